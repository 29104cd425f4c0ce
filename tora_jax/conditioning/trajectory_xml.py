"""Tracks in CVAT's XML (CVAT for video 1.1)."""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np

from tora_jax.conditioning.trajectory_hints import Canvas, Drawing, Marks
from tora_jax.errors import UserError

NO_POINT = ("polygon", "polyline", "mask", "cuboid", "skeleton")
EXPORT = 'export it as "CVAT for video 1.1"'


def from_text(text: str, name: str) -> Drawing:
    """Boxes become their centres; each point of a track of points is a path. The text names size and frames.

    Raises:
      UserError: it is other XML, or has no tracks of boxes or points.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:  # expands to anything
        raise UserError(f"{name}: is XML with definitions of its own, which is not read; {EXPORT}")
    try:
        root = ElementTree.fromstring(text.encode())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{name}: is broken XML ({error}); {EXPORT} again") from None
    if root.tag != "annotations":
        raise UserError(f"{name}: is XML of another kind ({root.tag[:40]}); of CVAT's annotations, {EXPORT}")
    if len(root.findall(".//original_size")) > 1:
        raise UserError(f"{name}: holds several tasks (a whole project?); export one of them")
    tracks = root.findall("track")
    if not tracks:
        raise UserError(f"{name}: holds no tracks (CVAT for images?); {EXPORT}")
    paths, without = [], 0
    try:
        for track in tracks:
            found = _paths(track, name)
            paths += found
            without += not found
        canvas, span = _canvas(root), _span(root)
    except UserError:
        raise
    except (ValueError, TypeError):
        raise UserError(f"{name}: has a number that is none; {EXPORT} again") from None
    if not paths:
        raise UserError(f"{name}: has shapes without a centre ({', '.join(NO_POINT)}); track boxes or points")
    notes = (f"{without} track{'s' * (without > 1)} of other shapes left out",) if without else ()
    return Drawing(paths, "CVAT's XML, centres of boxes", canvas, notes, span, of_video=True)


def _paths(track: ElementTree.Element, name: str) -> list[Marks]:
    frames, places = [], []
    for shape in track:
        if shape.tag in NO_POINT:
            return []
        if shape.tag not in ("box", "points", "ellipse"):
            continue
        value = shape.attrib
        if shape.tag == "box":
            left, top, right, bottom = (float(value.get(key, "?")) for key in ("xtl", "ytl", "xbr", "ybr"))
            xy = [[(left + right) / 2, (top + bottom) / 2]]
        elif shape.tag == "ellipse":
            xy = [[float(value.get("cx", "?")), float(value.get("cy", "?"))]]
        else:
            xy = [[float(number) for number in point.split(",")] for point in value.get("points", "?").split(";")]
        frames.append(int(value.get("frame", "?")))
        places.append(np.full((len(xy), 2), np.nan) if value.get("outside") == "1" else np.array(xy))
    if not frames:
        return []
    if len({place.shape for place in places}) > 1:
        raise UserError(f"{name}: a track changes its number of points; cut it in two")
    order = np.argsort(frames, kind="stable")
    at, xy = np.array(frames, np.float64)[order], np.stack(places)[order]
    if (np.diff(at) <= 0).any():
        raise UserError(f"{name}: a track has two shapes in one frame; {EXPORT} again")
    return [Marks(xy[:, i], at) for i in range(xy.shape[1])]


def _canvas(root: ElementTree.Element) -> Canvas | None:
    size = root.find(".//original_size")
    if size is None:
        return None
    width, height = (float(size.findtext(side, "?")) for side in ("width", "height"))
    if not 0 < min(width, height) < np.inf:
        raise ValueError
    return width, height


def _span(root: ElementTree.Element) -> tuple[float, float] | None:
    ends = [root.findtext(f".//{end}") for end in ("start_frame", "stop_frame")]
    return (float(ends[0]), float(ends[1])) if all(ends) else None
