"""The released Tora, on CogVideoX-5B; see backbones/opensora.py for what a backbone defines.

Two front ends run these weights, and their numbers differ. The authors' own ("sat", alibaba/Tora at 9a23dce, sat/)
trained them, text to video and image to video; a later one ("diffusers", diffusers-version/) has text to video alone.
`CogVideoXTora.front_end` says which is followed, where this module does something that depends on it.

One thing is done as in neither: the motion is encoded once for both passes of guidance, as in diffusers, but with the
authors' "sat" as well, which draws from the posterior once for each pass.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.core import freeze
from jaxtyping import Array, Float, Key, UInt8

from tora_jax.conditioning import motion_maps, prompt_rewriting
from tora_jax.conditioning.text import Tokenizer
from tora_jax.conditioning.trajectory import Tracks
from tora_jax.diffusion.v_prediction import GUIDANCE, VPrediction
from tora_jax.errors import UserError
from tora_jax.io.video import to_float
from tora_jax.models import eight_bit
from tora_jax.models.cogvideox import CogVideoX
from tora_jax.models.cogvideox_tora import CogVideoXTora
from tora_jax.models.cogvideox_vae import CHUNK, CogVideoXVAE
from tora_jax.models.t5 import T5Encoder

PARTS = {"tora": CogVideoXTora, "vae": CogVideoXVAE, "t5": T5Encoder}
SECTIONS = {**PARTS, "tora.cogvideox": CogVideoX}
OWN = {"tora.cogvideox": {"eight_bit"}}  # of `in_eight_bit`
OPTIONAL: set[str] = set()
MOTION = "vae"  # trajectory maps go through the video VAE
BUFFERS = r"tora/cogvideox/positions"
REWRITING = prompt_rewriting.LONG_INSTRUCTIONS
TOKENS = {"clean": str, "see_padding": True}  # as both front ends have it: no cleaning, no mask

SPACINGS = {"sat": "sat", "diffusers": "trailing"}  # of the sampler's timesteps, by front end
SAT_FRAMES = (33, 41, 49)  # the lengths that the authors' own code has positions for
# Noise on the given image, exp(N(mean, std)) strong, and how often it is dropped: in training alone, as CogVideoX's
# image-to-video training has them (sat/diffusion_video.py).
IMAGE_NOISE, DROP_IMAGE = (-3.0, 0.5), 0.05


def dummies(parts: Mapping[str, nn.Module]) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """Part -> the arguments and keywords of a call with the smallest inputs, for those of `parts`."""

    def denoiser(tora: CogVideoXTora) -> tuple[tuple, dict[str, Any]]:
        latents = jnp.zeros((1, 1, tora.patch, tora.patch, tora.in_channels))
        caption = jnp.zeros((1, 1, tora.caption_channels))
        given = jnp.zeros((*latents.shape[:-1], tora.given_channels)) if tora.given_channels else None
        return (latents, jnp.ones(1), caption, latents), {"given": given}

    def video(vae: CogVideoXVAE) -> tuple[tuple, dict[str, Any]]:
        return (jnp.zeros((1, 1, vae.space_factor, vae.space_factor, 3)),), {}

    def tokens(t5: T5Encoder) -> tuple[tuple, dict[str, Any]]:
        return (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)), {}

    kinds = {"tora": denoiser, "vae": video, "t5": tokens}
    return {part: smallest(parts[part]) for part, smallest in kinds.items() if part in parts}


def check_fit(parts: Mapping[str, nn.Module], tokenizer: Tokenizer) -> None:
    """Parts that do not fit would fail later, or make noise.

    Raises:
      UserError: they do not speak of the same latents, captions and tokens, or a name is unknown.
    """
    tora, vae, t5 = (parts[part] for part in PARTS)
    for name, known in (("front_end", SPACINGS), ("guidance", GUIDANCE)):
        if (value := getattr(tora, name)) not in known:
            raise UserError(f"config: tora.{name} is {value!r}; choose {' or '.join(known)}")
    if vae.latent_channels != tora.in_channels:
        raise UserError(
            f"config: vae has {vae.latent_channels} latent channels, tora.cogvideox.out_channels is {tora.in_channels}"
        )
    if tora.given_channels not in (0, tora.in_channels):
        wanted = f"{tora.in_channels} (text to video) or {2 * tora.in_channels} (image to video)"
        raise UserError(f"config: tora.cogvideox.in_channels should be {wanted}")
    if tora.caption_channels != t5.width:
        raise UserError(
            f"config: tora.cogvideox.caption_channels is {tora.caption_channels}, t5.width {t5.width}; make them equal"
        )
    if tokenizer.vocab_size > t5.vocab_size:
        raise UserError(f"config: t5.vocab_size is {t5.vocab_size}, the tokenizer has {tokenizer.vocab_size} pieces")


def process(parts: Mapping[str, nn.Module]) -> VPrediction:
    """The process that the weights were trained on."""
    return VPrediction(SPACINGS[parts["tora"].front_end])


def in_eight_bit(parts: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts with a denoiser whose kernels are in 8 bits: it takes the parameters of `quantize`."""
    tora = parts["tora"]
    return {**parts, "tora": tora.clone(cogvideox=freeze({**tora.cogvideox, "eight_bit": True}))}


