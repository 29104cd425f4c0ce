"""Video and image files <-> uint8 arrays, channels last (PyAV, Pillow)."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import jax
import numpy as np
from jaxtyping import Float, Float32, Real, UInt8
from PIL import Image, ImageCms, ImageOps

from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.clip_files import ClipError, Decoder, Source, find_timeline, jump, name_of, open_clip
from tora_jax.io.display import Display, reformat
from tora_jax.io.files import write_atomic

Frames = UInt8[np.ndarray, "t h w 3"]

MAX_PIXELS = 100_000_000  # of a still or a frame; a small file can claim any size
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# x264's output depends on the number of threads, so the number is fixed. Two parts of its lookahead are off, because
# with them the same frames gave other bytes from one run to the next (measured on a machine with AVX-512).
ENCODER_THREADS = 4
REPEATABLE = "weightp=0:mbtree=0"
BT709 = 1  # FFmpeg's number for it, in each of its colour enums
STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")  # endings
PNG_HEAD = 1 << 16  # bytes in which a PNG says its colours
ORIENTATION = 274  # of EXIF's tags; from 5 on, width and height change places


def to_float(pixels: UInt8[np.ndarray | jax.Array, "*shape"]) -> Float32[np.ndarray | jax.Array, "*shape"]:
    """Pixels 0..255 -> [-1, 1], in NumPy or in JAX, as given.

    The last bits of a compiled function differ from NumPy's: XLA multiplies by the reciprocal of 127.5.
    """
    return pixels.astype(np.float32) / 127.5 - 1


def as_float(video: Real[np.ndarray | jax.Array, "*shape"]) -> Float[np.ndarray | jax.Array, "*shape"]:
    """`to_float` of uint8; what is in [-1, 1] already stays as it is."""
    return to_float(video) if video.dtype == np.uint8 else video


def from_float(video: Float[np.ndarray | jax.Array, "*shape"]) -> UInt8[np.ndarray | jax.Array, "*shape"]:
    """Inverts `to_float`: rounds, and clips to [-1, 1]. NaN gives no defined pixel."""
    return (video.clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)


def write_video(path: str | os.PathLike, frames: Frames, fps: float | int) -> None:
    """Writes an .mp4 (H.264, yuv420p, BT.709, index in front: plays in every browser) or a .gif.

    H.264 needs even sides, so the last row or column is repeated where a side is odd. The same frames give the same
    bytes. A GIF's clock ticks in 1/100 s, so its frame rate is approximate.

    Args:
      path: ends in .mp4 or .gif; its folder exists. The file is written aside and renamed, see `write_atomic`.
      frames: uint8 0..255, RGB; at least one.
      fps: frames per second, above 0.

    Raises:
      UserError: the ending is wrong, fps is no positive number, or the file cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, not uint8 [t, h, w, 3]")
    with video_writer(path, fps) as write:
        write(frames)


@contextlib.contextmanager
def video_writer(path: str | os.PathLike, fps: float | int) -> Iterator[Callable[[Frames], None]]:
    """`write_video` for frames that come piece by piece: yields the function that takes them, at least one in all.

    Frames of an .mp4 are encoded as they come; those of a .gif stay in memory until the end.
    """
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise UserError(f"{path}: fps is {fps}; it must be from 0.01 to 1000")
    writers = {".mp4": _mp4_writer, ".gif": _gif_writer}
    suffix = Path(path).suffix.lower()
    if suffix not in writers:
        raise UserError(f"{path}: is not a video name; end it in .mp4 or .gif")
    with write_atomic(path) as aside, writers[suffix](aside, fps) as write:
        yield write


@contextlib.contextmanager
def _mp4_writer(path: Path, fps: float | int) -> Iterator[Callable[[Frames], None]]:
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(path.absolute()), "w", format="mp4", options=options) as container:
        stream = container.add_stream(
            "libx264",
            rate=Fraction(fps).limit_denominator(1001),
            options={"crf": "18", "preset": "medium", "x264-params": REPEATABLE},
        )
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = ENCODER_THREADS
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = 1  # 16..235

        def write(frames: Frames) -> None:
            frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
            if not codec.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for array in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
                container.mux(stream.encode(reformat(frame, "yuv420p", dst_colorspace=BT709)))

        yield write
        container.mux(stream.encode())


@contextlib.contextmanager
def _gif_writer(path: Path, fps: float | int) -> Iterator[Callable[[Frames], None]]:
    pictures: list[Image.Image] = []
    yield lambda frames: pictures.extend(map(Image.fromarray, frames))
    # Browsers slow down a GIF with frames under 2/100 s.
    milliseconds = 10 * max(round(100 / fps), 2)
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0)


