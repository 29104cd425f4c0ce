"""CogVideoX's VAE -> `tora_jax.models.cogvideox_vae.CogVideoXVAE`, from diffusers' names (AutoencoderKLCogVideoX) and
from those of the authors' own file (3d-vae.pt, under "state_dict")."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from convert_weights import views
from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, Rule, affine, norm, pattern
from convert_weights.tables import tora_cogvideox
from convert_weights.typing import CheckpointType, Fields, Shapes
from convert_weights.views import Piece, Source
from tora_jax.io.files import tuples
from tora_jax.models.cogvideox_vae import CogVideoXVAE

CONV2D, CONV3D = Layout.CONV2D, Layout.CONV3D
LEVELS = 4


class Names(NamedTuple):
    """What a form calls the parts of the VAE; `{level}` and `{j}` stand for indices of ours.

    Attributes:
      down, up: a res block of a level of the encoder, of the decoder.
      middle: a res block between.
      shortcut: of a res block.
      downsample, upsample: convolutions after a level.
      reversed: the decoder's levels are counted from the finest one.
    """

    down: str
    up: str
    middle: str
    shortcut: str
    downsample: str
    upsample: str
    reversed: bool


DIFFUSERS = Names(
    down="down_blocks.{level}.resnets.{j}",
    up="up_blocks.{level}.resnets.{j}",
    middle="mid_block.resnets.{j}",
    shortcut="conv_shortcut",
    downsample="down_blocks.{level}.downsamplers.0.conv",
    upsample="up_blocks.{level}.upsamplers.0.conv",
    reversed=False,
)
SAT = Names(
    down="down.{level}.block.{j}",
    up="up.{level}.block.{j}",
    middle="mid.block_{j}",
    shortcut="nin_shortcut",
    downsample="down.{level}.downsample.conv",
    upsample="up.{level}.upsample.conv",
    reversed=True,
)


def _conv(source: str, target: str) -> list[Rule]:
    return affine(f"{source}.conv", f"{target}/conv", CONV3D)


def _spatial_norm(source: str, target: str) -> list[Rule]:
    return [
        *norm(f"{source}.norm_layer", f"{target}/norm"),
        *affine(f"{source}.conv_y.conv", f"{target}/scale", CONV3D),
        *affine(f"{source}.conv_b.conv", f"{target}/shift", CONV3D),
    ]


def _block(names: Names, half: str, source: str, target: str) -> list[Rule]:
    normalise = _spatial_norm if half == "decoder" else norm
    source, target = f"{half}.{source}", f"{half}/{target}"
    return [
        *(rule for i in (1, 2) for rule in normalise(f"{source}.norm{i}", f"{target}/norm{i}")),
        *(rule for i in (1, 2) for rule in _conv(f"{source}.conv{i}", f"{target}/conv{i}")),
        *affine(f"{source}.{names.shortcut}", f"{target}/shortcut", CONV3D),
    ]


def _middle(names: Names, half: str) -> list[Rule]:
    """The two blocks between, which the authors count from 1."""
    first = 1 if names.reversed else 0
    return [
        rule
        for j in (0, 1)
        for rule in _block(names, half, names.middle.replace("{j}", str(j + first)), f"middle_block_{j}")
    ]


def _table(names: Names) -> list[Rule]:
    rules = [
        rule
        for half in ("encoder", "decoder")
        for rule in (
            *_conv(f"{half}.conv_in", f"{half}/conv_in"),
            *_middle(names, half),
            *(norm if half == "encoder" else _spatial_norm)(f"{half}.norm_out", f"{half}/norm_out"),
            *_conv(f"{half}.conv_out", f"{half}/conv_out"),
        )
    ]
    for level in range(LEVELS):
        theirs = LEVELS - 1 - level if names.reversed else level
        down, up = (path.replace("{level}", str(i)) for path, i in ((names.down, level), (names.up, theirs)))
        rules += _block(names, "encoder", down, f"down_{level}_block_{{j}}")
        rules += _block(names, "decoder", up, f"up_{level}_block_{{j}}")
        for path, i, half, ours in (
            (names.downsample, level, "encoder", "down"),
            (names.upsample, theirs, "decoder", "up"),
        ):
            source = path.replace("{level}", str(i))
            rules += affine(f"{half}.{source}", f"{half}/{ours}_{level}_conv", CONV2D)
    return rules


TABLE = _table(DIFFUSERS)
SAT_TABLE = _table(SAT)

# The authors' file holds the nets of its training's loss beside.
DROPPED = (r"loss\..*",)


def view(source: Source) -> Source:
    """The authors' file under diffusers' names; their code encodes the whole clip at once, as the weights were trained.

    A tensor that has no such name keeps its own.
    """
    if not any(key.startswith("encoder.down.") for key in source.shapes):
        return source
    rules = [(pattern(sat.source), ours.source) for sat, ours in zip(SAT_TABLE, TABLE, strict=True)]
    pieces = {}
    for key in source.shapes:
        names = (name.format(**m.groupdict()) for regex, name in rules if (m := regex.fullmatch(key)))
        pieces[next(names, key)] = Piece(key)
    return views.cut(source, pieces, encoder_chunk=0)


def infer(shapes: Shapes) -> Fields:
    block = r"(?:en|de)coder\.{}_blocks\.{}\.resnets\.[0-9]+\.conv[12]\.conv\.bias"
    widths = [
        size(shapes, f"{block.format('down', level)}|{block.format('up', LEVELS - 1 - level)}")
        for level in range(LEVELS)
    ]
    latent = size(shapes, r"encoder\.conv_out\.conv\.(?:weight|bias)")
    return known(
        channels=None if None in widths else widths,
        layers_per_block=count(shapes, r"encoder\.down_blocks\.[0-9]+\.resnets\.([0-9]+)\."),
        latent_channels=latent // 2 if latent else None,
    )


def init(key: jax.Array, fields: Fields) -> Any:
    model = CogVideoXVAE(**tuples(fields))
    return model.init(key, jnp.zeros((1, 1, model.space_factor, model.space_factor, 3)))["params"]


CHECKPOINT_TYPE = CheckpointType(
    name="cogvideox_vae",
    part="vae",
    view=view,
    table=TABLE,
    dropped=DROPPED,
    infer=infer,
    init=init,
    released={
        "5B": {
            "channels": (128, 256, 256, 512),
            "layers_per_block": 3,
            "norm_groups": 32,
            "latent_channels": 16,
            "scaling": 0.7,
        }
    },
    needs=("norm_groups", "scaling"),
    config_names={"norm_groups": "norm_num_groups", "scaling": "scaling_factor", "encoder_chunk": "encoder_chunk"},
    licence=tora_cogvideox.LICENCE,
)
