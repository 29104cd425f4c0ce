"""Clips of every kind that the reader knows, which all show the same: a square that moves evenly between patches.

Places are in a frame of 256x144, whatever the size of the clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from tests.odd_videos import set_matrix

HEIGHT, WIDTH, FPS, FRAMES = 144, 256, 25, 40
START, SPEED, SIDE = 60.0, 40.0, 24  # of the square: x of its centre, pixels a second
GREY, WHITE = 90, (230, 230, 230)
PATCHES = {(0, 0): (220, 40, 40), (0, 1): (40, 180, 60), (1, 0): (40, 60, 210), (1, 1): (230, 210, 60)}
PATCH = 40

BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # of BT.709's, linear
P3 = np.array([[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]])


def scene(time: float, scale: int = 1) -> np.ndarray:
    """The frame at a time: uint8 [144 scale, 256 scale, 3]."""
    frame = np.full((HEIGHT, WIDTH, 3), GREY, np.uint8)
    for (down, right), colour in PATCHES.items():
        y, x = down * (HEIGHT - PATCH), right * (WIDTH - PATCH)
        frame[y : y + PATCH, x : x + PATCH] = colour
    left, top = round(START + SPEED * time - SIDE / 2), (HEIGHT - SIDE) // 2
    frame[top : top + SIDE, left : left + SIDE] = WHITE
    return frame.repeat(scale, 0).repeat(scale, 1)


def times(count: int = FRAMES) -> np.ndarray:
    return np.arange(count) / FPS


def check(frames: np.ndarray, fps: float, first: float = 0.0, patches: dict = PATCHES) -> None:
    """Places within 2 pixels, colours within 4 of 255.

    Args:
      first: the time of the first frame.
    """
    scale = frames.shape[1] / HEIGHT
    assert frames.shape[1:] == (HEIGHT * scale, WIDTH * scale, 3), frames.shape
    rows = slice(round(64 * scale), round(80 * scale))
    for number, frame in enumerate(frames):
        bright = (frame[rows] > (GREY + WHITE[0]) / 2).all(-1)
        x = (np.nonzero(bright)[1].mean() + 0.5) / scale
        want = START + SPEED * (first + number / fps)
        assert abs(x - want) <= 2, f"frame {number}: at {x:.1f}, not {want:.1f}"
        assert abs(bright.any(0).sum() / scale - SIDE) <= 2, f"frame {number}"
    for (down, right), colour in patches.items():
        inner = (np.array([8, 32]) + np.array([[down * (HEIGHT - PATCH)], [right * (WIDTH - PATCH)]])) * scale
        (top, bottom), (left, end) = inner.round().astype(int)
        seen = frames[:, top:bottom, left:end].mean((0, 1, 2))
        assert np.abs(seen - colour).max() <= 4, f"patch {down, right}: {seen.round(1)}, not {colour}"


def write(
    path: Path,
    frames: Iterator[np.ndarray],
    codec: str = "libx264",
    pixels: str = "yuv420p",
    ticks: list[int] | None = None,
    tags: dict[str, int] | None = None,
    **options: str,
) -> Path:
    """Encodes frames, at FPS or at the `ticks` of 1/1000 s.

    Args:
      frames: uint8 or uint16 RGB.
      tags: fields of the codec, such as colorspace; BT.709, 16..235 by default.
    """
    tags = {"colorspace": 1, "color_primaries": 1, "color_trc": 1, "color_range": 1} | (tags or {})
    matrix = tags["colorspace"] if tags["colorspace"] in (5, 9) else 1  # BT.601's, BT.2020's, BT.709's
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.pix_fmt, context = pixels, stream.codec_context
        for name, value in tags.items():
            setattr(context, name, value)
        if ticks is not None:
            context.time_base = Fraction(1, 1000)
        for number, array in enumerate(frames):
            if not context.is_open:
                stream.height, stream.width = array.shape[:2]
            deep = "rgb48le" if array.dtype == np.uint16 else "rgb24"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format=deep)
            frame = frame.reformat(format=pixels, dst_colorspace=matrix, dst_color_range=tags["color_range"] or 1)
            if ticks is not None:
                frame.pts, frame.time_base = ticks[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def plain(path: Path) -> Path:
    return write(path, map(scene, times()))


def bare(path: Path) -> Path:
    """A stream without a container, and so without times."""
    return write(path, map(scene, times()), bf="2")


def without_matrix(path: Path) -> Path:
    """HDR whose matrix nobody names; it is BT.2020's."""
    whole = _wide(BT2020, pq, 9, 16, 9)(path.with_name(f"whole_{path.name}"))
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.codec_context.colorspace = 2
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    whole.unlink()
    return path


def jittering(path: Path) -> Path:
    """As a phone's: up to 8 ms early or late, and every ninth frame is missing."""
    ticks = [40 * i + (5 * i) % 9 - 4 * (i > 0) for i in range(FRAMES) if i % 9 != 8]
    return write(path, (scene(tick / 1000) for tick in ticks), ticks=ticks)


def slowing(path: Path) -> Path:
    """The rate halves on the way from 25 to 12.5."""
    ticks = [*range(0, 1000, 40), *range(1000, 1600, 80)]
    return write(path, (scene(tick / 1000) for tick in ticks), ticks=ticks)


