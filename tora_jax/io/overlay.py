"""Trajectories drawn over a video, to compare the asked path with the result."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np
from jaxtyping import Float, UInt8

FRACTION_BITS = 4  # OpenCV draws at sub-pixel positions given as fixed-point integers


def draw_tracks(
    video: UInt8[np.ndarray, "t h w 3"], tracks: Float[np.ndarray, "n _ 2"], start: int = 0
) -> UInt8[np.ndarray, "t h w 3"]:
    """Draws each track's path so far and a dot at its present point, each track in its own colour.

    Args:
      video: uint8 RGB; stays unchanged.
      tracks: (x, y) in 0..1 of the frame, one point for each frame of the whole video; pixel = x * width - 0.5.
      start: number of the first frame of `video` in the whole video.

    Returns:
      uint8 RGB, a copy with the drawing. At every size, lines are 1/180 of the shorter side wide, with a dark rim that
      keeps them readable on any colour.
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
