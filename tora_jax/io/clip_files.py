"""What lies in a video file: its stream, when each frame is shown, and the frames as they are decoded (PyAV)."""

from __future__ import annotations

import contextlib
import io
import itertools
import operator
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import av.filter
import numpy as np
from jaxtyping import Float, Int

from tora_jax.errors import UserError
from tora_jax.io import files

Source = str | os.PathLike | bytes

# FFmpeg goes by a file's content, whatever its name. This list leaves out playlists (concat, HLS, DASH ...): they name
# other files to read.
CONTAINERS = {
    "format_whitelist": "mov,matroska,webm,avi,gif,mpegts,mpeg,mpegvideo,m4v,h264,hevc,ivf,obu,flv,asf,ogg,mxf,nut,dv"
}
# The usual endings of such files.
ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".gif", ".ts", ".m2ts", ".mts", ".mpg"),
    *(".mpeg", ".m2v", ".vob", ".h264", ".264", ".hevc", ".265", ".ivf", ".obu", ".flv", ".wmv", ".asf", ".ogv"),
    *(".mxf", ".nut", ".dv"),
)
REORDERED = 32  # frames between the stored and the shown order; H.264 allows 16
STEADY = 0.25  # of the time between two frames: how far frames at a constant rate may lie from their times
EXACT = 1e-6  # of a rate: for rounding
USUAL = 25  # percentile of the times between frames: a quarter of the frames come at the usual rate, or faster
FASTEST = 120  # frames a second, of a variable rate
# The longest time from frame to frame at a variable rate: in seconds, or in usual times if that is more, so that one
# frame may be missing. With a longer one, motion is uneven.
GAP, MISSING = 0.085, 2.45


class ClipError(UserError):
    """A video file that cannot be used.

    Attributes:
      reason: why, in a few words, for counting.
    """

    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


def name_of(source: Source) -> str:
    """What messages call a source."""
    return "video" if isinstance(source, bytes) else str(source)


def _local(source: str | os.PathLike) -> Path | None:
    """The file, on this machine; None where there is none."""
    try:
        here = files.local(source)
    except FileNotFoundError:  # in a bucket
        return None
    return here if here.is_file() else None


