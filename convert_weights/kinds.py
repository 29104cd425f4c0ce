"""The checkpoints that can be converted: for each its table, its model, and the sizes that were released."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tora_jax.configs import common

from convert_weights import aesthetic, clip, i3d, mapping, measure, raft, stdit3, t5, vae
from convert_weights.measure import Fields
from convert_weights.sources import Source, parse_json
from tora_jax.errors import UserError
from tora_jax.io.files import tuples
from tora_jax.models.aesthetic import V2, AestheticHead
from tora_jax.models.autoencoder_kl import AutoencoderKL
from tora_jax.models.clip import CLIP, CLIPText, CLIPVision
from tora_jax.models.clip import clip as released_clip
from tora_jax.models.i3d import I3D, MIN_FRAMES, SIZE
from tora_jax.models.raft import RAFT
from tora_jax.models.stdit import SIZES, STDiT, parse_variant
from tora_jax.models.t5 import T5Encoder
from tora_jax.models.video_vae import VideoVAE


@dataclasses.dataclass(frozen=True)
class Kind:
    """One sort of checkpoint.

    Attributes:
      name: on the command line.
      part: of a release folder: the name of its file and of its section in config.json.
      table, ignored: see mapping.py.
      measure: shapes -> the fields that they tell.
      model: fields -> (module, shapes of its parameters).
      released: variant -> fields.
      needs: fields that shapes cannot tell.
      beside: field -> its name in a config.json that comes with the checkpoint.
      constants: name -> a tensor that PyTorch's module holds and ours computes, of these fields.
    """

    name: str
    part: str
    table: Sequence[mapping.Rule]
    ignored: Sequence[str]
    measure: Callable[[measure.Shapes], Fields]
    model: Callable[[Fields], tuple[nn.Module, Any]]
    released: Mapping[str, Fields]
    needs: tuple[str, ...] = ()
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Callable[[Fields], np.ndarray]] = dataclasses.field(default_factory=dict)

    def shapes(self, fields: Fields) -> dict[str, tuple[int, ...]]:
        """Parameter path -> shape.

        Raises:
          UserError: for a field that the model does not have.
        """
        try:
            _, params = self.model(fields)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name}: these sizes make no model: {str(error).splitlines()[0]}") from None
        return {path: leaf.shape for path, leaf in mapping.flatten(params).items()}


# ----------------------------------------------------------------------------------------------------------
# Models
# ----------------------------------------------------------------------------------------------------------


def _shapes(module: nn.Module, *inputs, **named):
    init = lambda key: module.init(key, *inputs, **named)["params"]  # noqa: E731
    return module, jax.eval_shape(init, jax.random.key(0))


def stdit_fields(fields: Fields) -> Fields:
    """Depth, width, heads and patch as the module wants them: one `variant`."""
    fields = dict(fields)
    size = tuple(fields.pop(name) for name in ("depth", "width", "num_heads", "patch"))
    name = next((name for name, released in SIZES.items() if released == size), None)
    return {"variant": name or "{}x{}x{}/{}".format(*size), **fields}


def _stdit3(fields: Fields):
    module = STDiT(**stdit_fields(fields))
    x, text, one = (
        jnp.zeros((1, 1, 2, 2, module.in_channels)),
        jnp.zeros((1, 1, module.caption_channels)),
        jnp.ones(1),
    )
    return _shapes(module, x, one, text, fps=one, height=one, width=one)


def _vae(fields: Fields):
    return _shapes(VideoVAE(**tuples(fields)), jnp.zeros((1, 1, 16, 16, 3)))


def _vae2d(fields: Fields):
    module = AutoencoderKL(**tuples(fields))
    return _shapes(module, jnp.zeros((1, module.space_factor, module.space_factor, 3)))


def _t5(fields: Fields):
    ids = jnp.zeros((1, 2), jnp.int32)
    return _shapes(T5Encoder(**fields), ids, ids > 0)


def _raft(fields: Fields):
    module = RAFT(**tuples(fields))
    frame = jnp.zeros((1, *(8 * 2**module.corr_levels,) * 2, 3))
    return _shapes(module, frame, frame)


def _i3d(fields: Fields):
    return _shapes(I3D(**fields), jnp.zeros((1, MIN_FRAMES, SIZE, SIZE, 3)))


def _clip(fields: Fields):
    rest = {name: value for name, value in fields.items() if name not in ("text", "vision")}
    module = CLIP(CLIPText(**fields["text"]), CLIPVision(**fields["vision"]), **rest)
    size = module.vision.image_size
    return _shapes(module, jnp.zeros((1, module.text.max_length), jnp.int32), jnp.zeros((1, size, size, 3)))


def _aesthetic(fields: Fields):
    module = AestheticHead(**tuples(fields))
    return _shapes(module, jnp.zeros((1, module.features)))


def _rotary_frequencies(fields: Fields) -> np.ndarray:
    """The frequencies that the reference's rotary embedding keeps as a tensor; layers.rotate computes them."""
    head = fields["width"] // fields["num_heads"]
    return (1 / 10000.0 ** (np.arange(0, head, 2, dtype=np.float32) / np.float32(head))).astype(np.float32)


