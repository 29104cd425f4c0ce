"""Arrays of points, alone or by name (.npy, .npz, Python's): axes, hidden points, what the third number is."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from tora_jax.conditioning import trajectory_pickles
from tora_jax.conditioning.trajectory_hints import THIRD, Drawing, Hints, Marks
from tora_jax.errors import UserError

MAX_BYTES = 256 * 2**20  # of an array inside of an .npz
POINTS = "every point must be two numbers x, y or three x, y, t; correct the others"
ORDERS = {"trajs_2d": "tn", "track_path": "tn", "target_points": "nt"}  # of the tools that use these names
PLACES = ("tracks", "pred_tracks", "track", "points", "trajectories", "trajectory", "array", "arr_0", *ORDERS)
SEEN = ("visibility", "visibilities", "visible", "visibles", "visibs", "vis", "pred_visibility", "track_visibility")
HIDDEN = ("occluded", "occlusion", "hidden")
IN_SPACE = ("tracks_XYZ", "coords", "tracks_3d")
CAMERA = "fx_fy_cx_cy"  # in pixels, of TAPVid-3D's tracks_XYZ, which are in the camera's axes at each frame
WANTED = {*PLACES, *SEEN, *HIDDEN, *IN_SPACE, CAMERA}
SAVEZ = "numpy.savez(FILE, tracks=tracks, visibility=visibility)"
CLEAR = 0.9  # of the pairs of steps speak for one order of axes, or against it
ENOUGH = 8  # steps each way, to let them speak


def read_npy(content: bytes, name: str) -> Any:
    """An .npy; of objects what they are, as `trajectory_pickles` reads them."""
    try:
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.hasobject:
            return trajectory_pickles.loads(content[file.tell() :], name)
        if int(np.prod(shape, dtype=object)) * dtype.itemsize > len(content):  # before anything is allocated
            raise ValueError("cut off")
        return np.load(io.BytesIO(content), allow_pickle=False)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, MemoryError, TokenError) as e:
        raise UserError(f"{name}: is not a readable array of numbers; save it again with numpy.save") from e


def read_npz(file: Path | io.BytesIO, hints: Hints, name: str, form: str = "NumPy's .npz") -> Drawing:
    """An .npz: places and visibility by their names; other arrays are passed over."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: info for info in archive.infolist()}
            found = {}
            for member, info in members.items():
                key = member.removesuffix(".npy")
                if key in WANTED:
                    if info.file_size > MAX_BYTES:
                        raise UserError(f"{name}: {key} is over {MAX_BYTES >> 20} MB; keep fewer tracks")
                    found[key] = read_npy(archive.read(member), name)
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError, ValueError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{name}: is not a readable .npz; save it again with numpy.savez") from e
    if len(found) == 1 and not isinstance(objects := next(iter(found.values())), np.ndarray):
        return from_objects(objects, hints, name, f"objects in {form}")
    return from_named(found, hints, name, form, tuple(key.removesuffix(".npy") for key in members))


def from_objects(data: Any, hints: Hints, name: str, form: str) -> Drawing:
    """What `trajectory_pickles` found: an array, arrays by name, one clip of TAP-Vid's, or ATI's bytes of an .npz."""
    if isinstance(data, bytes) and data.startswith(b"PK\x03\x04"):
        return read_npz(io.BytesIO(data), hints, name, f"an .npz in {form}")
    if isinstance(data, np.ndarray):
        return from_array(data, hints, name, form=form)
    if isinstance(data, list) and data and all(isinstance(each, np.ndarray) for each in data):
        paths = [path for each in data for path in from_array(each, hints, name).paths]
        return Drawing(paths, form)
    clips = list(data.values()) if isinstance(data, dict) and not WANTED & data.keys() else data
    if isinstance(clips, list) and clips and all(isinstance(each, dict) and WANTED & each.keys() for each in clips):
        if len(clips) > 1:
            which = ", ".join(data)[:60] if isinstance(data, dict) else "0, 1 ..."
            one = "numpy.savez(FILE, points=clip['points'], occluded=clip['occluded'])"
            raise UserError(f"{name}: holds {len(clips)} clips ({which}); save the one that you want: {one}")
        (data,) = clips
    if not isinstance(data, dict):
        raise UserError(f"{name}: holds no arrays of points; the form is {SAVEZ}")
    found = {key: each for key, each in data.items() if key in WANTED and isinstance(each, np.ndarray)}
    drawing = from_named(found, hints, name, form, tuple(data))
    if {"video", "points", "occluded"} <= data.keys() and np.abs(found["points"]).max(initial=0) <= 2:
        return drawing._replace(canvas=(1, 1), form=f"TAP-Vid's fractions in {form}")
    return drawing


