"""The sizes of a model, read off the shapes in its checkpoint.

Each function gives what shapes can tell, under the names of the model's fields; the number of groups of a norm, or
of heads where nothing is as wide as a head, they cannot tell. Where a size shows in many tensors the most frequent
one counts, so that one damaged tensor is reported as such.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Fields = dict[str, Any]


def _count(shapes: Shapes, pattern: str) -> int | None:
    """One more than the largest index that the pattern's group matches."""
    return max((int(m[1]) + 1 for key in shapes if (m := re.match(pattern, key))), default=None)


def _size(shapes: Shapes, pattern: str, axis: int = 0) -> int | None:
    """The most frequent size of an axis over all tensors whose name matches in full."""
    found = (s[axis] for key, s in shapes.items() if re.fullmatch(pattern, key) and len(s) > axis)
    return next((size for size, _ in collections.Counter(found).most_common(1)), None)


def _half(size: int | None) -> int | None:
    return None if size is None else size // 2


def _known(**fields: Any) -> Fields:
    return {name: value for name, value in fields.items() if value is not None}


def stdit3(shapes: Shapes) -> Fields:
    block = r"(?:spatial|temporal)_blocks\.([0-9]+)\."
    width = _size(shapes, block + r"(?:attn\.proj|cross_attn\.proj|mlp\.fc2)\.bias")
    head = _size(shapes, block + r"attn\.[qk]_norm\.weight") or 2 * (_size(shapes, r"rope\.freqs") or 0)
    return _known(
        depth=_count(shapes, block),
        width=width,
        num_heads=width // head if width and head else None,
        patch=_size(shapes, r"x_embedder\.proj\.weight", 4),
        in_channels=_size(shapes, r"x_embedder\.proj\.weight", 1),
        caption_channels=_size(shapes, r"y_embedder\.y_proj\.fc1\.weight", 1),
        caption_length=_size(shapes, r"y_embedder\.y_embedding"),
        qk_norm=any(re.fullmatch(block + r"attn\.[qk]_norm\.weight", key) for key in shapes),
    )


def autoencoder_kl(shapes: Shapes, prefix: str = "") -> Fields:
    levels = _count(shapes, prefix + r"encoder\.down_blocks\.([0-9]+)\.")
    conv = prefix + r"encoder\.down_blocks\.{}\.resnets\.[0-9]+\.conv[12]\.weight"
    channels = [_size(shapes, conv.format(i)) for i in range(levels or 0)]
    return _known(
        channels=channels if channels and None not in channels else None,
        layers_per_block=_count(shapes, prefix + r"encoder\.down_blocks\.[0-9]+\.resnets\.([0-9]+)\."),
        latent_channels=_size(shapes, prefix + r"post_quant_conv\.weight"),
    )


