"""Tracks for stage 2: points inside moving objects, followed as long as the flow can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from tora_jax.conditioning.motion_maps import follow
from tora_jax.data.motion import GRID

MARGIN = 1 / 32  # of the shorter side: the least distance of a start from the edge of its object

PATCH = np.stack(np.meshgrid(np.arange(-2, 3), np.arange(-2, 3)), -1).reshape(1, -1, 2).astype(np.float32)
CHANGE = 20.0  # of 255: the largest mean change in a step, over the PATCH around a point, of one and the same thing

Maps = Float[np.ndarray, "_ h w 2"]
Found = tuple[Float[np.ndarray, "n t 2"], Bool[np.ndarray, "n t"]]


def inside_objects(
    rng: np.random.Generator,
    video: UInt8[np.ndarray, "t h w 3"],
    forward: Maps,
    backward: Maps,
    masks: Bool[np.ndarray, "_ h w"],
    starts: int,
    most: int,
) -> Found:
    """Follows points of moving objects through a clip's flow.

    At every `starts`-th frame, `most` points of a grid (32 pixels at 480p, as Tora's) inside the mask are drawn, with a
    probability proportional to the length of their way until they are lost. A point is lost where the flow back does
    not return it to its start (the usual bound, |forward + back|^2 < 0.01 (|forward|^2 + |back|^2) + 0.5), where it
    looks different after a step (something covers it), or where it leaves the picture.

    Args:
      forward: from each frame to the next, in pixels.
      backward: from the next frame back to each.
      masks: moving pixels of each frame but the last.

    Returns:
      tracks, (x, y) in 0..1 of the frame, and visible. Before its first frame a track waits at its start, and once lost
      it stays in place; there it is not visible.
    """
    frames, (height, width) = len(forward) + 1, masks.shape[1:]
    tracks, visible = np.zeros((0, frames, 2), np.float32), np.zeros((0, frames), bool)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) for frame in video]
    for first in range(0, len(forward), starts):
        points = _starts(masks[first])
        if not len(points):
            continue
        path, seen = follow(forward[first:], points)
        seen = _trusted(path, seen, grey[first:], backward[first:])
        path = _resting(path, seen)
        lengths = np.linalg.norm(np.diff(path, axis=1) * (width, height), axis=-1).sum(-1)
        count = min(most, np.count_nonzero(lengths))
        if not count:
            continue
        chosen = np.sort(rng.choice(len(points), count, replace=False, p=lengths / lengths.sum()))
        before = np.repeat(path[chosen, :1], first, 1), np.zeros((count, first), bool)
        tracks = np.concatenate([tracks, np.concatenate([before[0], path[chosen]], 1)])
        visible = np.concatenate([visible, np.concatenate([before[1], seen[chosen]], 1)])
    return tracks, visible


def _starts(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "n 2"]:
    """The points of the grid that are well inside the mask, and the innermost one of each of its pieces."""
    height, width = mask.shape
    step = max(round(GRID * min(height, width)), 1)
    depth = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    grid = np.zeros_like(mask)
    grid[step // 2 :: step, step // 2 :: step] = True
    grid &= depth > MARGIN * min(height, width)
    count, pieces = cv2.connectedComponents(mask.astype(np.uint8))
    for piece in range(1, count):
        grid.flat[np.where(pieces == piece, depth, 0).argmax()] = True
    y, x = np.nonzero(grid)
    return (np.stack([x, y], 1).astype(np.float32) + np.float32(0.5)) / np.float32([width, height])


def _trusted(
    path: Float[np.ndarray, "n t 2"],
    seen: Bool[np.ndarray, "n t"],
    grey: Sequence[Float[np.ndarray, "h w"]],
    backward: Maps,
) -> Bool[np.ndarray, "n t"]:
    """`seen`, where every step so far leads back to its start, and to a place that looks alike."""
    height, width = backward.shape[1:3]
    pixels = path * np.float32([width, height]) - np.float32(0.5)
    good = seen.copy()
    for j, back in enumerate(backward):
        forward, there = pixels[:, j + 1] - pixels[:, j], pixels[:, j + 1]
        back = _sample(back, there[:, None])[:, 0]
        bound = 0.01 * (np.square(forward).sum(-1) + np.square(back).sum(-1)) + 0.5
        change = np.abs(_sample(grey[j], pixels[:, j, None] + PATCH) - _sample(grey[j + 1], there[:, None] + PATCH))
        alike = change.mean(1) < CHANGE
        good[:, j + 1] &= good[:, j] & (np.square(forward + back).sum(-1) < bound) & alike
    return good


def _sample(image: Float[np.ndarray, "h w *c"], at: Float[np.ndarray, "n p 2"]) -> Float[np.ndarray, "n p *c"]:
    """Bilinear values at pixel positions (x, y); outside, those of the edge."""
    return cv2.remap(image, at[..., 0], at[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _resting(path: Float[np.ndarray, "n t 2"], seen: Bool[np.ndarray, "n t"]) -> Float[np.ndarray, "n t 2"]:
    """Tracks that stay at the place where they are seen last."""
    last = seen.sum(1) - 1  # seen at first and, once lost, never again
    at = np.minimum(np.arange(path.shape[1]), last[:, None])
    return np.take_along_axis(path, at[..., None], axis=1)


def to_all_frames(
    tracks: Float[np.ndarray, "n t 2"], visible: Bool[np.ndarray, "n t"], at: Int[np.ndarray, "t"]
) -> tuple[Float[np.ndarray, "n all 2"], Bool[np.ndarray, "n all"]]:
    """Tracks of some of a clip's frames -> tracks of all frames, linear between them.

    Args:
      at: the numbers of those frames, rising, the first and the last of the clip among them.

    Returns:
      the same for all frames; between two frames of `at` a track is visible if it is visible in both.
    """
    every = np.arange(at[-1] + 1)
    right = np.searchsorted(at, every)
    left = np.where(at[right] == every, right, right - 1)
    share = ((every - at[left]) / np.maximum(at[right] - at[left], 1)).astype(np.float32)[:, None]
    return (1 - share) * tracks[:, left] + share * tracks[:, right], visible[:, left] & visible[:, right]
