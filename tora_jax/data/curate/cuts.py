"""Scenes -> clips of some seconds, as mp4 files of their own; without re-encoding where key frames allow it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from jaxtyping import Bool, Float, UInt8

from tora_jax.data.curate.probe import Look, UnusableError, Video, opened
from tora_jax.io.clip_files import Decoder
from tora_jax.io.display import Display

COPIED = ("h264", "hevc", "vp9", "av1")  # codecs that an mp4 may hold as they are
# Traits that a copy would hand on.
REENCODED = ("rotated", "odd size", "not square", "interlaced", "HDR", "wide gamut", "variable rate")
QUALITY = {"crf": "18", "preset": "veryfast", "x264-params": "weightp=0:mbtree=0"}  # as `io.video`, and faster
BT709 = 1  # FFmpeg's number for it, in each of its colour enums
UNEVEN = 0.5  # of the usual time between two frames: the largest difference from it that a copy may have
SLACK = 1e-6  # seconds, for rounding

Times = Float[np.ndarray, "_"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a video, to become a clip.

    Attributes:
      start, stop: in the video's ticks.
      copied: whether its packets are copied; otherwise it is encoded anew.
      seconds: approximate length.
      black, frozen: share of black frames, and seconds of the longest stretch without any change.
    """

    start: int
    stop: int
    copied: bool
    seconds: float
    black: float
    frozen: float


def plan(video: Video, look: Look, shortest: float, longest: float, loss: float) -> list[Piece]:
    """Cuts scenes into pieces; where no frame is shown for too long, another scene begins.

    A scene longer than `longest` is cut again, if possible at a key frame in the second half of the time that a clip
    may take. A piece that does not start with a key frame begins at the next one if it is at most `loss` away, and is
    encoded anew otherwise.

    Args:
      shortest, longest, loss: seconds.
    """
    begins = (look.ticks - look.ticks[0]) * video.tick
    times = np.append(begins, np.inf)
    short, long = shortest - SLACK, longest + SLACK
    pieces = []
    for start, stop in itertools.pairwise((0, *sorted({*look.cuts, *look.gaps}), len(look.ticks))):
        times[start] = begins[start]
        if stop in look.gaps or stop == len(begins):
            times[stop] = times[stop - 1] + 1 / video.fps  # the end of the last frame, for this scene
        while start < stop and times[stop] - times[start] >= short:
            end = stop
            if times[stop] - times[start] > long:
                end = _end(times, look.keys, start, stop, short, long)
            first, copied = _first(video, look, times, start, end, short, loss)
            still = [len(list(run)) for same, run in itertools.groupby(look.frozen[first + 1 : end]) if same]
            pieces.append(
                Piece(
                    start=int(look.ticks[first]),
                    stop=int(look.ticks[0]) + round(times[end] / video.tick),
                    copied=copied,
                    seconds=float(times[end] - times[first]),
                    black=float(look.black[first:end].mean()),
                    frozen=max(still, default=0) / video.fps,
                )
            )
            start = end
    return pieces


def _end(times: Times, keys: Bool[np.ndarray, "t"], start: int, stop: int, short: float, long: float) -> int:
    """The end of a piece of a scene that is too long, such that the piece and the rest are long enough."""
    latest = (
        np.searchsorted(times, min(times[start] + long, max(times[stop] - short, times[start] + short)), "right") - 1
    )
    earliest = np.searchsorted(times, times[start] + max(long / 2, short))
    found = np.flatnonzero(keys[earliest : latest + 1])
    return int(earliest + found[-1]) if len(found) else max(int(latest), start + 1)


def _first(video: Video, look: Look, times: Times, start: int, end: int, short: float, loss: float) -> tuple[int, bool]:
    """The first frame of a piece, and whether its packets can be copied from there."""
    uneven = (np.abs(np.diff(times[start:end]) * video.fps - 1) > UNEVEN).any()
    if video.codec not in COPIED or uneven or set(video.traits) & set(REENCODED):
        return start, False
    reach = np.searchsorted(times, times[start] + loss, side="right")
    keys = start + np.flatnonzero(look.keys[start : min(reach, end)])
    if len(keys) and times[end] - times[keys[0]] >= short:
        return int(keys[0]), True
    return start, False


