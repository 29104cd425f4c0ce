"""Pictures and clips given for frames of a video."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.video import STILLS, image_size, probe, read_image, read_video, resize_crop

STILL_FPS = 120.0  # what the reference says of a single frame (opensora/datasets/__init__.py, IMG_FPS)
MAX_CLIP_PIXELS = 10**9  # decoded for one clip, 3 GB; a small file can hold any number of frames

Pixels = UInt8[np.ndarray, "... h w 3"]


class Given(NamedTuple):
    """A visual condition.

    Attributes:
      pixels: a picture [h, w, 3], or a clip [n, h, w, 3] whose first frame stands at the condition's frame.
      edit: Open-Sora's edit ratio. 0 keeps the pixels; up to 1, they are denoised for that share of the way from
        noise, and may change.
    """

    pixels: Pixels
    edit: float = 0.0


Images = Mapping[int, Pixels | Given]  # by frame number


class Condition(NamedTuple):
    """A picture or clip asked for at a frame.

    Attributes:
      frame: of the video; a negative number counts from the end, and a clip ends there.
      source: a file, or uint8 pixels [h, w, 3] or [n, h, w, 3].
      edit: 0 (keep) to 1 (make anew); see `Given`.
    """

    frame: int
    source: str | os.PathLike | np.ndarray
    edit: float = 0.0


def parse(given: Any) -> Condition:
    """ "frame=file" or "frame=file:edit" -> the condition.

    Raises:
      UserError: it has another form.
    """
    form = f"--condition {given}: write frame=image_or_video, or frame=image_or_video:edit_ratio, such as 0=photo.png"
    if not isinstance(given, str):
        raise UserError(form)
    frame, _, source = given.partition("=")
    try:
        number = int(frame)
    except ValueError:
        raise UserError(form) from None
    file, _, edit = source.rpartition(":")
    if file and not os.path.lexists(source):
        try:
            source, ratio = file, float(edit)
        except ValueError:
            ratio = 0.0  # a colon in a name
    else:
        ratio = 0.0
    if not source:
        raise UserError(form)
    if not 0 <= ratio <= 1:
        raise UserError(f"--condition {given}: the edit ratio is {ratio:g}; give 0 (keep) to 1 (make it anew)")
    return Condition(number, source, ratio)


def check(conditions: Sequence[Condition], num_frames: int) -> None:
    """Checks frame numbers, before anything is read.

    Raises:
      UserError: for a frame that the video does not have, or that has two conditions.
    """
    taken = set()
    for frame, source, _ in conditions:
        at = frame + num_frames if frame < 0 else frame
        name = "pixels" if isinstance(source, np.ndarray) else source
        if not 0 <= at < num_frames:
            raise UserError(f"{name}: is given for frame {frame}; the video has frames 0 to {num_frames - 1}")
        if at in taken:
            raise UserError(f"{name}: frame {at} has a picture already; give one of them")
        taken.add(at)


def sizes(conditions: Sequence[Condition], num_frames: int) -> dict[str, tuple[int, int]]:
    """(height, width) of what is given, upright, by its name; the earliest frame first.

    Raises:
      UserError: for a file that cannot be read.
    """
    found: dict[str, tuple[int, int]] = {}
    for frame, source, _ in sorted(conditions, key=lambda each: each.frame % num_frames):
        if isinstance(source, np.ndarray):
            found.setdefault(f"the picture for frame {frame}", source.shape[-3:-1])
        else:
            found.setdefault(str(source), _size(files.path(source)))
    return found


def _size(path: Path) -> tuple[int, int]:
    """Of a picture the header is enough; the others are read."""
    if path.suffix.lower() not in STILLS and path.is_file():
        _, height, width, _ = probe(path)
        return height, width
    return image_size(path)


def read(conditions: Sequence[Condition], num_frames: int, fps: float) -> dict[int, Given]:
    """Reads the pixels, by the frame at which they start; a clip plays at the video's own frames per second.

    Raises:
      UserError: for a file that cannot be read, or a clip longer than the frames left for it.
    """
    check(conditions, num_frames)
    found = {}
    for frame, source, edit in conditions:
        at = frame + num_frames if frame < 0 else frame
        room = at + 1 if frame < 0 else num_frames - at
        pixels = source if isinstance(source, np.ndarray) else _read(files.path(source), room, fps)
        if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise UserError(f"a condition is {pixels.dtype} {pixels.shape}; give uint8 [h, w, 3] or [n, h, w, 3]")
        count = len(pixels) if pixels.ndim == 4 else 1
        if count > room:
            raise UserError(
                f"the clip for frame {frame} is longer than the {room} frames there are for it; "
                "cut it, or make a longer video (--num_frames)"
            )
        start = at - count + 1 if frame < 0 else at
        if start in found:
            raise UserError(f"frame {start} has a picture already; give one of them")
        found[start] = Given(pixels, edit)
    return found


def _read(path: Path, room: int, fps: float) -> np.ndarray:
    if path.suffix.lower() in STILLS or not path.is_file():
        return read_image(path)
    count, height, width, rate = probe(path)
    wanted, most = math.ceil((room + 1) * rate / fps), MAX_CLIP_PIXELS // (height * width)
    if (needed := min(count, wanted)) > most:
        raise UserError(f"{path}: {needed} frames of {width}x{height} are too much; cut it to {most}, or shrink it")
    frames, _ = read_video(path, max_frames=min(wanted, most))  # a file may have more frames than it declares
    index = np.round(np.arange(math.ceil(len(frames) * fps / rate)) * rate / fps).astype(int)
    return frames[index[index < len(frames)]]


def fit(images: Mapping[int, Given], size: tuple[int, int]) -> dict[int, Given]:
    """Scales and crops the given pixels to the video's (height, width)."""
    return {frame: Given(resize_crop(pixels, *size), edit) for frame, (pixels, edit) in images.items()}
