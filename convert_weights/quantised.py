"""Weights in eight bits as ComfyUI's users have them: seen as bfloat16, with their scales multiplied in.

Plain fp8 is a cast, and bfloat16 holds each of its numbers. Scaled fp8 has a float32 scale beside each weight, one for
the tensor or one a row, in an older form (`scale_weight`, and the marker `scaled_fp8`) and in a newer one
(`weight_scale`, and the format of each layer as JSON: in the header's metadata, or in the tensor `comfy_quant`).
Scales of activations (`scale_input`, `input_scale`) serve kernels that multiply in fp8; they change no weight.

Source: comfy/utils.py (convert_old_quants) and comfy/quant_ops.py of comfyanonymous/ComfyUI.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert_weights.notes import note
from convert_weights.views import Source
from tora_jax.errors import UserError
from tora_jax.io import safetensors_io

FP8 = (safetensors_io.DTYPES["F8_E4M3"], safetensors_io.DTYPES["F8_E5M2"])
FORMATS = ("float8_e4m3fn", "float8_e5m2")  # of a layer; others pack, rotate or share scales among blocks
_SCALES = ("scale_weight", "weight_scale")
_UNUSED = re.compile(r"(?:.*\.)?(?:scaled_fp8|scale_input|input_scale|comfy_quant)")


def as_bfloat16(source: Source, metadata: Mapping[str, str]) -> Source:
    """A checkpoint without fp8: as it is, where it has none.

    Args:
      metadata: of the safetensors file.

    Raises:
      UserError: for another form of quantised weights, and for scaled ones without their scales.
    """
    small = {key for key, dtype in source.dtypes.items() if dtype in FP8 and not _UNUSED.fullmatch(key)}
    layers = _formats(source, metadata)
    if odd := {name: one for name, one in layers.items() if one.get("format") not in FORMATS or one.get("convrot")}:
        name, one = next(iter(odd.items()))
        raise UserError(
            f"{source.name}: {name} is quantised as {one.get('format')!r}; of quantised weights only "
            f"{' and '.join(FORMATS)} are converted; take a file in bfloat16, float16 or fp8"
        )
    if not small:
        return source
    scales = {key: scale for key in small if (scale := _scale(source, key)) is not None}
    marked = any(key.rpartition(".")[2] == "scaled_fp8" for key in source.shapes)
    lost = sorted(small - {*scales}) if marked and not scales else []
    lost += [key for layer in layers if (key := f"{layer}.weight") in small and key not in scales]
    if lost:
        raise UserError(f"{source.name}: {lost[0]} is scaled fp8, and its scale is not there; get the whole file")
    dropped = {*scales.values(), *(key for key in source.shapes if _UNUSED.fullmatch(key))}
    kept = [key for key in source.shapes if key not in dropped]
    times = f", {len(scales)} of them times their scales" if scales else ""
    note(f"{source.name}: {len(small)} tensors in fp8 become bfloat16{times}")

    def read(key: str) -> np.ndarray:
        array = source.read(key)
        if key not in small:
            return array
        if key not in scales:
            return array.astype(jnp.bfloat16)
        scale = source.read(scales[key]).astype(np.float32)
        rows = scale.reshape(-1, *(1,) * (array.ndim - 1)) if scale.size > 1 else scale.reshape(())
        return (array.astype(np.float32) * rows).astype(jnp.bfloat16)

    return source._replace(
        shapes={key: source.shapes[key] for key in kept},
        dtypes={key: np.dtype(jnp.bfloat16) if key in small else source.dtypes[key] for key in kept},
        read=read,
    )


def _formats(source: Source, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Layer -> what the file says of how it is quantised."""
    texts = {
        key.removesuffix(".comfy_quant"): source.read(key).tobytes().decode("utf-8", "replace")
        for key in source.shapes
        if key.endswith(".comfy_quant")
    }
    try:
        layers = {name: json.loads(text) for name, text in texts.items()}
        layers |= json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        return {name: dict(layer) for name, layer in layers.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{source.name}: broken description of quantised layers; get the file again") from None


def _scale(source: Source, key: str) -> str | None:
    """The name of a weight's scale, or None.

    Raises:
      UserError: it is not one number for the tensor, or one a row.
    """
    layer, _, last = key.rpartition(".")
    names: Iterable[str] = (f"{layer}.{name}" for name in _SCALES) if last == "weight" else ()
    name = next((name for name in names if name in source.shapes), None)
    if name is not None and (shape := source.shapes[name]) not in ((), (1,)):
        rows = source.shapes[key][0]
        if shape not in ((rows,), (rows, *(1,) * (len(source.shapes[key]) - 1))):
            raise UserError(
                f"{source.name}: {name} has the shape {list(shape)}; known are one scale for the tensor and one a row"
            )
    return name
