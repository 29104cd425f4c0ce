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

import json
import os
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from tora_jax.errors import UserError

CANVAS = (256, 256)  # width, height; of files that name no canvas
MAX_POINTS = 100_000  # in one file; far more than the frames of any video
MAX_BYTES = 32 * 2**20
THIN_OUT = "thin the trajectory out to about one point a frame"

Canvas = tuple[float | int, float | int]
SEQUENCE = (list, tuple, np.ndarray)

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


def read(sources: Any) -> list[Trajectory] | None:
    """Files, presets or points (as in `parse`) -> trajectories; None without any source.

    Raises:
      UserError: for a source that cannot be read.
    """
    if sources is None or (isinstance(sources, Sequence) and not sources):
        return None
    if named := names(sources):
        return [points for name in named for points in load(find(name))]
    return parse(sources)


def load(path: str | os.PathLike) -> list[Trajectory]:
    """Reads the trajectories of a file.

    The content decides on the format, not the name:
      * text: a line `x,y` or `x, y` for each point (the format of the released code), one trajectory;
      * JSON: `[[x, y], ...]`, `[[x, y, t], ...]`, `[{"x": .., "y": ..}, ...]` (also with `"t"`), a list of
        those, or `{"canvas": [width, height], "trajectories": [...]}`;
      * NumPy's .npy: [p, 2], [p, 3] or [n, p, 2 or 3].

    x and y are on a canvas of 256x256 unless the file names another. Points off the canvas move to its edge,
    with one warning for the file.

    Returns:
      One float64 array for each trajectory, [p, 2] (x, y) or [p, 3] (x, y, t), all in 0..1.

    Raises:
      UserError: the file is missing, is not one of these formats, has no trajectory of two points or more, a
        value that is no finite number, times that do not rise within 0..1, or more than MAX_POINTS points.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a trajectory file (.txt, .json or .npy)")
        if not path.is_file():
            raise UserError(f"{path}: no such trajectory file; check the path")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is over {MAX_BYTES >> 20} MB; {THIN_OUT}")
        content = path.read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); check its permissions") from e
    if content.startswith(b"\x93NUMPY"):
        return parse(_read_npy(path), name=str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: is not a trajectory; give text lines x,y, JSON or a NumPy .npy file")
    if not text.strip():
        raise UserError(f"{path}: is empty; write one point x,y a line, at least 2")
    if text.lstrip()[0] in "[{":
        return parse(_read_json(text, path), name=str(path))
    return parse(_read_lines(text, path), name=str(path))


def parse(data: Any, canvas: Canvas = CANVAS, name: str = "trajectory") -> list[Trajectory]:
    """Turns points in memory into trajectories.

    Args:
      data: what `load` takes from a file: nested lists, dicts or arrays.
      canvas: (width, height) of x and y, (1, 1) for fractions; a canvas in `data` wins.
      name: of the data in messages, such as the file.

    Returns, raises: see `load`.
    """
    if isinstance(data, dict):
        data, canvas = _unwrap(data, canvas, name)
    parts = _split(data, name)
    labels = [f"{name}, trajectory {i + 1}" if len(parts) > 1 else name for i in range(len(parts))]
    if sum(map(len, parts)) > MAX_POINTS:
        raise UserError(f"{name}: has over {MAX_POINTS} points; {THIN_OUT}")
    arrays = [_points(part, label) for part, label in zip(parts, labels, strict=True)]

    size = np.asarray(canvas, np.float64)
    xy = np.concatenate([a[:, :2] for a in arrays])
    off = int(((xy < 0) | (xy > size)).any(-1).sum())
    if off:
        where = f"off the {canvas[0]:g}x{canvas[1]:g} canvas; they were moved to its edge"
        warnings.warn(f"{name}: {off} of {len(xy)} points lie {where}", stacklevel=3)
    elif size.min() > 1 and xy.max() <= 1 and (xy % 1).any():
        hint = 'if they are fractions of the frame, write {"canvas": [1, 1], "trajectories": [...]}'
        warnings.warn(f"{name}: all points lie in one corner of the canvas; {hint}", stacklevel=3)
    for a in arrays:
        a[:, :2] = np.clip(a[:, :2], 0, size) / size
    return arrays


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


# ---------------------------------------------------------------- file formats


def _read_npy(path: Path) -> np.ndarray:
    try:
        # Mapped: NumPy then checks the header's shape against the file before it allocates anything.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, EOFError, SyntaxError) as e:
        raise UserError(f"{path}: is not a readable array of numbers; save it again with numpy.save") from e


def _read_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: is not valid JSON (line {e.lineno}: {e.msg}); correct it there") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: is not a JSON list of points [[x, y], ...]; write it so") from e


def _read_lines(text: str, path: Path) -> list[list[float]]:
    lines = text.splitlines()
    if len(lines) > 2 * MAX_POINTS:  # blank ones are forgiven
        raise UserError(f"{path}: has over {MAX_POINTS} points; {THIN_OUT}")
    points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            x, y = line.split(",")
            points.append([float(x), float(y)])
        except ValueError:
            wrong = f"{path}, line {number}: {line.strip()[:40]!r}"
            raise UserError(f"{wrong} is not a point; write two numbers x,y") from None
    return points


# ---------------------------------------------------------------- checks


def _unwrap(data: dict, canvas: Canvas, name: str) -> tuple[Any, Canvas]:
    if "trajectories" not in data or set(data) - {"canvas", "trajectories"}:
        form = 'the form is {"canvas": [width, height], "trajectories": [...]}'
        raise UserError(f"{name}: has the keys {', '.join(map(str, data))[:80] or '(none)'}; {form}")
    try:
        width, height = (float(side) for side in data.get("canvas", canvas))
    except (TypeError, ValueError, OverflowError):
        width = height = np.nan
    if not (np.isfinite([width, height]).all() and width > 0 and height > 0):
        raise UserError(f"{name}: the canvas is not two positive numbers; write it as [width, height]")
    return data["trajectories"], (width, height)


def _split(data: Any, name: str) -> list:
    """The trajectories in `data`, one or a list."""
    if isinstance(data, np.ndarray):
        parts = list(data) if data.ndim == 3 else [np.atleast_1d(data)]
    elif isinstance(data, SEQUENCE):
        nested = bool(data) and isinstance(data[0], SEQUENCE) and len(data[0]) > 0
        parts = list(data) if nested and isinstance(data[0][0], (*SEQUENCE, dict)) else [data] if data else []
    else:
        raise UserError(f"{name}: is not a list of points; write [[x, y], ...]")
    if not parts:
        raise UserError(f"{name}: holds no points; write at least 2")
    if not all(isinstance(part, SEQUENCE) for part in parts):
        raise UserError(f"{name}: mixes points and trajectories; write a list of lists of points")
    return parts


def _points(part: Any, name: str) -> Trajectory:
    """One trajectory as float64 [p, 2 or 3], checked, still in canvas units."""
    try:
        if not isinstance(part, np.ndarray):
            keys = ("x", "y", "t") if part and isinstance(part[0], dict) and "t" in part[0] else ("x", "y")
            part = np.asarray([[p[k] for k in keys] if isinstance(p, dict) else p for p in part])
        fits = part.ndim == 2 and part.shape[1] in (2, 3) and part.dtype.kind in "fiu"
    except (KeyError, ValueError, TypeError):
        fits = False
    if len(part) == 0:
        raise UserError(f"{name}: holds no points; write at least 2")
    if not fits:
        raise UserError(f"{name}: every point must be two numbers x, y or three x, y, t; correct the others")
    points = part.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(points).all(-1))
    if len(bad):
        raise UserError(f"{name}: point {bad[0] + 1} is not finite (NaN or infinity); correct or remove it")
    if len(points) < 2:
        raise UserError(f"{name}: has a single point; a trajectory needs at least 2")
    if points.shape[1] == 3:
        t = points[:, 2]
        if t.min() < 0 or t.max() > 1:
            raise UserError(f"{name}: times run from {t.min():g} to {t.max():g}; scale t to 0..1")
        late = np.flatnonzero(np.diff(t) <= 0)
        if len(late):
            raise UserError(f"{name}: point {late[0] + 2} is not later than the one before; sort by rising t")
    return points
