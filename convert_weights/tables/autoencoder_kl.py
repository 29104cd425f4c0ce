"""Diffusers' AutoencoderKL (SDXL's VAE) -> `tora_jax.models.autoencoder_kl.AutoencoderKL`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from tora_jax.configs import model_sizes

from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, Rule, affine, norm
from convert_weights.typing import CheckpointType, Fields, Shapes
from tora_jax.io.files import tuples
from tora_jax.models.autoencoder_kl import AutoencoderKL

# Two generations of diffusers' names; a file has one of them.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OLD_ATTENTION = ("query", "key", "value", "proj_attn")

CONV2D, LINEAR = Layout.CONV2D, Layout.LINEAR


def _block_2d(source: str, target: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm1", f"{target}/norm1"),
        *affine(f"{source}.conv1", f"{target}/conv1", CONV2D),
        *norm(f"{source}.norm2", f"{target}/norm2"),
        *affine(f"{source}.conv2", f"{target}/conv2", CONV2D),
        *affine(f"{source}.conv_shortcut", f"{target}/shortcut", CONV2D),
    ]


def _half_2d(half: str, direction: str) -> list[Rule]:
    """Rules of the encoder (`down_blocks`, `downsamplers`) or of the decoder (`up_blocks`, `upsamplers`)."""
    attention = f"{half}.mid_block.attentions.0"
    levels = f"{half}.{direction}_blocks.{{i}}"
    return [
        *affine(f"{half}.conv_in", f"{half}/conv_in", CONV2D),
        *_block_2d(f"{levels}.resnets.{{j}}", f"{half}/{direction}_{{i}}_block_{{j}}"),
        *affine(f"{levels}.{direction}samplers.0.conv", f"{half}/{direction}_{{i}}_conv", CONV2D),
        *_block_2d(f"{half}.mid_block.resnets.{{j}}", f"{half}/middle/block_{{j}}"),
        *norm(f"{attention}.group_norm", f"{half}/middle/attention/norm"),
        *(
            rule
            for names in (ATTENTION, OLD_ATTENTION)
            for theirs, ours in zip(names, ("q", "k", "v", "proj"), strict=True)
            for rule in affine(f"{attention}.{theirs}", f"{half}/middle/attention/{ours}", LINEAR)
        ),
        *norm(f"{half}.conv_norm_out", f"{half}/norm_out"),
        *affine(f"{half}.conv_out", f"{half}/conv_out", CONV2D),
    ]


TABLE = [
    *_half_2d("encoder", "down"),
    *_half_2d("decoder", "up"),
    *affine("quant_conv", "quant_conv", CONV2D),
    *affine("post_quant_conv", "post_quant_conv", CONV2D),
]


def infer(shapes: Shapes, prefix: str = "") -> Fields:
    levels = count(shapes, prefix + r"encoder\.down_blocks\.([0-9]+)\.")
    conv = prefix + r"encoder\.down_blocks\.{}\.resnets\.[0-9]+\.conv[12]\.weight"
    channels = [size(shapes, conv.format(i)) for i in range(levels or 0)]
    return known(
        channels=channels if channels and None not in channels else None,
        layers_per_block=count(shapes, prefix + r"encoder\.down_blocks\.[0-9]+\.resnets\.([0-9]+)\."),
        latent_channels=size(shapes, prefix + r"post_quant_conv\.weight"),
    )


def init(key: jax.Array, fields: Fields) -> Any:
    module = AutoencoderKL(**tuples(fields))
    return module.init(key, jnp.zeros((1, module.space_factor, module.space_factor, 3)))["params"]


CHECKPOINT_TYPE = CheckpointType(
    name="vae2d",
    part="autoencoder_kl",
    table=TABLE,
    infer=infer,
    init=init,
    released={"SDXL": {**model_sizes.opensora_vae()["spatial"], "latent_channels": 4}},
    needs=("norm_groups",),
    config_names={"norm_groups": "norm_num_groups"},
)
