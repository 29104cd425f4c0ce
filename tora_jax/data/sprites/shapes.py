"""What sprites look like: colours, shapes, fills, and the backgrounds behind them."""

from __future__ import annotations

import functools

import cv2
import numpy as np
from jaxtyping import Float

COLOURS = {
    "red": (214, 40, 40),
    "yellow": (238, 205, 45),
    "green": (40, 165, 70),
    "blue": (45, 85, 225),
    "purple": (150, 55, 190),
    "cyan": (45, 200, 210),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("disc", "square", "triangle", "star", "ring", "cross", "heart", *DIGITS)
FILLS = ("plain", "striped", "spotted")
BACKGROUNDS = {"grey": (122, 122, 122), "brown": (138, 112, 88), "green": (98, 128, 100), "blue": (96, 114, 142)}
TEXTURES = ("waves", "stripes", "checks", "clouds")

CANVAS, EXTENT = 320, 240  # of a shape before it is scaled: pixels a side, and of its larger side


@functools.cache
def shape_mask(shape: str) -> Float[np.ndarray, "side side"]:
    """A shape on its canvas, 0..1. Its larger side has EXTENT pixels, and its centre of mass is the canvas's centre."""
    drawn = np.zeros((1024, 1024), np.uint8)
    if shape in DIGITS:
        place = {"fontFace": cv2.FONT_HERSHEY_DUPLEX, "fontScale": 20, "thickness": 110}
        cv2.putText(drawn, str(DIGITS.index(shape)), (280, 730), color=255, **place)
    else:
        cv2.fillPoly(drawn, [np.round(outline(shape) * 400 + 512).astype(np.int32)], 255)
        if shape == "ring":
            cv2.circle(drawn, (512, 512), 200, 0, -1)
    y, x = np.nonzero(drawn)
    scale = EXTENT / max(np.ptp(x), np.ptp(y))
    centre = np.array([x.mean(), y.mean()])
    matrix = np.column_stack([np.eye(2) * scale, (CANVAS - 1) / 2 - scale * centre])
    return cv2.warpAffine(drawn, matrix, (CANVAS, CANVAS), flags=cv2.INTER_AREA).astype(np.float32) / 255


def outline(shape: str) -> Float[np.ndarray, "n 2"]:
    """Corners of a shape, about -1..1.

    Raises:
      ValueError: there is no such shape.
    """
    turn = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    circle = np.stack([np.sin(turn), -np.cos(turn)], 1)
    if shape in ("disc", "ring"):
        return circle
    if shape == "triangle":
        return circle[::60]
    if shape == "square":
        return np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    if shape == "star":
        return circle[::18] * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]
    if shape == "cross":
        a = 0.36
        quarter = np.array([(-a, -1), (a, -1), (a, -a)])
        turned = np.array([(0, 1), (-1, 0)])
        return np.concatenate([quarter @ np.linalg.matrix_power(turned, k) for k in range(4)])
    if shape == "heart":
        height = sum(a * np.cos(k * turn) for k, a in ((1, 13), (2, -5), (3, -2), (4, -1)))
        return np.stack([np.sin(turn) ** 3, -height / 16], 1)
    raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")


def fill_texture(rng: np.random.Generator, fill: str) -> Float[np.ndarray, "side side"]:
    """The factor of a sprite's colour at each pixel of its canvas."""
    y, x = np.mgrid[:CANVAS, :CANVAS] * (2 * np.pi / (0.36 * EXTENT))
    angle = rng.uniform(0, np.pi)
    wave = np.sin(np.cos(angle) * x + np.sin(angle) * y)
    if fill == "plain":
        return np.ones((CANVAS, CANVAS), np.float32)
    if fill == "spotted":
        wave = wave * np.sin(np.cos(angle) * y - np.sin(angle) * x) * 1.5
    return (0.8 + 0.2 * np.tanh(2.5 * wave)).astype(np.float32)


def draw_background(rng: np.random.Generator, texture: str, tone: str, size: int) -> Float[np.ndarray, "h w 3"]:
    """A square picture of `size` pixels a side on the 0..255 scale. Every size shows the same scene."""
    y, x = np.mgrid[:size, :size] / size
    angle, length = rng.uniform(0, np.pi), rng.uniform(0.18, 0.34)
    phases = rng.uniform(0, 2 * np.pi, 3)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    length *= 1.3 if texture == "checks" else 1.0
    u, v = (2 * np.pi * side / length + phase for side, phase in zip((along, across), phases, strict=False))
    if texture == "waves":
        field = np.sin(u + 1.2 * np.sin(2 * np.pi * across / 0.6 + phases[2]))
    elif texture == "stripes":
        field = np.tanh(2.5 * np.sin(u))
    elif texture == "checks":
        field = np.tanh(2.5 * np.sin(u) * np.sin(v))
    else:
        cells = rng.standard_normal((8, 8)).astype(np.float32)
        field = cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)
    field = np.clip((field - field.mean()) / field.std(), -2, 2)
    # The tone's lightness goes up and down; grey 122 +- 0.30 * 122 has a deviation of 0.14.
    return np.array(BACKGROUNDS[tone]) * (1 + 0.30 * field[..., None] / field.std())
