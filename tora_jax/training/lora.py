"""Low-rank updates of kernels (LoRA, arXiv:2106.09685), with everything else frozen.

An adapter is a flat dict: for the kernel at `path`, [..., in, out], it has `path/a` [..., in, rank] and `path/b`
[..., rank, out]. The kernel in use is kernel + alpha / rank * a @ b. The axes before the last two, stacked blocks and
taps of convolutions, have updates of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray
from safetensors import SafetensorError, safe_open
from safetensors.flax import load_file, save_file

from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.files import write_atomic
from tora_jax.training import optim

# What Tora trains of Open-Sora, but for biases and norms.
TEMPORAL = (r"tora/stdit/blocks/temporal/(attn|cross_attn|mlp)/\w+/kernel",)


def init(params: Mapping[str, Any], patterns: Sequence[str], rank: int, key: PRNGKeyArray) -> dict[str, Array]:
    """An adapter that changes nothing yet: a is random, b zero.

    Args:
      params: nested dict of arrays or shapes.
      patterns: of the kernels, as `optim.select` has them, such as TEMPORAL; other leaves are passed over.

    Raises:
      UserError: a pattern wins no kernel, or the rank is not below that of a kernel.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    kernels = {path: leaf for path, leaf in flat.items() if path.endswith("/kernel")}
    chosen = sorted(path for path, train in optim.select(kernels, patterns).items() if train)
    adapter = {}
    for path, draw in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *stack, wide, out = kernels[path].shape
        if not 0 < rank < min(wide, out):
            raise UserError(f"lora: rank {rank} should be above 0 and below that of {path}, {wide} x {out}")
        adapter[f"{path}/a"] = jax.random.normal(draw, (*stack, wide, rank)) * wide**-0.5
        adapter[f"{path}/b"] = jnp.zeros((*stack, rank, out))
    return adapter


def merge(adapter: Mapping[str, Any], params: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Parameters with the updates added, to be used in a loss, or to be released.

    Args:
      adapter: of `init` or `load`.
      params: nested dict, or a flat one of paths.
      alpha: strength; the updates are divided by the rank.

    Raises:
      UserError: the adapter was made for other parameters.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    for path in sorted({name.rpartition("/")[0] for name in adapter}):
        a, b = adapter[f"{path}/a"], adapter[f"{path}/b"]
        shape = (*a.shape[:-1], b.shape[-1])
        if path not in flat or flat[path].shape != shape:
            there = flat[path].shape if path in flat else "missing"
            raise UserError(f"lora: the adapter is for {path} of {shape}, which is {there} in these weights")
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * (alpha / a.shape[-1])
        flat[path] = (flat[path] + update).astype(flat[path].dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def save(path: str | Path, adapter: Mapping[str, Any], alpha: float) -> None:
    """Writes an adapter as a safetensors file; `alpha` is in its metadata.

    Raises:
      UserError: the file cannot be written.
    """
    with write_atomic(path) as aside:
        save_file(
            {path: jnp.asarray(leaf) for path, leaf in adapter.items()}, aside, metadata={"alpha": repr(float(alpha))}
        )


def load(path: str | Path) -> tuple[dict[str, Array], float]:
    """The adapter of a file, and its alpha.

    Raises:
      UserError: the file is missing, broken or something else.
    """
    try:
        here = files.local(path)
        with safe_open(here, "flax") as file:
            metadata = file.metadata() or {}
        adapter = load_file(here)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None
    names = {name.rpartition("/")[0] for name in adapter}
    if "alpha" not in metadata or adapter.keys() != {f"{name}/{part}" for name in names for part in "ab"}:
        raise UserError(f"{path}: is no adapter of lora.save")
    return adapter, float(metadata["alpha"])
