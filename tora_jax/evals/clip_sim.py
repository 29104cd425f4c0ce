"""CLIPSIM: how well videos fit their captions, as CLIP ViT-B/32 sees it (arXiv 2104.14806)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.video import resize_crop
from tora_jax.models import clip

TOKENIZER = "tokenizer.json"
FRAMES_AT_ONCE = 16  # through the image tower

Video = UInt8[np.ndarray, "t h w 3"]
# (video, caption) -> the mean over frames of the cosine between image and caption, -1 to 1.
Similarity = Callable[[Video, str], float]


def load(folder: str | Path) -> Similarity:
    """Loads the similarity from a folder of `python -m convert_weights clip`.

    Raises:
      UserError: the folder or its tokenizer is missing or broken.
    """
    model, params = release.load_model(folder, "clip", clip.from_fields)
    tokenize = tokenizer(files.path(folder) / TOKENIZER, model.text.max_length)
    encode_text = jax.jit(lambda params, ids: model.apply({"params": params}, ids, method="encode_text"))
    encode_image = jax.jit(lambda params, pixels: model.apply({"params": params}, pixels, method="encode_image"))
    side = model.vision.image_size

    def similarity(video: Video, caption: str) -> float:
        text = encode_text(params, jnp.asarray(tokenize(caption))[None])[0]
        pixels = (resize_crop(video, side, side).astype(np.float32) / 255 - clip.MEAN) / clip.STD
        parts = [pixels[start : start + FRAMES_AT_ONCE] for start in range(0, len(pixels), FRAMES_AT_ONCE)]
        cosines = np.concatenate([encode_image(params, jnp.asarray(part)) @ text for part in parts])
        return float(cosines.mean(dtype=np.float64))

    return similarity


def tokenizer(path: str | Path, length: int) -> Callable[[str], Int[np.ndarray, "length"]]:
    """Caption -> CLIP's tokens: begin mark, words, end mark, and end marks to the full length.

    Args:
      path: tokenizer.json, as it lies beside the checkpoint.
      length: of the text tower; what is longer is cut, and the end mark kept.

    Raises:
      UserError: the file is missing or broken, or the library is not installed.
    """
    try:
        import tokenizers  # of the extra "eval"
    except ImportError:
        raise UserError("CLIPSIM needs the library tokenizers: pip install 'tora_jax[eval]'") from None
    if not files.path(path).is_file():
        raise UserError(f"{path}: missing; copy it there from the folder of the checkpoint")
    try:
        made = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this very class
        raise UserError(f"{path}: is no tokenizer ({error})") from None
    made.no_padding()
    made.enable_truncation(length)

    def tokenize(caption: str) -> Int[np.ndarray, "length"]:
        ids = made.encode(caption).ids
        return np.array(ids + ids[-1:] * (length - len(ids)), np.int32)

    return tokenize
