"""LAION's aesthetic heads, of both versions -> `tora_jax.models.aesthetic.AestheticHead`."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from convert_weights.infer_fields import known, size
from convert_weights.mapping import Layout, Rule, affine
from convert_weights.typing import CheckpointType, Fields, Shapes
from tora_jax.io.files import tuples
from tora_jax.models.aesthetic import V2, AestheticHead

TABLE = [
    *affine("layers.{i}", "layers_{i}", Layout.LINEAR),
    # Version 1 is one layer without a name.
    Rule("weight", "linear/kernel", Layout.LINEAR),
    Rule("bias", "linear/bias"),
]


def infer(shapes: Shapes) -> Fields:
    found = sorted(
        (int(m[1]), shape) for key, shape in shapes.items() if (m := re.fullmatch(r"layers\.(\d+)\.weight", key))
    )
    return {
        "layers": [[place, shape[0]] for place, shape in found],
        **known(features=size(shapes, r"(layers\.0\.)?weight", 1)),
    }


def init(key: jax.Array, fields: Fields) -> Any:
    module = AestheticHead(**tuples(fields))
    return module.init(key, jnp.zeros((1, module.features)))["params"]


CHECKPOINT_TYPE = CheckpointType(
    name="aesthetic",
    part="aesthetic",
    table=TABLE,
    infer=infer,
    init=init,
    released={"v1": {"features": 768, "layers": ()}, "v2": {"features": 768, "layers": V2}},
)
