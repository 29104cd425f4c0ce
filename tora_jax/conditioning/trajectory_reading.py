"""From files, and what they draw, to trajectories: the kind by the content, fractions, what is said of a reading."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tora_jax.conditioning import (
    trajectory_arrays,
    trajectory_json,
    trajectory_pickles,
    trajectory_pictures,
    trajectory_tables,
    trajectory_xml,
)
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
from tora_jax.conditioning.trajectory_pictures import Drawn, Pictures
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.files import decode_text

MAX_BYTES = 32 * 2**20
MAX_BINARY_BYTES = 1024 * 2**20  # an .npz or a pickle may hold the video, too
UNKNOWN, NONE = Hints(), MappingProxyType({})
SLEAP = (
    "of DeepLabCut's give the .csv, of SLEAP's save the points: numpy.save('FILE.npy', "
    "numpy.concatenate(h5py.File('FILE.h5')['tracks'][:].transpose(0, 2, 3, 1))), and say --trajectory_axes=nt"
)


class Reading(NamedTuple):
    """What was read, and how.

    Attributes:
      trajectories: as `trajectory.load` returns them, in 0..1 of what they were drawn on.
      name: of the file, or what messages call the points.
      line: how it was read, for people.
      drawn: the given picture that they were drawn on; None = the video's frame.
    """

    trajectories: list[Float[np.ndarray, "_ _"]]
    name: str
    line: str
    drawn: Drawn | None = None


def open_file(path: Path, hints: Hints = UNKNOWN, pictures: Pictures = NONE) -> Reading:
    """Reads a file; see `trajectory.load`, and `trajectory.readings` for the pictures."""
    return finish(_drawing(path, hints), str(path), hints, CANVAS, pictures)


def _drawing(path: Path, hints: Hints) -> Drawing:
    name = str(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a trajectory file (.txt, .csv, .json, .npy or .npz)")
        if not path.is_file():
            raise UserError(f"{path}: no such trajectory file; check the path")
        start = files.read_range(path, 0, 8)
        binary = start.startswith((b"PK\x03\x04", b"\x80", b"\x93NUMPY"))
        limit = MAX_BINARY_BYTES if binary else MAX_BYTES
        if path.stat().st_size > limit:
            raise UserError(f"{path}: is over {limit >> 20} MB; {THIN_OUT}")
        if start.startswith(b"PK\x03\x04"):
            return _zipped(files.local(path), hints, name)
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e
    if content.startswith(b"\x93NUMPY"):
        array = trajectory_arrays.read_npy(content, name)
        if isinstance(array, np.ndarray):
            form, seen = "NumPy's .npy", None
            if other := beside(path):
                found = trajectory_arrays.read_npy(other.read_bytes(), str(other))
                form, seen = f"{form} with {other.name}", trajectory_arrays.visible(found, other.name, name)
            return trajectory_arrays.from_array(array, hints, name, seen=seen, form=form)
        return trajectory_arrays.from_objects(array, hints, name, "objects in NumPy's .npy")
    if content[:1] == b"\x80":
        data = trajectory_pickles.loads(content, name)
        return trajectory_arrays.from_objects(data, hints, name, "a pickle")
    if content.startswith(b"\x89HDF"):
        raise UserError(f"{path}: is HDF5, which is not read; {SLEAP}")
    return _from_text(content, hints, name)


def _zipped(path: Path, hints: Hints, name: str) -> Drawing:
    if trajectory_pickles.is_torch(path):
        data = trajectory_pickles.load_torch(path, name)
        return trajectory_arrays.from_objects(data, hints, name, "PyTorch's file")
    return trajectory_arrays.read_npz(path, hints, name)


def beside(path: Path) -> Path | None:
    """X_visibility.npy beside X_tracks.npy, as Wan-Move has them."""
    other = path.with_name(path.name.replace("tracks", "visibility"))
    there = other != path and path.suffix == ".npy" and other.is_file() and other.stat().st_size <= MAX_BYTES
    return other if there else None


def _from_text(content: bytes, hints: Hints, name: str) -> Drawing:
    try:
        text = decode_text(content, name)
    except UserError:
        raise UserError(
            f"{name}: is not a trajectory; give text lines x,y, a table or JSON, in UTF-8, or NumPy's .npy or .npz"
        ) from None
    if not text.strip():
        raise UserError(f"{name}: is empty; write one point x,y a line, at least 2")
    if text.lstrip()[0] in "[{" or text.lstrip()[:2] in ('"[', '"{', "'[", "'{"):
        data = trajectory_json.loads(text, name)
        return trajectory_json.from_data(data, hints, name, form="JSON")
    if text.lstrip()[0] == "<":
        return trajectory_xml.from_text(text, name)
    return trajectory_tables.from_text(text, hints, name)


# ---------------------------------------------------------------- from drawings to trajectories


def finish(
    drawing: Drawing, name: str, hints: Hints = UNKNOWN, canvas: Canvas = CANVAS, pictures: Pictures = NONE
) -> Reading:
    """Paths in their own units -> trajectories: those asked for, their visible points, fractions of the frame.

    Args:
      canvas: where neither the drawing nor the hints name one.
    """
    chosen = trajectory_pictures.choose(drawing.canvas, hints, pictures, name)
    drawn = Drawn(name, chosen, pictures[chosen]) if chosen else None
    said = drawing.canvas or hints.canvas or (drawn and drawn.size[::-1])
    image = f", or image for the pixels of {next(iter(pictures))}" if pictures else ""
    if drawing.of_video and not said:
        way_out = f"name it: --trajectory_canvas=WxH{image}"
        raise UserError(f"{name}: {drawing.form}, in pixels of a video of unknown size; {way_out}")
    canvas = said or canvas
    late = [path.times[0] for path in drawing.paths if path.times is not None and drawing.canvas is None]
    if drawing.bare and late and min(late) > 0:
        what = f"the third number, from {min(late):g} on, was taken as the time"
        warnings.warn(f"{name}: {what}; if it is none, --trajectory_axes=xyz leaves it out", stacklevel=4)
    paths = _chosen(drawing.paths, hints.tracks, name)
    if sum(len(path.xy) for path in paths) > MAX_POINTS:
        raise UserError(f"{name}: has over {MAX_POINTS} points; {THIN_OUT}, or choose with --trajectory_tracks")
    found, hidden = _visible(paths, drawing.span, hints, name)
    size = np.asarray(canvas, np.float64)
    xy = np.concatenate([each[:, :2] for each in found])
    _check_places(xy, size, bool(said), hints.clip, drawing.form, name, image)
    if drawing.canvas is None:
        _check_corners(found, size, hints, name)
    for each in found:
        if hints.up:
            each[:, 1] = size[1] - each[:, 1]
        each[:, :2] = np.clip(each[:, :2], 0, size) / size
    where = f"{canvas[0]:g}x{canvas[1]:g}" + _where(chosen, pictures, hints)
    notes = [*drawing.notes, *_notes(hints, hidden, len(paths) - len(found)), *_rests(paths)]
    return Reading(found, name, "; ".join([_count(found, where, hints), f"from {drawing.form}", *notes]), drawn)


def _where(chosen: str | None, pictures: Pictures, hints: Hints) -> str:
    if chosen is not None:
        return f" of {chosen}"
    if pictures and not hints.on:
        size = f":{hints.canvas[0]:g}x{hints.canvas[1]:g}" if hints.canvas else ""
        return f", the whole frame (drawn on {next(iter(pictures))}: --trajectory_canvas=image{size})"
    return ""


def _count(found: list[np.ndarray], where: str, hints: Hints) -> str:
    counts = sorted({len(each) for each in found})
    points = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    frames = f", {hints.num_frames} frame{'s' * (hints.num_frames > 1)}" if hints.num_frames else ""
    return f"{len(found)} path{'s' * (len(found) > 1)} of {points} points on {where}{frames}"


def _notes(hints: Hints, hidden: int, dropped: int) -> list[str]:
    return [
        *["y upwards"] * bool(hints.up),
        *[f"{hidden} hidden point{'s' * (hidden > 1)} left out"] * bool(hidden),
        *[f"{dropped} of the paths hidden"] * bool(dropped),
        *["one point a frame"] * hints.each_frame,
    ]


def _rests(paths: list[Marks]) -> list[str]:
    """Where times do not fill the video: they may be seconds."""
    times = [time for path in paths if path.times is not None for time in path.times[[0, -1]]]
    start, end = min(times, default=0), max(times, default=1)
    return [f"times from {start:g} to {end:g} of the video"] * ((start, end) != (0, 1))


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


def _visible(
    paths: list[Marks], span: tuple[float, float] | None, hints: Hints, name: str
) -> tuple[list[np.ndarray], int]:
    """The paths that can be followed, of their visible points, and the number of hidden points."""
    ends = [*([span] if span else []), *((path.at.min(), path.at.max()) for path in paths if path.at is not None)]
    span = (min(start for start, _ in ends), max(end for _, end in ends)) if ends else None
    found, hidden = [], 0
    for i, path in enumerate(paths):
        seen = ~np.isnan(path.xy).any(-1)
        hidden += int((~seen).sum())
        if seen.sum() >= 2:
            found.append(_timed(path, seen, span, hints, name))
        elif seen.all():
            label = f"{name}, trajectory {i + 1}" if len(paths) > 1 else name
            raise UserError(f"{label}: has a single point; a trajectory needs at least 2 (of one at rest: it, twice)")
    if not found:
        raise UserError(f"{name}: no path has two points that are visible; there is nothing to follow")
    return found, hidden


def _timed(path: Marks, seen: np.ndarray, span: tuple | None, hints: Hints, name: str) -> np.ndarray:
    """[p, 2] where the points are spread evenly over the video, else [p, 3], still in canvas units."""
    if path.times is not None:
        if hints.each_frame:
            raise UserError(f"{name}: has times of its own; leave --trajectory_times out")
        return np.column_stack([path.xy, path.times])[seen]
    at = np.arange(len(path.xy), dtype=np.float64) if path.at is None else path.at - span[0]
    end = len(path.xy) - 1 if path.at is None else span[1] - span[0]
    if not hints.each_frame and seen.all() and len(at) == end + 1 and (np.diff(at) == 1).all():
        return path.xy.copy()
    points = np.column_stack([path.xy, at / max((hints.num_frames or 1) - 1 if hints.each_frame else end, 1)])[seen]
    inside = np.flatnonzero(points[:, 2] <= 1)
    return points[: max(len(inside), 2)]


def _check_places(xy: np.ndarray, size: np.ndarray, said: bool, clip: bool, form: str, name: str, image: str) -> None:
    on = f"{size[0]:g}x{size[1]:g} canvas"
    normalized = ", or give KJNodes' coord_str in place of its normalized_str" if form == "JSON" else ""
    off = int(((xy < 0) | (xy > size)).any(-1).sum())
    if off and not clip:
        small = normalized if np.abs(xy).max() <= 3 else ""
        clipped = f", or move points to the edge with {size[0]:g}x{size[1]:g}:clip there"
        raise UserError(f"{name}: {off} of {len(xy)} points lie off the {on}; {SAY_CANVAS}{image}{clipped}{small}")
    if off:
        warnings.warn(f"{name}: {off} of {len(xy)} points lie off the {on}; they were moved to its edge", stacklevel=4)
    elif size.min() > 1 and xy.max() <= (2 if size.min() > 32 else 1) and (xy % 1).any():
        corner = f"{name}: all points lie in one corner of the {on}"
        if not said:
            raise UserError(f"{corner}; {SAY_CANVAS}{normalized}")
        warnings.warn(f"{corner}; 1x1 is the canvas of fractions of the frame", stacklevel=4)


def _check_corners(paths: list[np.ndarray], size: np.ndarray, hints: Hints, name: str) -> None:
    """SG-I2V begins with two corners of a box, and goes on from its centre, in the same path or in the next."""
    unit = size.max() / 256

    def is_box(corners: np.ndarray, centre: np.ndarray) -> bool:
        (left_top, right_bottom), off = corners[:, :2], corners[:, :2].mean(0) - centre[:2]
        return bool((np.abs(right_bottom - left_top) >= 4 * unit).all() and (np.abs(off) <= unit / 2).all())

    inside = any(len(each) > 3 and is_box(each[:2], each[2]) for each in paths)
    beside = any(len(box) == 2 < len(path) and is_box(box, path[0]) for box, path in itertools.pairwise(paths))
    if not hints.values and all(each.shape[1] == 2 for each in paths) and (inside or beside):
        what = "begins with two corners of a box and then its centre, as SG-I2V's files do"
        raise UserError(f"{name}: {what}; leave the corners out (if they are points: --trajectory_axes=xy)")