class VideoInfo(NamedTuple):
    """Number of frames, height and width in pixels as shown, frames per second."""

    frames: int
    height: int
    width: int
    fps: float


def probe(source: Source) -> VideoInfo:
    """What `read_video` will give of a file: reads its index, and decodes the first frame for its size.

    Args:
      source: path, or the file's bytes.

    Raises:
      ClipError: as `read_video`, for faults that the index or the first frame show.
    """
    name = name_of(source)
    with _opened(source, [], threads=0) as (container, stream):
        timeline = find_timeline(source, container, stream)
        for frame in Decoder(container, stream):
            return VideoInfo(timeline.count, *Display.of(stream, frame, name).size(frame), timeline.fps)
    raise ClipError(f"{name}: has no video frames; give a video file", "not a video")


def read_video(
    source: Source, max_frames: int | None = None, only: range | None = None, strict: bool = False, threads: int = 0
) -> tuple[Frames, float]:
    """Decodes a video as players show it: at a constant rate, upright, with square pixels, in SDR colours of sRGB.

    docs/curate.md says what is done with each kind of file.

    Args:
      source: path, or the bytes, of a video in one of the CONTAINERS of `clip_files`.
      max_frames: stops after that number.
      only: the numbers of the wanted frames, rising. In a file with an index (such as mp4), decoding starts at the key
        frame before the first of them; it ends after the last.
      strict: raises an error in place of a warning.
      threads: of the decoder; 0 = one for each core.

    Returns:
      uint8 [t, h, w, 3] RGB, and frames per second.

    Warns:
      the file promises more frames than it gives, or some frames are damaged.

    Raises:
      ClipError: the file is missing, is no video, has no frame, is cut off, changes its size midway, or cannot be
        shown evenly, upright or in its colours.
    """
    name, only = name_of(source), range(max_frames or sys.maxsize) if only is None else only
    frames: list[np.ndarray] = []
    with _opened(source, frames, threads) as (container, stream):
        timeline, repeats, display = find_timeline(source, container, stream), None, None
        if only[0] >= timeline.count:
            raise ClipError(f"{name}: has {timeline.count} frames, and none of number {only[0]}", "too short")
        if timeline.numbers is not None:
            wanted = timeline.numbers[only.start : only.stop : only.step]
            only, repeats = np.unique(wanted, return_inverse=True)
        seen, decoder = jump(container, stream, int(only[0])), Decoder(container, stream)
        for frame in decoder:
            if seen in only:
                display = display or Display.of(stream, frame, name)
                frames.append(display(frame))
            seen += 1
            if seen > only[-1]:
                break
    promised = timeline.promised
    if decoder.cut_off:
        raise ClipError(f"{name}: is cut off after frame {seen} of {promised}; get the complete file", "cut off")
    if not frames:
        raise ClipError(f"{name}: has no video frames; give a video file", "not a video")
    if len({frame.shape for frame in frames}) > 1:
        problem = f"{name}: changes its frame size midway; cut or re-encode it to one size"
        raise ClipError(problem, "changes its size")
    expected = min(promised, only[-1] + 1)
    if seen < expected or decoder.damaged:
        problem = f"{name}: {seen} of {expected} frames decoded, {decoder.damaged} of them damaged; "
        problem += "the file may be broken"
        if strict:
            raise ClipError(problem, "damaged")
        warnings.warn(problem, stacklevel=2)
    video = np.stack(frames)
    return video if repeats is None else video[repeats[repeats < len(video)]], timeline.fps


@contextlib.contextmanager
def _opened(source: Source, frames: list, threads: int) -> Iterator[tuple]:
    """`open_clip`, where faults of the decoder become a `ClipError` that counts the `frames` so far."""
    name = name_of(source)
    with open_clip(source, threads) as (container, stream):
        if stream.width * stream.height > MAX_PIXELS:
            limit = f"{MAX_PIXELS // 10**6} million pixels"
            raise ClipError(f"{name}: has frames of over {limit}; make it smaller", "too large")
        try:
            yield container, stream
        except (OSError, av.FFmpegError) as e:
            where = f"after frame {len(frames)}" if frames else "as a video"
            problem = f"{name}: cannot be decoded {where} ({e.strerror}); is the file complete?"
            raise ClipError(problem, "damaged") from e