def _released_clip(variant: str) -> Fields:
    model = released_clip(variant)
    tower = lambda t: {  # noqa: E731
        f.name: getattr(t, f.name) for f in dataclasses.fields(t) if f.name not in ("dtype", "parent", "name")
    }
    return {"text": tower(model.text), "vision": tower(model.vision), "features": model.features}


def _defaults(module: type[nn.Module]) -> Fields:
    """The fields of a module and their defaults, but for how it computes."""
    return {f.name: f.default for f in dataclasses.fields(module) if f.name not in ("dtype", "parent", "name")}


_RELEASED_STDIT = {name: {**size._asdict(), "base_resolution": 512.0} for name, size in SIZES.items()}
_RELEASED_VAE = {**common.opensora_vae(), "spatial": {**common.opensora_vae()["spatial"], "latent_channels": 4}}
_CLIP_BESIDE = {
    f"{tower}.{ours}": f"{tower}_config.{theirs}"
    for tower in ("text", "vision")
    for ours, theirs in (("num_heads", "num_attention_heads"), ("activation", "hidden_act"))
}

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="stdit3",
            part="stdit",
            table=stdit3.TABLE,
            ignored=stdit3.IGNORED,
            measure=measure.stdit3,
            model=_stdit3,
            released=_RELEASED_STDIT,
            needs=("num_heads",),
            beside={"num_heads": "num_heads", "base_resolution": "input_sq_size"},
            constants={"rope.freqs": _rotary_frequencies},
        ),
        Kind(
            name="vae",
            part="vae",
            table=vae.VIDEO_VAE,
            ignored=(),
            measure=measure.video_vae,
            model=_vae,
            released={"v1.2": _RELEASED_VAE},
            needs=("spatial.norm_groups", "temporal.norm_groups"),
        ),
        Kind(
            name="vae2d",
            part="autoencoder_kl",
            table=vae.AUTOENCODER_KL,
            ignored=(),
            measure=measure.autoencoder_kl,
            model=_vae2d,
            released={"SDXL": _RELEASED_VAE["spatial"]},
            needs=("norm_groups",),
            beside={"norm_groups": "norm_num_groups"},
        ),
        Kind(
            name="t5",
            part="t5",
            table=t5.TABLE,
            ignored=t5.IGNORED,
            measure=measure.t5,
            model=_t5,
            released={"XXL": common.t5_xxl()},
            beside={"relative_max_distance": "relative_attention_max_distance"},
        ),
        Kind(
            name="raft",
            part="raft",
            table=raft.TABLE,
            ignored=raft.IGNORED,
            measure=measure.raft,
            model=_raft,
            released={"large": _defaults(RAFT)},
            needs=("corr_levels", "corr_radius"),
        ),
        Kind(
            name="i3d",
            part="i3d",
            table=i3d.TABLE,
            ignored=i3d.IGNORED,
            measure=measure.i3d,
            model=_i3d,
            released={"k400": {"num_classes": 400}},
        ),
        Kind(
            name="clip",
            part="clip",
            table=clip.TABLE,
            ignored=clip.IGNORED,
            measure=measure.clip,
            model=_clip,
            released={name: _released_clip(name) for name in ("ViT-L/14", "ViT-B/32")},
            needs=("text.num_heads", "vision.num_heads"),
            beside={**_CLIP_BESIDE, "text.eos_id": "text_config.eos_token_id"},
        ),
        Kind(
            name="aesthetic",
            part="aesthetic",
            table=aesthetic.TABLE,
            ignored=aesthetic.IGNORED,
            measure=measure.aesthetic,
            model=_aesthetic,
            released={"v1": {"features": 768, "layers": ()}, "v2": {"features": 768, "layers": V2}},
        ),
    )
}


