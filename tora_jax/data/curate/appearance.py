"""The looks of a clip's frames: a perceptual hash, to find copies by, and an aesthetic score."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from jaxtyping import UInt8

from tora_jax.checkpoints import release
from tora_jax.data.curate.probe import UnusableError, opened
from tora_jax.errors import UserError
from tora_jax.io.clip_files import Decoder
from tora_jax.io.display import Display
from tora_jax.io.video import VideoInfo, resize_crop
from tora_jax.models.aesthetic import AestheticHead
from tora_jax.models.clip import CLIP, MEAN, STD, from_fields

FRAMES = 4  # of a clip, evenly spread, that are judged
HASH_SIDE, HASH_KEPT = 32, 8  # a side: pixels of the picture, and its frequencies in the hash
BITS = FRAMES * HASH_KEPT**2

Pictures = UInt8[np.ndarray, "t h w 3"]
# Frames -> a score of about 1 to 10, their mean.
Judge = Callable[[Pictures], float]


def read_frames(
    source: str | os.PathLike | bytes, numbers: Callable[[int, float], Iterable[int]], short: int
) -> tuple[Pictures, VideoInfo]:
    """Reads some frames of a clip, made small.

    Args:
      source: path or bytes of a clip that `cuts.cut` made.
      numbers: length and rate of the clip -> the numbers of the frames, rising; the others are not converted.
      short: pixels of the shorter side, at most.

    Returns:
      these frames, and the length, size and rate of the clip.

    Raises:
      UnusableError: "damaged".
    """
    with opened(source) as (container, stream):
        rate = float(stream.average_rate)
        wanted, pictures, count, display = set(numbers(stream.frames, rate)), [], 0, None
        for frame in Decoder(container, stream):
            if count in wanted:
                display = display or Display.of(stream, frame, "clip")
                pictures.append(display(frame, short))
            count += 1
        if not count or count != stream.frames:
            raise UnusableError("damaged")
        info = VideoInfo(count, stream.height, stream.width, rate)
    return np.stack(pictures), info


def spread(count: int, rate: float = 0.0) -> list[int]:
    """The numbers of the FRAMES frames of a clip that are judged."""
    return [(2 * i + 1) * count // (2 * FRAMES) for i in range(FRAMES)]


def perceptual_hash(frames: Pictures) -> bytes:
    """64 bits for each frame: which of its lowest frequencies are above their median (the usual pHash).

    Scaling, encoding, brightness and contrast hardly change it; few bits differ between copies.
    """
    bits = []
    for frame in frames:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        grey = cv2.resize(grey, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
        low = cv2.dct(grey)[:HASH_KEPT, :HASH_KEPT].ravel()
        bits.append(low > np.median(low[1:]))
    return np.packbits(np.concatenate(bits)).tobytes()


def make_judge(clip: str | Path, head: str | Path) -> Judge:
    """LAION's aesthetic score: CLIP ViT-L/14's embedding of each frame, and a linear head on it.

    Args:
      clip, head: folders that `python -m convert_weights clip` and `... aesthetic` wrote.

    Raises:
      UserError: one is missing or broken, or they do not fit.
    """
    model, params = release.load_model(clip, "clip", from_fields)
    last, last_params = release.load_model(head, "aesthetic", AestheticHead)
    if last.features != model.features:
        raise UserError(f"{head}: the head takes {last.features} features, and {clip} gives {model.features}")
    return clip_judge(model, params, last, last_params)


def clip_judge(model: CLIP, params: Mapping[str, Any], head: AestheticHead, head_params: Mapping[str, Any]) -> Judge:
    """`make_judge` with the models and their parameters."""
    side = model.vision.image_size

    @jax.jit
    def run(params, head_params, pixels):
        embeddings = model.apply({"params": params}, pixels, method=CLIP.encode_image)
        return head.apply({"params": head_params}, embeddings).mean()

    def judge(frames: Pictures) -> float:
        pixels = (resize_crop(frames, side, side).astype(np.float32) / 255 - MEAN) / STD
        return float(run(params, head_params, pixels))

    return judge