def _turned(stored: Callable, matrix: list[int]) -> Callable[[Path], Path]:
    return lambda path: set_matrix(write(path, (stored(scene(time)) for time in times())), matrix)


def not_square(path: Path, wide: int = 180) -> Path:
    """Stored narrower, or wider, than shown."""

    def frames():
        for time in times():
            frame = av.VideoFrame.from_ndarray(scene(time), format="rgb24")
            yield frame.reformat(width=wide, interpolation="AREA").to_ndarray()

    return write(path, frames(), tags={"sample_aspect_ratio": Fraction(WIDTH, wide)})


def trimmed(path: Path, hidden: int = 11) -> Path:
    """An edit list hides the first frames: what trimming without encoding writes."""
    whole = write(path.with_name(f"whole_{path.name}"), (scene(time - hidden / FPS) for time in times(FRAMES + hidden)))
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        shift = round(hidden / FPS / source.streams.video[0].time_base)
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    whole.unlink()
    return path


UNTAGGED = {"colorspace": 2, "color_primaries": 2, "color_trc": 2, "color_range": 0}


def untagged_hd(path: Path) -> Path:
    return write(path, (scene(time, 5) for time in times()), preset="ultrafast", tags=UNTAGGED)


def untagged_sd(path: Path) -> Path:
    frames = (av.VideoFrame.from_ndarray(scene(time), format="rgb24") for time in times())
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=5)))
        container.mux(stream.encode())
    return path


def full_range(path: Path) -> Path:
    return write(path, map(scene, times()), tags={"color_range": 2})


def interlaced(path: Path) -> Path:
    """The lower lines are shown half a frame after the upper ones."""

    def frames():
        for time in times():
            frame = scene(time)
            frame[1::2] = scene(time + 0.5 / FPS)[1::2]
            yield frame

    return write(path, frames(), flags="+ildct+ilme", **{"x264-params": "tff=1"})


def linear(frame: np.ndarray) -> np.ndarray:
    """sRGB -> light, 1 = white."""
    level = frame / 255
    return np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)


def _deep(frame: np.ndarray, primaries: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.round(curve((linear(frame) @ primaries.T).clip(0, 1)) * 65535).astype(np.uint16)


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084's inverse EOTF, for white at 203 nits."""
    power = (light * 203 / 10000) ** (2610 / 16384)
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 4096 * 128)


def hlg(light: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100's OETF, for white at 75 %."""
    scene_light = light * 0.26496
    high = 0.17883277 * np.log(np.maximum(12 * scene_light - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light), high)


def srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _wide(primaries: np.ndarray, curve: Callable, number: int, transfer: int, matrix: int) -> Callable[[Path], Path]:
    tags = {"colorspace": matrix, "color_primaries": number, "color_trc": transfer}
    options = {"codec": "ffv1", "pixels": "yuv444p10le"}

    def make(path: Path) -> Path:
        frames = (_deep(scene(time), primaries, curve) for time in times())
        return write(path, frames, tags=tags, **options)

    return make


class Kind(NamedTuple):
    """How it is made, its file's name, the trait that curation notes, and whether curation copies its packets."""

    make: Callable[[Path], Path]
    name: str = "a.mp4"
    trait: str | None = None
    copied: bool = False


KINDS = {
    "plain": Kind(plain, copied=True),
    "bare": Kind(bare, "a.h264"),
    "jittering": Kind(jittering, trait="variable rate"),
    "slowing": Kind(slowing, "a.mkv", "variable rate"),
    "clockwise": Kind(_turned(lambda f: np.rot90(f), [0, 1, -1, 0]), trait="rotated"),
    "upside down": Kind(_turned(lambda f: f[::-1, ::-1], [-1, 0, 0, -1]), "a.mov", "rotated"),
    "mirrored": Kind(_turned(lambda f: f[:, ::-1], [-1, 0, 0, 1]), trait="rotated"),
    "flipped": Kind(_turned(lambda f: f[::-1], [1, 0, 0, -1]), trait="rotated"),
    "transposed": Kind(_turned(lambda f: f.swapaxes(0, 1), [0, 1, 1, 0]), trait="rotated"),
    "narrow": Kind(not_square, trait="not square"),
    "wide": Kind(lambda path: not_square(path, 320), "a.mkv", "not square"),
    "trimmed": Kind(trimmed),  # no key frame is near the first frame that is shown
    "untagged HD": Kind(untagged_hd, copied=True),
    "untagged SD": Kind(untagged_sd, copied=True),
    "full range": Kind(full_range, copied=True),
    "interlaced": Kind(interlaced, trait="interlaced"),
    "PQ": Kind(_wide(BT2020, pq, 9, 16, 9), "a.mkv", "HDR"),
    "HLG": Kind(_wide(BT2020, hlg, 9, 18, 9), "a.mkv", "HDR"),
    "PQ without a matrix": Kind(without_matrix, "a.mkv", "HDR"),
    "BT.2020": Kind(_wide(BT2020, srgb, 9, 14, 9), "a.mkv", "wide gamut"),
    "Display P3": Kind(_wide(P3, srgb, 12, 1, 1), "a.mkv", "wide gamut"),
}


def make(kind: str, folder: Path) -> Path:
    return KINDS[kind].make(folder / KINDS[kind].name)
