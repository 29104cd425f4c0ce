"""Whether a file is a video that decodes, and where its scenes are: one pass over its frames, made small."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from jaxtyping import Bool, Float, Int

from tora_jax.io import clip_files
from tora_jax.io.clip_files import ClipError, Decoder, Source, find_rate
from tora_jax.io.display import Display

SHORT = 128  # pixels of the shorter side, for finding cuts and still frames
BLACK = 8.0  # of 255: the largest mean of a black frame
FROZEN = 0.05  # of 255: the largest mean difference between two frames that are the same
WINDOW = 2  # frames before and after a frame, whose change is the usual one there
CUT, HARD = 15.0, 27.0  # of 255: the least change, mean over hue, saturation and value, at a cut, and at a hard one


class UnusableError(Exception):
    """A file, or a clip of it, that cannot be used; the message is one of a few reasons, for counting."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Facts about a video file, found by decoding it.

    Attributes:
      height, width: of the picture as it is shown: upright, with square pixels.
      fps: its rate, or the usual one where it varies.
      seconds: length; the last frame counts as long as a usual one.
      codec: such as "h264".
      traits: its oddities, of "wrong name", "rotated" (or mirrored), "odd size", "10 bit", "not square", "interlaced",
        "HDR", "wide gamut", "variable rate".
      tick: seconds; the unit of time in the file.
      timed: whether the file says when each frame is shown; otherwise frames are counted.
    """

    height: int
    width: int
    fps: float
    seconds: float
    codec: str
    traits: tuple[str, ...]
    tick: float
    timed: bool

    def count(self, number: int) -> int:
        """The time of a frame in ticks, of a file without times."""
        return round(number / self.fps / self.tick)


class Look(NamedTuple):
    """Facts about each frame of a video.

    Attributes:
      ticks: the time at which it is shown.
      keys: whether it decodes by itself.
      black, frozen: whether it is black, or the same as the one before.
      cuts: numbers of the frames that begin a scene, without the first.
      gaps: numbers of the frames before which there is none for too long.
    """

    ticks: Int[np.ndarray, "t"]
    keys: Bool[np.ndarray, "t"]
    black: Bool[np.ndarray, "t"]
    frozen: Bool[np.ndarray, "t"]
    cuts: list[int]
    gaps: Sequence[int] = ()


def probe(path: str | os.PathLike, damaged_share: float, threshold: float) -> tuple[Video, Look]:
    """Decodes a video once and looks at each frame.

    Args:
      path: any file; its content counts, not its name.
      damaged_share: the largest share of the declared frames that may be damaged or missing.
      threshold: the change at a cut, in multiples of the usual one; see `find_cuts`.

    Raises:
      UnusableError: "empty", "not a video", "no video stream", "cut off", "damaged", "one frame", "changes its size",
        "rotated" (not by quarters), "colours" (of a rare kind), "not square" (at all).
    """
    with opened(path) as (container, stream):
        try:
            return _look(container, stream, Path(path), damaged_share, threshold)
        except ClipError as error:
            raise UnusableError(error.reason) from error
        except av.FFmpegError as error:
            raise UnusableError("damaged") from error


@contextlib.contextmanager
def opened(source: Source) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A container and its video stream, decoded in one thread: the pipeline has a process for each core.

    Raises:
      UnusableError: "empty", "not a video" or "no video stream".
    """
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(clip_files.open_clip(source, threads=1))
        except ClipError as error:
            raise UnusableError(error.reason) from error
        yield found


def find_cuts(changes: Float[np.ndarray, "t"], threshold: float) -> list[int]:
    """The numbers of the frames that begin a scene, without the first, however near each other or an end they are.

    A frame does if its change is at least CUT, and `threshold` times the usual one: the mean of up to WINDOW frames
    before and WINDOW after it; of the quieter side alone if the change is at least HARD, as where a shot of a frame or
    two lies between others.

    Args:
      changes: of each frame from the one before, see `Look`; that of the first is not used.

    Source: PySceneDetect's AdaptiveDetector, whose measure of change and values these are; HARD is its
      ContentDetector's. It passes over cuts near an end or within 15 frames of another, and so is not used itself.
    """
    found = []
    for frame in 1 + np.flatnonzero(changes[1:] >= CUT):
        sides = changes[max(frame - WINDOW, 1) : frame], changes[frame + 1 : frame + 1 + WINDOW]
        means = [side.mean() for side in sides if len(side)] or [0.0]
        usual = min(means) if changes[frame] >= HARD else np.mean(means)
        if changes[frame] >= threshold * usual:
            found.append(int(frame))
    return found


def _look(container, stream, path: Path, damaged_share: float, threshold: float) -> tuple[Video, Look]:
    declared = stream.average_rate or stream.guessed_rate or Fraction(25)
    decoder = Decoder(container, stream, survey=True)
    ticks, black, frozen, changes = [], [], [], []
    first = previous = display = None
    for frame in decoder:
        if first is None:
            first, display = frame, Display.of(stream, frame, path.name)
        elif (frame.height, frame.width) != (first.height, first.width):
            raise UnusableError("changes its size")
        ticks.append(frame.pts)
        picture = np.ascontiguousarray(display(frame, SHORT))
        pair = picture, cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
        change = [cv2.absdiff(*both).mean() for both in zip(pair, previous or pair, strict=True)]
        black.append(bool(picture.mean() < BLACK))
        frozen.append(previous is not None and bool(change[0] < FROZEN))
        changes.append(change[1])
        previous = pair
    if decoder.cut_off:
        raise UnusableError("cut off")
    promised = clip_files.promised_frames(stream)
    if not ticks or decoder.damaged > damaged_share * len(ticks) or len(ticks) < promised * (1 - damaged_share):
        raise UnusableError("damaged")
    if len(ticks) < 2:
        raise UnusableError("one frame")
    tick, timed = float(stream.time_base or 1 / declared), None not in ticks and bool((np.diff(ticks) > 0).all())
    keys = decoder.keys
    if not timed:
        declared = clip_files.counted_rate(stream) or declared
        ticks, keys = [round(i / declared / tick) for i in range(len(ticks))], set()
    rate = find_rate(np.array(ticks) * tick, float(declared))
    height, width = display.size(first)
    endings = container.format.extensions  # of some, none are known
    traits = {
        "wrong name": bool(endings) and path.suffix[1:].lower() not in endings,
        "rotated": display.turned,
        "odd size": bool(height % 2 or width % 2),
        "10 bit": any(component.bits > 8 for component in first.format.components),
        "not square": display.square != 1,
        "interlaced": decoder.interlaced,
        "HDR": bool(display.transfer),
        "wide gamut": bool(display.primaries and not display.transfer),
        "variable rate": not rate.constant,
    }
    video = Video(
        height=height,
        width=width,
        fps=rate.fps,
        seconds=float(ticks[-1] - ticks[0]) * tick + 1 / rate.fps,
        codec=stream.codec_context.name,
        traits=tuple(name for name, found in traits.items() if found),
        tick=tick,
        timed=timed,
    )
    seen = np.array(ticks, np.int64), np.isin(ticks, list(keys)), np.array(black), np.array(frozen)
    return video, Look(*seen, find_cuts(np.array(changes), threshold), rate.gaps.tolist())
