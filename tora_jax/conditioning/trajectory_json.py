"""Points in JSON, and in Python's lists and dicts: as spline editors, node graphs and we ourselves write them."""

from __future__ import annotations

import json
import warnings
from typing import Any

import numpy as np

from tora_jax.conditioning import trajectory_arrays
from tora_jax.conditioning.trajectory_arrays import HIDDEN, PLACES, POINTS, SEEN, check_times
from tora_jax.conditioning.trajectory_hints import MAX_POINTS, THIN_OUT, THIRD, Canvas, Drawing, Hints, Marks
from tora_jax.errors import UserError

SEQUENCE = (list, tuple, np.ndarray)
TIME = ("t", "time")
FRAME = ("frame", "frame_id")
BESIDE = ("confidence", "score", "likelihood")  # known, and no part of a path
DEEPEST = 3  # texts in texts
DEPTH_OF_BATCH = 4  # of lists: a tracker's arrays with a leading axis of 1


def loads(text: str, name: str, depth: int = 0) -> Any:
    """JSON, also in quotes, in single quotes, and with texts of JSON inside."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        text = text[1:-1]
    if '"' not in text:
        text = text.replace("'", '"')
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise UserError(f"{name}: is not valid JSON (line {e.lineno}: {e.msg}); correct it there") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{name}: is not a JSON list of points [[x, y], ...]; write it so") from e
    if isinstance(data, str) and depth < DEEPEST and data.strip()[:1] in tuple("[{\"'"):
        return loads(data, name, depth + 1)
    return data


def from_data(
    data: Any, hints: Hints, name: str, form: str = "points", canvas: Canvas | None = None, order: str = ""
) -> Drawing:
    """Lists, dicts, arrays (NumPy's, JAX's, PyTorch's) -> paths.

    Args:
      order: of lists of lists of points, where the form settles it: "nt" = each is a path; "" = by the points.

    Raises:
      UserError: for what has another form, for keys that are not known, for points that are no finite numbers, and
        where the lists may be those of the points of one frame each.
    """
    if hasattr(data, "__array__"):
        return trajectory_arrays.from_array(_array(data, name), hints, name)
    if isinstance(data, dict):
        return _from_dict(data, hints, name, form, canvas)
    if not isinstance(data, SEQUENCE):
        raise UserError(f"{name}: is not a list of points; write [[x, y], ...]")
    data = [_array(each, name) if hasattr(each, "__array__") else each for each in data]
    if data and all(isinstance(each, str) and each.strip()[:1] == "[" for each in data):
        read = [from_data(loads(each, name), hints, name, form, canvas) for each in data]
        return Drawing([path for each in read for path in each.paths], form, canvas)
    if _depth(data) == DEPTH_OF_BATCH:
        if (batch := _regular(data)) is not None:
            return trajectory_arrays.from_array(batch, hints, name, form=form)._replace(canvas=canvas)
        data = data[0] if len(data) == 1 else data
    parts = _split(data, hints.order or order, name)
    notes: tuple[str, ...] = ()
    if sum(map(len, parts)) > MAX_POINTS:
        raise UserError(f"{name}: has over {MAX_POINTS} points; {THIN_OUT}")
    labels = [f"{name}, trajectory {i + 1}" if len(parts) > 1 else name for i in range(len(parts))]
    paths = [_marks(part, hints, label) for part, label in zip(parts, labels, strict=True)]
    rest = [path.at is None and path.times is None and len(path.xy) == 1 for path in paths]
    if any(rest) and not all(rest):  # DragNUWA's objects at rest
        paths = [Marks(np.repeat(path.xy, 2, 0)) if still else path for path, still in zip(paths, rest, strict=True)]
        notes += (f"{sum(rest)} of a single point, at rest",)
    if any(path.times is not None for path in paths) and not isinstance(parts[0][0], dict):
        notes += (THIRD,)
    if all(_is_turned(part, hints) for part in parts):
        what = "KJNodes' normalized_str is turned round; if this is one, give its coord_str"
        warnings.warn(f"{name}: {what}", stacklevel=5)
    return Drawing(paths, form, canvas, notes)


def _array(data: Any, name: str) -> np.ndarray:
    """An array of NumPy, JAX or PyTorch, from whatever device, as NumPy's."""
    try:
        data = data.detach().cpu() if hasattr(data, "detach") else data
        if "bfloat16" in str(getattr(data, "dtype", "")):
            data = data.float() if hasattr(data, "detach") else data.astype(np.float32)
        return np.asarray(data)
    except (TypeError, RuntimeError) as e:
        raise UserError(f"{name}: cannot become an array of NumPy; give it as one") from e


def _is_turned(part: Any, hints: Hints) -> bool:
    """Whether points may be KJNodes' normalized_str, which nothing tells from fractions of the frame."""
    keyed = all(isinstance(point, dict) and set(point) == {"x", "y"} for point in part)
    return keyed and hints.canvas == (1, 1) and all(0 <= value <= 1 for point in part for value in point.values())


def _from_dict(data: dict, hints: Hints, name: str, form: str, canvas: Canvas | None) -> Drawing:
    if "trajectories" in data and not set(data) - {"canvas", "trajectories"}:
        return from_data(data["trajectories"], hints, name, form, _own_canvas(data, name) or canvas, "nt")
    if data and all(isinstance(each, dict) and "trajectory" in each for each in data.values()):
        if odd := {key for each in data.values() for key in each} - {"comment", "mask_name", "trajectory"}:
            raise UserError(f"{name}: has the key {min(map(str, odd))}, which is not known; leave it out")
        inside = [each["trajectory"] for each in data.values()]  # DragAnything's
        return from_data(inside, hints, name, f"{form} of DragAnything", canvas, "nt")
    if set(data) <= {*PLACES, *SEEN, *HIDDEN} and set(data) & {*SEEN, *HIDDEN, "tracks", "pred_tracks", "track_path"}:
        try:
            arrays = {key: _array(value, name) for key, value in data.items()}
        except ValueError as e:
            raise UserError(f"{name}: {POINTS}") from e
        if any(each.dtype.hasobject for each in arrays.values()):
            raise UserError(f"{name}: {POINTS}")
        return trajectory_arrays.from_named(arrays, hints, name, form, tuple(data))._replace(canvas=canvas)
    keys = ", ".join(map(str, data))[:80] or "(none)"
    if data and all(str(key).startswith("frame") and isinstance(each, dict) for key, each in data.items()):
        raise UserError(f"{name}: has the keys {keys}: poses of a camera, no points; give [[x, y], ...]")
    raise UserError(f'{name}: has the keys {keys}; the form is {{"canvas": [width, height], "trajectories": [...]}}')


def _own_canvas(data: dict, name: str) -> Canvas | None:
    if "canvas" not in data:
        return None
    try:
        width, height = (float(side) for side in data["canvas"])
    except (TypeError, ValueError, OverflowError):
        width = height = np.nan
    if not (np.isfinite([width, height]).all() and width > 0 and height > 0):
        raise UserError(f"{name}: the canvas is not two positive numbers; write it as [width, height]")
    return width, height


def _depth(data: Any) -> int:
    """Of the lists in which the first number stands; a point by name counts as one: 2 of a path, 3 of several."""
    if isinstance(data, dict):
        return 1
    return 1 + _depth(data[0]) if isinstance(data, SEQUENCE) and len(data) else 0


def _regular(data: Any) -> np.ndarray | None:
    """Lists of as many points each as one array; None for others."""
    try:
        array = np.asarray(data)
    except ValueError:
        return None
    return array if array.ndim > 2 and array.shape[-1] in (2, 3) and array.dtype.kind in "fiu" else None


def _split(data: list, order: str, name: str) -> list:
    """The paths in `data`: it is one, or a list of them."""
    nested = bool(data) and isinstance(data[0], SEQUENCE) and len(data[0]) > 0
    parts = list(data) if nested and isinstance(data[0][0], (*SEQUENCE, dict)) else [data] if data else []
    if not parts:
        raise UserError(f"{name}: holds no points; write at least 2")
    if not all(isinstance(part, SEQUENCE) for part in parts):
        raise UserError(f"{name}: mixes points and trajectories; write a list of lists of points")
    if not order and nested and (array := _regular(parts)) is not None:
        trajectory_arrays.check_lists(array, name)
    if order == "tn" and nested:
        if len({len(part) for part in parts}) > 1:
            raise UserError(f"{name}: has frames with more points than others; leave --trajectory_axes=tn out")
        parts = [list(path) for path in zip(*parts, strict=True)]
    return parts


def _marks(part: Any, hints: Hints, name: str) -> Marks:
    """One path, checked, in canvas units."""
    if len(part) == 0:
        raise UserError(f"{name}: holds no points; write at least 2")
    if isinstance(part[0], dict):
        return _keyed(part, name)
    try:
        if len(part[0]) in (12, 16, 19) and not isinstance(part[0], str):
            raise UserError(f"{name}: has {len(part[0])} numbers a row: poses of a camera; give points [[x, y], ...]")
        points = np.asarray(part)
        fits = points.ndim == 2 and points.shape[1] in (2, 3) and points.dtype.kind in "fiu"
    except (ValueError, TypeError) as e:
        if isinstance(e, UserError):
            raise
        fits = False
    if not fits:
        raise UserError(f"{name}: {POINTS}")
    points = points.astype(np.float64)
    xy, third, kind = points[:, :2], points[:, 2:], hints.values[2:] or "t"
    finite(points, name)
    trajectory_arrays.warn_of_corner(xy, name)
    xy = xy[:, ::-1] if hints.values.startswith("yx") else xy
    if kind == "v" and third.size:
        xy = np.where(third > 0, xy, np.nan)
    return Marks(xy, times=check_times(third[:, 0], name) if third.size and kind == "t" else None)


def _keyed(part: Any, name: str) -> Marks:
    """Points as dicts, all with the same keys."""
    keys = list(part[0])
    if not {"x", "y"} <= set(keys) or not all(isinstance(p, dict) and p.keys() == part[0].keys() for p in part):
        raise UserError(f"{name}: {POINTS}")
    if odd := [str(key) for key in keys if key not in ("x", "y", *TIME, *FRAME, *BESIDE, *SEEN, *HIDDEN)]:
        raise UserError(f"{name}: points have the key {odd[0][:40]}, which is not known; leave it out, or call times t")
    try:
        columns = {key: np.asarray([p[key] for p in part]) for key in keys}
        if any(each.ndim != 1 or each.dtype.kind not in "fiub" for each in columns.values()):
            raise ValueError
    except ValueError:
        raise UserError(f"{name}: {POINTS}") from None
    return from_columns(columns, name)


def from_columns(columns: dict[str, np.ndarray], name: str) -> Marks:
    """x and y with what else is known of each point, by name."""
    xy = np.stack([columns["x"], columns["y"]], -1).astype(np.float64)
    hidden = np.zeros(len(xy), bool)
    for key in columns.keys() & {*SEEN, *HIDDEN}:
        hidden |= columns[key] == (1 if key in HIDDEN else 0)
    finite(xy[~hidden], name)
    xy[hidden] = np.nan
    times = [columns[key].astype(np.float64) for key in TIME if key in columns]
    frames = [columns[key].astype(np.float64) for key in FRAME if key in columns]
    if len(times) + len(frames) > 1:
        raise UserError(f"{name}: has two columns of time; leave one out")
    if frames and not (np.diff(frames[0]) > 0).all():
        raise UserError(f"{name}: frames do not rise; sort them, and name the column of the paths point_id")
    return Marks(xy, frames[0] if frames else None, check_times(times[0], name) if times else None)


def finite(points: np.ndarray, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(points).all(-1))
    if len(bad):
        raise UserError(f"{name}: point {bad[0] + 1} is not finite (NaN or infinity); correct or remove it")
