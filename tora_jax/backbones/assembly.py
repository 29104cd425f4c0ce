"""All parts of the chain as one thing: the modules of a config, their parameters and their compiled functions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from tora_jax.checkpoints import release
from tora_jax.conditioning import text
from tora_jax.diffusion import rectified_flow
from tora_jax.errors import UserError, closest
from tora_jax.io.files import tuples
from tora_jax.models.autoencoder_kl import AutoencoderKL
from tora_jax.models.causal_vae import CausalVAE
from tora_jax.models.stdit import STDiT
from tora_jax.models.t5 import T5Encoder
from tora_jax.models.tora import Tora
from tora_jax.models.video_vae import VideoVAE

PARTS = {"tora": Tora, "vae": VideoVAE, "motion_vae": VideoVAE, "t5": T5Encoder}
SECTIONS = {
    **PARTS,
    "tora.stdit": STDiT,
    "vae.spatial": AutoencoderKL,
    "vae.temporal": CausalVAE,
    "motion_vae.spatial": AutoencoderKL,
    "motion_vae.temporal": CausalVAE,
}
OWN = {"tora.stdit": {"fuser", "placement"}}  # fields that the section above sets


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """All parts of the chain with their parameters, and their compiled functions (kept for the next call).

    Attributes:
      tora, vae, motion_vae, t5: the modules.
      params: part name -> parameter tree; NumPy's arrays are copied to the device for each call, see `load`.
      tokenizer: for `t5`; None where nothing is generated.
      origin: where the parameters come from, for people: a folder, or "random weights (seed 0)".
      sampling: that section of the config: what is to be generated where a person does not say.
    """

    tora: Tora
    vae: VideoVAE
    motion_vae: VideoVAE
    t5: T5Encoder
    params: Mapping[str, Any]
    tokenizer: text.Tokenizer | None
    origin: str
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def encode_text(self) -> Callable:
        return jax.jit(lambda params, ids, mask: self.t5.apply({"params": params}, ids, mask))

    @functools.cached_property
    def encode_video(self) -> Callable:
        return jax.jit(functools.partial(_apply, self.vae, method="encode"))

    @functools.cached_property
    def extract(self) -> Callable:
        """RGB flow maps -> the extractor's features."""

        def extract(params, maps):
            motion = _apply(self.motion_vae, params["motion_vae"], maps, method="encode")
            return _apply(self.tora, params["tora"], motion, method="extract")

        return jax.jit(extract)

    @functools.cached_property
    def step(self) -> Callable:
        """One step of the sampler; the latents are donated."""
        return jax.jit(functools.partial(_step, self.tora), donate_argnums=1)

    @functools.cached_property
    def saving_step(self) -> Callable:
        """One step that takes from the ones before what need not be computed anew, see `_saving_step`."""
        return jax.jit(functools.partial(_saving_step, self.tora), donate_argnums=1)

    @functools.cached_property
    def decode(self) -> Callable:
        """Latents -> uint8 video, and whether all of it was finite."""

        def decode(num_frames, params, latents):
            video = _apply(self.vae, params, latents, num_frames, method="decode")
            pixels = jnp.round(jnp.clip(video, -1, 1) * 127.5 + 127.5).astype(jnp.uint8)
            return pixels, jnp.isfinite(video).all()

        return jax.jit(decode, static_argnums=0)


def _apply(module: nn.Module, params, *args, **kwargs):
    return module.apply({"params": params}, *args, **kwargs)


def _step(tora, params, x, times, guidance, trajectory_guidance, conditions, features, edit, noise):
    def predict(x: Array, timestep: Array, frame_mask: Array | None) -> Array:
        return _passes(tora, params, x, timestep, frame_mask, conditions, features)

    return rectified_flow.sampling_step(predict, x, times, guidance, trajectory_guidance, edit, noise)


def _saving_step(
    tora, params, x, times, guidance, trajectory_guidance, conditions, features, edit, noise, memory, ratio, residual
):
    """`_step` with `rectified_flow.saving_step`.

    Args:
      conditions: of all passes, or of the first alone.
      residual: what the blocks added at the step before, in their place; None = they are computed.

    Returns:
      the latents, the memory, and what the blocks added.
    """
    added = []

    def predict(x: Array, timestep: Array, frame_mask: Array | None) -> Array:
        options = {"residual": residual} if residual is not None else {"mutable": ["intermediates"]}
        out = _passes(tora, params, x, timestep, frame_mask, conditions, features, **options)
        if residual is not None:
            added.append(residual)
            return out
        out, sown = out
        added.append(jax.tree.leaves(sown)[0])
        return out

    x, memory = rectified_flow.saving_step(predict, x, times, guidance, trajectory_guidance, edit, noise, memory, ratio)
    return x, memory, added[0]


def _passes(tora, params, x, timestep, frame_mask, conditions, features, **options):
    """The passes of `rectified_flow.guide`, stacked; with `mutable`, also what was sown."""
    passes = len(conditions["text"]) // len(x)
    out = tora.apply(
        {"params": params},
        jnp.concatenate([x] * passes),
        jnp.concatenate([timestep] * passes),
        frame_mask=None if frame_mask is None else jnp.concatenate([frame_mask] * passes),
        features=features,
        method="denoise",
        **conditions,
        **options,
    )
    out, *rest = out if isinstance(out, tuple) else (out,)
    out = out.reshape(passes, *x.shape[:-1], -1)
    return (out, *rest) if rest else out


