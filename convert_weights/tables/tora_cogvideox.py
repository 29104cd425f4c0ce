"""The released Tora on CogVideoX -> `tora_jax.models.cogvideox_tora.CogVideoXTora`.

One table, of the names in diffusers' form (diffusers-version/tora of alibaba/Tora at 9a23dce). The authors' own
checkpoints, of SwissArmyTransformer (sat/), name and cut the same tensors differently: `from_sat` shows them under
diffusers' names. Files that ComfyUI's users have hold the fusers and the extractor apart, without their prefixes:
`SPLIT`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from convert_weights import views
from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, Rule, Shape, affine, norm, pattern
from convert_weights.typing import CheckpointType, Fields, Shapes
from convert_weights.views import Piece, Source
from tora_jax.backbones import cogvideox
from tora_jax.errors import UserError
from tora_jax.io.files import tuples
from tora_jax.models.cogvideox import SIZES, CogVideoX
from tora_jax.models.cogvideox_tora import CogVideoXTora
from tora_jax.models.stdit import Size

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

# Split files, as ComfyUI's users have them: the prefix that their names lack.
SPLIT = {"fuser": "fuser.", "traj_extractor": "traj_extractor."}

# What a plain CogVideoX lacks.
ADDED = r"extractor/.*|cogvideox/blocks/motion_fuser/.*"

TABLE = [
    *(rule.prefixed("", "cogvideox/") for rule in COGVIDEOX),
    *(rule.prefixed("fuser.", "cogvideox/blocks/motion_fuser/") for rule in FUSER),
    *(rule.prefixed("traj_extractor.", "extractor/") for rule in EXTRACTOR),
]

IGNORED = (r"traj_extractor\.body\.[0-9]+\.bn[12]\.num_batches_tracked",)  # batch norm's counter, for training alone

# Of the authors' own checkpoints.
DROPPED = (
    r"mixins\.pos_embed\.freqs_(sin|cos)",  # rotary tables: constants, computed in models/cogvideox.py
    r"transformer\.position_embeddings\.weight",  # of SwissArmyTransformer's base class, which CogVideoX never reads
    r"first_stage_model\..*",  # the VAE, which has a file of its own
    r"conditioner\..*",  # the text encoder, which has files of its own
)

# ----------------------------------------------------------------------------------------------------------
# The authors' own checkpoints
# ----------------------------------------------------------------------------------------------------------

SAT_PREFIX = "model.diffusion_model."


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


SAT_EPS = 1e-6  # of the last norm in the authors' own code


def view(source: Source) -> Source:
    """A checkpoint under diffusers' names.

    Raises:
      UserError: for a CogVideoX whose tensors have these names and that works in another way.
    """
    if is_sat(source.shapes):
        source = views.cut(source, from_sat(source.shapes), final_eps=SAT_EPS, front_end="sat")
    config = source.config
    if all(isinstance(config.get(name), int) for name in ("sample_height", "sample_width", "patch_size")):
        rows, columns = (config[name] // config["patch_size"] for name in ("sample_height", "sample_width"))
        source = source._replace(config={**config, "base_grid": (rows, columns)})
    runs = "the released Tora runs on CogVideoX-5b and CogVideoX-5b-I2V"
    patches = source.shapes.get("patch_embed.proj.weight", ())
    if len(patches) == 2 or any(key.startswith(("ofs_embed", "patch_embed.ofs")) for key in source.shapes):
        raise UserError(f"{source.name}: CogVideoX 1.5, whose patches span frames; {runs}")
    learned = "patch_embed.pos_embedding" in source.shapes
    rotary = source.config.get("use_rotary_positional_embeddings", not learned or takes_images(source.shapes))
    if not rotary:
        raise UserError(f"{source.name}: CogVideoX-2b, whose positions are not rotary; {runs}")
    return source


def takes_images(shapes: Shapes) -> bool:
    """Are these the weights of image to video, with more channels in than out?"""
    patches, out = shapes.get("patch_embed.proj.weight", ()), shapes.get("proj_out.weight", ())
    return len(patches) == 4 and len(out) == 2 and patches[1] * math.prod(patches[2:]) > out[0]


def infer(shapes: Shapes) -> Fields:
    block = r"transformer_blocks\.([0-9]+)\."
    depth, width = count(shapes, block), size(shapes, block + r"(?:attn1\.to_out\.0|ff\.net\.2|norm[12]\.norm)\.bias")
    head, patch = size(shapes, block + r"attn1\.norm_[qk]\.weight"), size(shapes, r"patch_embed\.proj\.weight", 2)
    rows = size(shapes, r"proj_out\.(?:weight|bias)")
    return {
        "cogvideox": known(
            variant=_variant(Size(depth, width, width // head, patch)) if depth and width and head and patch else None,
            in_channels=size(shapes, r"patch_embed\.proj\.weight", 1),
            out_channels=rows // patch**2 if rows and patch else None,
            caption_channels=size(shapes, r"patch_embed\.text_proj\.weight", 1),
            time_channels=size(shapes, r"time_embedding\.linear_[12]\.(?:weight|bias)"),
            learned_positions=size(shapes, r"patch_embed\.pos_embedding", 1),
        ),
        **known(motion_features=size(shapes, r"traj_extractor\.(?:conv_in|body\.[0-9]+\.block[12])\.bias")),
    }


def _variant(sizes: Size) -> str:
    return next((name for name, released in SIZES.items() if released == sizes), None) or "{}x{}x{}/{}".format(*sizes)


def init(key: jax.Array, fields: Fields) -> Any:
    model = CogVideoXTora(**tuples(fields))
    args, options = cogvideox.dummies({"tora": model})["tora"]
    return model.init(key, *args, **options)["params"]


def split(fields: Fields) -> dict[str, str]:
    """The split files of a model: file -> the prefix that its names lack."""
    inner = {"in_channels": CogVideoX.in_channels, "out_channels": CogVideoX.out_channels, **fields["cogvideox"]}
    mark = "_I2V" if inner["in_channels"] > inner["out_channels"] else ""
    return {f"{name}/{name}{mark}.safetensors": prefix for name, prefix in SPLIT.items()}


def _released(**fields: Any) -> Fields:
    sizes = {"variant": "5B", "out_channels": 16, "caption_channels": 4096, "caption_length": 226, "time_channels": 512}
    return {"cogvideox": {**sizes, **fields}, "motion_features": 128}


LICENCE = (
    "the weights of CogVideoX-5B, and of Tora on it, are under the CogVideoX License: free for academic research; "
    "commercial use needs a registration with its authors, up to a million visits a month; no sublicence, no military "
    "use. Read it: https://huggingface.co/THUDM/CogVideoX-5b/blob/main/LICENSE"
)

CHECKPOINT_TYPE = CheckpointType(
    name="tora_cogvideox",
    part="tora",
    view=view,
    table=TABLE,
    ignored=IGNORED,
    dropped=DROPPED,
    added=ADDED,
    infer=infer,
    init=init,
    released={
        "t2v": _released(in_channels=16),
        "i2v": _released(in_channels=32, learned_positions=226 + 13 * 30 * 45),
    },
    config_names={
        "cogvideox.caption_length": "max_text_seq_length",
        "cogvideox.base_grid": "base_grid",
        "cogvideox.final_eps": "final_eps",
        "front_end": "front_end",
    },
    licence=LICENCE,
    split=split,
    lora="transformer.",
)