def from_named(arrays: Mapping[str, np.ndarray], hints: Hints, name: str, form: str, keys: tuple[str, ...]) -> Drawing:
    """Arrays by the names that trackers and data sets use.

    Args:
      keys: all names, for the message.
    """
    if {"tracks_XYZ", CAMERA} <= arrays.keys():
        if hints.canvas is None and not hints.on:
            raise UserError(f"{name}: tracks_XYZ are projected into the video; name its size: --trajectory_canvas=WxH")
        xy = _projected(arrays["tracks_XYZ"], arrays[CAMERA], name)
        seen = {key: array for key, array in arrays.items() if key in (*SEEN, *HIDDEN)}
        return from_named({"trajs_2d": xy, **seen}, hints, name, "TAPVid-3D's points, projected", keys)
    if space := [key for key in IN_SPACE if key in arrays]:
        raise UserError(f"{name}: {space[0]} holds places in space; project them into the picture, and save x, y")
    places, seen = [key for key in PLACES if key in arrays], [key for key in (*SEEN, *HIDDEN) if key in arrays]
    if len(places) != 1 or len(seen) > 1:
        raise UserError(f"{name}: has the arrays {', '.join(keys)[:80] or '(none)'}; the form is {SAVEZ}")
    (key,) = places
    array = arrays[key]
    if not all(isinstance(arrays[each], np.ndarray) for each in (key, *seen)):
        raise UserError(f"{name}: {key} is no array of numbers; the form is {SAVEZ}")
    if key == "array" and array.ndim == 4 and array.shape[2:] == (1, 3) and np.isin(array[..., 2], (0, 8)).all():
        scaled, shown = array[..., :2] / 8, array[..., 2] > 0
        return from_array(scaled, hints, name, seen=shown, form="ATI's tracks")
    shown = None
    if seen:
        shown = visible(arrays[seen[0]], seen[0], name, hidden=seen[0] in HIDDEN)
    order = ORDERS.get(key, "nt" if key == "points" and seen and seen[0] == "occluded" else "")
    return from_array(array, hints, name, seen=shown, form=form, order=order)


def _projected(xyz: np.ndarray, camera: np.ndarray, name: str) -> np.ndarray:
    """Pixels of [t, n, 3] metres; what is behind the camera is hidden."""
    if not all(isinstance(each, np.ndarray) and each.dtype.kind in "fiu" for each in (xyz, camera)):
        raise UserError(f"{name}: tracks_XYZ and {CAMERA} are no arrays of numbers; the form is {SAVEZ}")
    if xyz.ndim != 3 or xyz.shape[-1] != 3 or camera.shape != (4,):
        raise UserError(f"{name}: tracks_XYZ {list(xyz.shape)} and {CAMERA} {list(camera.shape)} are not TAPVid-3D's")
    depth = xyz[..., 2:].astype(np.float64)
    return xyz[..., :2] / np.where(depth > 0, depth, np.nan) * camera[:2] + camera[2:]


