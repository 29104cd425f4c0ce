"""RAFT, as torchvision names it (raft_large) -> `tora_jax.models.raft.RAFT`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, Rule, affine, norm
from convert_weights.typing import CheckpointType, Fields, Shapes
from tora_jax.io.files import tuples
from tora_jax.models.raft import RAFT

CONV2D = Layout.CONV2D


def _batch_norm(source: str, target: str) -> list[Rule]:
    """A batch norm with fixed statistics: the running ones become parameters."""
    return [
        *norm(source, target),
        Rule(source + ".running_mean", target + "/mean"),
        Rule(source + ".running_var", target + "/variance"),
    ]


def _encoder(name: str) -> list[Rule]:
    """Rules of one encoder; the feature encoder's instance norm has no parameters, its norm rules stay unused."""
    block, ours = f"{name}.layer{{i}}.{{j}}", f"{name}/level_{{i}}_block_{{j}}"
    return [
        *affine(f"{name}.convnormrelu.0", f"{name}/conv_in", CONV2D),
        *_batch_norm(f"{name}.convnormrelu.1", f"{name}/norm_in"),
        *affine(f"{block}.convnormrelu{{k}}.0", f"{ours}/conv{{k}}", CONV2D),
        *_batch_norm(f"{block}.convnormrelu{{k}}.1", f"{ours}/norm{{k}}"),
        *affine(f"{block}.downsample.0", f"{ours}/shortcut", CONV2D),
        *_batch_norm(f"{block}.downsample.1", f"{ours}/shortcut_norm"),
        *affine(f"{name}.conv", f"{name}/conv_out", CONV2D),
    ]


GATES = {"convz": "update", "convr": "reset", "convq": "candidate"}

TABLE = [
    *_encoder("feature_encoder"),
    *_encoder("context_encoder"),
    *affine("update_block.motion_encoder.convcorr{i}.0", "update_block/motion_encoder/corr{i}", CONV2D),
    *affine("update_block.motion_encoder.convflow{i}.0", "update_block/motion_encoder/flow{i}", CONV2D),
    *affine("update_block.motion_encoder.conv.0", "update_block/motion_encoder/conv_out", CONV2D),
    *(
        rule
        for theirs, ours in GATES.items()
        for rule in affine(
            f"update_block.recurrent_block.convgru{{i}}.{theirs}", f"update_block/gru{{i}}/{ours}", CONV2D
        )
    ),
    *affine("update_block.flow_head.conv{i}", "update_block/flow_head{i}", CONV2D),
    *affine("mask_predictor.convrelu.0", "mask_predictor/conv1", CONV2D),
    *affine("mask_predictor.conv", "mask_predictor/conv2", CONV2D),
]

# Batch norm's step counter, which only training reads.
IGNORED = (r".*\.num_batches_tracked",)


def infer(shapes: Shapes) -> Fields:
    def encoder(name: str) -> list[int] | None:
        levels = count(shapes, rf"{name}_encoder\.layer([0-9]+)\.") or 1
        inner = (rf"layer{i}\.[0-9]+\.convnormrelu[0-9]+\.0" for i in range(1, levels))
        sizes = [size(shapes, rf"{name}_encoder\.{part}\.bias") for part in (r"convnormrelu\.0", *inner, "conv")]
        return None if None in sizes else sizes

    def motion(kind: str) -> list[int] | None:
        convolution = r"update_block\.motion_encoder\.conv" + kind
        layers = count(shapes, convolution + "([0-9]+)") or 1
        sizes = [size(shapes, rf"{convolution}{i}\.0\.bias") for i in range(1, layers)]
        return sizes if sizes and None not in sizes else None

    gate = size(shapes, r"update_block\.recurrent_block\.convgru[0-9]+\.conv[zrq]\.bias")
    out = size(shapes, r"update_block\.motion_encoder\.conv\.0\.bias")
    return known(
        feature_layers=encoder("feature"),
        context_layers=encoder("context"),
        motion_corr_layers=motion("corr"),
        motion_flow_layers=motion("flow"),
        motion_features=None if out is None else out + 2,  # the flow itself is appended
        hidden=gate,
        flow_hidden=size(shapes, r"update_block\.flow_head\.conv1\.bias"),
        mask_hidden=size(shapes, r"mask_predictor\.convrelu\.0\.bias"),
    )


def init(key: jax.Array, fields: Fields) -> Any:
    module = RAFT(**tuples(fields))
    frame = jnp.zeros((1, *(8 * 2**module.corr_levels,) * 2, 3))
    return module.init(key, frame, frame)["params"]


_HOW_TO_COMPUTE = ("dtype", "parent", "name")  # fields that say nothing about sizes

CHECKPOINT_TYPE = CheckpointType(
    name="raft",
    part="raft",
    table=TABLE,
    ignored=IGNORED,
    infer=infer,
    init=init,
    released={"large": {f.name: f.default for f in dataclasses.fields(RAFT) if f.name not in _HOW_TO_COMPUTE}},
    needs=("corr_levels", "corr_radius"),
)
