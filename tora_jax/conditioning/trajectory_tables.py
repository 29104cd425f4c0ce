"""Points in lines of text: one path without a header, tables by their header, boxes, After Effects' keyframes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tora_jax.conditioning.trajectory_arrays import HIDDEN, SEEN, check_times
from tora_jax.conditioning.trajectory_hints import MAX_POINTS, THIN_OUT, THIRD, Drawing, Hints, Marks
from tora_jax.conditioning.trajectory_json import from_columns
from tora_jax.errors import UserError

COLUMNS = {  # by other names, without case, spaces and underscores
    "x": ("x", "xpixels", "posx", "positionx", "px", "cx", "centerx", "xcenter", "xpx"),
    "y": ("y", "ypixels", "posy", "positiony", "py", "cy", "centery", "ycenter", "ypx"),
    "left": ("left", "xmin", "x1", "xtl", "bbleft", "bboxleft"),
    "top": ("top", "ymin", "y1", "ytl", "bbtop", "bboxtop"),
    "right": ("right", "xmax", "x2", "xbr"),
    "bottom": ("bottom", "ymax", "y2", "ybr"),
    "width": ("width", "w", "bbwidth", "bboxwidth"),
    "height": ("height", "h", "bbheight", "bboxheight"),
    "frame": ("frame", "frameid", "framenumber", "frameindex", "frameidx", "frames"),
    "time": ("t", "time"),
    "id": ("id", "pointid", "trackid", "trackerid", "objectid", "point", "track", "object", "trajectory", "path"),
    "visible": SEEN,
    "occluded": HIDDEN,
    "": ("confidence", "conf", "score", "likelihood", "isreferenceframe", "classid", "class", "label", "z", "depth"),
}
NAMES = {other.replace("_", ""): name for name, others in COLUMNS.items() for other in others}
TRUTH = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "": np.nan}
NO_PLACES = ("Anchor Point", "Offset", "Size")  # of After Effects, in pixels all the same
LIKELY = 0.6  # pcutoff, DeepLabCut's own
FORM = "write two numbers x,y"
FRAMES = "add a column frame (supervision: sink.append(detections, custom_data={'frame': index}))"
HEADER = "write a header that names the columns, such as x,y or frame,x,y"

Rows = list[tuple[int, list[str]]]  # number of the line, its cells


def from_text(text: str, hints: Hints, name: str) -> Drawing:
    """Lines of text -> paths.

    Raises:
      UserError: for a line that is no point, for columns that are not known, and where the numbers allow two readings.
    """
    lines = text.splitlines()
    if len(lines) > 2 * MAX_POINTS:  # blank ones are forgiven
        raise UserError(f"{name}: has over {MAX_POINTS} points; {THIN_OUT}")
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    first = filled[0][1].strip()
    if first.startswith(("http://", "https://")):
        raise UserError(f"{name}: holds poses of a camera (RealEstate10K), no paths of points; give lines x,y")
    if first.startswith("Adobe After Effects"):
        return _after_effects(filled, name)
    comma = next((mark for mark in ("\t", ";", ",") if mark in first), None)
    rows = [(number, _cells(line, comma)) for number, line in filled]
    head = rows[0][1][:-1] if len(rows[0][1]) > 2 and not rows[0][1][-1] else rows[0][1]
    rows = [(number, cells[: len(head)] if not any(cells[len(head) :]) else cells) for number, cells in rows]
    numbers = [_number(cell) is not None for cell in head]
    if len(head) > 6 and not numbers[0] and all(numbers[1:]):
        return _tap_vid(rows, name)
    if head[0].lower() == "scorer":
        return _deep_lab_cut(rows, name)
    if len(head) > 1 and not any(numbers):
        return _table(rows, comma, hints, name)
    return _headless(rows, filled, hints, name)


def _cells(line: str, comma: str | None) -> list[str]:
    cells = [cell.strip().strip("\"'") for cell in (line.split(comma) if comma else line.split())]
    if comma != "," and "." not in line:  # 25,6;64,0
        cells = [cell.replace(",", ".") for cell in cells]
    return cells


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)  # Python's 1_000
    except ValueError:
        return None


def _headless(rows: Rows, filled: Sequence[tuple[int, str]], hints: Hints, name: str) -> Drawing:
    count = len(rows[0][1])
    if count in (12, 16, 19):
        raise UserError(f"{name}: has {count} numbers a line: poses of a camera, no paths of points; give lines x,y")
    values = []
    for (number, cells), (_, line) in zip(rows, filled, strict=True):
        found = [_number(cell) for cell in cells]
        if None in found or len(found) != count or count < 2:
            raise UserError(f"{name}, line {number}: {line.strip()[:40]!r} is not a point; {FORM}")
        values.append(found)
    points = np.array(values, np.float64)
    if len(points) > MAX_POINTS:
        raise UserError(f"{name}: has over {MAX_POINTS} points; {THIN_OUT}")
    if 7 <= count <= 10 and (points[:, :2] % 1 == 0).all() and (points[:, 4:6] > 0).all():
        if (points[:, 1] < 0).any():
            raise UserError(f"{name}: holds boxes without tracks (id -1); give a tracker's result")
        columns = dict(zip(("frame", "id", "left", "top", "width", "height"), points.T, strict=False))
        return Drawing(_tracks(columns, name), "boxes of MOT, their centres", of_video=True)
    if count > 3:
        raise UserError(f"{name}: has {count} numbers a line and no header; {HEADER}")
    counts = len(points) > 2 and (points[:, 0] % 1 == 0).all() and (np.diff(points[:, 0]) == 1).all()
    if counts and not hints.values:
        kinds = "frame,x or x,y" if count == 2 else "frame,x,y or x,y,t"
        raise UserError(f"{name}: the first number counts up one by one, so it may be {kinds}; {HEADER}")
    xy = points[:, 1::-1] if hints.values.startswith("yx") else points[:, :2]
    bad = np.flatnonzero(~np.isfinite(points).all(-1))
    if len(bad):
        raise UserError(f"{name}: point {bad[0] + 1} is not finite (NaN or infinity); correct or remove it")
    kind = hints.values[2:] or "t"
    if count == 2 or kind == "z":
        return Drawing([Marks(xy)], "lines of text")
    if kind == "v":
        return Drawing([Marks(np.where(points[:, 2:] > 0, xy, np.nan))], "lines of text")
    times = check_times(points[:, 2], name)
    return Drawing([Marks(xy, times=times)], "lines of text", notes=(THIRD,))


def _table(rows: Rows, comma: str | None, hints: Hints, name: str) -> Drawing:
    head = rows[0][1]
    names = [NAMES.get(re.sub(r"[\s_]|\(.*\)|\[.*\]", "", cell.lower())) for cell in head]
    if None in names:
        odd = head[names.index(None)][:40]
        if len(head) > 1 and not set(names) & {"x", "y", "left"}:
            raise UserError(f"{name}, line {rows[0][0]}: {odd!r} is not a point; {FORM}")
        raise UserError(f"{name}: the column {odd!r} is not known; leave it out, or name it as docs/sampling.md does")
    kept = [each for each in names if each]
    if len(set(kept)) < len(kept):
        raise UserError(f"{name}: two columns mean the same; keep one of each")
    boxes = {"left", "top"} <= set(kept) and ({"right", "bottom"} <= set(kept) or {"width", "height"} <= set(kept))
    if boxes and {"x", "y"} & set(kept):
        raise UserError(f"{name}: holds points x, y and boxes; leave the columns of one out")
    if {"x", "y", "width", "height"} & set(kept) == {"x", "y", "width", "height"}:
        raise UserError(f"{name}: x, y may be the corner or the centre of a box; name them left, top or leave w, h out")
    if ({"x", "y"} <= set(kept)) == boxes:
        raise UserError(f"{name}: the columns {', '.join(head)[:80]} hold no point x, y and no box; {HEADER}")
    if comma == ";" and kept == ["frame", "x", "y"] and hints.up is None:
        say = "say --trajectory_axes=up for that, or down"
        raise UserError(f"{name}: frame;x;y is Blender's export, where y runs upwards; {say}")
    values: dict[str, list[float]] = {each: [] for each in kept}
    for number, cells in rows[1:]:
        if len(cells) != len(head):
            raise UserError(f"{name}, line {number}: has {len(cells)} columns, not {len(head)}; correct it")
        for each, cell in zip(names, cells, strict=True):
            if each:
                value = TRUTH.get(cell.lower(), _number(cell))
                if value is None:
                    raise UserError(f"{name}, line {number}: {cell[:40]!r} is no number; correct it")
                values[each].append(value)
    if len(rows) == 1:
        raise UserError(f"{name}: holds no points; write at least 2")
    paths = _tracks({each: np.array(column) for each, column in values.items()}, name)
    form = f"a table of {', '.join(head)[:60]}" + (", centres of the boxes" if boxes else "")
    return Drawing(paths, form, of_video=boxes)


def _tracks(columns: dict[str, np.ndarray], name: str) -> list[Marks]:
    """Rows by name -> a path for each id, in their order; boxes become their centres."""
    if boxes := "left" in columns:
        left, top = columns.pop("left"), columns.pop("top")
        right, bottom = columns.pop("right", None), columns.pop("bottom", None)
        width, height = columns.pop("width", None), columns.pop("height", None)
        if any((end < start).any() for start, end in ((left, right), (top, bottom)) if end is not None):
            raise UserError(f"{name}: a box ends before it begins; if these are two points, write each in its own row")
        columns["x"] = (left + right) / 2 if right is not None else left + width / 2
        columns["y"] = (top + bottom) / 2 if bottom is not None else top + height / 2
    ids = columns.pop("id", np.zeros(len(columns["x"])))
    if np.isnan(ids).any():
        raise UserError(f"{name}: a row has no number of its path; give it one, or leave it out")
    if boxes and not columns.keys() & {"frame", "time"} and len(set(np.unique(ids, return_counts=True)[1])) > 1:
        raise UserError(f"{name}: some boxes are missing, and no column says in which frame; {FRAMES}")
    lost = np.isnan(columns["x"]) & np.isnan(columns["y"])
    columns["occluded"] = lost | (columns.get("occluded", np.zeros(len(ids))) == 1)
    if "visible" in columns:
        columns["visible"] = columns["visible"] > 0
    paths = []
    for each in sorted(set(ids.tolist())):
        chosen = {key: column[ids == each] for key, column in columns.items()}
        if "frame" in chosen:
            order = np.argsort(chosen["frame"], kind="stable")
            chosen = {key: column[order] for key, column in chosen.items()}
            if not np.isfinite(chosen["frame"]).all() or (np.diff(chosen["frame"]) <= 0).any():
                raise UserError(f"{name}: a frame is written twice; tell paths apart by a column point_id")
        paths.append(from_columns(chosen, name))
    return paths


def _tap_vid(rows: Rows, name: str) -> Drawing:
    """A track a row: clip (TAP-Vid Kinetics: with its start and end), then x, y, occluded again and again."""
    paths = []
    count = len(rows[0][1])
    skip = 3 if count % 3 == 0 else 1
    if len({tuple(cells[:skip]) for _, cells in rows}) > 1:
        raise UserError(f"{name}: holds tracks of several clips; keep the rows of one")
    for number, cells in rows:
        values = [_number(cell) for cell in cells[skip:]]
        if None in values or len(cells) != count or len(values) % 3:
            raise UserError(f"{name}, line {number}: is no row of TAP-Vid (x, y, occluded again and again); correct it")
        triples = np.array(values).reshape(-1, 3)
        paths.append(Marks(np.where(triples[:, 2:] > 0, np.nan, triples[:, :2])))
    return Drawing(paths, "TAP-Vid's table", (1, 1))


def _deep_lab_cut(rows: Rows, name: str) -> Drawing:
    """Rows of names (scorer, [individuals,] bodyparts, coords), then frame, x, y, likelihood again and again."""
    heads = {cells[0].lower(): cells[1:] for _, cells in rows[:4] if _number(cells[0]) is None}
    kinds, values = heads.get("coords", []), []
    if len(kinds) % 3 or [kind.lower() for kind in kinds] != ["x", "y", "likelihood"] * (len(kinds) // 3) or not kinds:
        raise UserError(f"{name}: DeepLabCut's table should have x, y, likelihood of each point; export it again")
    for number, cells in rows[len(heads) :]:
        found = [_number(cell) if cell else np.nan for cell in cells]
        if None in found or len(found) != len(kinds) + 1:
            raise UserError(f"{name}, line {number}: is no row of frame, then x, y, likelihood of each point")
        values.append(found)
    if not values:
        raise UserError(f"{name}: holds no points; write at least 2")
    table = np.array(values, np.float64)
    points = table[:, 1:].reshape(len(table), -1, 3)
    unsure = ~(points[..., 2] >= LIKELY)
    xy = np.where(unsure[..., None], np.nan, points[..., :2])
    if not np.isfinite(table[:, 0]).all() or (np.diff(table[:, 0]) <= 0).any():
        raise UserError(f"{name}: frames do not rise; sort them")
    notes = (f"likelihood under {LIKELY} = hidden",) if unsure.any() else ()
    paths = [Marks(xy[:, i], table[:, 0]) for i in range(xy.shape[1])]
    return Drawing(paths, "DeepLabCut's table", notes=notes, of_video=True)


def _after_effects(filled: Sequence[tuple[int, str]], name: str) -> Drawing:
    sides, paths, block, wanted, label = {}, [], [], False, [""]
    for _, line in [*filled, (0, "End of Keyframe Data")]:
        cells = line.strip().split("\t")
        if cells[0] in ("Source Width", "Source Height"):
            sides[cells[0]] = _number(cells[-1]) or 0
        row = [_number(cell) for cell in cells[:3]]
        if wanted and len(row) == 3 and None not in row:
            block.append(row)
            continue
        if block:
            paths.append((label, np.array(block, np.float64)))
            block = []
        if cells[0] == "Frame":
            places = [cell.strip() for cell in cells[1:3]] == ["X pixels", "Y pixels"]
            wanted = places and not label[-1].endswith(NO_PLACES)
        else:
            wanted, label = False, [cell.strip() for cell in cells]
    if not paths or min(sides.values(), default=0) <= 0 or len(sides) < 2:
        raise UserError(f"{name}: has no keyframes of a position in pixels; copy Position or a track point again")
    tracked = [label[:-1] for label, _ in paths if label[-1] == "Feature Center"]  # has its attach point beside it
    paths = [path for label, path in paths if label[-1] != "Attach Point" or label[:-1] not in tracked]
    marks = [from_columns(dict(zip(("frame", "x", "y"), path.T, strict=True)), name) for path in paths]
    return Drawing(marks, "After Effects' keyframes", (sides["Source Width"], sides["Source Height"]))
