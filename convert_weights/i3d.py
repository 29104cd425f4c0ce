"""The public Flax I3D (google-research/magvit's i3d_k400.flax, names joined by "/") -> `tora_jax.models.i3d.I3D`."""

from __future__ import annotations

from convert_weights.mapping import Rule

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


def _unit(source: str, target: str) -> list[Rule]:
    """A Flax file: axes are as ours."""
    return [
        Rule(f"{source}/conv_3d/kernel", f"{target}/conv/kernel"),
        Rule(f"{source}/batch_norm/beta", f"{target}/bias"),
        Rule(f"{source}/batch_norm/moving_mean", f"{target}/mean"),
        Rule(f"{source}/batch_norm/moving_variance", f"{target}/variance"),
    ]


TABLE = [
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

# Nothing in the file is without a place.
IGNORED: tuple[str, ...] = ()
