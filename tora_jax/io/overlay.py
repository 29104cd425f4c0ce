"""Trajectories drawn over a video, to compare what was asked for with what came out."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
from jaxtyping import Float, UInt8

FRACTION_BITS = 4  # OpenCV draws at sub-pixel positions given as fixed-point integers


def draw_tracks(
    video: UInt8[np.ndarray, "t h w 3"], tracks: Float[np.ndarray, "n _ 2"], start: int = 0
) -> UInt8[np.ndarray, "t h w 3"]:
    """Draws each track's path so far and a dot where it is now, each track in its own colour.

    Args:
      video: uint8 RGB; it is not changed.
      tracks: (x, y) in 0..1 of the frame, one point for each frame of the whole video; pixel = x * width - 0.5.
      start: which frame of the whole video the first one given is.

    Returns:
      uint8 RGB, a copy with the drawing. Lines are as wide at every size as 1/180 of the shorter side, with a
      dark rim that keeps them readable on a picture of any colour.
    """
    height, width = video.shape[1:3]
    side = min(height, width)
    line, dot, rim = max(side / 180, 1.0), max(side / 50, 2.5), max(side / 360, 1.0)
    pixels = np.asarray(tracks, np.float64) * (width, height) - 0.5
    fixed = np.round(pixels * 2**FRACTION_BITS).astype(np.int32)
    drawn = np.ascontiguousarray(video).copy()
    for t, frame in enumerate(drawn, start):
        for path, color in zip(fixed, _colors(len(fixed)), strict=True):
            _stroke(frame, path[: t + 1], (0, 0, 0), line + 2 * rim, dot + rim)
            _stroke(frame, path[: t + 1], color, line, dot)
    return drawn


def _colors(count: int) -> list[tuple[int, int, int]]:
    """Bright hues, far apart for neighbours: each turns the colour circle by the golden angle."""
    hues = [(0.02 + i * 0.381966) % 1 for i in range(count)]
    return [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, 1)) for hue in hues]


def _stroke(frame: np.ndarray, path: np.ndarray, color: tuple[int, int, int], line: float, dot: float) -> None:
    smooth = {"lineType": cv2.LINE_AA, "shift": FRACTION_BITS}
    if len(path) > 1:
        cv2.polylines(frame, [path.reshape(-1, 1, 2)], False, color, max(round(line), 1), **smooth)
    radius = round(dot * 2**FRACTION_BITS)
    cv2.circle(frame, tuple(map(int, path[-1])), radius, color, -1, **smooth)