# ----------------------------------------------------------------------------------------------------------
# Sizes
# ----------------------------------------------------------------------------------------------------------


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Fields:
    flat: Fields = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: tuples(value)}
    return flat


def _nested(flat: Fields) -> Fields:
    return mapping.unflatten({path.replace(".", "/"): value for path, value in flat.items()})


def read_variant(kind: Kind, variant: str) -> Fields:
    """What --variant says: a released name, STDiT's DEPTHxWIDTHxHEADS/PATCH, or fields as JSON or a JSON file.

    Raises:
      UserError: for anything else.
    """
    if variant in kind.released:
        return kind.released[variant]
    if variant.startswith("{") or variant.endswith(".json"):
        text = variant if variant.startswith("{") else Path(variant).read_text(encoding="utf-8")
        fields = parse_json(text, "--variant")
        if kind.name == "stdit3" and "variant" in fields:
            fields = {**fields, **_stdit_size(fields.pop("variant"))}
        return fields
    if kind.name == "stdit3":
        return _stdit_size(variant)
    raise UserError(f"--variant {variant}: {kind.name} has {', '.join(kind.released)}, or give fields as JSON")


def _stdit_size(variant: str) -> Fields:
    try:
        return parse_variant(variant)._asdict()
    except ValueError as error:
        raise UserError(f"--variant: {error}") from None


def sizes(kind: Kind, source: Source, variant: str | None) -> tuple[str, Fields]:
    """The fields of a checkpoint's model, and the variant's name ("own sizes" where none was released).

    Args:
      variant: what the user says; None = by the shapes alone.

    Raises:
      UserError: when it is no such checkpoint, of another variant, or does not tell a field.
    """
    rules = [mapping.pattern(rule.source) for rule in kind.table]
    if not any(rule.fullmatch(key) for rule in rules for key in source.shapes):
        known = next(iter(source.shapes))
        raise UserError(f"{source.name}: no tensor of a {kind.name} checkpoint inside (it holds {known} ...)")
    measured = _flat(kind.measure(source.shapes))
    given: Fields = {}
    if variant is not None:
        given = _flat(read_variant(kind, variant))
        wrong = [f"{k} {measured[k]}, not {v}" for k, v in given.items() if k in measured and measured[k] != v]
        if wrong:
            raise UserError(f"{source.name}: wrong variant: --variant {variant}, but the file has {'; '.join(wrong)}")
    told = measured | given
    fits = (all(told.get(k, v) == v for k, v in _flat(fields).items()) for fields in kind.released.values())
    name = next((name for name, fit in zip(kind.released, fits, strict=True) if fit), None)
    if name is not None:
        # Sizes that a damaged checkpoint does not show are the released ones: they are then reported as missing.
        measured = _flat(kind.released[name]) | measured
    beside = {k: v for k, path in kind.beside.items() if (v := _lookup(source.config, path)) is not None}
    fields = measured | beside | given
    if unknown := [field for field in kind.needs if field not in fields]:
        example = "DEPTHxWIDTHxHEADS/PATCH" if kind.name == "stdit3" else json.dumps(_nested(dict.fromkeys(unknown, 8)))
        raise UserError(f"{source.name}: shapes do not tell {', '.join(unknown)}; give it, as in --variant '{example}'")
    return name or "own sizes", _nested(fields)


def _lookup(config: Mapping[str, Any], path: str) -> Any:
    """A value in a config.json, by names joined with dots."""
    value: Any = config
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
