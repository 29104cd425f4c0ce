"""What a trajectory file draws, in its own units, and what a person says where the file leaves it open."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tora_jax.errors import UserError

CANVAS = (256, 256)  # width, height of the canvas that a file without one means
MAX_POINTS = 100_000  # in one file; far more than the frames of any video
THIN_OUT = "thin the trajectory out to about one point a frame"
SAY_CANVAS = "name theirs with --trajectory_canvas=WxH (1x1 for fractions of the frame)"

THIRD = "the third number is the time"

AXES = re.compile(r"[1b]?(nt|tn|t)?(2|3|xy[tzv]?|yx[tzv]?)?(up|down)?")
CANVAS_FORM = re.compile(r"(?:(image|frame)(?::|$))?(?:(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)(?::|$))?(clip)?")

Canvas = tuple[float | int, float | int]


class Marks(NamedTuple):
    """One path.

    Attributes:
      xy: in units of the canvas; NaN where the point is hidden.
      at: number of the frame of each point, rising; None = 0, 1, 2 ...
      times: 0..1 of the video for each point, rising, in place of `at`.
    """

    xy: Float[np.ndarray, "p 2"]
    at: Float[np.ndarray, " p"] | None = None
    times: Float[np.ndarray, " p"] | None = None


class Drawing(NamedTuple):
    """The paths of a file.

    Attributes:
      form: what it is, for people.
      canvas: width, height; None where the file does not say.
      notes: further words on how it was read.
      span: the first and the last frame of the clip; None = those that have a point.
      of_video: in pixels of a video, so that a canvas must be named where the file does not.
    """

    paths: list[Marks]
    form: str
    canvas: Canvas | None = None
    notes: tuple[str, ...] = ()
    span: tuple[float, float] | None = None
    of_video: bool = False

    @property
    def bare(self) -> bool:
        """Times are there, and only their place says that they are."""
        return THIRD in self.notes


@dataclasses.dataclass(frozen=True)
class Hints:
    """What settles a file with two readings.

    Attributes:
      canvas: width, height that x and y are measured on; (1, 1) for fractions.
      clip: points off the canvas move to its edge.
      on: "image" = the canvas is that of a given picture, "frame" = it is the video's frame; "" = unsaid.
      order: "nt" = paths, then points; "tn" = frames, then paths; "" = unsaid.
      values: of a point, in order: "xy" or "yx", then t = time, z = anything to leave out, v = visible; "" = unsaid.
      up: y runs upwards; None = unsaid.
      each_frame: the points are one a frame of the video, not spread over it.
      num_frames: of the video; None = unknown.
      tracks: numbers of the paths to take from 0, or how many of those that move most.
    """

    canvas: Canvas | None = None
    clip: bool = False
    on: str = ""
    order: str = ""
    values: str = ""
    up: bool | None = None
    each_frame: bool = False
    num_frames: int | None = None
    tracks: tuple[int, ...] | int | None = None


def hints(
    canvas: str | None = None,
    axes: str | None = None,
    times: str | None = None,
    tracks: str | None = None,
    num_frames: int | None = None,
) -> Hints:
    """Reads the settings `trajectory_canvas`, `trajectory_axes`, `trajectory_times` and `trajectory_tracks`.

    Args:
      num_frames: of the video; times "frames" need it.

    Raises:
      UserError: for a text of another form.
    """
    size, clip, on = _canvas(canvas)
    order, values, up = _axes(axes)
    if times not in (None, "points", "frames"):
        raise UserError(f"trajectory_times is {times!r}; give points (spread over the video) or frames (one a frame)")
    return Hints(size, clip, on, order, values, up, times == "frames", num_frames, _tracks(tracks))


def _canvas(given: str | None) -> tuple[Canvas | None, bool, str]:
    if given is None:
        return None, False, ""
    match = CANVAS_FORM.fullmatch(given.replace(" ", "").lower())
    on, width, height, clip = match.groups() if match else (None,) * 4
    size = (float(width), float(height)) if width else None
    if not (on or size) or (size and not 0 < min(size) <= max(size) < 1e6):
        form = "give WIDTHxHEIGHT, such as 720x480 (1x1 for fractions; 720x480:clip moves points inside)"
        raise UserError(f"trajectory_canvas is {given!r}; {form}, or image for the pixels of the given picture")
    return size, bool(clip), on or ""


def _axes(given: str | None) -> tuple[str, str, bool | None]:
    if given is None:
        return "", "", None
    match = AXES.fullmatch(re.sub(r"[\s\[\](),;]", "", given.lower()))
    if not match or not any(match.groups()):
        form = "give nt (paths, then points) or tn (frames, then paths), and if need be xy, yx, xyt, xyz, xyv, up"
        raise UserError(f"trajectory_axes is {given!r}; {form}, such as tnyx")
    order, values, way = match.groups()
    return {"t": ""}.get(order, order) or "", {"2": "xy", "3": ""}.get(values, values) or "", way and way == "up"


def _tracks(given: str | None) -> tuple[int, ...] | int | None:
    if given is None:
        return None
    text = given.replace(" ", "")
    if not re.fullmatch(r"\d{1,6}(,\d{1,6})*,?", text) or text == "0":
        form = 'give numbers from 0, such as 0,3,7 ("3," for one), or how many of those that move most'
        raise UserError(f"trajectory_tracks is {given!r}; {form}")
    return tuple(int(each) for each in text.split(",") if each) if "," in text else int(text)
