"""RAFT, as torchvision names it (raft_large) -> `tora_jax.models.raft.RAFT`."""

from __future__ import annotations

from convert_weights.mapping import Layout, Rule, affine, norm

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
