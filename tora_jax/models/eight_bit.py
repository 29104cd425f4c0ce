"""Kernels in 8 bits: whole numbers, and a scale for each output channel of each layer.

Symmetric, with the largest weight of a channel at 127. Products run in the module's own dtype, on kernels that are put
together layer by layer: what is saved is memory, not time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tora_jax.models.layers import Dtype

LARGEST = 127
SCALE = "scale_of_kernel"  # beside each "kernel"


def quantize(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of blocks, stacked on a leading axis, with all their kernels in 8 bits; on the host.

    Args:
      params: nested dict; a kernel [depth, ..., channels] keeps its place, and gets a neighbour `SCALE`, float32.
    """
    flat = {}
    for path, leaf in traverse_util.flatten_dict(dict(params)).items():
        if path[-1] != "kernel":
            flat[path] = leaf
            continue
        whole = np.empty(leaf.shape, np.int8)
        scale = np.empty((len(leaf), *(1,) * (leaf.ndim - 2), leaf.shape[-1]), np.float32)
        for i, layer in enumerate(leaf):  # one after the other: in float32 a layer is small, and all are not
            kernel = np.asarray(layer, np.float32)
            largest = np.abs(kernel).max(tuple(range(kernel.ndim - 1)), keepdims=True)
            scale[i] = np.where(largest > 0, largest, 1) / LARGEST
            whole[i] = np.rint(kernel / scale[i])
        flat[path], flat[(*path[:-1], SCALE)] = whole, scale
    return traverse_util.unflatten_dict(flat)


def shapes(params: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of what `quantize` makes of parameters, or of their shapes."""
    flat = traverse_util.flatten_dict(dict(params))
    for path, leaf in list(flat.items()):
        if path[-1] == "kernel":
            shape = (leaf.shape[0], *(1,) * (leaf.ndim - 2), leaf.shape[-1])
            flat[(*path[:-1], SCALE)] = jax.ShapeDtypeStruct(shape, jnp.float32)
            flat[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.int8)
    return traverse_util.unflatten_dict(flat)


def restored(module: type[nn.Module], dtype: Dtype) -> type[nn.Module]:
    """A block that reads the parameters of `quantize`, a layer's at a time."""

    def restore(variables: Mapping[str, Any]) -> dict[str, Any]:
        flat = traverse_util.flatten_dict(dict(variables))
        kernels = {
            path: (leaf * flat[(*path[:-1], SCALE)]).astype(dtype) if path[-1] == "kernel" else leaf
            for path, leaf in flat.items()
            if path[-1] != SCALE
        }
        return traverse_util.unflatten_dict(kernels)

    return nn.map_variables(module, "params", trans_in_fn=restore, methods=["__call__", "fusion"])
