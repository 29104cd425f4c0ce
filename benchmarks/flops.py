"""Floating-point operations of the denoiser, counted from its sizes: two for each multiply-add of a matrix product.

XLA's own count knows a loop's body once, and nothing of what a Pallas kernel does.
"""

from collections.abc import Mapping
from typing import Any

from tora_jax.models.cogvideox import size_of
from tora_jax.models.stdit import parse_variant


def forward(tora: Mapping[str, Any], frames: int, height: int, width: int, text: int = 300) -> dict[str, float]:
    """Of one forward pass for one clip, by the parts whose parameters they use; "attention" uses none.

    Args:
      tora: the section of a config.
      frames, height, width: of the latents.
      text: tokens.
    """
    count = _cogvideox if "cogvideox" in tora else _stdit
    return {part: float(value) for part, value in count(tora, frames, height, width, text).items()}


def _cogvideox(tora: Mapping[str, Any], frames: int, height: int, width: int, text: int) -> dict[str, int]:
    """The parts have the names of their parameters' paths."""
    fields, m = tora["cogvideox"], tora["motion_features"]
    size = size_of(fields["variant"])
    c, depth, patch = size.width, size.depth, size.patch**2
    video = frames * -(-height // size.patch) * -(-width // size.patch)
    channels, tokens = fields.get("in_channels", 16), video + text
    once = tora.get("keep_fusion", False)
    return {
        "attn": depth * 2 * 4 * c * c * tokens,
        "mlp": depth * 2 * 8 * c * c * tokens,
        "attention": depth * 2 * 2 * c * tokens**2,
        "fuser": 0 if once else depth * 2 * 2 * (9 * m * c // 4 + 3 * c // 4 * c) * video,
        "extractor": 2 * 9 * m * video * (16 * patch + 4 * depth * m),
        "ends": 2 * c * video * 2 * channels * patch + 2 * fields.get("caption_channels", 4096) * c * text,
    }


def _stdit(tora: Mapping[str, Any], frames: int, height: int, width: int, text: int) -> dict[str, int]:
    size = parse_variant(tora["stdit"]["variant"])
    c, m, depth = size.width, tora["motion_features"], size.depth
    cells = -(-height // size.patch) * -(-width // size.patch)
    tokens = frames * cells
    channels = tora["stdit"].get("in_channels", 4) * size.patch**2
    block = 2 * c * c * (3 + 1 + 2 + 8) * tokens + 2 * 2 * c * c * text  # qkv, proj, the text's q and proj, MLP; its kv
    # Scores and their sums of values: a token sees its frame, its track, and in both blocks the text.
    attention = 2 * 2 * c * tokens * (cells + frames + 2 * text)
    fuser = 2 * (9 * m * c // 4 + 3 * c // 4 * c) * 2 * tokens
    if tora.get("fuser", "adaptive_norm") != "adaptive_norm":
        fuser = (
            2 * 9 * (c + m) * c * tokens if tora["fuser"] == "extra_channels" else 2 * (2 * c * c + 2 * m * c) * tokens
        )
    fusers = 2 if tora.get("placement", "temporal") == "both" else 1
    return {
        "spatial": depth * block,
        "temporal": depth * block,
        "attention": depth * attention,
        "fuser": depth * fuser * fusers,
        "extractor": 2 * 9 * m * tokens * (channels + 2 * depth * m),
        "ends": 2 * c * tokens * 3 * channels + 2 * (tora["stdit"]["caption_channels"] + c) * c * text,
    }


def training(forward: Mapping[str, float], trained: set[str]) -> float:
    """Of a training step for one clip, without what is computed twice to save memory.

    Args:
      forward: see there.
      trained: parts whose parameters train; the others have gradients of their inputs alone.
    """
    twice = {*trained, "attention"}
    return sum(value * (3 if part in twice else 2) for part, value in forward.items())
