"""CogVideoX's VAE -> `tora_jax.models.cogvideox_vae.CogVideoXVAE`, from diffusers' names (AutoencoderKLCogVideoX) and
from those of the authors' own file (3d-vae.pt, under "state_dict")."""

from __future__ import annotations

from typing import NamedTuple

from convert_weights.mapping import Layout, Rule, affine, norm

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
IGNORED = (r"loss\..*",)