@contextlib.contextmanager
def open_clip(source: Source, threads: int = 0) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A container and its first video stream.

    Args:
      source: path, or the file's bytes.
      threads: of the decoder; 0 = one for each core.

    Raises:
      ClipError: "empty", "not a video" or "no video stream".
    """
    name = name_of(source)
    here = source if isinstance(source, bytes) else _local(source)
    if here is None:
        raise ClipError(f"{name}: no such video file; check the path", "not a video")
    if not (len(here) if isinstance(here, bytes) else here.stat().st_size):
        raise ClipError(f"{name}: cannot be decoded as a video (it is empty); is the file complete?", "empty")
    try:
        file = io.BytesIO(here) if isinstance(here, bytes) else str(here)
        container = av.open(file, options=CONTAINERS)
    except (OSError, av.FFmpegError) as e:
        problem = f"{name}: cannot be decoded as a video ({e.strerror}); is the file complete?"
        raise ClipError(problem, "not a video") from e
    with container:
        # A song's cover is a video stream, too.
        pictures = av.stream.Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
        if not streams:
            raise ClipError(f"{name}: has no video in it; give a video file", "no video stream")
        stream = streams[0]
        stream.thread_count, stream.thread_type = threads, "NONE" if threads == 1 else "AUTO"
        yield container, stream


# ----------------------------------------------------------------------------------------------------------
# When frames are shown
# ----------------------------------------------------------------------------------------------------------


class Rate(NamedTuple):
    """The rate at which a clip is read.

    Attributes:
      fps: frames per second.
      constant: whether its frames lie at that rate; otherwise it is the usual rate of those that do not.
      gaps: numbers of the frames before which there is none for too long; empty at a constant rate.
    """

    fps: float
    constant: bool
    gaps: Int[np.ndarray, "_"]


def find_rate(times: Float[np.ndarray, "t"], declared: float) -> Rate:
    """The rate of frames.

    Args:
      times: seconds, rising.
      declared: the average rate by the file's word, taken where the frames agree with it; 0 = unknown.
    """
    none = np.zeros(0, int)
    if len(times) < 2:
        return Rate(declared, True, none)
    steps = np.diff(times)
    step = (times[-1] - times[0]) / len(steps)
    if np.abs((times - times[0]) / step - np.arange(len(times))).max() <= STEADY:
        agree = abs(declared * step - 1) * len(steps) <= 2 * STEADY
        return Rate(declared if agree else float(Fraction(1 / step).limit_denominator(1001)), True, none)
    usual = np.percentile(steps, USUAL)
    usual = max(steps[np.abs(steps / usual - 1) < 0.3].mean(), 1 / FASTEST)
    gaps = 1 + np.flatnonzero(steps > max(GAP, MISSING * usual))
    return Rate(float(Fraction(1 / usual).limit_denominator(1001)), False, gaps)


def at_rate(times: Float[np.ndarray, "t"], fps: float) -> Int[np.ndarray, "n"]:
    """At each tick of a constant rate, from the first frame to the last, the number of the frame that is nearest."""
    ticks = times[0] + np.arange(round((times[-1] - times[0]) * fps) + 1) / fps
    return np.searchsorted((times[1:] + times[:-1]) / 2, ticks)


class Timeline(NamedTuple):
    """Which frames of a file are read.

    Attributes:
      count: of the frames that are read.
      fps: their rate.
      numbers: of each frame that is read, that of the frame in the file, in the order in which they are shown; None
        where it is the same.
      promised: number of frames that the file promises; 0 = unknown.
    """

    count: int
    fps: float
    numbers: Int[np.ndarray, "n"] | None
    promised: int


def find_timeline(source: Source, container: av.container.InputContainer, stream: av.VideoStream) -> Timeline:
    """Finds out when the frames of a file are shown, from its index, or else from its packets.

    A file of a variable rate is read at its usual rate: at each of the times, the frame that is nearest. Frames that
    an edit list hides are none.

    Raises:
      ClipError: "variable rate", where there is no frame for too long; or "not a video", without frames or a rate.
    """
    name, declared = name_of(source), float(stream.average_rate or stream.guessed_rate or 0)
    index, tick = [entry.timestamp for entry in _index(stream) if not entry.is_discard], float(stream.time_base)
    promised = len(index) or stream.frames
    known = index if promised == stream.frames else []  # times of decoding, where no frame is hidden
    steps = set(map(operator.sub, known[1:], known))
    if declared and len(steps) == 1 and abs(declared * steps.pop() * tick - 1) < EXACT:
        return Timeline(promised, declared, None, promised)
    times = np.array(known, float) * tick
    # They are as even as the times of showing, and without B-frames the same. Packets are asked last: all are read.
    if not known or (stream.codec_context.has_b_frames and not find_rate(times, declared).constant):
        shown = _times(source)
        if None in shown:  # a bare stream: frames are counted
            return _checked(Timeline(len(shown), counted_rate(stream), None, promised), name)
        times = np.unique(shown) * tick
    rate = find_rate(times, declared)
    if len(rate.gaps):
        at, gap = times[rate.gaps[0] - 1] - times[0], times[rate.gaps[0]] - times[rate.gaps[0] - 1]
        problem = f"has a variable frame rate, and no frame for {gap:.2g} s after {at:.2f} s, so motion is uneven"
        way_out = f"make it even first (ffmpeg -i IN -vf minterpolate=fps={rate.fps:g} OUT)"
        raise ClipError(f"{name}: {problem}; {way_out}", "variable rate")
    numbers = None if rate.constant else at_rate(times, rate.fps)
    return _checked(Timeline(len(times) if rate.constant else len(numbers), rate.fps, numbers, promised), name)


def counted_rate(stream: av.VideoStream) -> float:
    """Frames per second of a stream without times; 0 = unknown."""
    # The average of a bare stream is FFmpeg's 25, whatever the stream says; the guess goes by the stream.
    return float(stream.guessed_rate or stream.average_rate or 0)


def promised_frames(stream: av.VideoStream) -> int:
    """Number of frames that a file promises, without those that an edit list hides; 0 = unknown."""
    return sum(not entry.is_discard for entry in _index(stream)) or stream.frames


def _times(source: Source) -> list[int | None]:
    """The times of all packets of shown frames."""
    # A container of its own: that of a bare stream cannot go back to the beginning, and gives nothing after the try.
    with open_clip(source) as (container, stream):
        return [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]


def _checked(timeline: Timeline, name: str) -> Timeline:
    if not timeline.count or not timeline.fps:
        raise ClipError(f"{name}: has no video frames; give a video file", "not a video")
    return timeline


def _index(stream: av.VideoStream) -> list:
    """The index of a file that has an entry for each frame, in the order of decoding; else nothing."""
    entries = stream.index_entries
    return list(entries) if len(entries) == stream.frames else []


# ----------------------------------------------------------------------------------------------------------
# Frames
# ----------------------------------------------------------------------------------------------------------


class Decoder:
    """The frames of a stream as they are shown, one after the other; interlaced ones deinterlaced.

    Attributes:
      damaged: number of frames so far that are broken.
      cut_off: whether the last packet so far has bytes missing.
      interlaced: whether a frame so far is.
      keys: times of the key frames so far, in ticks, for a `survey`.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream, survey: bool = False):
        """
        Args:
          survey: passes over packets that cannot be decoded, and counts them as damaged; notes key frames.
        """
        self._container, self._stream, self._survey = container, stream, survey
        self.damaged, self.cut_off, self.interlaced, self.keys = 0, False, False, set()

    def __iter__(self) -> Iterator[av.VideoFrame]:
        frames = self._decoded()
        for frame in frames:
            if frame.interlaced_frame:
                break
            yield frame
        else:
            return
        tick = self._stream.time_base  # PyAV 19 has a type of its own here
        graph, self.interlaced = _deinterlacer(frame, Fraction(tick.numerator, tick.denominator)), True
        for each in itertools.chain((frame,), frames, (None,)):
            yield from _pass(graph, each)

    def _decoded(self) -> Iterator[av.VideoFrame]:
        for packet in self._container.demux(self._stream):
            if packet.size:
                self.cut_off = packet.is_corrupt  # the demuxer's word for a last packet with bytes missing
            if self._survey and packet.is_keyframe and packet.pts is not None:
                self.keys.add(packet.pts)
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                if not self._survey:
                    raise
                self.damaged += 1
                continue
            for frame in frames:
                self.damaged += frame.is_corrupt
                yield frame


