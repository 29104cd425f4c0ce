"""Trajectories: files and arrays of points -> tracks.

A *trajectory* is a drawn path: any number of points, float64 [p, 2] as (x, y) or [p, 3] as (x, y, t), x and y in
0..1 of the frame, t in 0..1 of the video. A *track* is a trajectory sampled once for each frame of a video:
float32 [frames, 2].

Coordinates are continuous: 0 is the left (upper) edge of the frame, 1 the right (lower) edge, and the pixel
centre i of W pixels lies at (i + 0.5) / W, so pixel = x * W - 0.5. A canvas coordinate c becomes c / canvas,
which lies inside pixel floor(c / canvas * W): the released code takes the same pixel.

In shapes, p counts points, n trajectories, t frames.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tora_jax.conditioning import trajectory_json, trajectory_reading
from tora_jax.conditioning.trajectory_hints import CANVAS, Canvas, Hints
from tora_jax.conditioning.trajectory_pictures import Pictures
from tora_jax.conditioning.trajectory_reading import Reading
from tora_jax.errors import UserError
from tora_jax.io import files as io_files

UNKNOWN, NONE = Hints(), MappingProxyType({})

Trajectory = Float[np.ndarray, "_ _"]
Tracks = Float[np.ndarray, "_ t 2"]  # the number may differ from video to video


def presets() -> dict[str, Path]:
    """The files of the shipped trajectories, by name."""
    folder = Path(str(resources.files("tora_jax").joinpath("assets/trajectories")))
    return {path.stem: path for path in sorted(folder.iterdir())}


def find(source: str | os.PathLike) -> Path:
    """Finds the file of a name: a file of that name wins over a preset."""
    return Path(source) if os.path.lexists(source) else presets().get(str(source)) or io_files.path(source)


def is_preset(path: Path) -> bool:
    return path in presets().values()


def files(source: str | os.PathLike) -> list[Path]:
    """All files of a name: Wan-Move's have their visibility beside them."""
    path = find(source)
    return [path, *filter(None, [trajectory_reading.beside(path)])]


def names(sources: Any) -> tuple[str, ...]:
    """The names of sources that are files or presets; empty for points."""
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    named = isinstance(sources, Sequence) and all(isinstance(each, str | os.PathLike) for each in sources)
    return tuple(map(str, sources)) if named else ()


def read(sources: Any, hints: Hints = UNKNOWN) -> list[Trajectory] | None:
    """Files, presets or points (as in `parse`) -> trajectories; None without any source.

    Args:
      hints: of `trajectory_hints.hints`, for all but the presets.

    Raises:
      UserError: for a source that cannot be read.
    """
    found = readings(sources, hints)
    return found and [points for each in found for points in each.trajectories]


def readings(sources: Any, hints: Hints = UNKNOWN, pictures: Pictures = NONE) -> list[Reading] | None:
    """`read`, each file apart, with how it was read.

    Args:
      pictures: that are given for frames of the video; paths may have been drawn on one of them.
    """
    if sources is None or (isinstance(sources, Sequence) and not sources):
        return None
    if named := names(sources):
        open_file = trajectory_reading.open_file
        return [open_file(path) if is_preset(path) else open_file(path, hints, pictures) for path in map(find, named)]
    drawing = trajectory_json.from_data(sources, hints, "trajectory")
    return [trajectory_reading.finish(drawing, "trajectory", hints, CANVAS, pictures)]


def load(path: str | os.PathLike, hints: Hints = UNKNOWN) -> list[Trajectory]:
    """Reads the trajectories of a file.

    The content decides, not the name; docs/sampling.md has the forms. x and y are on a canvas of 256x256 unless the
    file or the hints name another. Hidden points are left out; the others keep their times.

    Returns:
      One float64 array for each trajectory, [p, 2] (x, y) or [p, 3] (x, y, t), all in 0..1.

    Raises:
      UserError: the file is missing, has no form that is known, or has two readings and no hint settles it; points lie
        off the canvas; there is no trajectory of two points or more, a value that is no finite number, times that do
        not rise within 0..1, or more than MAX_POINTS points.
    """
    return trajectory_reading.open_file(io_files.path(path), hints).trajectories


