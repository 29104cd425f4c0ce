"""Motion in a clip: its strength, the camera's motion, and the pixels that move by themselves.

Frames a fixed time apart are compared. The homography that most of the picture follows is the camera's motion; pixels
that do not follow it belong to moving objects. Lengths are shares of the frame's shorter side, at every size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from jaxtyping import Bool, Float, UInt8

from tora_jax.checkpoints import release
from tora_jax.data import motion
from tora_jax.errors import UserError
from tora_jax.io.video import to_float
from tora_jax.models.raft import RAFT, STRIDE

Video = UInt8[np.ndarray, "t h w 3"]
# A clip -> displacements in pixels between consecutive frames, [t - 1, h, w, 2], (x, y).
Flow = Callable[[Video], Float[np.ndarray, "_ h w 2"]]

METHODS = ("dis", "raft")
PAIRS = 8  # of frames, that RAFT takes at once

SCORE_SIDE, SCORE_SECONDS = 320, 10 / 24  # of the flow score: Open-Sora's frames of 320x576, 10 apart

GRID = 8  # pixels between the points from which the camera's motion is found
INLIER = 1.0  # pixels; MAGSAC's scale of the noise
TRUSTED = 0.4  # of the points: the least share that follows the camera's motion where that motion counts
OBJECT = 1 / 128  # of the shorter side: the least difference of a moving pixel from the camera's motion in a step
RELATIVE = 0.1  # of the camera's motion, which the least difference grows by
BETTER, WINDOW = 1.0, 5  # of 255, by which one motion explains a pixel better than another; pixels
CLOSE = 1 / 16  # of the shorter side: the widest gaps in an object's outline that are closed
SPECK = 1 / 1000  # of the frame: smaller pieces of a mask are noise
RADIUS = 0.4  # mean distance of a pixel from the centre, for comparing a zoom with a pan


def make_flow(method: str, weights: str | Path | None = None) -> Flow:
    """The function that finds the flow between a clip's frames.

    Args:
      method: "dis", OpenCV's, on the CPU; or "raft", for accelerators.
      weights: for "raft", a folder that `python -m convert_weights raft` wrote.

    Raises:
      UserError: another method, or the weights are missing.
    """
    if method == "dis":
        return lambda video: motion.dense_flow(video)[1:]
    if method != "raft":
        raise UserError(f"flow method {method!r}; choose one of {', '.join(METHODS)}")
    if not weights:
        raise UserError("flow method 'raft' needs weights; convert torchvision's with `python -m convert_weights raft`")
    return raft_flow(*release.load_model(weights, "raft", RAFT))


def raft_flow(model: RAFT, params: Mapping[str, Any]) -> Flow:
    """`make_flow` with RAFT and its parameters."""
    smallest = STRIDE * 2 ** (model.corr_levels - 1)
    run = jax.jit(lambda first, second: model.apply({"params": params}, first, second))

    def find(video: Video) -> Float[np.ndarray, "_ h w 2"]:
        height, width = video.shape[1:3]
        below, right = (max(-(-side // STRIDE) * STRIDE, smallest) - side for side in (height, width))
        frames = to_float(np.pad(video, ((0, 0), (0, below), (0, right), (0, 0)), mode="edge"))
        found = [np.zeros((0, height, width, 2), np.float32)]
        for start in range(0, len(video) - 1, PAIRS):
            # The last batch is filled up, so that one compiled program serves all.
            first = np.minimum(np.arange(start, start + PAIRS), len(video) - 2)
            flow = np.asarray(run(frames[first], frames[first + 1]))
            found.append(flow[: len(video) - 1 - start, :height, :width])
        return np.concatenate(found)

    return find


def flow_score(flow: Float[np.ndarray, "n h w 2"], seconds: float) -> float:
    """Mean length of the displacements, in pixels of a frame whose shorter side is 320, in 10 frames at 24 a second.

    This is the scale of the motion scores in Open-Sora's captions: 5 is calm, 20 is fast.

    Args:
      flow: in pixels, at any size.
      seconds: between two frames.
    """
    if not len(flow):
        return 0.0
    return float(_length(flow).mean() * SCORE_SIDE / min(flow.shape[1:3]) * SCORE_SECONDS / seconds)


@dataclasses.dataclass(frozen=True)
class Motion:
    """The motion in a clip.

    Attributes:
      camera: "static", or the camera's strongest motion: "pan left", "pan right", "tilt up", "tilt down",
        "zoom in", "zoom out", "roll" or "shake".
      pan, tilt: of the camera, to the right and up; shorter sides a second.
      zoom: growth a second, as a logarithm; in is positive.
      roll: radians a second.
      shake: length of the camera's way beyond the distance that it covers; shorter sides a second.
      foreground: share of pixels that move by themselves, mean over the pairs of frames.
      masks: bool [n, h, w], these pixels in the first frame of each pair.
    """

    camera: str
    pan: float
    tilt: float
    zoom: float
    roll: float
    shake: float
    foreground: float
    masks: Bool[np.ndarray, "n h w"]


def analyse(video: Video, flow: Float[np.ndarray, "_ h w 2"], seconds: float, static: float) -> Motion:
    """Camera and objects, from frames and the flow between them.

    Args:
      video: frames that are `seconds` apart.
      flow: in pixels, see `make_flow`.
      static: shorter sides a second; a slower camera counts as static.
    """
    height, width = flow.shape[1:3]
    side = min(height, width)
    found = [camera_motion(one) for one in flow]
    homographies = [homography for homography, _ in found]
    masks = object_masks(video, flow, homographies)
    moves = np.array([_parameters(one, height, width) for one in homographies]).reshape(-1, 4)
    # Something that fills the picture hides the camera's motion for a while.
    trusted = np.array([share for _, share in found]) >= TRUSTED
    moves = moves[trusted] if trusted.any() else moves
    span = max(len(moves), 1) * seconds
    x, y, zoom, roll = moves.sum(0) / span
    x, y, way = x / side, y / side, np.hypot(*moves[:, :2].T).sum() / span / side
    shake = way - np.hypot(x, y)
    # The camera goes where the picture comes from.
    sizes = {
        "pan left" if x > 0 else "pan right": abs(x),
        "tilt up" if y > 0 else "tilt down": abs(y),
        "zoom in" if zoom > 0 else "zoom out": abs(zoom) * RADIUS,
        "roll": abs(roll) * RADIUS,
        "shake": shake,
    }
    strongest = max(sizes, key=sizes.get)
    camera = strongest if sizes[strongest] > static else "static"
    return Motion(
        camera, *(float(v) for v in (-x, y, zoom, roll, shake)), float(masks.mean()) if len(flow) else 0.0, masks
    )


def camera_motion(flow: Float[np.ndarray, "h w 2"]) -> tuple[Float[np.ndarray, "3 3"], float]:
    """The homography that most of the picture follows, by MAGSAC, and the share that does.

    The identity and 0 where there is none.
    """
    height, width = flow.shape[:2]
    y, x = (grid.reshape(-1) for grid in np.mgrid[GRID // 2 : height : GRID, GRID // 2 : width : GRID])
    start = np.stack([x, y], 1).astype(np.float32)
    found = None
    if len(start) >= 4:
        found, inside = cv2.findHomography(start, start + flow[y, x], cv2.USAC_MAGSAC, INLIER)
    return (np.eye(3), 0.0) if found is None else (found, float(inside.mean()))


@functools.lru_cache(maxsize=4)
def _pixels(height: int, width: int) -> Float[np.ndarray, "h w 2"]:
    return np.stack(np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)), -1)


def camera_flow(homography: Float[np.ndarray, "3 3"], height: int, width: int) -> Float[np.ndarray, "h w 2"]:
    """The displacement in pixels that a homography gives each pixel."""
    pixels = _pixels(height, width)
    return cv2.perspectiveTransform(pixels, homography) - pixels


def object_masks(
    video: Video, flow: Float[np.ndarray, "_ h w 2"], homographies: Sequence[Float[np.ndarray, "3 3"]]
) -> Bool[np.ndarray, "_ h w"]:
    """Pixels of each frame but the last that do not move with the camera.

    Flow also moves the background around an object, which the object covers or uncovers. So pixels are taken out again
    that the camera's motion finds, better than the flow does, in the frame before or in the next one; and so are pixels
    that the camera moves out of the picture.
    """
    height, width = flow.shape[1:3]
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in video]
    masks = np.zeros(flow.shape[:3], bool)
    for j, (move, homography) in enumerate(zip(flow, homographies, strict=True)):
        expected = camera_flow(homography, height, width)
        bound = OBJECT * min(height, width) + RELATIVE * _length(expected)
        mask = (_length(move - expected) > bound) & ~_leaves(expected)
        if not mask.any():
            continue
        by_camera = _mismatch(grey[j], grey[j + 1], expected)
        if j:
            back = camera_flow(np.linalg.inv(homographies[j - 1]), height, width)
            before = np.where(_leaves(back), np.inf, _mismatch(grey[j], grey[j - 1], back))
            by_camera = np.minimum(by_camera, before)
        sure = mask & (by_camera > _mismatch(grey[j], grey[j + 1], move) + BETTER)
        mask = (_filled(sure) & mask).astype(np.uint8)
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask)
        large = stats[:, cv2.CC_STAT_AREA] >= SPECK * height * width
        large[0] = False
        masks[j] = large[pieces]
    if len(masks) > 1 and masks[1].any():
        # Before the first frame there is none: pixels that move in it must move on in the second.
        moved = cv2.remap(masks[1].astype(np.float32), _pixels(height, width) + flow[0], None, cv2.INTER_LINEAR)
        masks[0] &= moved > 0.5
    return masks


def _length(vectors: Float[np.ndarray, "*s 2"]) -> Float[np.ndarray, "*s"]:
    """np.linalg.norm over a last axis of two numbers, in a tenth of its time."""
    return np.sqrt(np.square(vectors[..., 0]) + np.square(vectors[..., 1]))


def _filled(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    size = max(round(CLOSE * min(mask.shape)), 1)
    closed = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((size, size), np.uint8))
    outlines, _ = cv2.findContours(closed, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(closed, outlines, -1, 1, cv2.FILLED) > 0


def _leaves(move: Float[np.ndarray, "h w 2"]) -> Bool[np.ndarray, "h w"]:
    height, width = move.shape[:2]
    x, y = np.moveaxis(_pixels(height, width) + move, -1, 0)
    return (x < 0) | (x > width - 1) | (y < 0) | (y > height - 1)


def _mismatch(
    first: Float[np.ndarray, "h w"], second: Float[np.ndarray, "h w"], move: Float[np.ndarray, "h w 2"]
) -> Float[np.ndarray, "h w"]:
    """Difference between a pixel and the place that it moves to, on the 0..255 scale, mean of its neighbourhood."""
    moved = cv2.remap(second, _pixels(*first.shape) + move, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.blur(np.abs(first - moved), (WINDOW, WINDOW))


def _parameters(homography: Float[np.ndarray, "3 3"], height: int, width: int) -> tuple[float, float, float, float]:
    """Shift of the picture's centre in pixels, logarithm of the growth there, and turn in radians."""
    centre = np.array([(width - 1) / 2, (height - 1) / 2, 1])
    u, v, w = homography @ centre
    # Derivative of (u / w, v / w) at the centre.
    jacobian = (homography[:2, :2] - np.outer([u / w, v / w], homography[2, :2])) / w
    growth = np.log(max(abs(np.linalg.det(jacobian)), 1e-6)) / 2
    turn = np.arctan2(jacobian[1, 0] - jacobian[0, 1], jacobian[0, 0] + jacobian[1, 1])
    return u / w - centre[0], v / w - centre[1], growth, turn
