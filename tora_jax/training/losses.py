"""What the three jobs minimise.

A loss is a function (params, batch, keys) -> (loss of each sample, metrics). Among the metrics may be STATISTICS: path
-> leaf, what the batch makes of leaves that hold a norm's moving statistics. Everything random comes from one key a
sample, so that the same step gives the same numbers on any mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tora_jax.diffusion.loss import training_loss
from tora_jax.errors import UserError
from tora_jax.io.video import to_float
from tora_jax.models.video_vae import Gaussian

STATISTICS = "statistics"
NEAR = 3  # pixels around an object that show its outline

Loss = Callable[[Any, Mapping[str, Array], Array], tuple[Array, dict[str, Array]]]


def sample_keys(key: PRNGKeyArray, step: Array | int, batch: Mapping[str, Array]) -> Array:
    """One key for each sample of a batch."""
    return jax.random.split(jax.random.fold_in(key, step), len(jax.tree.leaves(batch)[0]))


def _normal(keys: Array, shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)


def _happens(keys: Array, probability: float) -> Array:
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)


# ----------------------------------------------------------------------------------------------------------
# The autoencoders
# ----------------------------------------------------------------------------------------------------------


def vae_loss(vae: nn.Module, part: str, config: Mapping[str, Any]) -> Loss:
    """Reconstruction and KL of the video VAE, or of the motion VAE on maps.

    Args:
      part: "vae", whose batches hold "video", or "motion_vae", whose batches hold "maps".
      config: weights of the terms; one of weight 0 is not computed.
        l1, l2: of |d| and d^2 in every reconstruction, means over its elements;
        near_objects: of pixels in and near objects, more than of others, in frame and video (see `near_objects`); the
            batches need object masks;
        frame: of the frames that the spatial VAE alone reconstructs;
        coarse: of frames of half the size, decoded from means of 2x2 of their latents: what is smooth in pixels becomes
            smooth in latents, which a denoiser learns sooner (Skorokhodov et al. 2025, "Improving the diffusability of
            autoencoders", section 4);
        identity: of the causal VAE's clip against the spatial VAE's (the reference's identity loss);
        video: of the pixels after both;
        kl_spatial, kl: of the posteriors, means over their elements.
      The three phases are frame, then identity, then all together.
    """
    pixels = {"vae": "video", "motion_vae": "maps"}[part]

    def distance(x: Array, y: Array, weight: Array | None = None) -> Array:
        d = (x - y).reshape(len(x), -1)
        if weight is None:
            return config["l1"] * jnp.abs(d).mean(1) + config["l2"] * jnp.square(d).mean(1)
        weight = jnp.broadcast_to(weight[..., None], x.shape).reshape(len(x), -1)
        terms = config["l1"] * jnp.abs(d) + config["l2"] * jnp.square(d)
        return (weight * terms).mean(1) / weight.mean(1)

    def weight_of(batch: Mapping[str, Array]) -> Array | None:
        if not config["near_objects"]:
            return None
        if "object_mask" not in batch:
            raise UserError("loss.near_objects needs batches that say where objects are: set data.object_masks")
        return 1 + config["near_objects"] * near_objects(batch["object_mask"])

    def loss(params, batch, keys):
        def run(method: str, *args):
            return vae.apply({"params": params[part]}, *args, method=method)

        if pixels not in batch:
            raise UserError(f"the batches hold no {pixels}: {part} trains on clips that are not precomputed")
        video, weight = to_float(batch[pixels]), weight_of(batch)
        moments = run("moments", video, keys[0])
        terms = {}
        if config["kl_spatial"]:
            terms["kl_spatial"] = _kl(moments.spatial)
        if config["kl"]:
            terms["kl"] = _kl(moments.latent)
        if config["frame"]:
            terms["frame"] = distance(run("decode_frames", moments.clip), video, weight)
        if config["coarse"]:
            coarse = run("decode_frames", _halve(moments.clip))
            height, width = coarse.shape[2:4]  # without what an odd number of latent cells leaves over
            terms["coarse"] = distance(coarse, _halve(video)[:, :, :height, :width])
        if config["identity"] or config["video"]:
            latent = moments.latent.mean + jnp.exp(0.5 * moments.latent.logvar) * _normal(
                keys, moments.latent.mean.shape
            )
            clip = run("decode_clip", latent, video.shape[1])
        if config["identity"]:
            terms["identity"] = distance(clip, moments.clip)
        if config["video"]:
            terms["video"] = distance(run("decode_frames", clip), video, weight)
        total = sum(config[name] * value for name, value in terms.items())
        return total, {name: value.mean() for name, value in terms.items()}

    return loss


def near_objects(mask: Bool[Array, "b t h w"]) -> Float[Array, "b t h w"]:
    """1 in objects and up to NEAR pixels from them, along each axis; 0 elsewhere."""
    side = 2 * NEAR + 1
    return nn.max_pool(mask.astype(jnp.float32)[..., None], (1, side, side), padding="SAME")[..., 0]


def _halve(x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
    return nn.avg_pool(x, (1, 2, 2), strides=(1, 2, 2))


def _kl(posterior: Gaussian) -> Float[Array, "b"]:
    """Divergence from the standard normal, mean over the elements of a sample."""
    mean, logvar = posterior
    terms = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    return terms.reshape(len(mean), -1).mean(1)


# ----------------------------------------------------------------------------------------------------------
# Tora
# ----------------------------------------------------------------------------------------------------------


def tora_loss(backbone: ModuleType, parts: Mapping[str, nn.Module], config: Mapping[str, Any]) -> Loss:
    """The denoiser's loss with captions, motion and given frames, dropped now and then.

    Args:
      backbone: a module of `backbones`.
      parts: "tora", and for batches that hold pixels or tokens "vae", "motion_vae" and "t5".
      config: timesteps ("logit_normal" or "uniform"), transform (shift them by size and length), drop_text,
        drop_motion (probabilities), path_weight (of the error beside the paths, more than elsewhere; see `near_paths`).
    """

    def loss(params, batch, keys):
        draws = dict(zip(("x", "motion", "noise", "time", "text", "drop"), _split(keys, 6), strict=True))
        x = _latents(parts, params, batch, draws["x"], "vae", "video", "latent")
        motion = _latents(parts, params, batch, draws["motion"], backbone.MOTION, "maps", "motion")
        process, size = backbone.process(parts), (batch["height"], batch["width"], x.shape[1])
        t = process.draw_timesteps(draws["time"], *size, config["timesteps"], config["transform"])
        has_motion = None if motion is None else ~_happens(draws["drop"], config["drop_motion"])
        weight = None
        if motion is not None and config["path_weight"]:
            weight = 1 + config["path_weight"] * near_paths(motion) * has_motion[:, None, None, None]
        drop_text = _happens(draws["text"], config["drop_text"])
        dropped = {"drop_text": drop_text, "has_motion": has_motion}
        predict, moved = backbone.predictor(parts, params, batch, motion, keys=keys, **dropped)
        noise = _normal(draws["noise"], x.shape)
        metrics = {STATISTICS: moved} if moved else {}
        return training_loss(process, predict, x, noise, t, batch["frame_mask"], weight), metrics

    return loss


def near_paths(motion: Float[Array, "b t h w c"]) -> Float[Array, "b t h w"]:
    """Where something moves: about 1 in cells that touch, in space or time, one whose motion latent is not that of
    most of its frame; 0 elsewhere.

    It takes the conditions alone, so that a loss with this as its weight has its minimum where the plain one has it.
    """
    still = jnp.median(motion[:, :, ::2, ::2], (2, 3), keepdims=True)  # a quarter tells it: sorting is slow
    moved = jnp.square(motion - still).mean(-1)
    moved = nn.max_pool(moved[..., None], (3, 3, 3), padding="SAME")[..., 0]
    return moved / (moved + moved.mean((1, 2, 3), keepdims=True) + 1e-6)


def tora_loss_at(backbone: ModuleType, parts: Mapping[str, nn.Module], timestep: float) -> Loss:
    """The loss at one timestep with nothing dropped, for evaluation."""

    def loss(params, batch, keys):
        first, second, third = _split(keys, 3)
        x = _latents(parts, params, batch, first, "vae", "video", "latent")
        motion = _latents(parts, params, batch, second, backbone.MOTION, "maps", "motion")
        predict, _ = backbone.predictor(parts, params, batch, motion)
        t = jnp.full(len(x), timestep)
        process = backbone.process(parts)
        return training_loss(process, predict, x, _normal(third, x.shape), t, batch["frame_mask"]), {}

    return loss


def _split(keys: Array, count: int) -> list[Array]:
    return list(jax.vmap(lambda key: jax.random.split(key, count))(keys).swapaxes(0, 1))


def _latents(parts, params, batch, keys, part: str, pixels: str, cached: str) -> Array | None:
    """A draw from the posterior, cached or from pixels; None where the batch holds neither (no motion)."""
    if f"{cached}_mean" in batch:
        mean, std = (batch[f"{cached}_{name}"].astype(jnp.float32) for name in ("mean", "std"))
        return mean + std * _normal(keys, mean.shape)
    if pixels in batch:
        return parts[part].apply({"params": params[part]}, to_float(batch[pixels]), keys[0], method="encode")
    return None