def cut(path: str | os.PathLike, video: Video, piece: Piece) -> bytes:
    """A piece of a video as an mp4 file, without sound.

    A copied piece may lose its last few frames, those that need later ones for decoding.

    Raises:
      UnusableError: "damaged".
    """
    try:
        return (_copy if piece.copied else _encode)(Path(path), video, piece)
    except av.FFmpegError as error:
        if isinstance(error, OSError):  # a full disk is no fault of the file
            raise
        raise UnusableError("damaged") from error


def _writer(file: io.BytesIO) -> av.container.OutputContainer:
    return av.open(file, "w", format="mp4", options={"fflags": "+bitexact"})


def _seek(container: av.container.InputContainer, stream: av.VideoStream, tick: int) -> None:
    """Goes to a key frame at or before a time, or to the start of a file that cannot be searched, such as MPEG-TS."""
    container.seek(tick, stream=stream)
    first = next((packet.pts for packet in container.demux(stream) if packet.pts is not None), None)
    if first is None or first > tick:
        container.seek(0)
    else:
        container.seek(tick, stream=stream)


def _copy(path: Path, video: Video, piece: Piece) -> bytes:
    packets, file = [], io.BytesIO()
    with opened(path) as (source, stream):
        _seek(source, stream, piece.start)
        for packet in source.demux(stream):
            if packet.pts is None:
                continue
            if packets or (packet.pts == piece.start and packet.is_keyframe):
                if packet.dts is not None and packet.dts >= piece.stop:
                    break
                if packet.pts >= piece.start:  # earlier frames of its group need packets that are left out
                    packets.append(packet)
        # All up to a packet, in the order of decoding, after which none comes that is shown earlier.
        shown = np.array([packet.pts for packet in packets], np.int64)
        later = np.append(np.minimum.accumulate(shown[::-1])[::-1][1:], piece.stop)[: len(shown)]
        whole = np.flatnonzero(np.maximum.accumulate(shown) < np.minimum(later, piece.stop))
        if not len(whole):
            raise UnusableError("damaged")
        shown = shown[: whole[-1] + 1] - piece.start
        # Not all containers say when a packet is to be decoded: in order, and none after it is shown.
        decoded = np.sort(shown)
        decoded -= max((decoded - shown).max(), 0)
        with _writer(file) as target:
            into = target.add_stream_from_template(stream)
            for packet, pts, dts in zip(packets, shown.tolist(), decoded.tolist(), strict=False):
                packet.pts, packet.dts, packet.stream = pts, dts, into
                target.mux(packet)
    return file.getvalue()


def _encode(path: Path, video: Video, piece: Piece) -> bytes:
    """Encodes frames at a constant rate, the nearest to each time: upright, with square pixels and even sides."""
    rate, file = Fraction(video.fps).limit_denominator(1001), io.BytesIO()
    height, width = video.height // 2 * 2, video.width // 2 * 2
    with _writer(file) as target:
        stream = target.add_stream("libx264", rate=rate, options=QUALITY)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        codec = stream.codec_context
        codec.thread_count, codec.thread_type = 1, "NONE"
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # 16..235
        for picture in _at_rate(_decode(path, video, piece), float(rate), (piece.stop - piece.start) * video.tick):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
            target.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=BT709, threads=1)))
        target.mux(stream.encode())
    return file.getvalue()


def _decode(path: Path, video: Video, piece: Piece) -> Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]]:
    """(seconds after the start, pixels as they are shown) of a piece's frames."""
    display = None
    with opened(path) as (container, stream):
        if video.timed:
            _seek(container, stream, piece.start)
        for number, frame in enumerate(Decoder(container, stream)):
            tick = frame.pts if video.timed else video.count(number)
            if tick >= piece.stop:
                return
            if tick >= piece.start:
                display = display or Display.of(stream, frame, path.name)
                yield (tick - piece.start) * video.tick, display(frame)


def _at_rate(
    frames: Iterator[tuple[float, UInt8[np.ndarray, "h w 3"]]], fps: float, seconds: float
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """Yields the frame that is nearest to each tick of a constant rate."""
    count, total = 0, max(math.floor(seconds * fps + 0.5), 1)
    at, last = 0.0, None
    for time, picture in frames:
        while last is not None and count < total and count / fps <= (at + time) / 2:
            yield last
            count += 1
        at, last = time, picture
    while last is not None and count < total:
        yield last
        count += 1
