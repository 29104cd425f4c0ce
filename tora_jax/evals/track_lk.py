"""Tracks by OpenCV's pyramidal Lucas-Kanade, without weights. Lengths are shares of the frame's shorter side."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from tora_jax.evals.traj_error import Points, Tracks, Video, Visible

SIDE_RANGE = (256, 512)  # pixels that the shorter side is brought to
MAX_OBJECT_RADIUS = 0.125  # around a point: what belongs to its object lies inside
MAX_DISTANCE = 0.08  # from a point to what moves: a ring is around its own centre
SPOT_DEPTH = 0.03  # of the nearest part of the object, which tells its colour
WINDOW_MARGIN = 0.02  # around the object
MAX_STEP = 0.15  # of a point in a frame
STEP_GROWTH, MAX_FRAMES_OF_GROWTH = 0.03, 5  # what each frame without the point adds to its step
MIN_CHANGE = 24  # of 255: a pixel that differs so much from the still picture moves
MIN_CORRELATION = 0.5  # of the window with what is found
MAX_RETURN_ERROR = 1.0  # pixels at which the way forward and back must meet
MAX_MOVING_SHARE = 0.25  # of the picture: if more of it moves, the camera does
MAX_COLOUR_DIFFERENCE = 0.08  # within an object, of the shares of red, green and blue
MAX_SHADE_DIFFERENCE = 0.6  # within an object, of the light's logarithm
COLOUR_FLOOR = 0.01  # a colour with a smaller share of the object says little
HISTOGRAM_BINS = 16  # along each channel


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
    side = np.clip(size.min(), *SIDE_RANGE)
    scale = side / size.min()
    mask = _object_mask(video[0], background, point * size - 0.5)
    pictures = _only_the_object(video, background, mask)
    extent = np.abs(np.argwhere(mask)[:, ::-1] - (point * size - 0.5)).max() * scale
    half = int(np.ceil(extent + WINDOW_MARGIN * side))
    border = 2 * half + int((MAX_STEP + STEP_GROWTH * MAX_FRAMES_OF_GROWTH) * side) + 1
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
            reach = int((MAX_STEP + STEP_GROWTH * min(j - 1 - last, MAX_FRAMES_OF_GROWTH)) * side)
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
    ours = cv2.absdiff(frame, background).max(-1) > MIN_CHANGE
    if ours.mean() > MAX_MOVING_SHARE or not (ours & (distance <= MAX_DISTANCE)).any():  # the camera moves, or nothing
        ours[:] = True
    # The shares of red, green and blue are the same in light and shade.
    light = frame.sum(-1) + 1.0
    shares = frame / light[..., None]
    spot = ours & (distance <= distance[ours].min() + SPOT_DEPTH)
    ours &= np.abs(shares - np.median(shares[spot], axis=0)).max(-1) < MAX_COLOUR_DIFFERENCE
    ours &= np.abs(np.log(light / np.median(light[spot]))) < MAX_SHADE_DIFFERENCE
    ours &= distance <= MAX_OBJECT_RADIUS
    if not ours.any():  # two colours meet there
        return spot
    _, parts = cv2.connectedComponents(ours.astype(np.uint8))
    return parts == parts.flat[np.where(ours, distance, np.inf).argmin()]


def _only_the_object(video: Video, background: UInt8[np.ndarray, "h w 3"], mask: np.ndarray) -> list[np.ndarray]:
    """Grey frames times the likelihood of each pixel's colour to be the object's and not the background's."""

    def histogram(image: np.ndarray, where: np.ndarray) -> np.ndarray:
        counts = cv2.calcHist([image], [0, 1, 2], where.astype(np.uint8), [HISTOGRAM_BINS] * 3, [0, 256] * 3)
        for _ in range(3):  # smoothed along one axis after the other
            counts = np.ascontiguousarray(cv2.GaussianBlur(counts, (1, 3), 0).transpose(1, 2, 0))
        return counts / max(counts.sum(), 1)

    near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))) > 0  # its soft edges
    ours, others = histogram(video[0], mask), histogram(video[0], ~near) + histogram(background, ~near)
    likelihood = ours / (ours + others + COLOUR_FLOOR)
    pictures = []
    for frame in video:
        weight = likelihood[tuple(np.moveaxis(frame // (256 // HISTOGRAM_BINS), -1, 0))]
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
    return np.array([left + x, top + y]) + half - at if correlation >= MIN_CORRELATION else None


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
    good = (np.abs(back - start).max((1, 2)) < MAX_RETURN_ERROR) & (found[:, 0] > 0) & (returned[:, 0] > 0)
    return np.median((there - start)[good, 0], axis=0).astype(np.float64) if good.mean() >= 0.5 else None
