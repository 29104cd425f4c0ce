"""Metrics of sprites that need no tracker and no network: where an object is, its colour and its shape.

A pixel of a sprites clip is a mixture of an object's colour and of the background, whose tone is one colour made
lighter and darker. Without that tone, what is left of a pixel's colour is the object's share of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float, UInt8

from tora_jax.data.sprites.shapes import COLOURS, EXTENT, SHAPES, shape_mask

Video = UInt8[np.ndarray, "t h w 3"]

EDGE_SHARES = (0.25, 0.6)  # of an object's full colour: under the first a pixel is background, over the second object
MIN_STRENGTH = 0.3  # of the named colour: what is weaker everywhere is no object
MIN_SIDE = 0.03  # of the frame's width: the side of the smallest object's area
PATH_DEVIATION = 0.07  # of the frame's width: how far around a path the object on it is looked for (a deviation)
WINDOW_SIDE = 0.36  # of the frame's width: the window around an object
WINDOW_CELLS = 64  # along a side of the window
SHAPE_WIDTHS = np.geomspace(0.08, 0.29, 20)  # of the shapes that a mask is compared with
MASK_BLUR = 1.5  # cells: a deviation, of the blur of a mask


def centroid(
    video: Video, colour: tuple[int, int, int], near: Float[np.ndarray, "t 2"] | None = None
) -> tuple[Float[np.ndarray, "t 2"], Bool[np.ndarray, "t"]]:
    """The place of the object of a colour: the centre of mass of the largest connected piece of that colour.

    Args:
      colour: RGB, 0..255.
      near: take the piece closest to this point, (x, y) in 0..1, in place of the largest.

    Returns:
      (x, y) in 0..1 for each frame, and whether there is such an object; where there is none, the place is that of the
      nearest frames (linear between two), and the middle of the frame in a video without it.
    """
    return _centres(_pieces(_shares(video, colour), near))


def path_error(video: Video, colours: Sequence[str], tracks: Float[np.ndarray, "n t 2"]) -> dict[str, float]:
    """The distance of objects from their given paths.

    Nothing tells a model which of several objects takes which path, so the better assignment counts.

    Args:
      colours: names of `COLOURS`, one for each path.
      tracks: the given paths, (x, y) in 0..1 of the frame.

    Returns:
      error: mean distance over objects and frames, as a share of the frame's width. An object that is not found
        counts with the place that `centroid` gives it.
      found: the share of frames in which the objects are found.
    """
    height, width = video.shape[1:3]
    places, found = zip(*(centroid(video, COLOURS[colour]) for colour in colours), strict=True)
    off = (np.stack(places)[:, None] - tracks) * (1, height / width)
    errors = np.linalg.norm(off, axis=-1).mean(-1)  # object x path
    count = range(len(tracks))
    best = min(
        np.mean([errors[i, j] for i, j in zip(count, order, strict=True)]) for order in itertools.permutations(count)
    )
    return {"error": float(best), "found": float(np.mean(found))}


def name_colour(video: Video, path: Float[np.ndarray, "t 2"]) -> str | None:
    """Which colour of `COLOURS` the object on a path has; None where nothing there has any.

    Each pixel votes for the colour that it is most like, the more the stronger it is and the nearer to the path.
    """
    shares = np.stack([_shares(video, colour) for colour in COLOURS.values()])
    height, width = video.shape[1:3]
    y, x = np.mgrid[:height, :width]
    at = np.asarray(path, np.float64) * (width, height) - 0.5
    square = (x - at[:, 0, None, None]) ** 2 + (y - at[:, 1, None, None]) ** 2
    weight = np.exp(-0.5 * square / (PATH_DEVIATION * width) ** 2)
    best = shares.max(0) * weight
    votes = np.array([best[winner].sum() for winner in shares.argmax(0) == np.arange(len(shares))[:, None, None, None]])
    enough = MIN_STRENGTH * (MIN_SIDE * width) ** 2 * len(video)
    return list(COLOURS)[votes.argmax()] if votes.max() >= enough else None


def name_shape(video: Video, path: Float[np.ndarray, "t 2"], colour: str) -> str | None:
    """Which of `SHAPES` the object of a colour on a path has; None where there is no such object.

    The object only slides, so its masks of all frames, laid on top of each other, make one that is sharper than each.
    It is correlated with all shapes in all sizes.
    """
    shares = _shares(video, COLOURS[colour])
    pieces = _pieces(shares, path)
    centres, found = _centres(pieces)
    if not found.any():
        return None
    pieces = shares * (pieces > 0)
    height, width = video.shape[1:3]
    step = WINDOW_SIDE * width / WINDOW_CELLS
    mask = np.zeros((WINDOW_CELLS, WINDOW_CELLS), np.float32)
    for piece, centre in zip(pieces[found], centres[found], strict=True):
        corner = centre * (width, height) - 0.5 - step * (WINDOW_CELLS - 1) / 2
        matrix = np.array([[step, 0, corner[0]], [0, step, corner[1]]])
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        mask += cv2.warpAffine(piece.astype(np.float32), matrix, (WINDOW_CELLS, WINDOW_CELLS), flags=flags)
    mask -= mask.mean()
    return SHAPES[(_shapes() @ mask.ravel()).reshape(len(SHAPES), -1).max(-1).argmax()]


def _shares(video: Video, colour: tuple[int, int, int]) -> Float[np.ndarray, "t h w"]:
    """About 1 where a pixel has a colour in full, 0 where it has another or that of the background."""
    pixels, colour = video.astype(np.float32), np.asarray(colour, np.float32)
    light = pixels.mean(-1, keepdims=True)
    tone = np.median((pixels - light) / (light + 1), axis=(0, 1, 2))
    pixels, colour = pixels - light * (1 + tone), colour - colour.mean() * (1 + tone)
    along = pixels @ colour / np.square(colour).sum()
    across = np.linalg.norm(pixels - along[..., None] * colour, axis=-1) / np.linalg.norm(colour)
    return np.clip(along - across, 0, 1)


def _pieces(
    shares: Float[np.ndarray, "t h w"], near: Float[np.ndarray, "t 2"] | None = None
) -> Float[np.ndarray, "t h w"]:
    """Of each frame one connected piece, 0..1 with soft edges; all 0 where there is none."""
    height, width = shares.shape[1:]
    smallest = (MIN_SIDE * width) ** 2
    full = np.quantile(shares, 1 - smallest / (height * width))
    weights = np.clip((shares / max(full, MIN_STRENGTH) - EDGE_SHARES[0]) / (EDGE_SHARES[1] - EDGE_SHARES[0]), 0, 1)
    pieces = np.zeros_like(weights)
    for j, weight in enumerate(weights):
        _, parts, stats, centres = cv2.connectedComponentsWithStats((weight > 0.5).astype(np.uint8))
        large = np.flatnonzero(stats[:, cv2.CC_STAT_AREA] >= smallest)
        large = large[large > 0]
        if not len(large):
            continue
        if near is None:
            chosen = large[stats[large, cv2.CC_STAT_AREA].argmax()]
        else:
            chosen = large[np.linalg.norm(centres[large] - (near[j] * (width, height) - 0.5), axis=1).argmin()]
        around = cv2.dilate((parts == chosen).astype(np.uint8), np.ones((5, 5), np.uint8))
        pieces[j] = weight * around * np.isin(parts, (0, chosen))
    return pieces


def _centres(pieces: Float[np.ndarray, "t h w"]) -> tuple[Float[np.ndarray, "t 2"], Bool[np.ndarray, "t"]]:
    height, width = pieces.shape[1:]
    mass = pieces.sum((1, 2))
    found = mass > 0
    if not found.any():
        return np.full((len(pieces), 2), 0.5), found
    x = pieces.sum(1) @ (np.arange(width) + 0.5) / width
    y = pieces.sum(2) @ (np.arange(height) + 0.5) / height
    frames = np.arange(len(pieces))
    return np.stack([np.interp(frames, frames[found], (v[found] / mass[found])) for v in (x, y)], axis=1), found


@functools.cache
def _shapes() -> Float[np.ndarray, "shapes cells"]:
    """All shapes, in all SHAPE_WIDTHS, in the window of a mask; of mean 0 and length 1."""
    rows = []
    for shape, width in itertools.product(SHAPES, SHAPE_WIDTHS):
        drawn = shape_mask(shape)
        side = len(drawn)
        scale = width / WINDOW_SIDE * WINDOW_CELLS / EXTENT
        small = cv2.GaussianBlur(drawn, (0, 0), max(0.5 / scale, 1e-3))  # each cell sees all that it covers
        shift = (WINDOW_CELLS - 1) / 2 - scale * (side - 1) / 2
        matrix = np.array([[scale, 0, shift], [0, scale, shift]])
        cells = cv2.GaussianBlur(cv2.warpAffine(small, matrix, (WINDOW_CELLS, WINDOW_CELLS)), (0, 0), MASK_BLUR)
        rows.append(cells.ravel() - cells.mean())
    return np.stack([row / np.linalg.norm(row) for row in rows])