def visible(array: np.ndarray, key: str, name: str, hidden: bool = False) -> np.ndarray:
    """Where points are seen; PointOdyssey's 2 is behind the camera.

    Raises:
      UserError: it is a confidence.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1, 2)).all():
        raise UserError(f"{name}: {key} is not of True and False; save it after the tool's threshold")
    return array == (0 if hidden else 1)


def from_array(
    array: np.ndarray,
    hints: Hints,
    name: str,
    seen: np.ndarray | None = None,
    form: str = "an array",
    order: str = "",
) -> Drawing:
    """One array: [p, 2 or 3], [n, p, ..] or [t, n, ..] as the hints say, [1, t, n, ..], [t, 1, ..], [n, t, 1, ..].

    Args:
      seen: where the points are visible; NaN is hidden in any case.
      order: what the name of the array says of its axes.

    Raises:
      UserError: for other shapes, and where the numbers allow two readings.
    """
    if array.dtype == bool:
        raise UserError(f"{name}: holds visibility and no places; give both in one file: {SAVEZ}")
    if array.ndim < 2 or array.ndim > 4 or array.shape[-1] not in (2, 3) or array.dtype.kind not in "fiu":
        raise UserError(f"{name}: {POINTS}")
    if not array.size:
        raise UserError(f"{name}: holds no points; write at least 2")
    array = array.astype(np.float64)  # a copy
    if seen is not None:
        if seen.size != array[..., 0].size or np.squeeze(seen).shape != np.squeeze(array[..., 0]).shape:
            raise UserError(f"{name}: visibility {list(seen.shape)} does not fit the places {list(array.shape)}")
        array[~seen.reshape(array.shape[:-1])] = np.nan
    if np.isinf(array).any():
        raise UserError(f"{name}: a point is not finite (infinity); correct or remove it")
    paths, read = _paths(array, hints, name, order)
    values = hints.values or "xy"
    if array.shape[-1] == 2 and len(values) > 2:
        raise UserError(f"{name}: points have two numbers, and --trajectory_axes names {', '.join(values)}; correct it")
    marks, notes = [], {read} - {""}
    for i, points in enumerate(paths):
        label = f"{name}, trajectory {i + 1}" if len(paths) > 1 else name
        xy, times = points[:, :2].copy(), None
        if array.shape[-1] == 3:
            kind = hints.values[2:] or "t"
            if kind == "t":
                times = check_times(points[:, 2], label)
                notes.add(THIRD)
            elif kind == "v":
                xy[~(points[:, 2] > 0)] = np.nan
        if values.startswith("yx"):
            xy = xy[:, ::-1]
        warn_of_corner(xy, label)
        marks.append(Marks(xy, times=times))
    return Drawing(marks, form, notes=tuple(notes))


def _paths(array: np.ndarray, hints: Hints, name: str, order: str) -> tuple[list[np.ndarray], str]:
    """The paths, and a word on the order of axes where only a custom settles it."""
    shape, custom = list(array.shape), ""
    if array.ndim == 4:
        if shape[0] == 1:
            array, custom = array[0], "tn"
        elif shape[2] == 1:
            array, custom = array[:, :, 0], "nt"
        else:
            raise UserError(f"{name}: has the shape {shape}; give [n, t, 2] or [t, n, 2] and --trajectory_axes")
    if array.ndim == 2:
        return [array], ""
    if 1 in array.shape[:2]:
        return [array.reshape(-1, array.shape[-1])], ""
    order, word, smooth = hints.order or order, "", _smoothness(array)
    if not order and custom and not (custom == "tn" and smooth > CLEAR):
        order, word = custom, f"axes {'1, t, n' if custom == 'tn' else 'n, t, 1'}"
    if not order and hints.canvas == (1, 1) and smooth > CLEAR:
        order, word = "nt", "axes n, t, as TAP-Vid's fractions have them"
    if not order:
        raise _two_readings(array, shape, name)
    return list(array if order == "nt" else array.swapaxes(0, 1)), word


def _two_readings(array: np.ndarray, shape: list[int], name: str) -> UserError:
    a, b = array.shape[:2]
    corners = "; of corners of boxes give the centres" if b == 2 else ""
    say = f"say --trajectory_axes=nt ({a} paths of {b} points) or tn ({b} paths of {a} points; tnyx: y before x)"
    return UserError(f"{name}: the shape {shape} has two readings; {say}{corners}")


def check_lists(array: np.ndarray, name: str) -> None:
    """Lists of lists of points [n, t, 2 or 3] are paths, unless they look like something else.

    Raises:
      UserError: they may be the points of each frame, or the corners of a box of each frame.
    """
    a, b = array.shape[:2]
    boxes = b == 2 and a > 2 and (array[:, 0, :2] < array[:, 1, :2]).all()
    if a > 1 and b > 1 and (boxes or _smoothness(array.astype(np.float64)) < 1 - CLEAR):
        raise _two_readings(array, list(array.shape), name)


def warn_of_corner(xy: np.ndarray, name: str) -> None:
    """Trackers write (0, 0) for points that are hidden."""
    zero = (xy == 0).all(-1)
    if not zero.all() and (zero.sum() > 1 or zero[1:-1].any()):
        what = f"{zero.sum()} of {len(xy)} points lie in the corner (0, 0)"
        warnings.warn(f"{name}: {what}; if they are hidden, use {SAVEZ}", stacklevel=6)


def _smoothness(array: np.ndarray) -> float:
    """The share of pairs in which the step along the second axis is the shorter; 0.5 where there are too few steps.

    Neighbours in time are nearer than neighbours in a list of tracks, in all but dense grids.
    """
    first, second = (np.linalg.norm(np.diff(array[..., :2], axis=axis), axis=-1).ravel() for axis in (0, 1))
    first, second = np.sort(first[np.isfinite(first)]), second[np.isfinite(second)]
    if min(len(first), len(second)) < ENOUGH:
        return 0.5
    shorter = len(first) - np.searchsorted(first, second, side="right")
    return float(shorter.mean() / len(first))


def check_times(t: np.ndarray, name: str) -> np.ndarray:
    """Times of a path, 0..1 of the video and rising.

    Raises:
      UserError: for other numbers, such as a depth or a confidence.
    """
    other = "or, if it is no time, leave it out (of an array: --trajectory_axes with xyz)"
    if not np.isfinite(t).all():
        raise UserError(f"{name}: a time is not finite; correct it, {other}")
    if t.min() < 0 or t.max() > 1:
        raise UserError(f"{name}: times run from {t.min():g} to {t.max():g}; scale t to 0..1, {other}")
    late = np.flatnonzero(np.diff(t) <= 0)
    if len(late):
        raise UserError(f"{name}: point {late[0] + 2} is not later than the one before; sort by rising t, {other}")
    return t
