"""Writes an adapter that was trained here (`tora_jax.training.lora`) as diffusers and ComfyUI read it.

Of a kernel they have `lora_A` [rank, in] and `lora_B` [out, rank], and add their product; our strength, alpha / rank,
is multiplied into `lora_B`. Source: peft's names, as diffusers' `load_lora_weights` takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from convert_weights import mapping, stream, writers
from convert_weights.mapping import Layout
from convert_weights.typing import CheckpointType
from tora_jax.errors import UserError
from tora_jax.io import files, safetensors_io
from tora_jax.io.safetensors_io import Spec

_ALPHA = "alpha"  # in the header's metadata
_header = safetensors_io.read_header_and_metadata


def is_adapter(name: str) -> bool:
    """Whether a file holds an adapter."""
    path = files.path(name)
    return path.suffix == ".safetensors" and path.is_file() and _ALPHA in _header(path)[1]


def write(target: str, kind: CheckpointType, name: str, cast: stream.Cast) -> dict[str, Any]:
    """Writes the file.

    Returns:
      A report.

    Raises:
      UserError: the adapter is of other kernels than this type's linear layers.
    """
    if kind.lora is None:
        raise UserError(f"{name}: an adapter, and {kind.name} has no form for adapters; convert the merged weights")
    tensors = {key: cast.apply(name, key, np.ascontiguousarray(array)) for key, array in _tensors(kind, name)}
    specs = {key: Spec(tensors[key].dtype, tensors[key].shape) for key in tensors}
    specs = {key: specs[key] for key in safetensors_io.file_order(specs)}
    nbytes = sum(array.nbytes for array in tensors.values())
    with writers.aside(target, nbytes) as path:
        safetensors_io.write(path, specs, (tensors[key] for key in specs), {"format": "pt"})
    return {"source": name, "tensors": list(specs), "bytes": nbytes}


def _tensors(kind: CheckpointType, name: str) -> Iterator[tuple[str, np.ndarray]]:
    held, metadata = _header(files.path(name))
    for path in sorted({path.rpartition("/")[0] for path in held}):
        inside = path.removeprefix(f"{kind.part}/")
        rules = ((rule, mapping.pattern(rule.target).fullmatch(inside)) for rule in kind.table)
        rule, index = next(((rule, match.groupdict()) for rule, match in rules if match), (None, {}))
        if rule is None or rule.layout is not Layout.LINEAR:
            raise UserError(f"{name}: {path} is no linear layer of {kind.name}, which adapters there are for")
        a, b = (safetensors_io.read(held[f"{path}/{part}"]).astype(np.float32) for part in "ab")
        b = b * (float(metadata[_ALPHA]) / a.shape[-1])
        stacked = a.ndim == 3
        for layer, (down, up) in enumerate(zip(a, b, strict=True) if stacked else [(a, b)]):
            left = {"i": layer} if stacked else {}
            key = kind.lora + rule.source.format(**index, **left).removesuffix(".weight")
            yield f"{key}.lora_A.weight", down.T
            yield f"{key}.lora_B.weight", up.T
