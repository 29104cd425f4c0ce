"""Video files that are odd or broken, as they come from phones, cameras and interrupted downloads."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests import moving
from tora_jax.io.video import write_video

FPS = 8
RATE = Fraction(FPS)


def good(
    kind: str = "still, object", seed: int = 0, frames: int = 17, height: int = 144, width: int = 192
) -> np.ndarray:
    return moving.make(kind, seed, frames, height, width).video


def write(
    path: Path, frames: np.ndarray, codec: str = "libx264", pixels: str = "yuv420p", times=None, **options
) -> Path:
    """A video in any codec; `times` are the ticks of 1/1000 s at which frames are shown."""
    with av.open(str(path), "w", format=options.pop("format", None)) as container:
        stream = container.add_stream(codec, rate=RATE, options={name: str(value) for name, value in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[i]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_matrix(path: Path, matrix: list[float]) -> Path:
    """Makes an mp4 say how it is to be shown: column x and row y at (a x + c y, b x + d y), of [a, b, c, d]."""
    data, (a, b, c, d) = bytearray(path.read_bytes()), (round(number * (1 << 16)) for number in matrix)
    place = data.index(b"tkhd") + 44  # after its flags, times, id, duration, layer and volume (version 0)
    data[place : place + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(data)
    return path


def rotated(path: Path, frames: np.ndarray) -> Path:
    """An mp4 that says that it is to be shown turned by 90 degrees, clockwise."""
    write_video(path, frames, FPS)
    return set_matrix(path, [0, 1, -1, 0])


def cut_off(path: Path, frames: np.ndarray) -> Path:
    """The index is in front, and the download stopped within the last frames."""
    write_video(path, frames, FPS)
    with av.open(str(path)) as container:
        ends = sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[: ends[-4] - 3])
    return path


def truncated(path: Path, frames: np.ndarray) -> Path:
    """The index was at the end, and is lost."""
    write(path, frames)
    path.write_bytes(path.read_bytes()[:-2000])
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    return path


def uneven(count: int) -> np.ndarray:
    """Times of a variable rate: mostly 125 ms apart, some 40 and some 300."""
    steps = np.resize([125, 125, 40, 125, 300, 125, 125], count - 1)
    return np.concatenate([[0], np.cumsum(steps)])


def damaged(path: Path, frames: np.ndarray) -> Path:
    """Complete, but with frames that do not decode."""
    write(path, frames, g=1, **{"x264-params": "slices=1"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = sorted((packet.pos, packet.size) for packet in container.demux(video=0) if packet.size)
    for position, size in places[3:8]:
        data[position : position + size] = b"\x00\x00\x00\x02\xff\xff" + bytes(size - 6)
    path.write_bytes(data)
    return path


def make_all(folder: Path) -> dict[str, str]:
    """All of them in a folder: name -> the reason it is refused for, or "" where it is used."""
    frames = good()
    write_video(folder / "good.mp4", frames, FPS)
    cut_off(folder / "cut_off.mp4", frames)
    truncated(folder / "truncated.mp4", frames)
    (folder / "empty.mp4").touch()
    (folder / "page.mp4").write_text("<html>not found</html>")
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")  # reads another file
    sound(folder / "sound.mp4")
    write_video(folder / "one.mp4", frames[:1], FPS)
    write_video(folder / "short.mp4", good(seed=1, frames=9), FPS)
    damaged(folder / "damaged.mp4", good(seed=2))
    write(folder / "variable.mp4", good(seed=3, frames=25), times=uneven(25))
    rotated(folder / "rotated.mp4", good(seed=4))
    write(folder / "deep.mp4", good(seed=5), "libx265", "yuv420p10le")
    write(folder / "odd.mkv", good(seed=6, height=145, width=191), "ffv1", "yuv444p")
    write(folder / "name.mp4", good(seed=7), format="matroska")
    (folder / "same.mp4").write_bytes((folder / "good.mp4").read_bytes())
    return {
        "good.mp4": "",
        "cut_off.mp4": "cut off",
        "truncated.mp4": "not a video",
        "empty.mp4": "empty",
        "page.mp4": "not a video",
        "list.mp4": "not a video",
        "sound.mp4": "no video stream",
        "one.mp4": "one frame",
        "short.mp4": "too short",
        "damaged.mp4": "damaged",
        "variable.mp4": "",
        "rotated.mp4": "",
        "deep.mp4": "",
        "odd.mkv": "",
        "name.mp4": "",
        "same.mp4": "same file",
    }
