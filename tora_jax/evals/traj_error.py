"""TrajError: how far the points of a generated video are from the paths that they were to follow, in pixels.

A tracker takes a video and points of its first frame, and says where they are in every frame. Three stand behind one
signature: OpenCV's pyramidal Lucas-Kanade (no weights), RAFT's flow chained from frame to frame, and TAPNext.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Bool, Float, UInt8

from tora_jax.checkpoints import release
from tora_jax.conditioning import motion_maps
from tora_jax.errors import UserError
from tora_jax.io.video import to_float
from tora_jax.models.raft import RAFT, STRIDE

Video = UInt8[np.ndarray, "t h w 3"]
Points = Float[np.ndarray, "n 2"]
Tracks = Float[np.ndarray, "n t 2"]
Visible = Bool[np.ndarray, "n t"]
# (video, points in 0..1 of its first frame) -> tracks in 0..1, starting there, and whether each point is seen; the
# position of a point that is not is the last one believed in.
Tracker = Callable[[Video, Points], tuple[Tracks, Visible]]

TRACKERS = ("lk", "raft", "tapnext")
WITHIN = (1, 2, 4, 8)  # pixels


def traj_error(given: Tracks, tracked: Tracks, visible: Visible, size: tuple[int, int]) -> dict[str, float]:
    """Compares the paths that were given with the tracks that a tracker found from their start points.

    Args:
      given, tracked: (x, y) in 0..1 of the frame.
      visible: of the tracker.
      size: (width, height) in whose pixels the error counts; (512, 512) in the paper.

    Returns:
      l1: the mean of |dx| + |dy| over trajectories and frames (the first one too): the paper's TrajError.
      l1_visible: the same over visible points; NaN where there are none.
      l2: the mean distance.
      endpoint: the mean distance in the last frame.
      within_1, within_2, within_4, within_8: the share of points at most so many pixels away.
      visible: the share of visible points.
    """
    off = np.abs(tracked.astype(np.float64) - given) * size
    l1, distance = off.sum(-1), np.linalg.norm(off, axis=-1)
    return {
        "l1": float(l1.mean()),
        "l1_visible": float(l1[visible].mean()) if visible.any() else float("nan"),
        "l2": float(distance.mean()),
        "endpoint": float(distance[:, -1].mean()),
        **{f"within_{limit}": float((distance <= limit).mean()) for limit in WITHIN},
        "visible": float(visible.mean()),
    }


def make_tracker(name: str, weights: str | Path = "") -> Tracker:
    """A tracker by name.

    Args:
      name: "lk", "raft" or "tapnext".
      weights: of "raft" a folder that `python -m convert_weights raft` wrote, of "tapnext" the published file.

    Raises:
      UserError: there is no such tracker, or its weights are missing or broken.
    """
    if name not in TRACKERS:
        raise UserError(f"tracker {name!r}: there are {', '.join(TRACKERS)}")
    if name == "lk":
        return track_lk
    if not weights:
        raise UserError(f"the tracker {name} needs weights; lk does without")
    if name == "tapnext":
        return tapnext_tracker(weights)
    fields = release.part_config(weights, "raft")
    return raft_tracker(release.load_part(weights, "raft"), **fields)


# ----------------------------------------------------------------------------------------------------------
# Lucas-Kanade. Lengths are shares of the frame's shorter side.
# ----------------------------------------------------------------------------------------------------------

SIDES = (256, 512)  # the shorter side is brought into this range of pixels
OBJECT = 0.125  # what belongs to a point lies at most so far from it
NEAR = 0.08  # and something that moves belongs to it from here: a ring is around its own centre
SPOT = 0.03  # so much around the nearest part of it tells its colour
MARGIN = 0.02  # of a window around the object
SEARCH, GROWTH = 0.15, 0.03  # how far a point may go in a frame; what each frame without it adds, up to FRAMES of them
FRAMES = 5
CHANGED = 24  # of 255: a pixel that differs so much from the still picture moves
CORRELATION = 0.5  # with what is looked for, at least
RETURN = 1.0  # pixels at which the way forward and back must meet
MOST = 0.25  # of the picture: if more of it moves, the camera does
ONE_COLOUR, SHADE = 0.08, 0.6  # within an object: of the shares of red, green and blue; of the light's logarithm
FEW = 0.01  # a colour with a smaller share of the object says little
BINS = 16  # of a colour histogram, along each channel


def track_lk(video: Video, points: Points) -> tuple[Tracks, Visible]:
    """Pyramidal Lucas-Kanade with a forward-backward check, without weights.

    Lucas-Kanade on its own loses a plain object on a textured background: the window around a point sees more of the
    background than of the object. So each point gets a picture of its own, in which what has the colours of the object
    at the point stays and the rest is black, and a window that holds the whole object. A template match finds
    the object again after a wide step or behind an occluder; Lucas-Kanade makes it exact, from the first frame where
    possible (then nothing drifts), else from the last one in which the point was seen.
    """
    tracks, visible = np.repeat(points[:, None], len(video), 1).astype(np.float32), np.zeros((len(points), len(video)))
    background = np.median(video[:: max(len(video) // 32, 1)], axis=0).astype(np.uint8)
    for n, point in enumerate(points):
        if ((point >= 0) & (point <= 1)).all():
            tracks[n], visible[n] = _track_object(video, background, np.asarray(point, np.float64))
    return tracks, visible.astype(bool)


def _track_object(video: Video, background: UInt8[np.ndarray, "h w 3"], point: Float[np.ndarray, "2"]):
    size = np.array(video.shape[2:0:-1])
    side = np.clip(size.min(), *SIDES)
    scale = side / size.min()
    mask = _object_mask(video[0], background, point * size - 0.5)
    pictures = _only_the_object(video, background, mask)
    extent = np.abs(np.argwhere(mask)[:, ::-1] - (point * size - 0.5)).max() * scale
    half = int(np.ceil(extent + MARGIN * side))
    border = 2 * half + int((SEARCH + GROWTH * FRAMES) * side) + 1
    sampling = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    pictures = [
        cv2.copyMakeBorder(cv2.resize(picture, None, fx=scale, fy=scale, interpolation=sampling), *[border] * 4, 0)
        for picture in pictures
    ]
    grid = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), -1).reshape(-1, 2) * half / 4
    at = {0: point * size * scale - 0.5 + border}  # frame -> where it was seen
    last = 0
    for j in range(1, len(pictures)):
        for reference in dict.fromkeys((0, last)):
            near = at[last] + (at[last] - at.get(last - 1, at[last])) * (last == j - 1)  # it keeps its speed, if known
            reach = int((SEARCH + GROWTH * min(j - 1 - last, FRAMES)) * side)
            step = _match(pictures[reference], pictures[j], at[reference], near, half, reach)
            step = None if step is None else _refine(pictures[reference], pictures[j], at[reference] + grid, step, half)
            if step is not None:
                at[j], last = at[reference] + step, j
                break
    seen = np.array([j in at for j in range(len(pictures))])
    known = np.maximum.accumulate(np.where(seen, np.arange(len(seen)), 0))
    track = (np.stack([at[j] for j in known]) - border + 0.5) / (size * scale)
    return track, seen & ((track >= 0) & (track <= 1)).all(-1)


def _object_mask(frame: UInt8[np.ndarray, "h w 3"], background: UInt8[np.ndarray, "h w 3"], pixel) -> np.ndarray:
    """The pixels of a frame that belong to the object at a pixel: one piece of one colour, where something moves."""
    height, width = frame.shape[:2]
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(x - pixel[0], y - pixel[1]) / min(height, width)
    ours = cv2.absdiff(frame, background).max(-1) > CHANGED
    if ours.mean() > MOST or not (ours & (distance <= NEAR)).any():  # the camera moves, or nothing
        ours[:] = True
    # The shares of red, green and blue are the same in light and shade.
    light = frame.sum(-1) + 1.0
    shares = frame / light[..., None]
    spot = ours & (distance <= distance[ours].min() + SPOT)
    ours &= np.abs(shares - np.median(shares[spot], axis=0)).max(-1) < ONE_COLOUR
    ours &= np.abs(np.log(light / np.median(light[spot]))) < SHADE
    ours &= distance <= OBJECT
    if not ours.any():  # two colours meet there
        return spot
    _, parts = cv2.connectedComponents(ours.astype(np.uint8))
    return parts == parts.flat[np.where(ours, distance, np.inf).argmin()]


def _only_the_object(video: Video, background: UInt8[np.ndarray, "h w 3"], mask: np.ndarray) -> list[np.ndarray]:
    """Grey frames times the likelihood of each pixel's colour to be the object's and not the background's."""

    def histogram(image: np.ndarray, where: np.ndarray) -> np.ndarray:
        counts = cv2.calcHist([image], [0, 1, 2], where.astype(np.uint8), [BINS] * 3, [0, 256] * 3)
        for _ in range(3):  # smoothed along one axis after the other
            counts = np.ascontiguousarray(cv2.GaussianBlur(counts, (1, 3), 0).transpose(1, 2, 0))
        return counts / max(counts.sum(), 1)

    near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0  # its soft edges
    ours, others = histogram(video[0], mask), histogram(video[0], ~near) + histogram(background, ~near)
    likelihood = ours / (ours + others + FEW)
    pictures = []
    for frame in video:
        weight = likelihood[tuple(np.moveaxis(frame // (256 // BINS), -1, 0))]
        grey = 64 + 0.75 * cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)  # dark objects count too
        pictures.append(np.round(weight * grey).astype(np.uint8))
    return pictures


def _match(first: np.ndarray, second: np.ndarray, at: np.ndarray, near: np.ndarray, half: int, reach: int):
    """The whole-pixel step that takes the window at `at` to the one most like it around `near`, or None."""
    at, near = np.round(at).astype(int), np.round(near).astype(int)
    window = first[at[1] - half : at[1] + half + 1, at[0] - half : at[0] + half + 1]
    left, top = np.maximum(near - half - reach, 0)
    searched = second[top : near[1] + half + reach + 1, left : near[0] + half + reach + 1]
    if min(np.subtract(searched.shape, window.shape)) < 0 or not window.any() or not searched.any():
        return None
    _, correlation, _, (x, y) = cv2.minMaxLoc(cv2.matchTemplate(searched, window, cv2.TM_CCOEFF_NORMED))
    return np.array([left + x, top + y]) + half - at if correlation >= CORRELATION else None


def _refine(first: np.ndarray, second: np.ndarray, points: np.ndarray, step: np.ndarray, half: int):
    """The median step of points that Lucas-Kanade brings forth and back again; None where most do not return."""
    options = {
        "winSize": (2 * half + 1, 2 * half + 1),
        "maxLevel": 2,
        "criteria": (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 0.003),
        "flags": cv2.OPTFLOW_USE_INITIAL_FLOW,
    }
    start, step = points.astype(np.float32)[:, None], step.astype(np.float32)
    there, found, _ = cv2.calcOpticalFlowPyrLK(first, second, start, start + step, **options)
    back, returned, _ = cv2.calcOpticalFlowPyrLK(second, first, there, there - step, **options)
    good = (np.abs(back - start).max((1, 2)) < RETURN) & (found[:, 0] > 0) & (returned[:, 0] > 0)
    return np.median((there - start)[good, 0], axis=0).astype(np.float64) if good.mean() >= 0.5 else None


# ----------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------


def raft_tracker(params: Mapping[str, Any], **fields: Any) -> Tracker:
    """Points carried by RAFT's flow from each frame to the next.

    A point is lost for good where the flow back does not return it to about where it came from (the usual bound,
    |forward + back|^2 < 0.01 (|forward|^2 + |back|^2) + 0.5), because what covers it carries it along.

    Args:
      params: of `RAFT`, such as the converter gives (`python -m convert_weights raft`).
      fields: of `RAFT`, where they are not the defaults.
    """
    model = RAFT(**fields)

    @jax.jit
    def both_ways(params, first, second):
        there, back = jnp.concatenate([first, second]), jnp.concatenate([second, first])
        return model.apply({"params": params}, there, back)

    def track(video: Video, points: Points) -> tuple[Tracks, Visible]:
        height, width = video.shape[1:3]
        # It sees an eighth of each side, and small videos would leave it too little.
        scale = max(SIDES[0] / min(height, width), 1)
        height, width = (round(side * scale / STRIDE) * STRIDE for side in (height, width))
        resized = [cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in video]
        frames = [to_float(frame[None]) for frame in resized]
        flows = [np.asarray(both_ways(params, *pair)) for pair in itertools.pairwise(frames)]
        flows = np.stack(flows) if flows else np.zeros((0, 2, height, width, 2), np.float32)
        tracks, visible = motion_maps.follow(flows[:, 0], points)
        pixels = tracks * np.float32([width, height]) - np.float32(0.5)
        for j, (_, back) in enumerate(flows):
            forward = pixels[:, j + 1] - pixels[:, j]
            back = cv2.remap(back, *pixels[None, :, j + 1].transpose(2, 0, 1), cv2.INTER_LINEAR)[0]
            bound = 0.01 * (np.square(forward).sum(-1) + np.square(back).sum(-1)) + 0.5
            visible[:, j + 1] &= visible[:, j] & (np.square(forward + back).sum(-1) < bound)
        return tracks, visible

    return track


def _tapnet() -> tuple[ModuleType, ModuleType]:
    """The modules of tapnet that hold TAPNext, imported where its two dependencies have the names that it expects.

    It wants recurrentgemma's modules under `_src`, where no released version has them, and a module of gemma that only
    an ablation uses.
    """
    inside = ("", ".common", ".jax", ".jax.array_typing", ".jax.modules", ".jax.scan")
    missing = {f"recurrentgemma._src{name}": importlib.import_module(f"recurrentgemma{name}") for name in inside}
    missing |= {name: ModuleType(name) for name in ("gemma", "gemma.modules")}
    added = {name: module for name, module in missing.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        return tuple(importlib.import_module(f"tapnet.models.{name}") for name in ("ssm_vit", "video_ssm_tracker"))
    finally:
        for name in added:
            del sys.modules[name]


TAPNEXT_SIDE = 256  # pixels; its position embedding has this size


def tapnext_tracker(weights: str | Path) -> Tracker:
    """TAPNext (arXiv 2504.05579), run frame by frame with the `tapnet` package.

    Args:
      weights: the published `tapnext_ckpt.npz` or `bootstapnext_ckpt.npz`.

    Raises:
      UserError: tapnet is not installed, or there is no such file.
    """
    try:
        ssm_vit, video_ssm_tracker = _tapnet()
    except ImportError as error:
        # Without their dependencies, of which one wants an older absl-py than we do.
        packages = "git+https://github.com/google-deepmind/tapnet recurrentgemma chex toolz 'typeguard<3'"
        raise UserError(f"the tracker TAPNext needs tapnet ({error}); pip install --no-deps {packages}") from None
    try:
        with np.load(weights) as stored:
            params = traverse_util.unflatten_dict({key: stored[key] for key in stored.files}, sep="/")
    except (OSError, ValueError) as error:
        raise UserError(f"{weights}: no weights of TAPNext (an .npz file): {error}") from None
    backbone = ssm_vit.Model(
        variant="B/8", patch_size=(1, 8, 8), posemb="learn", posemb_full="sincos2d", rep_size=True, lru_width=768
    )
    model = video_ssm_tracker.TAPNextTracker(backbone)

    @jax.jit
    def step(params, frame, **state):
        result = model.apply({"params": params}, frame, method="forward_step", **state)
        return result.tracks, result.visible_logits, result.state

    def track(video: Video, points: Points) -> tuple[Tracks, Visible]:
        side = TAPNEXT_SIDE
        # It counts (t, y, x) from the frame's corner: pixel i is centred at i + 0.5.
        queries = np.insert(points[:, ::-1] * side, 0, 0, axis=1).astype(np.float32)[None, :, None]
        state = {"query_points": jnp.asarray(queries), "query_padding": jnp.ones(queries.shape[:-1])}
        tracks, visible = [], []
        for frame in video:
            frame = to_float(cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA))
            at, logits, new = step(params, jnp.asarray(frame)[None, None], **state)
            state = {"state": new}
            tracks.append(np.asarray(at[0, :, 0, ::-1]) / side)
            visible.append(np.asarray(logits[0, :, 0, 0]) > 0)
        tracks[0] = points.astype(np.float32)
        return np.stack(tracks, axis=1).astype(np.float32), np.stack(visible, axis=1)

    return track
