"""T5 v1.1 encoder, as transformers names it -> `tora_jax.models.t5.T5Encoder`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tora_jax.configs import model_sizes

from convert_weights import views
from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import ConversionError, Layout, Rule
from convert_weights.typing import CheckpointType, Fields, Shapes
from convert_weights.views import Source
from tora_jax.models.t5 import T5Encoder

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
DROPPED = (r"decoder\..*", r"lm_head\.weight")


def untie(source: Mapping) -> dict:
    """Leaves one name for the embedding, so that the table fills it once.

    Args:
      source: state-dict key -> array, or key -> shape when only the headers were read. A streaming converter
        plans on shapes first and calls it again with the two tensors of `TIED`.

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


# Where ComfyUI keeps it in a bundle of all models.
_BUNDLED = re.compile(r"((?:text_encoders|cond_stage_model)\.t5xxl\.transformer\.).*")


def view(source: Source) -> Source:
    """The text encoder of a bundle."""
    found = next((match[1] for key in source.shapes if (match := _BUNDLED.fullmatch(key))), None)
    return source if found is None else views.under(source, found)


def infer(shapes: Shapes) -> Fields:
    attention = r"encoder\.block\.[0-9]+\.layer\.0\.SelfAttention\."
    heads = size(shapes, attention + r"relative_attention_bias\.weight", 1)
    inner = size(shapes, attention + r"[qkv]\.weight")
    return known(
        vocab_size=size(shapes, r"shared\.weight|encoder\.embed_tokens\.weight"),
        width=size(shapes, r"encoder\.block\.[0-9]+\.layer\.[01]\.layer_norm\.weight"),
        num_heads=heads,
        head_dim=inner // heads if inner and heads else None,
        mlp_dim=size(shapes, r"encoder\.block\.[0-9]+\.layer\.1\.DenseReluDense\.wi_[01]\.weight"),
        depth=count(shapes, r"encoder\.block\.([0-9]+)\."),
        relative_buckets=size(shapes, attention + r"relative_attention_bias\.weight"),
    )


def init(key: jax.Array, fields: Fields) -> Any:
    ids = jnp.zeros((1, 2), jnp.int32)
    return T5Encoder(**fields).init(key, ids, ids > 0)["params"]


CHECKPOINT_TYPE = CheckpointType(
    name="t5",
    part="t5",
    view=view,
    table=TABLE,
    dropped=DROPPED,
    infer=infer,
    init=init,
    released={"XXL": model_sizes.t5_xxl()},
    config_names={"relative_max_distance": "relative_attention_max_distance"},
    tied=TIED,
    untie=untie,
    tokenizer=lambda source: source.tokenizer,
)
