"""CLIP, as transformers names it -> `tora_jax.models.clip.CLIP`."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from convert_weights import sources
from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, Rule, affine, norm
from convert_weights.typing import CheckpointType, Fields, Shapes
from tora_jax.models import clip


def _blocks(source: str, target: str) -> list[Rule]:
    return [
        *norm(source + "layer_norm1", target + "norm1"),
        *(
            rule
            for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("proj", "out_proj"))
            for rule in affine(f"{source}self_attn.{theirs}", target + ours, Layout.LINEAR)
        ),
        *norm(source + "layer_norm2", target + "norm2"),
        *affine(source + "mlp.fc1", target + "fc1", Layout.LINEAR),
        *affine(source + "mlp.fc2", target + "fc2", Layout.LINEAR),
    ]


TABLE = [
    Rule("logit_scale", "logit_scale"),
    *affine("text_projection", "text_projection", Layout.LINEAR, bias=False),
    *affine("visual_projection", "image_projection", Layout.LINEAR, bias=False),
    Rule("text_model.embeddings.token_embedding.weight", "text/embed/embedding"),
    Rule("text_model.embeddings.position_embedding.weight", "text/position"),
    *_blocks("text_model.encoder.layers.{i}.", "text/blocks/"),
    *norm("text_model.final_layer_norm", "text/norm"),
    Rule("vision_model.embeddings.class_embedding", "vision/class_token"),
    Rule("vision_model.embeddings.patch_embedding.weight", "vision/patch_embed/kernel", Layout.CONV2D),
    Rule("vision_model.embeddings.position_embedding.weight", "vision/position"),
    *norm("vision_model.pre_layrnorm", "vision/pre_norm"),  # sic
    *_blocks("vision_model.encoder.layers.{i}.", "vision/blocks/"),
    *norm("vision_model.post_layernorm", "vision/norm"),
]

# 0, 1, 2 ..., which older files hold as a buffer.
IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)


def _infer_tower(shapes: Shapes, tower: str) -> Fields:
    layer = rf"{tower}_model\.encoder\.layers\.([0-9]+)\."
    return known(
        width=size(shapes, layer + r"layer_norm[12]\.weight"),
        mlp_dim=size(shapes, layer + r"mlp\.fc1\.bias"),
        depth=count(shapes, layer),
    )


def infer(shapes: Shapes) -> Fields:
    text, vision = (f"{tower}_model.embeddings." for tower in ("text", "vision"))
    patch = size(shapes, re.escape(vision + "patch_embedding.weight"), 2)
    positions = size(shapes, re.escape(vision + "position_embedding.weight"))
    side = math.isqrt(positions - 1) if positions else None
    return {
        "text": known(
            vocab_size=size(shapes, re.escape(text + "token_embedding.weight")),
            max_length=size(shapes, re.escape(text + "position_embedding.weight")),
            **_infer_tower(shapes, "text"),
        ),
        "vision": known(
            image_size=side * patch if side and patch else None, patch=patch, **_infer_tower(shapes, "vision")
        ),
        **known(features=size(shapes, r"text_projection\.weight")),
    }


def init(key: jax.Array, fields: Fields) -> Any:
    module = clip.from_fields(**fields)
    side = module.vision.image_size
    ids, pixels = jnp.zeros((1, module.text.max_length), jnp.int32), jnp.zeros((1, side, side, 3))
    return module.init(key, ids, pixels)["params"]


def _sizes(tower: nn.Module) -> Fields:
    how = ("dtype", "parent", "name")  # to compute; these say nothing about sizes
    return {f.name: getattr(tower, f.name) for f in dataclasses.fields(tower) if f.name not in how}


def _released(variant: str) -> Fields:
    model = clip.clip(variant)
    return {"text": _sizes(model.text), "vision": _sizes(model.vision), "features": model.features}


_CONFIG_NAMES = {
    f"{tower}.{ours}": f"{tower}_config.{theirs}"
    for tower in ("text", "vision")
    for ours, theirs in (("num_heads", "num_attention_heads"), ("activation", "hidden_act"))
}

CHECKPOINT_TYPE = CheckpointType(
    name="clip",
    part="clip",
    table=TABLE,
    ignored=IGNORED,
    infer=infer,
    init=init,
    released={name: _released(name) for name in ("ViT-L/14", "ViT-B/32")},
    needs=("text.num_heads", "vision.num_heads"),
    config_names={**_CONFIG_NAMES, "text.eos_id": "text_config.eos_token_id"},
    tokenizer=lambda source: sources.beside(source, "tokenizer.json"),
)
