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
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tora_jax.conditioning import trajectory_arrays, trajectory_json, trajectory_tables
from tora_jax.conditioning.trajectory_hints import (
    CANVAS,
    MAX_POINTS,
    SAY_CANVAS,
    THIN_OUT,
    Canvas,
    Drawing,
    Hints,
    Marks,
)
from tora_jax.errors import UserError

MAX_BYTES = 32 * 2**20
MAX_ZIP_BYTES = 1024 * 2**20  # an .npz may hold the video, too
UNKNOWN = Hints()

Trajectory = Float[np.ndarray, "_ _"]
Tracks = Float[np.ndarray, "_ t 2"]  # the number may differ from video to video


def presets() -> dict[str, Path]:
    """The files of the shipped trajectories, by name."""
    folder = Path(str(resources.files("tora_jax").joinpath("assets/trajectories")))
    return {path.stem: path for path in sorted(folder.iterdir())}


def find(source: str | os.PathLike) -> Path:
    """Finds the file of a name: a file of that name wins over a preset."""
    return Path(source) if os.path.lexists(source) else presets().get(str(source), Path(source))


def names(sources: Any) -> tuple[str, ...]:
    """The names of sources that are files or presets; empty for points."""
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    named = isinstance(sources, Sequence) and all(isinstance(each, str | os.PathLike) for each in sources)
    return tuple(map(str, sources)) if named else ()


class Reading(NamedTuple):
    """What was read, and how.

    Attributes:
      trajectories: as `load` returns them.
      name: of the file, or what messages call the points.
      line: how it was read, for people.
    """

    trajectories: list[Trajectory]
    name: str
    line: str


def read(sources: Any, hints: Hints = UNKNOWN) -> list[Trajectory] | None:
    """Files, presets or points (as in `parse`) -> trajectories; None without any source.

    Args:
      hints: of `trajectory_hints.hints`, for all but the presets.

    Raises:
      UserError: for a source that cannot be read.
    """
    found = readings(sources, hints)
    return found and [points for each in found for points in each.trajectories]


def readings(sources: Any, hints: Hints = UNKNOWN) -> list[Reading] | None:
    """`read`, each file apart."""
    if sources is None or (isinstance(sources, Sequence) and not sources):
        return None
    if named := names(sources):
        shipped = presets().values()
        return [_open(path, UNKNOWN if path in shipped else hints) for path in map(find, named)]
    return [_finish(trajectory_json.from_data(sources, hints, "trajectory"), hints, CANVAS, "trajectory")]


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
    return _open(Path(path), hints).trajectories


def parse(data: Any, canvas: Canvas = CANVAS, name: str = "trajectory", hints: Hints = UNKNOWN) -> list[Trajectory]:
    """Turns points in memory into trajectories.

    Args:
      data: nested lists or dicts as in JSON, or arrays.
      canvas: (width, height) of x and y, (1, 1) for fractions; a canvas in `data` or of the hints wins.
      name: of the data in messages, such as the file.

    Returns, raises: see `load`.
    """
    return _finish(trajectory_json.from_data(data, hints, name), hints, canvas, name).trajectories


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


# ---------------------------------------------------------------- files, and the way from drawings to trajectories


def _open(path: Path, hints: Hints) -> Reading:
    return _finish(_drawing(path, hints), hints, CANVAS, str(path))


