"""The released Tora on CogVideoX -> `tora_jax.models.cogvideox_tora.CogVideoXTora`.

One table, of the names in diffusers' form (diffusers-version/tora of alibaba/Tora at 9a23dce). The authors' own
checkpoints, of SwissArmyTransformer (sat/), name and cut the same tensors differently: `from_sat` shows them under
diffusers' names. Files that ComfyUI's users have hold the fusers and the extractor apart, without their prefixes:
`from_split`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from convert_weights.mapping import Layout, Rule, Shape, affine, norm, pattern

CONV1D, CONV2D, LINEAR = Layout.CONV1D, Layout.CONV2D, Layout.LINEAR

# ----------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------


def _batch_norm(source: str, target: str) -> list[Rule]:
    return [
        *norm(source, target),
        Rule(source + ".running_mean", target + "/mean"),
        Rule(source + ".running_var", target + "/variance"),
    ]


EXTRACTOR = [
    *affine("conv_in", "conv_in", CONV2D),
    *(
        rule
        for i in (1, 2)
        for rule in (
            *affine(f"body.{{i}}.block{i}", f"blocks/conv{i}", CONV2D),
            *_batch_norm(f"body.{{i}}.bn{i}", f"blocks/norm{i}"),
        )
    ),
]

FUSER = [
    *(
        rule
        for name in ("gamma", "beta")
        for rule in (
            *affine(f"{{i}}.flow_{name}_spatial", f"{name}_spatial", CONV2D),
            *affine(f"{{i}}.flow_{name}_temporal", f"{name}_temporal", CONV1D),
        )
    ),
    *norm("{i}.flow_cond_norm", "norm"),
]

_BLOCK, _OURS = "transformer_blocks.{i}", "blocks"

COGVIDEOX = [
    *affine("patch_embed.proj", "patch_embedder", CONV2D),
    *affine("patch_embed.text_proj", "text_embedder", LINEAR),
    Rule("patch_embed.pos_embedding", "positions"),
    *affine("time_embedding.linear_1", "time_fc1", LINEAR),
    *affine("time_embedding.linear_2", "time_fc2", LINEAR),
    *(
        rule
        for name in ("norm1", "norm2")
        for rule in (
            *affine(f"{_BLOCK}.{name}.linear", f"{_OURS}/{name}/modulation", LINEAR),
            *norm(f"{_BLOCK}.{name}.norm", f"{_OURS}/{name}/norm"),
        )
    ),
    *(rule for x in "qkv" for rule in affine(f"{_BLOCK}.attn1.to_{x}", f"{_OURS}/attn/{x}", LINEAR)),
    *(rule for x in "qk" for rule in norm(f"{_BLOCK}.attn1.norm_{x}", f"{_OURS}/attn/{x}_norm")),
    *affine(f"{_BLOCK}.attn1.to_out.0", f"{_OURS}/attn/proj", LINEAR),
    *affine(f"{_BLOCK}.ff.net.0.proj", f"{_OURS}/mlp/fc1", LINEAR),
    *affine(f"{_BLOCK}.ff.net.2", f"{_OURS}/mlp/fc2", LINEAR),
    *norm("norm_final", "final_layer/norm_in"),
    *norm("norm_out.norm", "final_layer/norm"),
    *affine("norm_out.linear", "final_layer/modulation", LINEAR),
    *affine("proj_out", "final_layer/linear", LINEAR),
]

# Split files: the prefix that they lack.
SPLIT = {"fuser.safetensors": "fuser.", "traj_extractor.safetensors": "traj_extractor."}

TABLE = [
    *(rule.prefixed("", "cogvideox/") for rule in COGVIDEOX),
    *(rule.prefixed("fuser.", "cogvideox/blocks/motion_fuser/") for rule in FUSER),
    *(rule.prefixed("traj_extractor.", "extractor/") for rule in EXTRACTOR),
]

IGNORED = (
    r"traj_extractor\.body\.[0-9]+\.bn[12]\.num_batches_tracked",  # batch norm's step counter, for training alone
    r"mixins\.pos_embed\.freqs_(sin|cos)",  # rotary tables: constants, computed in models/cogvideox.py
    r"transformer\.position_embeddings\.weight",  # of SwissArmyTransformer's base class, which CogVideoX never reads
    r"first_stage_model\..*",  # the VAE, which has a file of its own
    r"conditioner\..*",  # the text encoder, which has files of its own
)

# ----------------------------------------------------------------------------------------------------------
# The authors' own checkpoints
# ----------------------------------------------------------------------------------------------------------

SAT_PREFIX = "model.diffusion_model."


class Piece(NamedTuple):
    """A tensor that is part of another one.

    Attributes:
      key: of the other tensor.
      rows: the parts of it, along the first axis, that follow one another here.
      parts: equal parts that it has.
    """

    key: str
    rows: tuple[int, ...] = (0,)
    parts: int = 1

    def shape(self, whole: Shape) -> Shape:
        """The shape of this piece of a tensor of shape `whole`."""
        return whole if self.parts == 1 else (whole[0] // self.parts * len(self.rows), *whole[1:])

    def cut(self, whole: np.ndarray) -> np.ndarray:
        """This piece of the tensor."""
        if self.parts == 1:
            return whole
        cuts = whole.reshape(self.parts, -1, *whole.shape[1:])
        return np.concatenate([cuts[row] for row in self.rows])


_LAYER, _MIXIN = "transformer.layers.{i}", "mixins.adaln_layer"

# The authors' name -> diffusers' names, with the rows and the parts of `Piece`, for weight and bias alike.
_SAT = [
    ("mixins.patch_embed.proj", [("patch_embed.proj", (0,), 1)]),
    ("mixins.patch_embed.text_proj", [("patch_embed.text_proj", (0,), 1)]),
    ("time_embed.0", [("time_embedding.linear_1", (0,), 1)]),
    ("time_embed.2", [("time_embedding.linear_2", (0,), 1)]),
    (f"{_LAYER}.input_layernorm", [(f"{_BLOCK}.norm1.norm", (0,), 1)]),
    (f"{_LAYER}.post_attention_layernorm", [(f"{_BLOCK}.norm2.norm", (0,), 1)]),
    (f"{_LAYER}.attention.query_key_value", [(f"{_BLOCK}.attn1.to_{x}", (i,), 3) for i, x in enumerate("qkv")]),
    (f"{_LAYER}.attention.dense", [(f"{_BLOCK}.attn1.to_out.0", (0,), 1)]),
    (f"{_LAYER}.mlp.dense_h_to_4h", [(f"{_BLOCK}.ff.net.0.proj", (0,), 1)]),
    (f"{_LAYER}.mlp.dense_4h_to_h", [(f"{_BLOCK}.ff.net.2", (0,), 1)]),
    (f"{_MIXIN}.query_layernorm_list.{{i}}", [(f"{_BLOCK}.attn1.norm_q", (0,), 1)]),
    (f"{_MIXIN}.key_layernorm_list.{{i}}", [(f"{_BLOCK}.attn1.norm_k", (0,), 1)]),
    # Shift, scale and gate of attention and of the MLP: of the video, then of the text.
    (
        f"{_MIXIN}.adaLN_modulations.{{i}}.1",
        [
            (f"{_BLOCK}.norm1.linear", (0, 1, 2, 6, 7, 8), 12),
            (f"{_BLOCK}.norm2.linear", (3, 4, 5, 9, 10, 11), 12),
        ],
    ),
    ("transformer.final_layernorm", [("norm_final", (0,), 1)]),
    ("mixins.final_layer.norm_final", [("norm_out.norm", (0,), 1)]),
    ("mixins.final_layer.adaLN_modulation.1", [("norm_out.linear", (0,), 1)]),
    ("mixins.final_layer.linear", [("proj_out", (0,), 1)]),
]


def from_sat(shapes: Mapping[str, Shape]) -> dict[str, Piece]:
    """The tensors of an authors' checkpoint by diffusers' names.

    A tensor that has no such name keeps its own, without `SAT_PREFIX`, so that the table's plan reports or ignores it.

    Args:
      shapes: key -> shape, as in the file's "module".
    """
    rules = [
        (pattern(f"{source}.{kind}"), [(f"{name}.{kind}", rows, parts) for name, rows, parts in targets])
        for source, targets in _SAT
        for kind in ("weight", "bias")
    ]
    pieces: dict[str, Piece] = {}
    for key, shape in shapes.items():
        name = key.removeprefix(SAT_PREFIX)
        matches = ((m.groupdict(), targets) for regex, targets in rules if (m := regex.fullmatch(name)))
        index, targets = next(matches, (None, None))
        if index is None or shape[0] % targets[0][2]:
            found = {_renamed(name): Piece(key)}
        else:
            found = {target.format(**index): Piece(key, rows, parts) for target, rows, parts in targets}
        # The same name with and without the prefix: the second has no place.
        pieces |= {key: Piece(key)} if found.keys() & pieces.keys() else found
    return pieces


def _renamed(name: str) -> str:
    """Names of modules that stand elsewhere in diffusers' form and are the same inside."""
    if name == "mixins.pos_embed.pos_embedding":
        return "patch_embed.pos_embedding"
    fusers = f"{_MIXIN}.fuser_list."
    return "fuser." + name.removeprefix(fusers) if name.startswith(fusers) else name


def is_sat(keys: Mapping[str, Shape]) -> bool:
    """Does a checkpoint have the authors' own names?"""
    return any(key.removeprefix(SAT_PREFIX).startswith("mixins.") for key in keys)


def reader(pieces: Mapping[str, Piece], read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
    """`read` by the names of `pieces`."""
    return lambda name: pieces[name].cut(read(pieces[name].key))


def from_split(file: str, keys: Mapping[str, Shape]) -> dict[str, Piece]:
    """The tensors of a split file by diffusers' names.

    Args:
      file: a name in `SPLIT`.
      keys: key -> shape.
    """
    return {SPLIT[file] + key: Piece(key) for key in keys}
