"""Quality on held-out clips while a job trains: parameters -> name -> value; "objective" is the lower the better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tora_jax import training
from tora_jax.chain import Models
from tora_jax.data import pipeline

TIMESTEPS = (100.0, 300.0, 500.0, 700.0, 900.0)

Judge = Callable[[Mapping[str, Any]], dict[str, float]]


def make(config: Mapping[str, Any], models: Models, open_split: Callable[[], pipeline.Batches], mesh: Mesh) -> Judge:
    """What a job is judged by: the losses at fixed timesteps for "tora", the PSNR for the autoencoders.

    Args:
      config: of a job.
      open_split: opens the held-out batches, in order.
    """
    count = config["evaluation"]["batches"]
    one = _tora(config, models) if config["job"] == "tora" else _psnr(config, models)
    one = jax.jit(one)

    def judge(params: Mapping[str, Any]) -> dict[str, float]:
        found = [jax.device_get(one(params, batch)) for batch in _first(open_split, mesh, count)]
        means = {name: float(np.mean([values[name] for values in found])) for name in found[0]}
        if config["job"] == "tora":
            return {**means, "objective": float(np.mean(list(means.values())))}
        return {**means, "objective": -means["psnr"]}

    return judge


def _first(open_split, mesh: Mesh, count: int) -> Iterator[dict[str, jax.Array]]:
    batches = pipeline.Placed(open_split(), mesh)
    try:
        for _, batch in zip(range(count), batches, strict=False):
            yield batch
    finally:
        batches.close()


def psnr(video: jax.Array, truth: jax.Array) -> jax.Array:
    """dB of each clip; both in [-1, 1], the first is clipped to it."""
    error = jnp.square(jnp.clip(video, -1, 1) - truth).reshape(len(truth), -1).mean(1) / 4
    return -10 * jnp.log10(jnp.maximum(error, 1e-10))


def _psnr(config: Mapping[str, Any], models: Models) -> Callable:
    """Of the reconstruction from the posteriors' means: by both VAEs, or by the spatial one while it trains alone."""
    part = config["job"]
    vae, pixels = getattr(models, part), {"vae": "video", "motion_vae": "maps"}[part]
    spatial_only = not (config["loss"]["video"] or config["loss"]["identity"])

    def one(params, batch):
        def run(method, *args):
            return vae.apply({"params": params[part]}, *args, method=method)

        video = training.to_float(batch[pixels])
        moments = run("moments", video)
        frames = psnr(run("decode_frames", moments.clip), video).mean()
        if spatial_only:
            return {"psnr": frames}
        clip = run("decode_clip", moments.latent.mean, video.shape[1])
        return {"psnr": psnr(run("decode_frames", clip), video).mean(), "psnr_frames": frames}

    return one


def _tora(config: Mapping[str, Any], models: Models) -> Callable:
    parts = {part: getattr(models, part) for part in ("tora", "vae", "motion_vae", "t5")}

    def one(params, batch):
        keys = training.sample_keys(jax.random.key(config["seed"]), 0, batch)
        return {f"loss_at_{t:g}": training.tora_loss_at(parts, t)(params, batch, keys)[0].mean() for t in TIMESTEPS}

    return one


def latent_statistics(
    config: Mapping[str, Any], models: Models, open_split: Callable[[], pipeline.Batches], mesh: Mesh
) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """A trained VAE's parameters -> `shift` and `scale` that normalise its latents on held-out clips."""
    part = config["job"]
    vae, pixels = getattr(models, part), {"vae": "video", "motion_vae": "maps"}[part]
    moments = jax.jit(
        lambda params, batch: vae.apply({"params": params}, training.to_float(batch[pixels]), method="moments").latent
    )

    def statistics(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found = [
            jax.device_get(moments(params, batch))
            for batch in _first(open_split, mesh, config["evaluation"]["batches"])
        ]
        axes = (0, 1, 2, 3)
        mean = np.mean([latent.mean.mean(axes) for latent in found], 0)
        second = np.mean([(np.square(latent.mean) + np.exp(latent.logvar)).mean(axes) for latent in found], 0)
        return {"shift": mean.astype(np.float32), "scale": np.sqrt(second - np.square(mean)).astype(np.float32)}

    return statistics
