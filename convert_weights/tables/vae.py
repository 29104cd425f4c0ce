"""Open-Sora's video VAE (hpcai-tech/OpenSora-VAE-v1.2), an AutoencoderKL and a VAE_Temporal ->
`tora_jax.models.video_vae.VideoVAE`."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
from tora_jax.configs import model_sizes

from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, Rule, affine, norm
from convert_weights.tables import autoencoder_kl
from convert_weights.typing import CheckpointType, Fields, Shapes
from tora_jax.io.files import tuples
from tora_jax.models.video_vae import VideoVAE


def _conv_3d(source: str, target: str, bias: bool = True) -> list[Rule]:
    return affine(f"{source}.conv", f"{target}/conv", Layout.CONV3D, bias)


def _block_3d(source: str, target: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *_conv_3d(f"{source}.conv1", f"{target}/conv1", bias=False),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *_conv_3d(f"{source}.conv2", f"{target}/conv2", bias=False),
        *_conv_3d(f"{source}.conv3", f"{target}/shortcut", bias=False),
    ]


CAUSAL_VAE = [
    *_conv_3d("encoder.conv_in", "encoder/conv_in", bias=False),
    *_block_3d("encoder.block_res_blocks.{i}.{j}", "encoder/level_{i}_block_{j}"),
    *_conv_3d("encoder.conv_blocks.{i}", "encoder/stride_{i}"),
    *_block_3d("encoder.res_blocks.{j}", "encoder/last_block_{j}"),
    *norm("encoder.norm1", "encoder/norm_out"),
    *_conv_3d("encoder.conv2", "encoder/conv_out"),
    *_conv_3d("decoder.conv1", "decoder/conv_in"),
    *_block_3d("decoder.res_blocks.{j}", "decoder/first_block_{j}"),
    *_block_3d("decoder.block_res_blocks.{i}.{j}", "decoder/level_{i}_block_{j}"),
    *_conv_3d("decoder.conv_blocks.{i}", "decoder/stride_{i}"),
    *norm("decoder.norm1", "decoder/norm_out"),
    *_conv_3d("decoder.conv_out", "decoder/conv_out"),
    *_conv_3d("quant_conv", "quant_conv"),
    *_conv_3d("post_quant_conv", "post_quant_conv"),
]

TABLE = [
    *(rule.prefixed("spatial_vae.module.", "spatial_vae/") for rule in autoencoder_kl.TABLE),
    *(rule.prefixed("temporal_vae.", "temporal_vae/") for rule in CAUSAL_VAE),
    Rule("shift", "shift", Layout.FLAT),
    Rule("scale", "scale", Layout.FLAT),
]


def _half(width: int | None) -> int | None:
    return None if width is None else width // 2


def _infer_causal(shapes: Shapes, prefix: str = "") -> Fields:
    levels = count(shapes, prefix + r"encoder\.block_res_blocks\.([0-9]+)\.") or 0
    filters = size(shapes, prefix + r"encoder\.conv_in\.conv\.weight")
    conv = prefix + r"encoder\.block_res_blocks\.{}\.[0-9]+\.conv[12]\.conv\.weight"
    widths = [size(shapes, conv.format(i)) for i in range(levels)]
    strides = [
        any(re.fullmatch(prefix + rf"encoder\.conv_blocks\.{i}\.conv\.weight", key) for key in shapes)
        for i in range(levels - 1)
    ]
    return known(
        filters=filters,
        channel_multipliers=[w // filters for w in widths] if filters and widths and None not in widths else None,
        num_res_blocks=count(shapes, prefix + r"encoder\.block_res_blocks\.[0-9]+\.([0-9]+)\."),
        temporal_downsample=strides if levels else None,
        channels=size(shapes, prefix + r"encoder\.conv_in\.conv\.weight", 1),
        inner_channels=_half(size(shapes, prefix + r"encoder\.conv2\.conv\.weight")),
        latent_channels=_half(size(shapes, prefix + r"quant_conv\.conv\.weight")),
    )


def infer(shapes: Shapes) -> Fields:
    fields = {
        "spatial": autoencoder_kl.infer(shapes, r"spatial_vae\.module\."),
        "temporal": _infer_causal(shapes, r"temporal_vae\."),
    }
    channels = size(shapes, "shift", 1)
    if channels not in (None, 4):  # only their number counts: the checkpoint brings the values
        fields |= {"latent_shift": [0.0] * channels, "latent_scale": [1.0] * channels}
    return fields


def init(key: jax.Array, fields: Fields) -> Any:
    return VideoVAE(**tuples(fields)).init(key, jnp.zeros((1, 1, 16, 16, 3)))["params"]


_RELEASED = model_sizes.opensora_vae()

CHECKPOINT_TYPE = CheckpointType(
    name="vae",
    part="vae",
    table=TABLE,
    infer=infer,
    init=init,
    released={"v1.2": {**_RELEASED, "spatial": {**_RELEASED["spatial"], "latent_channels": 4}}},
    needs=("spatial.norm_groups", "temporal.norm_groups"),
)
