"""STDiT3 (hpcai-tech/OpenSora-STDiT-v3) -> `tora_jax.models.stdit.STDiT`."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, Rule, affine
from convert_weights.typing import CheckpointType, Fields, Notation, Shapes
from tora_jax.models.stdit import SIZES, STDiT, parse_variant

LINEAR = Layout.LINEAR


def _block(kind: str) -> list[Rule]:
    source, target = f"{kind}_blocks.{{i}}", f"blocks/{kind}"
    return [
        Rule(f"{source}.scale_shift_table", f"{target}/scale_shift_table"),
        *affine(f"{source}.attn.qkv", f"{target}/attn/qkv", LINEAR),
        Rule(f"{source}.attn.q_norm.weight", f"{target}/attn/q_norm/scale"),
        Rule(f"{source}.attn.k_norm.weight", f"{target}/attn/k_norm/scale"),
        *affine(f"{source}.attn.proj", f"{target}/attn/proj", LINEAR),
        *affine(f"{source}.cross_attn.q_linear", f"{target}/cross_attn/q", LINEAR),
        *affine(f"{source}.cross_attn.kv_linear", f"{target}/cross_attn/kv", LINEAR),
        *affine(f"{source}.cross_attn.proj", f"{target}/cross_attn/proj", LINEAR),
        *affine(f"{source}.mlp.fc1", f"{target}/mlp/fc1", LINEAR),
        *affine(f"{source}.mlp.fc2", f"{target}/mlp/fc2", LINEAR),
    ]


TABLE = [
    *affine("x_embedder.proj", "patch_embedder", Layout.PATCH),
    *affine("t_embedder.mlp.0", "t_embedder/fc1", LINEAR),
    *affine("t_embedder.mlp.2", "t_embedder/fc2", LINEAR),
    *affine("fps_embedder.mlp.0", "fps_embedder/fc1", LINEAR),
    *affine("fps_embedder.mlp.2", "fps_embedder/fc2", LINEAR),
    *affine("t_block.1", "t_block", LINEAR),
    Rule("y_embedder.y_embedding", "null_caption"),
    *affine("y_embedder.y_proj.fc1", "text_embedder/fc1", LINEAR),
    *affine("y_embedder.y_proj.fc2", "text_embedder/fc2", LINEAR),
    *_block("spatial"),
    *_block("temporal"),
    Rule("final_layer.scale_shift_table", "final_layer/scale_shift_table"),
    *affine("final_layer.linear", "final_layer/linear", LINEAR),
]

# The rotary frequencies are a constant, computed in models/layers.py.
IGNORED = [r"rope\.freqs"]


def infer(shapes: Shapes) -> Fields:
    block = r"(?:spatial|temporal)_blocks\.([0-9]+)\."
    width = size(shapes, block + r"(?:attn\.proj|cross_attn\.proj|mlp\.fc2)\.bias")
    head = size(shapes, block + r"attn\.[qk]_norm\.weight") or 2 * (size(shapes, r"rope\.freqs") or 0)
    return known(
        depth=count(shapes, block),
        width=width,
        num_heads=width // head if width and head else None,
        patch=size(shapes, r"x_embedder\.proj\.weight", 4),
        in_channels=size(shapes, r"x_embedder\.proj\.weight", 1),
        caption_channels=size(shapes, r"y_embedder\.y_proj\.fc1\.weight", 1),
        caption_length=size(shapes, r"y_embedder\.y_embedding"),
        qk_norm=any(re.fullmatch(block + r"attn\.[qk]_norm\.weight", key) for key in shapes),
    )


def init(key: jax.Array, fields: Fields) -> Any:
    module = STDiT(**write_variant(fields))
    latents, one = jnp.zeros((1, 1, 2, 2, module.in_channels)), jnp.ones(1)
    text = jnp.zeros((1, 1, module.caption_channels))
    return module.init(key, latents, one, text, fps=one, height=one, width=one)["params"]


def read_variant(variant: str) -> Fields:
    return parse_variant(variant)._asdict()


def write_variant(fields: Fields) -> Fields:
    fields = dict(fields)
    sizes = tuple(fields.pop(name) for name in ("depth", "width", "num_heads", "patch"))
    name = next((name for name, released in SIZES.items() if released == sizes), None)
    return {"variant": name or "{}x{}x{}/{}".format(*sizes), **fields}


def rotary_frequencies(fields: Fields) -> np.ndarray:
    """The frequencies that the reference's rotary embedding keeps as a tensor; layers.rotate computes them."""
    head = fields["width"] // fields["num_heads"]
    return (1 / 10000.0 ** (np.arange(0, head, 2, dtype=np.float32) / np.float32(head))).astype(np.float32)


CHECKPOINT_TYPE = CheckpointType(
    name="stdit3",
    part="stdit",
    table=TABLE,
    ignored=IGNORED,
    infer=infer,
    init=init,
    released={name: {**sizes._asdict(), "base_resolution": 512.0} for name, sizes in SIZES.items()},
    needs=("num_heads",),
    config_names={"num_heads": "num_heads", "base_resolution": "input_sq_size"},
    notation=Notation("DEPTHxWIDTHxHEADS/PATCH", read_variant, write_variant),
    constants={"rope.freqs": rotary_frequencies},
    in_tora=True,
)