def modules(config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The parts that a config names.

    Raises:
      UserError: for a missing part, or a field that a part does not have.
    """
    config = tuples(config)
    if missing := [part for part in PARTS if part not in config]:
        raise UserError(f"the config has no section {', '.join(missing)}; it needs {', '.join(PARTS)}")
    for section in SECTIONS:
        fields = functools.reduce(lambda at, name: at.get(name), section.split("."), config)
        if fields is None and section.endswith("spatial"):
            continue  # the causal VAE works on pixels
        if not isinstance(fields, Mapping):
            raise UserError(f"config: {section} should hold the fields of a model")
        known = _fields(section)
        for name in sorted(fields.keys() - known):
            close = closest(name, known) or ", ".join(sorted(known))
            raise UserError(f"config: {section} has no field {name!r}; did you mean {close}?")
    try:
        return {part: kind(**config[part]) for part, kind in PARTS.items()}
    except TypeError as error:
        raise UserError(f"config: {error}") from None


def _fields(section: str) -> set[str]:
    return {f.name for f in dataclasses.fields(SECTIONS[section])} - {"name", "parent"} - OWN.get(section, set())


def field_names() -> set[str]:
    """Names of all fields that the sections of a config may have."""
    return set().union(*map(_fields, SECTIONS))


def init_params(parts: Mapping[str, nn.Module], key: jax.Array) -> dict[str, Any]:
    """Fresh parameters for all parts; the motion VAE starts as the video VAE where they are of one shape."""
    tora, vae, t5 = parts["tora"], parts["vae"], parts["t5"]
    keys = jax.random.split(key, 4)
    latents = jnp.zeros((1, 1, 2, 2, tora.in_channels))
    caption = jnp.zeros((1, 1, tora.caption_channels))
    one = jnp.ones(1)
    video = jnp.zeros((1, 1, vae.space_factor, vae.space_factor, 3))
    params = {
        "tora": tora.init(keys[0], latents, one, caption, latents, fps=one, height=one, width=one)["params"],
        "vae": vae.init(keys[1], video)["params"],
        "t5": t5.init(keys[2], jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"],
    }
    same = parts["motion_vae"] == vae
    params["motion_vae"] = params["vae"] if same else parts["motion_vae"].init(keys[3], video)["params"]
    return params


def load(
    config: Mapping[str, Any] | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
    low_memory: bool = False,
) -> Models:
    """Builds the parts of a config and fills them.

    All parts are on the device from here on; at the released sizes in bfloat16, T5 alone takes 9.5 GB of it.

    Args:
      config: plain nested dict with "tora", "vae", "motion_vae" and "t5"; None = that of the weights.
      weights: a release folder; None = random weights, which make noise.
      seed: of the random weights.
      low_memory: the parameters stay in the host's memory, and each part is on the device only while it is used.

    Raises:
      UserError: when the config makes no model, or the weights are missing, broken or of another size.
    """
    if config is None:
        if weights is None:
            raise ValueError("load needs a config, weights or both")
        config = release.read_config(weights)
    parts = modules(config)
    init = functools.partial(init_params, parts)
    try:
        shapes = jax.eval_shape(init, jax.random.key(0))
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(f"config: these values make no model: {str(error).strip().splitlines()[0]}") from None
    keep = jax.device_get if low_memory else (lambda params: params)
    released = None if weights is None else release.load(weights, keep)
    length = parts["tora"].caption_length
    tokenizer = text.Tokenizer(tokenizer_path(weights).read_bytes(), length)
    _check_fit(**parts, tokenizer=tokenizer)
    if released is None:
        # Run once, so fast to compile beats fast to run: half a minute less on a laptop.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        params = keep(jax.jit(init, compiler_options=quick)(jax.random.key(seed)))
        origin = f"random weights (seed {seed})"
    else:
        params, origin = released.params, str(weights)
        _check_sizes(shapes, params, origin)
    return Models(**parts, params=params, tokenizer=tokenizer, origin=origin, sampling=config.get("sampling", {}))


def tokenizer_path(weights: str | Path | None) -> Path:
    """The sentencepiece model of a release folder, or the one of the small model."""
    return Path(str(resources.files("tora_jax").joinpath("assets") if weights is None else weights)) / "tokenizer.model"


def _check_sizes(want: Mapping, got: Mapping, origin: str) -> None:
    want, got = (
        {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()} for tree in (want, got)
    )
    if differ := sorted(path for path in want.keys() | got.keys() if want.get(path) != got.get(path)):
        path = differ[0]
        raise UserError(
            f"{origin}: weights of another size than the config: {path} is {got.get(path, 'missing')}, "
            f"the config wants {want.get(path, 'none')} ({len(differ)} tensors differ); "
            "leave --config out to use the config of the weights"
        )


def _check_fit(tora: Tora, vae: VideoVAE, motion_vae: VideoVAE, t5: T5Encoder, tokenizer: text.Tokenizer) -> None:
    """The parts must speak of the same latents, captions and tokens; else they would fail later, or make noise."""
    for name in ("space_factor", "time_factor", "micro_frame_size"):
        here, there = getattr(vae, name), getattr(motion_vae, name)
        if here != there:
            raise UserError(f"config: {name} is {here} in vae and {there} in motion_vae; make them equal")
    channels = tora.in_channels
    for part, module in (("vae", vae), ("motion_vae", motion_vae)):
        latent = module.temporal.get("latent_channels", CausalVAE.latent_channels)
        if latent != channels:
            raise UserError(f"config: {part} has {latent} latent channels, tora.stdit.in_channels is {channels}")
    caption = tora.caption_channels
    if caption != t5.width:
        raise UserError(f"config: tora.stdit.caption_channels is {caption}, t5.width {t5.width}; make them equal")
    if tokenizer.vocab_size > t5.vocab_size:
        raise UserError(f"config: t5.vocab_size is {t5.vocab_size}, the tokenizer has {tokenizer.vocab_size} pieces")