def quantize(params: Mapping[str, Any], of_blocks: Callable[[Any], Any] = eight_bit.quantize) -> dict[str, Any]:
    """The denoiser's parameters as a module of `in_eight_bit` takes them.

    Args:
      of_blocks: `eight_bit.quantize`, or `eight_bit.shapes`.
    """
    inner = params["cogvideox"]
    return {**params, "cogvideox": {**inner, "blocks": of_blocks(inner["blocks"])}}


# ----------------------------------------------------------------------------------------------------------
# Compiled functions
# ----------------------------------------------------------------------------------------------------------


def encode_text(t5: nn.Module, params: Any, ids: Array, mask: Array) -> Float[Array, "b n c"]:
    """Tokens -> features of captions."""
    return t5.apply({"params": params}, ids, mask)


def extract(
    parts: Mapping[str, nn.Module], params: Mapping[str, Any], maps: Float[Array, "b t h w 3"], keys: Key[Array, "b"]
) -> Any:
    """Trajectory maps in -1..1 -> the motion features of all blocks, or what the fusers make of them (`keep_fusion`).

    Args:
      keys: of each video, for its draw from the posterior.
    """
    motion = _drawn(parts["vae"], params["vae"], maps, keys)
    tora, variables = parts["tora"], {"params": params["tora"]}
    features = tora.apply(variables, motion, method="extract")
    return tora.apply(variables, features, method="fusion") if tora.keep_fusion else features


def denoise(
    tora: nn.Module,
    params: Any,
    x: Array,
    timestep: Array,
    text: Array,
    *,
    frame_mask: Array | None = None,
    strength: Array | None = None,
    strength_span: Array | None = None,
    **conditions: Any,
) -> tuple[Array, Array | None]:
    """A forward pass, and what the blocks added in it; see `sampler.Method`.

    Args:
      frame_mask: not used: these weights know no frames that are given in their places.
      strength: of the fusers in each video.
      strength_span: the part of the steps, 0..1, in which they act; [b, 2].
    """
    if strength is not None:
        # The share of the steps that are done; timesteps are rounded to thousandths of it.
        done = 1 - (timestep + 1) / 1000 + 1.5e-3
        strength = jnp.where((done >= strength_span[:, 0]) & (done < strength_span[:, 1]), strength, 0.0)
    variables, options = {"params": params}, {"mutable": ["intermediates"], "method": "denoise"}
    out, sown = tora.apply(variables, x, timestep, text, strength=strength, **conditions, **options)
    return out, next(iter(jax.tree.leaves(sown)), conditions.get("residual"))


@functools.partial(jax.jit, static_argnums=0)
def _drawn(
    vae: CogVideoXVAE, params: Any, video: Float[Array, "b t h w 3"], keys: Key[Array, "b"]
) -> Float[Array, "b t4 h8 w8 c"]:
    """A draw from the posterior of each video, normalised; it depends on the video's own key alone."""
    mean, logvar = vae.apply({"params": params}, video, method="moments").latent
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return (mean + jnp.exp(0.5 * logvar) * noise) * vae.scaling


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


