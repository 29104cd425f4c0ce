"""LAION's aesthetic heads, of both versions -> `tora_jax.models.aesthetic.AestheticHead`."""

from __future__ import annotations

from convert_weights.mapping import Layout, Rule, affine

TABLE = [
    *affine("layers.{i}", "layers_{i}", Layout.LINEAR),
    # Version 1 is one layer without a name.
    Rule("weight", "linear/kernel", Layout.LINEAR),
    Rule("bias", "linear/bias"),
]
IGNORED = ()