def causal_vae(shapes: Shapes, prefix: str = "") -> Fields:
    levels = _count(shapes, prefix + r"encoder\.block_res_blocks\.([0-9]+)\.") or 0
    filters = _size(shapes, prefix + r"encoder\.conv_in\.conv\.weight")
    conv = prefix + r"encoder\.block_res_blocks\.{}\.[0-9]+\.conv[12]\.conv\.weight"
    widths = [_size(shapes, conv.format(i)) for i in range(levels)]
    strides = [
        any(re.fullmatch(prefix + rf"encoder\.conv_blocks\.{i}\.conv\.weight", key) for key in shapes)
        for i in range(levels - 1)
    ]
    return _known(
        filters=filters,
        channel_multipliers=[w // filters for w in widths] if filters and widths and None not in widths else None,
        num_res_blocks=_count(shapes, prefix + r"encoder\.block_res_blocks\.[0-9]+\.([0-9]+)\."),
        temporal_downsample=strides if levels else None,
        channels=_size(shapes, prefix + r"encoder\.conv_in\.conv\.weight", 1),
        inner_channels=_half(_size(shapes, prefix + r"encoder\.conv2\.conv\.weight")),
        latent_channels=_half(_size(shapes, prefix + r"quant_conv\.conv\.weight")),
    )


def video_vae(shapes: Shapes) -> Fields:
    fields = {
        "spatial": autoencoder_kl(shapes, r"spatial_vae\.module\."),
        "temporal": causal_vae(shapes, r"temporal_vae\."),
    }
    channels = _size(shapes, "shift", 1)
    if channels not in (None, 4):  # only their number counts: the checkpoint brings the values
        fields |= {"latent_shift": [0.0] * channels, "latent_scale": [1.0] * channels}
    return fields


def t5(shapes: Shapes) -> Fields:
    attention = r"encoder\.block\.[0-9]+\.layer\.0\.SelfAttention\."
    heads = _size(shapes, attention + r"relative_attention_bias\.weight", 1)
    inner = _size(shapes, attention + r"[qkv]\.weight")
    return _known(
        vocab_size=_size(shapes, r"shared\.weight|encoder\.embed_tokens\.weight"),
        width=_size(shapes, r"encoder\.block\.[0-9]+\.layer\.[01]\.layer_norm\.weight"),
        num_heads=heads,
        head_dim=inner // heads if inner and heads else None,
        mlp_dim=_size(shapes, r"encoder\.block\.[0-9]+\.layer\.1\.DenseReluDense\.wi_[01]\.weight"),
        depth=_count(shapes, r"encoder\.block\.([0-9]+)\."),
        relative_buckets=_size(shapes, attention + r"relative_attention_bias\.weight"),
    )


def _clip_tower(shapes: Shapes, tower: str) -> Fields:
    layer = rf"{tower}_model\.encoder\.layers\.([0-9]+)\."
    return _known(
        width=_size(shapes, layer + r"layer_norm[12]\.weight"),
        mlp_dim=_size(shapes, layer + r"mlp\.fc1\.bias"),
        depth=_count(shapes, layer),
    )


def clip(shapes: Shapes) -> Fields:
    text, vision = (f"{tower}_model.embeddings." for tower in ("text", "vision"))
    patch = _size(shapes, re.escape(vision + "patch_embedding.weight"), 2)
    positions = _size(shapes, re.escape(vision + "position_embedding.weight"))
    side = math.isqrt(positions - 1) if positions else None
    return {
        "text": _known(
            vocab_size=_size(shapes, re.escape(text + "token_embedding.weight")),
            max_length=_size(shapes, re.escape(text + "position_embedding.weight")),
            **_clip_tower(shapes, "text"),
        ),
        "vision": _known(
            image_size=side * patch if side and patch else None, patch=patch, **_clip_tower(shapes, "vision")
        ),
        **_known(features=_size(shapes, r"text_projection\.weight")),
    }


def aesthetic(shapes: Shapes) -> Fields:
    found = sorted(
        (int(m[1]), shape) for key, shape in shapes.items() if (m := re.fullmatch(r"layers\.(\d+)\.weight", key))
    )
    return {
        "layers": [[place, shape[0]] for place, shape in found],
        **_known(features=_size(shapes, r"(layers\.0\.)?weight", 1)),
    }


def i3d(shapes: Shapes) -> Fields:
    bias = r"Logits\.Conv3d_0c_1x1/conv_3d/bias|logits\.conv3d\.bias"
    return _known(num_classes=_size(shapes, bias))


def raft(shapes: Shapes) -> Fields:
    def encoder(name: str) -> list[int] | None:
        levels = _count(shapes, rf"{name}_encoder\.layer([0-9]+)\.") or 1
        inner = (rf"layer{i}\.[0-9]+\.convnormrelu[0-9]+\.0" for i in range(1, levels))
        sizes = [_size(shapes, rf"{name}_encoder\.{part}\.bias") for part in (r"convnormrelu\.0", *inner, "conv")]
        return None if None in sizes else sizes

    def motion(kind: str) -> list[int] | None:
        convolution = r"update_block\.motion_encoder\.conv" + kind
        count = _count(shapes, convolution + "([0-9]+)") or 1
        sizes = [_size(shapes, rf"{convolution}{i}\.0\.bias") for i in range(1, count)]
        return sizes if sizes and None not in sizes else None

    gate = _size(shapes, r"update_block\.recurrent_block\.convgru[0-9]+\.conv[zrq]\.bias")
    out = _size(shapes, r"update_block\.motion_encoder\.conv\.0\.bias")
    return _known(
        feature_layers=encoder("feature"),
        context_layers=encoder("context"),
        motion_corr_layers=motion("corr"),
        motion_flow_layers=motion("flow"),
        motion_features=None if out is None else out + 2,  # the flow itself is appended
        hidden=gate,
        flow_hidden=_size(shapes, r"update_block\.flow_head\.conv1\.bias"),
        mask_hidden=_size(shapes, r"mask_predictor\.convrelu\.0\.bias"),
    )
