"""Paths that were drawn on a given picture go the way of the picture: scaled to cover the frame, and cropped.

A size is (height, width) in pixels. `Pictures` are the given ones by name, those of the earliest frames first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tora_jax.conditioning.trajectory_hints import Canvas, Hints
from tora_jax.errors import UserError
from tora_jax.io.video import cover

Size = tuple[int, int]
Pictures = Mapping[str, Size]

LOOKS = 257  # at a path, whose points may all lie outside while it goes through the frame


class Drawn(NamedTuple):
    """Where paths were drawn: the name of their file, the name of the picture, its size."""

    source: str
    picture: str
    size: Size

    def crop(self, size: Size) -> str:
        return f"the crop of {self.picture} from {self.size[1]}x{self.size[0]} to {size[1]}x{size[0]}"


def choose(own: Canvas | None, hints: Hints, pictures: Pictures, name: str) -> str | None:
    """The picture that paths were drawn on; None = on the whole frame.

    Without a word from the person it is the one that their canvas has the shape of, if somebody named a canvas that is
    none of fractions.

    Args:
      own: the canvas that the file names.
      name: of the file, for messages.

    Raises:
      UserError: a picture is asked for, and there is none, or there are several of different shapes.
    """
    canvas = own or hints.canvas
    if hints.on == "frame" or not pictures:
        if hints.on == "image":
            raise UserError(f"{name}: trajectory_canvas is image, and none is given; give --image or --condition")
        return None
    named = canvas is not None and canvas != (1, 1)
    fits = [each for each in pictures if named and _is_shape_of(canvas, pictures[each])]
    if fits or hints.on != "image":
        return fits[0] if fits else None
    first, *others = pictures
    if not all(_is_shape_of(pictures[first][::-1], pictures[each]) for each in others):
        raise UserError(f"{name}: the pictures have several shapes; say which: --trajectory_canvas=image:WIDTHxHEIGHT")
    return first


def _is_shape_of(canvas: Canvas, size: Size) -> bool:
    """To one unit of the canvas on its shorter side."""
    (width, height), (pixels_high, pixels_wide) = canvas, size
    return abs(width * pixels_high - height * pixels_wide) <= max(pixels_high, pixels_wide)


def brought_along(points: Float[np.ndarray, "p _"], picture: Size, size: Size) -> Float[np.ndarray, "p _"]:
    """(x, y) in 0..1 of a picture -> in units of the frame that the picture covers; beyond 0..1 = cropped away."""
    height, width, top, left = cover(*picture, *size)
    moved = points.copy()
    moved[:, 0] = (points[:, 0] * width - left) / size[1]
    moved[:, 1] = (points[:, 1] * height - top) / size[0]
    return moved


def place(
    paths: Sequence[Float[np.ndarray, "_ _"]], drawn: Sequence[Drawn | None], size: Size
) -> tuple[list[Float[np.ndarray, "_ _"]], list[str]]:
    """`brought_along` for those of the paths that were drawn on a picture.

    Returns:
      the paths, and what is to be said of points that the crop takes away.

    Raises:
      UserError: it takes away a whole path.
    """
    placed, lost = [], {}
    for points, on in zip(paths, drawn, strict=True):
        if on is None:
            placed.append(points)
            continue
        moved = brought_along(points, on.size, size)
        if not _inside(_densely(moved)).any():
            raise UserError(f"{on.source}: a path lies in what {on.crop(size)} takes away; take a video of its shape")
        placed.append(moved)
        out, count = lost.get(on, (0, 0))
        lost[on] = out + int((~_inside(moved)).sum()), count + len(moved)
    return placed, [
        f"{on.source}: {out} of {count} points lie in what {on.crop(size)} takes away; "
        "the paths stay at the frame's edge there"
        for on, (out, count) in lost.items()
        if out
    ]


def _densely(points: Float[np.ndarray, "p _"]) -> Float[np.ndarray, "p2 2"]:
    between = np.linspace(0, len(points) - 1, LOOKS)
    at = np.union1d(between, np.arange(len(points)))
    return np.stack([np.interp(at, np.arange(len(points)), points[:, k]) for k in (0, 1)], -1)


def _inside(points: Float[np.ndarray, "p _"]) -> np.ndarray:
    slack = 1e-6  # of the frame: rounding
    return ((points[:, :2] >= -slack) & (points[:, :2] <= 1 + slack)).all(-1)