def check(models: Any, inputs: Sequence[Any], settings: Any) -> None:
    """Refuses what these weights cannot make, before anything is computed.

    Raises:
      UserError: for the first such value.
    """
    tora, vae = models.tora, models.vae
    cell = vae.space_factor * tora.patch
    if settings.height % cell or settings.width % cell:
        near = "x".join(str(max(round(side / cell), 1) * cell) for side in (settings.width, settings.height))
        size = f"{settings.width}x{settings.height}"
        raise UserError(f"the size {size}: these weights take multiples of {cell} pixels, such as {near}")
    if settings.trajectory_guidance != 1:
        raise UserError(
            "these weights have no null trajectory, so there is no trajectory_guidance; try trajectory_strength"
        )
    frames = min(settings.num_frames, settings.segment or settings.num_frames)
    if frames % CHUNK != 1:
        below = max(frames - frames % CHUNK + 1, 1) if frames % CHUNK else frames - CHUNK + 1
        raise UserError(f"{frames} frames at once: these weights make 8k + 1, such as {below} or {below + CHUNK}")
    _check_images(tora, inputs, settings)
    grid = vae.latent_frames(frames), settings.height // cell, settings.width // cell
    tora.check_grid(grid)
    if tora.front_end == "sat" and frames not in SAT_FRAMES:
        lengths = ", ".join(map(str, SAT_FRAMES))
        warnings.warn(f"{frames} frames: the authors' own code has these weights make {lengths} alone", stacklevel=2)


def _check_images(tora: CogVideoXTora, inputs: Sequence[Any], settings: Any) -> None:
    longer = settings.segment and settings.num_frames > settings.segment
    for each in inputs:
        if not tora.given_channels:
            if each.images:
                raise UserError("text-to-video weights take no pictures; take image-to-video ones for that")
            if longer:
                raise UserError(
                    f"text-to-video weights go on from no frames: {settings.num_frames} frames need "
                    f"--segment={settings.num_frames}, to be made at once, or image-to-video weights"
                )
            continue
        if 0 not in each.images:
            raise UserError("image-to-video weights need the first frame: give --image")
        if len(each.images) > 1:
            others = ", ".join(str(frame) for frame in sorted(each.images) if frame)
            raise UserError(f"image-to-video weights take the first frame alone; leave out what is given at {others}")
        pixels, edit = each.images[0]
        if edit or (pixels.ndim == 4 and len(pixels) > 1):
            raise UserError("image-to-video weights take one picture as the first frame, as it is: no clip, no edit")
    if tora.given_channels and longer and settings.overlap != 1:
        raise UserError("image-to-video weights go on from one frame: give --overlap=1")


def conditions(models: Any, inputs: Sequence[Any], settings: Any) -> dict[str, Array | None]:
    """What the denoiser is told in each pass of `guidance.guide`, pass after pass, stacked along the batch.

    The null caption is zeros with "sat", as in training, where dropped captions are multiplied by 0
    (sat/sgm/modules/encoders/modules.py), and the empty text with "diffusers" (t2v_pipeline.py). A negative prompt
    takes its place in both.
    """
    empty = models.tora.front_end == "diffusers" or settings.negative_prompt
    prompts = [each.prompt for each in inputs]
    ids, mask = models.tokenizer([*prompts, settings.negative_prompt] if empty else prompts)
    embedded = models.encode_text(models.params["t5"], jnp.asarray(ids), jnp.asarray(mask))
    count, passes = len(prompts), 1 if settings.guidance == 1 else 2
    null = embedded[count:] if empty else jnp.zeros_like(embedded[:1])
    captions = [embedded[:count], jnp.repeat(null, count, axis=0)][:passes]
    told = {"text": jnp.concatenate(captions)}
    if settings.trajectory_strength is not None and inputs[0].tracks is not None:
        span = [settings.trajectory_from or 0.0, 1.0 if settings.trajectory_to is None else settings.trajectory_to]
        told["strength"] = jnp.full(count * passes, settings.trajectory_strength, jnp.float32)
        told["strength_span"] = jnp.tile(jnp.asarray(span, jnp.float32), (count * passes, 1))
    return told


def motion_map(
    tracks: Tracks, size: tuple[int, int], max_norm: float | None
) -> tuple[UInt8[np.ndarray, "t h w 3"], Float[np.ndarray, "t h w 3"]]:
    """The map of a trajectory: as a picture, and as `extract` takes it: that picture in -1..1.

    Where points are whole pixels at 480x720, it is the released code's (sat/utils/flow_utils.py), which rounds the
    colours before it encodes them. Other points keep their place between pixels, and other sizes scale the blur.

    Args:
      size: height and width in pixels.
      max_norm: the displacement in pixels that has full colour; None = the map's own largest.
    """
    picture = motion_maps.flow_to_rgb(motion_maps.displacement_maps(np.asarray(tracks), *size), max_norm)
    return picture, np.asarray(to_float(picture))