def _drawing(path: Path, hints: Hints) -> Drawing:
    name = str(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a trajectory file (.txt, .csv, .json, .npy or .npz)")
        if not path.is_file():
            raise UserError(f"{path}: no such trajectory file; check the path")
        with path.open("rb") as file:
            start = file.read(8)
        zipped = start.startswith(b"PK\x03\x04")
        limit = MAX_ZIP_BYTES if zipped else MAX_BYTES
        if path.stat().st_size > limit:
            raise UserError(f"{path}: is over {limit >> 20} MB; {THIN_OUT}")
        if zipped:
            return trajectory_arrays.read_npz(path, hints, name)
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e
    if content.startswith(b"\x93NUMPY"):
        array = trajectory_arrays.read_npy(content, name)
        return trajectory_arrays.from_array(array, hints, name, form="NumPy's .npy")
    if content[:1] == b"\x80" and content[-1:] == b".":
        raise UserError(f"{path}: {trajectory_arrays.CONVERT}")
    if content.startswith(b"\x89HDF"):
        raise UserError(f"{path}: is HDF5 (SLEAP's?), which is not read; save its points with numpy.save, [n, t, 2]")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: is not a trajectory; give text lines x,y, a table, JSON or NumPy's .npy or .npz")
    if not text.strip():
        raise UserError(f"{path}: is empty; write one point x,y a line, at least 2")
    if text.lstrip()[0] in "[{" or text.lstrip()[:2] in ('"[', '"{', "'[", "'{"):
        data = trajectory_json.loads(text, name)
        return trajectory_json.from_data(data, hints, name, form="JSON")
    return trajectory_tables.from_text(text, hints, name)


def _finish(drawing: Drawing, hints: Hints, canvas: Canvas, name: str) -> Reading:
    """Paths in their own units -> trajectories: those asked for, their visible points, fractions of the frame."""
    said = drawing.canvas or hints.canvas
    canvas = said or canvas
    late = [path.times[0] for path in drawing.paths if path.times is not None and drawing.canvas is None]
    if drawing.bare and late and min(late) > 0:
        what = f"the third number, from {min(late):g} on, was taken as the time"
        warnings.warn(f"{name}: {what}; if it is none, --trajectory_axes=xyz leaves it out", stacklevel=4)
    paths = _chosen(drawing.paths, hints.tracks, name)
    if sum(len(path.xy) for path in paths) > MAX_POINTS:
        raise UserError(f"{name}: has over {MAX_POINTS} points; {THIN_OUT}, or choose with --trajectory_tracks")
    marks = [path.at for path in paths if path.at is not None]
    span = (min(at.min() for at in marks), max(at.max() for at in marks)) if marks else None
    found, hidden, dropped = [], 0, 0
    for i, path in enumerate(paths):
        seen = ~np.isnan(path.xy).any(-1)
        hidden += int((~seen).sum())
        if seen.sum() < 2 and not seen.all():
            dropped += 1
        elif seen.sum() < 2:
            label = f"{name}, trajectory {i + 1}" if len(paths) > 1 else name
            raise UserError(f"{label}: has a single point; a trajectory needs at least 2 (of one at rest: it, twice)")
        else:
            found.append(_timed(path, seen, span, hints.frames, name))
    if not found:
        raise UserError(f"{name}: no path has two points that are visible; there is nothing to follow")
    size = np.asarray(canvas, np.float64)
    _check_places(np.concatenate([each[:, :2] for each in found]), size, bool(said), hints.clip, drawing.form, name)
    for each in found:
        if hints.up:
            each[:, 1] = size[1] - each[:, 1]
        each[:, :2] = np.clip(each[:, :2], 0, size) / size
    counts = sorted({len(each) for each in found})
    points = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    what = f"{len(found)} path{'s' * (len(found) > 1)} of {points} points on {canvas[0]:g}x{canvas[1]:g}"
    notes = [
        *drawing.notes,
        *(["y upwards"] if hints.up else []),
        *([f"{hidden} hidden points left out"] if hidden else []),
    ]
    notes += [f"{dropped} of the paths hidden"] * bool(dropped) + ["one point a frame"] * (hints.frames is not None)
    return Reading(found, name, "; ".join([what, f"from {drawing.form}", *notes]))


def _chosen(paths: list[Marks], wanted: tuple[int, ...] | int | None, name: str) -> list[Marks]:
    if wanted is None:
        return paths
    if isinstance(wanted, tuple):
        if max(wanted) >= len(paths):
            raise UserError(f"{name}: has no path {max(wanted)}; --trajectory_tracks takes 0 to {len(paths) - 1}")
        return [paths[i] for i in wanted]
    visible = [path.xy[~np.isnan(path.xy).any(-1)] for path in paths]
    length = [np.hypot(*np.diff(xy, axis=0).T).sum() for xy in visible]
    return [paths[i] for i in sorted(np.argsort(length, kind="stable")[::-1][:wanted])]


def _timed(path: Marks, seen: np.ndarray, span: tuple | None, frames: int | None, name: str) -> Trajectory:
    """[p, 2] where the points are spread evenly over the video, else [p, 3], still in canvas units."""
    if path.times is not None:
        if frames is not None:
            raise UserError(f"{name}: has times of its own; leave --trajectory_times out")
        return np.column_stack([path.xy, path.times])[seen]
    at = np.arange(len(path.xy), dtype=np.float64) if path.at is None else path.at - span[0]
    end = len(path.xy) - 1 if path.at is None else span[1] - span[0]
    if frames is None and seen.all() and len(at) == end + 1 and (np.diff(at) == 1).all():
        return path.xy.copy()
    points = np.column_stack([path.xy, at / max(end if frames is None else frames - 1, 1)])[seen]
    inside = np.flatnonzero(points[:, 2] <= 1)
    return points[: max(len(inside), 2)]


def _check_places(xy: np.ndarray, size: np.ndarray, said: bool, clip: bool, form: str, name: str) -> None:
    on = f"{size[0]:g}x{size[1]:g} canvas"
    normalized = ", or give KJNodes' coord_str in place of its normalized_str" if form == "JSON" else ""
    off = int(((xy < 0) | (xy > size)).any(-1).sum())
    if off and not clip:
        small = normalized if np.abs(xy).max() <= 3 else ""
        clipped = f", or move points to the edge with {size[0]:g}x{size[1]:g}:clip there"
        raise UserError(f"{name}: {off} of {len(xy)} points lie off the {on}; {SAY_CANVAS}{clipped}{small}")
    if off:
        warnings.warn(f"{name}: {off} of {len(xy)} points lie off the {on}; they were moved to its edge", stacklevel=4)
    elif size.min() > 1 and xy.max() <= 1 and (xy % 1).any():
        corner = f"{name}: all points lie in one corner of the {on}"
        if not said:
            raise UserError(f"{corner}; {SAY_CANVAS}{normalized}")
        warnings.warn(f"{corner}; 1x1 is the canvas of fractions of the frame", stacklevel=4)
