"""What is dropped on the canvas, taken for what it is; and pictures for the page, as addresses."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tora_jax.conditioning import images, motion_maps, trajectory, trajectory_hints, trajectory_pictures
from tora_jax.configs import sampling
from tora_jax.errors import UserError
from tora_jax.io.video import cover, image_size, probe, read_image, read_video, resize_crop

STRIP_SIDE, STRIP_FRAMES = 160, 24  # of the flow map that is shown while drawing
MOST_READINGS = 4  # that a person is asked to choose from
SHARED_BYTES = 2**20  # a larger file is no request
READING = threading.Lock()  # what catches warnings is one for all threads


def kind(path: str) -> str:
    """ "picture", "clip", "request" or "paths", by the content; "paths" is also what nobody can read.

    Raises:
      UserError: a file that is named as a picture or a clip is none.
    """
    named = {**dict.fromkeys(images.STILLS, "picture"), ".mp4": "clip", ".webm": "clip", ".mov": "clip"}
    if _is_request(path):
        return "request"
    for found, read in (("picture", image_size), ("clip", probe)):
        if found == "picture" and path.lower().endswith(".gif"):
            continue
        try:
            read(path)
            return found
        except UserError:
            if named.get(Path(path).suffix.lower()) == found:
                raise
    return "paths"


def _is_request(path: str) -> bool:
    if Path(path).stat().st_size > SHARED_BYTES:
        return False
    try:
        return "prompt" in json.loads(Path(path).read_text())
    except (ValueError, RecursionError, TypeError):  # another kind of file
        return False


def picture(path: str, size: tuple[int, int]) -> tuple[str, list[float]]:
    """An uploaded picture, or a clip's first frame, as the model will see it, as an address; and what the crop leaves.

    Returns:
      the address, and left, top, right, bottom in 0..1 of the picture.
    """
    with named(path):
        still = read_image(path) if kind(path) != "clip" else read_video(path, max_frames=1)[0][0]
    high, wide = size
    height, width, top, left = cover(*still.shape[:2], high, wide)
    seen = [left / width, top / height, (left + wide) / width, (top + high) / height]
    return address(resize_crop(still, high, wide)), seen


# ----------------------------------------------------------------------------------------------------------
# Files of paths
# ----------------------------------------------------------------------------------------------------------


def readings(
    path: str, size: tuple[int, int], num_frames: int, picture: str | None = None, said: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The ways to read a file of paths: one where it is clear, several where a person has to choose.

    Args:
      size: (height, width) of the video.
      picture: the first frame; paths that were drawn on it stay on it.
      said: settings of reading (`sampling.READING`), which settle it.

    Returns:
      for each: "said" (settings), "line" (how it was read), "paths" (points in 0..1 of the video's frame).

    Raises:
      UserError: nobody can read it.
    """
    said = {name: value for name, value in (said or {}).items() if value}
    if not all(name in sampling.READING and isinstance(value, str) for name, value in said.items()):
        raise UserError(f"settings of reading are {', '.join(sampling.READING)}, and texts")
    try:
        sure = _read(path, size, num_frames, picture, said)
    except UserError as error:
        found = [] if said else _all(path, size, num_frames, picture)
        if not found:
            raise error from None
        return found
    # On the photo, or on the whole frame: the file does not say.
    loose = picture and not said and "the whole frame" in sure["line"]
    other = _all(path, size, num_frames, picture, on_picture=True) if loose else []
    return [sure, *(each for each in other if each["paths"] != sure["paths"])]


def _all(
    path: str, size: tuple[int, int], num_frames: int, picture: str | None, on_picture: bool = False
) -> list[dict[str, Any]]:
    """All readings that differ, of those that a person could mean."""
    canvases = ["image", "image:1x1"] if picture else []
    canvases += [] if on_picture else [None, "1x1", f"{size[1]}x{size[0]}", "256x256:clip"]
    found: list[dict[str, Any]] = []
    for axes in ([None], ["nt", "tn"]):  # the order of axes only where it is in question
        for canvas, order in itertools.product(canvases, axes):
            said = {"trajectory_canvas": canvas, "trajectory_axes": order}
            try:
                each = _read(path, size, num_frames, picture, {k: v for k, v in said.items() if v})
            except UserError:
                continue
            if all(each["paths"] != other["paths"] for other in found):
                found.append(each)
        if found:
            break
    return found[:MOST_READINGS]


def _read(
    path: str, size: tuple[int, int], num_frames: int, picture: str | None, said: Mapping[str, str]
) -> dict[str, Any]:
    with named(path, *filter(None, [picture])), READING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hints = trajectory_hints.hints(*(said.get(name) for name in sampling.READING), num_frames=num_frames)
        pictures = _pictures(picture) if picture else {}
        (reading,) = trajectory.readings([path], hints, pictures)
        paths = reading.trajectories
        paths, words = trajectory_pictures.place(paths, [reading.drawn] * len(paths), size)
        warned = [str(each.message) for each in caught if path in str(each.message)]  # others' are caught as well
        lines = [f"{path}: {reading.line}", *words, *warned]
    points = [np.column_stack([each[:, :2].clip(0, 1), each[:, 2:]]).tolist() for each in paths]
    return {"said": dict(said), "line": _by_name("; ".join(lines), path, picture or path), "paths": points}


def _pictures(path: str) -> dict[str, tuple[int, int]]:
    return images.sizes([images.Condition(0, path)], 1)


# ----------------------------------------------------------------------------------------------------------
# Pictures for the page
# ----------------------------------------------------------------------------------------------------------


def flow_strip(points: Sequence[trajectory.Trajectory], size: tuple[int, int], num_frames: int) -> tuple[str, int]:
    """The flow map of a drawing, small: its frames one under the other, as an address; and their number."""
    height, width = size
    scale = min(STRIP_SIDE / min(height, width), 1)
    frames = min(num_frames, STRIP_FRAMES)
    tracks = trajectory.tracks(points, frames)
    maps = motion_maps.displacement_maps(tracks, round(height * scale), round(width * scale))
    return address(np.concatenate(motion_maps.flow_to_rgb(maps))), frames


def address(picture: UInt8[np.ndarray, "h w 3"]) -> str:
    """A picture as an address, with the picture in it."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "WEBP", quality=85, method=0)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


# ----------------------------------------------------------------------------------------------------------
# Names
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def named(*paths: str) -> Iterator[None]:
    """What goes wrong inside has the names of files in place of where they lie."""
    try:
        yield
    except UserError as error:
        raise UserError(_by_name(str(error), *paths)) from None


def _by_name(text: str, *paths: str) -> str:
    """Names of files in place of where they lie."""
    for path in paths:
        text = text.replace(str(path), Path(path).name)
    return text
