"""Whether a file is a video that decodes, and where its scenes are: one pass over its frames, made small."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import Bool, Int
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from tora_jax.io.video import CONTAINERS

SHORT = 128  # pixels of the shorter side, for finding cuts and still frames
BLACK = 8.0  # of 255: the largest mean of a black frame
FROZEN = 0.05  # of 255: the largest mean difference between two frames that are the same
UNEVEN = 0.5  # of the usual time between two frames: the largest difference from it at a constant rate


class UnusableError(Exception):
    """A file, or a clip of it, that cannot be used; the message is one of a few reasons, for counting."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Facts about a video file, found by decoding it.

    Attributes:
      height, width: of the picture as it is shown: upright, with square pixels.
      fps: usual rate.
      seconds: length; the last frame counts as long as a usual one.
      codec: such as "h264".
      traits: its oddities, of "wrong name", "rotated", "odd size", "10 bit", "not square", "variable rate".
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
    """

    ticks: Int[np.ndarray, "t"]
    keys: Bool[np.ndarray, "t"]
    black: Bool[np.ndarray, "t"]
    frozen: Bool[np.ndarray, "t"]
    cuts: list[int]


def probe(path: str | os.PathLike, damaged_share: float, threshold: float) -> tuple[Video, Look]:
    """Decodes a video once and looks at each frame.

    Args:
      path: any file; its content counts, not its name.
      damaged_share: the largest share of the declared frames that may be damaged or missing.
      threshold: of PySceneDetect's AdaptiveDetector: the change at a cut, in multiples of the usual one; its own is 3.

    Raises:
      UnusableError: "empty", "not a video", "no video stream", "cut off", "damaged", "one frame", "changes its size".
    """
    path = Path(path)
    if not path.stat().st_size:
        raise UnusableError("empty")
    with opened(path) as (container, stream):
        try:
            return _look(container, stream, path, damaged_share, threshold)
        except av.FFmpegError as error:
            raise UnusableError("damaged") from error


@contextlib.contextmanager
def opened(source: str | os.PathLike | bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A container and its video stream, decoded in one thread: the pipeline has a process for each core.

    Raises:
      UnusableError: "not a video" or "no video stream".
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        container = av.open(file, options=CONTAINERS)
    except av.FFmpegError as error:
        raise UnusableError("not a video") from error
    with container:
        # A song's cover is a video stream, too.
        pictures = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
        if not streams:
            raise UnusableError("no video stream")
        streams[0].thread_count, streams[0].thread_type = 1, "NONE"
        yield container, streams[0]


def fit(height: int, width: int, short: int) -> tuple[int, int]:
    """Height and width made small enough for a shorter side of `short` pixels; never enlarged."""
    scale = min(short / min(height, width), 1)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def small(frame: av.VideoFrame, short: int, pixels: str = "rgb24") -> np.ndarray:
    """A frame's pixels with a shorter side of at most `short`, not turned upright."""
    height, width = fit(frame.height, frame.width, short)
    return frame.reformat(width, height, pixels, interpolation="AREA", threads=1).to_ndarray()


def _look(container, stream, path: Path, damaged_share: float, threshold: float) -> tuple[Video, Look]:
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    detector = AdaptiveDetector(adaptive_threshold=threshold)
    ticks, keys, cuts, black, frozen = [], set(), [], [], []
    first = previous = None
    missing, cut_off = 0, False

    def frames() -> Iterator[av.VideoFrame]:
        nonlocal missing, cut_off
        for packet in container.demux(stream):
            if packet.size:
                cut_off = packet.is_corrupt
            if packet.is_keyframe and packet.pts is not None:
                keys.add(packet.pts)
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                missing += 1
                continue
            for frame in decoded:
                missing += frame.is_corrupt
                yield frame

    for number, frame in enumerate(frames()):
        if first is None:
            first = frame
        elif (frame.height, frame.width) != (first.height, first.width):
            raise UnusableError("changes its size")
        ticks.append(frame.pts)
        picture = small(frame, SHORT, "bgr24")
        cuts += detector.process_frame(FrameTimecode(number, float(rate)), picture)
        black.append(bool(picture.mean() < BLACK))
        frozen.append(previous is not None and np.abs(picture.astype(np.int16) - previous).mean() < FROZEN)
        previous = picture.astype(np.int16)
    if cut_off:
        raise UnusableError("cut off")
    if not ticks or missing > damaged_share * len(ticks) or len(ticks) < stream.frames * (1 - damaged_share):
        raise UnusableError("damaged")
    if len(ticks) < 2:
        raise UnusableError("one frame")
    tick, timed = float(stream.time_base or 1 / rate), None not in ticks and bool((np.diff(ticks) > 0).all())
    if not timed:
        ticks, keys = [round(i / rate / tick) for i in range(len(ticks))], set()
    steps = np.diff(ticks)
    usual, square = float(np.median(steps)), float(stream.sample_aspect_ratio or 1)
    endings = container.format.extensions  # of some, none are known
    traits = {
        "wrong name": bool(endings) and path.suffix[1:].lower() not in endings,
        "rotated": bool(first.rotation % 360),
        "odd size": bool(first.height % 2 or first.width % 2),
        "10 bit": any(component.bits > 8 for component in first.format.components),
        "not square": square != 1,
        "variable rate": bool((np.abs(steps - usual) > UNEVEN * usual).any()),
    }
    step = usual if traits["variable rate"] else steps.mean()
    fps = float(Fraction(1 / (step * tick)).limit_denominator(1001))
    sides = first.height, round(first.width * square)
    height, width = sides[::-1] if round(first.rotation / 90) % 2 else sides
    video = Video(
        height=height,
        width=width,
        fps=fps,
        seconds=float(ticks[-1] - ticks[0]) * tick + 1 / fps,
        codec=stream.codec_context.name,
        traits=tuple(name for name, found in traits.items() if found),
        tick=tick,
        timed=timed,
    )
    numbers = [int(cut.frame_num) for cut in cuts]
    return video, Look(
        np.array(ticks, np.int64), np.isin(ticks, list(keys)), np.array(black), np.array(frozen), numbers
    )