def given(
    models: Any, inputs: Sequence[Any], settings: Any, keys: Key[Array, "b"]
) -> tuple[list[dict[int, tuple[Array, float]]], dict[str, Array]]:
    """No latent is set in its place. Image-to-video weights are told the first frame: its latent, then zeros.

    Args:
      keys: of each video, for the draw from its picture's posterior.
    """
    nothing = [{} for _ in inputs]
    if not models.tora.given_channels:
        return nothing, {}
    pictures = np.stack([np.reshape(each.images[0].pixels, (1, *each.images[0].pixels.shape[-3:])) for each in inputs])
    first = _drawn(models.vae, models.params["vae"], to_float(jnp.asarray(pictures)), keys)
    told = _first_frame(first, models.vae.latent_frames(settings.num_frames))
    return nothing, {"given": jnp.concatenate([told] * (1 if settings.guidance == 1 else 2))}


def _first_frame(latent: Float[Array, "b 1 h w c"], frames: int) -> Float[Array, "b t h w c"]:
    """A first frame's latent, and zeros for the others."""
    return jnp.pad(latent, ((0, 0), (0, frames - 1), (0, 0), (0, 0), (0, 0)))


def guidance(models: Any, settings: Any, times: Float[np.ndarray, "_"]) -> Float[np.ndarray, "steps 2"]:
    """The weights of `guidance.guide` at each step."""
    weights = GUIDANCE[models.tora.guidance](settings.guidance, times)
    return np.stack([weights, np.ones_like(weights)], axis=1).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def predictor(
    parts: Mapping[str, nn.Module],
    params: Mapping[str, Any],
    batch: Mapping[str, Array],
    motion: Float[Array, "b t h w c"] | None,
    *,
    keys: Key[Array, "b"] | None = None,
    drop_text: Array | None = None,
    has_motion: Array | None = None,
) -> tuple[Callable[[Array, Array], Array], dict[str, Array]]:
    """(noisy latents, timesteps) -> the denoiser's output under a batch's conditions; and moving statistics.

    A dropped caption is zeros, and a dropped motion leaves the fusers out.

    Args:
      batch: of `data.pipeline.batches`, with "text" where it was precomputed, else with "ids".
      motion: latents of the trajectory maps.
      keys: of each sample, in training: batch norms then take the batch's statistics and move their own towards them,
        which is the second result (path -> leaf); given pictures get noise, or are dropped. None = evaluation.
      drop_text, has_motion: bool [b].
    """
    tora, training = parts["tora"], keys is not None
    if "text" in batch:
        caption = batch["text"]
    else:
        caption = encode_text(parts["t5"], params["t5"], batch["ids"], batch["text_mask"])
    if drop_text is not None:
        caption = jnp.where(drop_text[:, None, None], 0, caption)
    told = {"given": _given_in(batch, parts["vae"], params, keys)} if tora.given_channels else {}
    statistics: dict[str, Array] = {}
    if motion is not None:
        variables, collections = {"params": params["tora"]}, ["batch_stats"] if training else []
        told["features"], moved = tora.apply(variables, motion, method="extract", mutable=collections)
        flat = traverse_util.flatten_dict(dict(moved.get("batch_stats", {})), sep="/")
        statistics = {f"tora/{path}": leaf for path, leaf in flat.items()}
        told["strength"] = None if has_motion is None else has_motion.astype(jnp.float32)

    def predict(x: Array, t: Array) -> Array:
        return tora.apply({"params": params["tora"]}, x, t, caption, method="denoise", **told)

    return predict, statistics


def _given_in(
    batch: Mapping[str, Array], vae: CogVideoXVAE, params: Mapping[str, Any], keys: Key[Array, "b"] | None
) -> Float[Array, "b t h w c"]:
    """A batch's first frames as image-to-video weights are told them.

    Raises:
      UserError: the batch holds no pixels.
    """
    if "video" not in batch:
        raise UserError("image-to-video weights train on clips: their first frame is encoded alone, with noise")
    video = to_float(batch["video"])
    frames, first = vae.latent_frames(video.shape[1]), video[:, :1]
    if keys is None:
        return _first_frame(vae.apply({"params": params["vae"]}, first, method="encode"), frames)

    def noisy(picture: Array, key: Array) -> Array:
        strength, noise = jax.random.split(key)
        mean, std = IMAGE_NOISE
        scale = jnp.exp(mean + std * jax.random.normal(strength))
        return picture + scale * jax.random.normal(noise, picture.shape)

    keys, draws, drops = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    latent = _drawn(vae, params["vae"], jax.vmap(noisy)(first, keys), draws)
    kept = ~jax.vmap(lambda key: jax.random.bernoulli(key, DROP_IMAGE))(drops)
    return _first_frame(jnp.where(kept[:, None, None, None, None], latent, 0), frames)
