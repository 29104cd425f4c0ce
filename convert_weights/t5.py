"""T5 v1.1 encoder, as transformers names it -> `tora_jax.models.t5.T5Encoder`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from convert_weights.mapping import ConversionError, Layout, Rule

# One tensor, two names: a file carries either or both.
TIED = ("shared.weight", "encoder.embed_tokens.weight")

_ATTENTION = "encoder.block.{i}.layer.0."
_MLP = "encoder.block.{i}.layer.1."

TABLE = [
    *(Rule(key, "embed/embedding") for key in TIED),
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
    *(
        Rule(f"{_ATTENTION}SelfAttention.{name}.weight", f"blocks/attention/{name}/kernel", Layout.LINEAR)
        for name in "qkvo"
    ),
    Rule(_ATTENTION + "layer_norm.weight", "blocks/norm1/scale"),
    *(
        Rule(f"{_MLP}DenseReluDense.{name}.weight", f"blocks/mlp/{name}/kernel", Layout.LINEAR)
        for name in ("wi_0", "wi_1", "wo")
    ),
    Rule(_MLP + "layer_norm.weight", "blocks/norm2/scale"),
    Rule("encoder.final_layer_norm.weight", "norm/scale"),
]

# A checkpoint of the whole T5 also holds the other half.
IGNORED = (r"decoder\..*", r"lm_head\.weight")


def untie(source: Mapping) -> dict:
    """Leaves one name for the embedding, so that the table fills it once.

    Args:
      source: state-dict key -> array, or key -> shape when only the headers were read. A streaming converter
        plans on shapes and compares the two tensors of `TIED` itself when it has both.

    Returns:
      The same mapping without `encoder.embed_tokens.weight` if it has `shared.weight` too; else unchanged.

    Raises:
      ConversionError: if both are there and differ in shape, dtype or any byte.
    """
    kept, copy = TIED
    if kept not in source or copy not in source:
        return dict(source)
    if not _same(source[kept], source[copy]):
        raise ConversionError(
            f"{kept} and {copy} differ, but name one tensor: the checkpoint is damaged or no T5 encoder"
        )
    return {key: value for key, value in source.items() if key != copy}


def _same(a, b) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # By bytes: NaN equals itself, and dtypes that NumPy cannot compare (bfloat16) work.
    return np.array_equal(np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8))