def read_image(source: Source) -> UInt8[np.ndarray, "h w 3"]:
    """Reads a still as uint8 RGB: upright (EXIF), in sRGB, over white where transparent, the first of several frames.

    Args:
      source: path, or the file's bytes.

    Raises:
      UserError: the file is missing, broken, not an image (whatever its name says), or over MAX_PIXELS; or its colour
        profile is broken.
    """
    path = "picture" if isinstance(source, bytes) else files.path(source)
    if not isinstance(source, bytes) and not path.is_file():
        raise UserError(f"{path}: no such image file; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata; sizes are checked here
            _check_coding(source if isinstance(source, bytes) else files.read_range(path, 0, PNG_HEAD), str(path))
            with Image.open(_file(source), formats=IMAGE_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Image.DecompressionBombError
                return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except UserError:
        raise
    except Image.DecompressionBombError as e:  # Pillow also raises this, at its own, larger limit
        limit = f"{MAX_PIXELS // 10**6} million pixels"
        raise UserError(f"{path}: has over {limit}; make it smaller") from e
    except ImageCms.PyCMSError as e:
        raise UserError(f"{path}: has a broken colour profile; save it again, as sRGB") from e
    except Exception as e:  # a broken file raises nearly anything from Pillow's decoders
        kinds = "PNG, JPEG, WebP, BMP, GIF or TIFF"
        raise UserError(f"{path}: is broken or not an image; give a {kinds} file") from e


def image_size(source: Source) -> tuple[int, int]:
    """(height, width) of a still, upright, by its header where that is whole.

    Args:
      source: path, or the file's bytes.

    Raises:
      UserError: as `read_image`.
    """
    try:
        with Image.open(_file(source), formats=IMAGE_FORMATS) as image:
            if image.format != "TIFF":  # Pillow turns a TIFF's size by itself, or not, by its version
                turned = image.getexif().get(ORIENTATION, 1) >= 5
                return image.size if turned else image.size[::-1]
    except Exception:  # as of Pillow's decoders; what is wrong, the reader says
        pass
    return read_image(source).shape[:2]


def _file(source: Source) -> io.BytesIO | Path:
    return io.BytesIO(source) if isinstance(source, bytes) else files.local(source)


def _check_coding(head: bytes, name: str) -> None:
    """A PNG's chunk cICP says HDR or a wide gamut by FFmpeg's numbers; Pillow passes over it."""
    _, found, coding = head[:PNG_HEAD].partition(b"IDAT")[0].partition(b"cICP")
    if head.startswith(b"\x89PNG") and found and tuple(coding[:2]) not in ((1, 1), (1, 6), (1, 13), (1, 14)):
        raise UserError(f"{name}: is HDR or of a wide gamut (cICP), which is not converted; save it as sRGB")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel, of no known range")
    info = image.info
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips 16 bits, and knows no transparent value of them
        levels = np.asarray(image)
        image = Image.fromarray((levels.astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
        if (clear := info.get("transparency")) is not None:
            image.putalpha(Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        colours = _to_srgb(image.convert("RGB"), info)
        colours.putalpha(image.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")
    return _to_srgb(image, info)


def _to_srgb(image: Image.Image, info: Mapping[str, Any]) -> Image.Image:
    """Colours of an embedded ICC profile, or of a PNG's gamma -> sRGB."""
    if profile := info.get("icc_profile"):
        own = ImageCms.getOpenProfile(io.BytesIO(profile))
        mode = {"GRAY": "L", "CMYK": "CMYK"}.get(own.profile.xcolor_space.strip(), "RGB")
        return ImageCms.profileToProfile(image.convert(mode), own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    image, gamma = image.convert("RGB"), info.get("gamma")
    # 1/2.2 is what writers put for sRGB, whose own chunk counts more (PNG specification, 11.3.2).
    if not gamma or "srgb" in info or abs(gamma - 1 / 2.2) < 0.01:
        return image
    linear = (np.arange(256) / 255) ** (1 / gamma)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return image.point([*np.round(255 * encoded).astype(int)] * 3)


def cover(old_height: int, old_width: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Plans `resize_crop`: the scaled (height, width), and (top, left) of the part that stays."""
    scale = max(height / old_height, width / old_width)
    new_height, new_width = max(round(old_height * scale), height), max(round(old_width * scale), width)
    return new_height, new_width, round((new_height - height) / 2), round((new_width - width) / 2)


def resize_crop(
    images: UInt8[np.ndarray, "*t h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "*t height width 3"]:
    """Scales images to cover height x width, antialiased, and crops the middle.

    Source: Open-Sora's treatment of reference images (opensora/datasets/utils.py, resize_crop_to_fill).
    """
    old_height, old_width = images.shape[-3:-1]
    new_height, new_width, top, left = cover(old_height, old_width, height, width)
    if (new_height, new_width) == (old_height, old_width):
        return images[..., top : top + height, left : left + width, :]
    resized = [
        np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC))
        for image in images.reshape(-1, old_height, old_width, 3)
    ]
    cropped = np.stack(resized)[:, top : top + height, left : left + width]
    return cropped.reshape(*images.shape[:-3], height, width, 3)