def _deinterlacer(frame: av.VideoFrame, tick: Fraction) -> av.filter.Graph:
    """A frame for each frame, at the time of its first field; frames that are not interlaced stay as they are."""
    graph = av.filter.Graph()
    nodes = (
        graph.add(
            "buffer",
            f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base={tick}"
            f":colorspace={frame.colorspace}:range={frame.color_range}",
        ),
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("settb", str(tick)),  # bwdif halves it
        graph.add("buffersink"),
    )
    graph.link_nodes(*nodes).configure()
    return graph


def _pass(graph: av.filter.Graph, frame: av.VideoFrame | None) -> Iterable[av.VideoFrame]:
    graph.vpush(frame)
    with contextlib.suppress(av.error.BlockingIOError, av.error.EOFError):
        while True:
            yield graph.vpull()


def jump(container: av.container.InputContainer, stream: av.VideoStream, number: int) -> int:
    """Goes to a key frame before the frame of that number, and returns the key frame's number; 0 = the beginning.

    Files go to the beginning if their index does not tell for sure which frame is which.
    """
    entries = _index(stream) if number > REORDERED else []
    if not entries or any(entry.is_discard for entry in entries):
        return 0
    keys = {entry.pos: place for place, entry in enumerate(entries) if entry.is_keyframe}
    target = entries[number - REORDERED].timestamp
    container.seek(target, stream=stream)
    packets = list(itertools.islice((packet for packet in container.demux(stream) if packet.size), REORDERED))
    times = [packet.pts for packet in packets]
    start = keys.get(packets[0].pos, 0) if packets else 0  # empty if the file is cut off before the target
    # No later packet may be shown before the key frame.
    if start > number or None in times or any(time < times[0] for time in times):
        start = 0
    container.seek(target, stream=stream) if start else container.seek(0)
    return start
