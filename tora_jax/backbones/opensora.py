"""Open-Sora v1.2 with Tora's modules.

A backbone is a module of this folder. A config names it as `backbone`; one that names none means this one. Nothing
outside a backbone, its models and its configs knows it: sampling, training and data ask for the names below.

The parts of a config:
  PARTS: part -> Linen module. "tora" is a `typing.Denoiser`, "vae" a `typing.VAE`, "t5" the text encoder.
  SECTIONS: section of a config -> the module whose fields it has; OWN: fields that the section above sets instead;
    OPTIONAL: sections that may be None.
  MOTION: the part that encodes trajectory maps.
  REWRITING: instructions for a language model that rewrites prompts.
  TOKENS: how captions become tokens; options of `text.Tokenizer`.
  BUFFERS: regex of the paths of parameters that never train.
  dummies: the smallest inputs of each part.
  check_fit: whether the parts speak of the same latents, captions and tokens.
  process: the `typing.Process` of the weights.
  in_eight_bit, quantize: where the denoiser has a form in 8 bits; see backbones/cogvideox.py.

What the compiled functions of `assembly.Models` are made of:
  encode_text, extract, denoise.

What sampling asks for:
  check: refuses requests that the weights cannot make.
  conditions: what the denoiser is told of captions and sizes, for all passes.
  motion_map: the colours of a trajectory.
  given: what is made of given frames: latents in their places, and more conditions.
  guidance: the weights of guidance at each step.

What training asks for:
  predictor: the denoiser under the conditions of a batch, and the statistics that the batch moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tora_jax.conditioning import motion_maps, prompt_rewriting, text
from tora_jax.conditioning.images import STILL_FPS, Given
from tora_jax.conditioning.trajectory import Tracks
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.errors import UserError
from tora_jax.io.video import to_float
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
OWN = {"tora.stdit": {"fuser", "placement"}}
OPTIONAL = {"vae.spatial", "motion_vae.spatial"}  # None = the causal VAE works on pixels
MOTION = "motion_vae"
# The reference keeps the null caption as a buffer; shift and scale of the VAEs are statistics of their latents.
BUFFERS = r"(.*/)?null_caption|(vae|motion_vae)/(shift|scale)"

REWRITING = prompt_rewriting.INSTRUCTIONS
TOKENS: dict[str, Any] = {}


def dummies(parts: Mapping[str, nn.Module]) -> dict[str, tuple[tuple, dict[str, Any]]]:
    """Part -> the arguments and keywords of a call with the smallest inputs, for those of `parts`.

    Parameters are drawn in this order. Of equal modules the later takes the earlier's parameters: the motion VAE starts
    as the video VAE.
    """

    def denoiser(tora: Tora) -> tuple[tuple, dict[str, Any]]:
        latents, one = jnp.zeros((1, 1, 2, 2, tora.in_channels)), jnp.ones(1)
        caption = jnp.zeros((1, 1, tora.caption_channels))
        return (latents, one, caption, latents), {"fps": one, "height": one, "width": one}

    def video(vae: VideoVAE) -> tuple[tuple, dict[str, Any]]:
        return (jnp.zeros((1, 1, vae.space_factor, vae.space_factor, 3)),), {}

    def tokens(t5: T5Encoder) -> tuple[tuple, dict[str, Any]]:
        return (jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)), {}

    kinds = {"tora": denoiser, "vae": video, "t5": tokens, "motion_vae": video}
    return {part: smallest(parts[part]) for part, smallest in kinds.items() if part in parts}


def check_fit(parts: Mapping[str, nn.Module], tokenizer: text.Tokenizer) -> None:
    """Parts that do not fit would fail later, or make noise.

    Raises:
      UserError: they do not speak of the same latents, captions and tokens.
    """
    tora, vae, motion_vae, t5 = (parts[part] for part in ("tora", "vae", "motion_vae", "t5"))
    for name in ("space_factor", "time_factor", "micro_frame_size"):
        here, there = getattr(vae, name), getattr(motion_vae, name)
        if here != there:
            raise UserError(f"config: {name} is {here} in vae and {there} in motion_vae; make them equal")
    channels = tora.in_channels
    for part, module in (("vae", vae), ("motion_vae", motion_vae)):
        latent = module.temporal.get("latent_channels", CausalVAE.latent_channels)
        if latent != channels:
            raise UserError(f"config: {part} has {latent} latent channels, tora.stdit.in_channels is {channels}")
    if tora.caption_channels != t5.width:
        raise UserError(
            f"config: tora.stdit.caption_channels is {tora.caption_channels}, t5.width {t5.width}; make them equal"
        )
    if tokenizer.vocab_size > t5.vocab_size:
        raise UserError(f"config: t5.vocab_size is {t5.vocab_size}, the tokenizer has {tokenizer.vocab_size} pieces")


def process(parts: Mapping[str, nn.Module]) -> RectifiedFlow:
    """The process that the weights were trained on."""
    return RectifiedFlow(parts["tora"].time_scale)


# ----------------------------------------------------------------------------------------------------------
# Compiled functions; `params` are those of the parts that a function uses
# ----------------------------------------------------------------------------------------------------------


def encode_text(t5: nn.Module, params: Any, ids: Array, mask: Array) -> Float[Array, "b n c"]:
    """Tokens -> features of captions."""
    return t5.apply({"params": params}, ids, mask)


def extract(
    parts: Mapping[str, nn.Module], params: Mapping[str, Any], maps: Float[Array, "b t h w 3"], keys: Array | None
) -> Float[Array, "depth b t2 h2 w2 m"]:
    """Trajectory maps in -1..1 -> the motion features of all blocks.

    Args:
      keys: of each video, for a backbone that samples the posterior; here its mean is taken.
    """
    motion = parts["motion_vae"].apply({"params": params["motion_vae"]}, maps, method="encode")
    return parts["tora"].apply({"params": params["tora"]}, motion, method="extract")


def denoise(
    tora: nn.Module, params: Any, x: Array, timestep: Array, text: Array, **conditions: Any
) -> tuple[Array, Array | None]:
    """A forward pass, and what the blocks added in it; see `sampler.Method`."""
    variables, options = {"params": params}, {"mutable": ["intermediates"], "method": "denoise"}
    out, sown = tora.apply(variables, x, timestep, text, **conditions, **options)
    return out, next(iter(jax.tree.leaves(sown)), conditions.get("residual"))


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------


def check(models: Any, inputs: Sequence[Any], settings: Any) -> None:
    """Refuses what these weights cannot make, before anything is computed.

    Args:
      models, inputs, settings: as of `conditions`; `settings` of the whole video, before it is cut into segments.

    Raises:
      UserError: for the first such value.
    """
    if settings.trajectory_strength is not None:
        raise UserError("trajectory_strength is of CogVideoX's weights; these have --trajectory_guidance")


def conditions(models: Any, inputs: Sequence[Any], settings: Any) -> dict[str, Array | None]:
    """What the denoiser is told in each pass of `guidance.guide`, pass after pass, stacked along the batch.

    Args:
      models: an `assembly.Models`.
      inputs, settings: of `sampling.generate_batch`.
    """
    prompts, negative = [each.prompt for each in inputs], settings.negative_prompt
    captions = [*prompts, negative] if negative else prompts
    ids, mask = models.tokenizer([models.tokenizer.clean(caption) for caption in captions])
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    embedded = models.encode_text(models.params["t5"], ids, mask)
    with_motion = inputs[0].tracks is not None
    third = with_motion and settings.trajectory_guidance != 1
    passes = 3 if third else 1 if settings.guidance == 1 else 2
    # The null caption keeps the prompt's own mask, as in the reference; a negative prompt brings its own.
    count = len(prompts)
    each = np.arange(count)
    rows = np.concatenate([each, np.full(count, count) if negative else each, each][:passes])

    def per_pass(*values: bool) -> Array:
        return jnp.repeat(jnp.asarray(values[:passes]), count)

    told = {
        "text": embedded[rows],
        "text_mask": mask[rows],
        "drop_text": per_pass(False, not negative, False),
        "has_motion": per_pass(True, True, False) if with_motion else None,
    }
    fps = STILL_FPS if settings.num_frames == 1 else settings.fps
    sizes = {"fps": fps, "height": settings.height, "width": settings.width}
    return told | {name: jnp.full(len(rows), value, jnp.float32) for name, value in sizes.items()}


def motion_map(
    tracks: Tracks, size: tuple[int, int], max_norm: float | None
) -> tuple[UInt8[np.ndarray, "t h w 3"], Float[np.ndarray, "t h w 3"]]:
    """The map of a trajectory: as a picture, and as `extract` takes it, in -1..1.

    Args:
      size: height and width in pixels.
      max_norm: the displacement in pixels that has full colour; None = the map's own largest.
    """
    displacements = motion_maps.displacement_maps(np.asarray(tracks), *size)
    return motion_maps.flow_to_rgb(displacements, max_norm), motion_maps.flow_to_color(displacements, max_norm)


def given(
    models: Any, inputs: Sequence[Any], settings: Any, keys: Array
) -> tuple[list[dict[int, tuple[Array, float]]], dict[str, Array]]:
    """For each video the latents of its given frames, see `_placed`; and what the denoiser is told beside `conditions`.

    Args:
      keys: of each video, for a backbone that samples the posterior; here its mean is taken.
    """
    return [_placed(models, each.images, settings.num_frames) for each in inputs], {}


def _placed(models: Any, images: Mapping[int, Given], num_frames: int) -> dict[int, tuple[Array, float]]:
    """Latent frame number -> the latent [1, h, w, c] of what is given for its frames, and the edit ratio.

    A latent holds several frames, so a still is encoded as a clip in which it stands still, as long as the
    micro-frame that it belongs to. A frame with a latent of its own (the head of a micro-frame) is encoded
    alone, as the reference does with its reference images.

    A clip sets the latents whose frames it gives, or, where it fills none, the one of which it gives most. Around it,
    its first and last frame are repeated up to whole micro-frames.
    """
    vae = models.vae

    def encode(pixels: np.ndarray) -> Array:
        return models.encode_video(models.params["vae"], to_float(jnp.asarray(pixels[None])))

    whole = [vae.latent_of(j, num_frames) for j in range(num_frames)]
    placed = {}
    for frame, (pixels, edit) in sorted(images.items()):
        clip = pixels if pixels.ndim == 4 else pixels[None]
        wanted = {whole[frame]}
        if len(clip) > 1:
            shown = whole[frame : frame + len(clip)]
            full = {i for i in shown if shown.count(i) == whole.count(i)}
            wanted = full or {max(shown, key=shown.count)}
        for part in vae.parts(num_frames):
            if part.stop <= frame or part.start >= frame + len(clip):
                continue
            first = whole[part.start]
            alone = wanted == {first} and vae.encoded_alone(part) and part.start >= frame
            index = np.asarray(part[:1] if alone else part) - frame
            encoded = encode(clip[np.clip(index, 0, len(clip) - 1)])
            placed |= {i: (encoded[:, i - first], edit) for i in wanted if 0 <= i - first < encoded.shape[1]}
    return placed


def guidance(models: Any, settings: Any, times: Float[np.ndarray, "_"]) -> Float[np.ndarray, "steps 2"]:
    """The weights of `guidance.guide` at each step: here the same at all."""
    return np.tile(np.float32([settings.guidance, settings.trajectory_guidance]), (len(times) - 2, 1))


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------


def predictor(
    parts: Mapping[str, nn.Module],
    params: Mapping[str, Any],
    batch: Mapping[str, Array],
    motion: Float[Array, "b t h w c"] | None,
    *,
    keys: Array | None = None,
    **dropped: Array | None,
) -> tuple[Callable[[Array, Array], Array], dict[str, Array]]:
    """(noisy latents, timesteps) -> the denoiser's output under a batch's conditions; and the moving statistics.

    The second is path -> leaf: what the batch makes of leaves that hold a norm's statistics. Here there are none.

    Args:
      batch: of `data.pipeline.batches`, with "text" where it was precomputed, else with "ids".
      motion: latents of the trajectory maps.
      keys: of each sample in training, for a backbone that draws more; None = evaluation.
      dropped: drop_text and has_motion, bool [b].
    """
    if "text" in batch:
        caption = batch["text"]
    else:
        caption = encode_text(parts["t5"], params["t5"], batch["ids"], batch["text_mask"])
    told = {name: batch[name] for name in ("text_mask", "fps", "height", "width", "frame_mask")}

    def predict(x: Array, t: Array) -> Array:
        return parts["tora"].apply({"params": params["tora"]}, x, t, caption, motion, **told, **dropped)

    return predict, {}