def parse(data: Any, canvas: Canvas = CANVAS, name: str = "trajectory", hints: Hints = UNKNOWN) -> list[Trajectory]:
    """Turns points in memory into trajectories.

    Args:
      data: nested lists or dicts as in JSON, or arrays.
      canvas: (width, height) of x and y, (1, 1) for fractions; a canvas in `data` or of the hints wins.
      name: of the data in messages, such as the file.

    Returns, raises: see `load`.
    """
    return trajectory_reading.finish(trajectory_json.from_data(data, hints, name), name, hints, canvas).trajectories


def resample(points: Trajectory, frames: int, arc_length: bool = False) -> Float[np.ndarray, "t 2"]:
    """Samples a trajectory once for each frame, linearly, both ends included.

    Points (x, y) lie at equal distances in time, so pauses (repeated points) and changes of speed survive. Points
    (x, y, t) lie at their times; the track rests before the first and after the last.

    Args:
      points: as `load` returns them.
      frames: of the video, at least 1; one frame gives the trajectory's start.
      arc_length: moves at constant speed along the path instead; lengths are in fractions of the frame.

    Returns:
      float32 [frames, 2], (x, y) in 0..1.

    Raises:
      UserError: `frames` is below 1.
    """
    if frames < 1:
        raise UserError(f"the number of frames is {frames}; it must be at least 1")
    xy, when, end = points[:, :2], np.arange(len(points)), len(points) - 1
    if arc_length:
        steps = np.hypot(*np.diff(xy, axis=0).T)
        moves = np.concatenate([[True], steps > 0])
        xy, when, end = xy[moves], np.cumsum(np.concatenate([[0], steps]))[moves], steps.sum()
    elif points.shape[1] == 3:
        when, end = points[:, 2], 1
    at = np.linspace(0, end, frames)
    return np.stack([np.interp(at, when, xy[:, i]) for i in (0, 1)], axis=-1).astype(np.float32)


def tracks(trajectories: Sequence[Trajectory], frames: int, arc_length: bool = False) -> Float[np.ndarray, "n t 2"]:
    """`resample` for several trajectories: float32 [n, frames, 2]; no trajectory gives n = 0."""
    if frames < 1:
        raise UserError(f"the number of frames is {frames}; it must be at least 1")
    sampled = [resample(points, frames, arc_length) for points in trajectories]
    return np.stack(sampled) if sampled else np.zeros((0, frames, 2), np.float32)


def released_points(
    points: Sequence[Sequence[int]] | Int[np.ndarray, "p 2"], frames: int, height: int, width: int
) -> Int[np.ndarray, "t 2"]:
    """The released code's points for each frame, in its integer arithmetic (sat/utils/flow_utils.py).

    Serves comparison alone; the rest of the project uses `resample`. The quirks of the released code: a whole stride
    thins out more points than frames and the rest is dropped, so the path may end early; missing points go between
    neighbours, the surplus into the first gaps; everything is cut to whole canvas units and then to whole pixels.
    Fewer than two remaining points give a point off the frame.

    Args:
      points: (x, y) on the 256x256 canvas.
      frames, height, width: of the video.

    Returns:
      int32 [frames, 2], (x, y) in pixels.
    """
    points = np.asarray(points)
    points = points[:: max(len(points) // frames, 1)][:frames]
    if len(points) < 2:
        points = np.full((frames, 2), 512)
    elif len(points) < frames:
        gaps = len(points) - 1
        share, surplus = divmod(frames - len(points), gaps)
        filled = []
        for i in range(gaps):
            pieces = share + (i < surplus) + 1
            steps = np.arange(pieces)[:, None] / pieces * (points[i + 1] - points[i])
            filled.append(np.trunc(points[i] + steps))
        points = np.concatenate([*filled, points[-1:]])
    return np.trunc(points * np.array([width, height]) / 256).astype(np.int32)
