"""Judges a training on held-out clips: losses or PSNR, and videos sampled along held-out tracks."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import UInt8

from tora_jax import sharding
from tora_jax.backbones.assembly import Models
from tora_jax.configs.sampling import Settings
from tora_jax.data import clips, motion, pipeline, placement, sources
from tora_jax.errors import UserError
from tora_jax.evals import sprite_metrics, track_lk, traj_error
from tora_jax.evals.quality import psnr
from tora_jax.io import files, overlay
from tora_jax.io.video import to_float, write_video
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs
from tora_jax.training import losses

TIMESTEPS = (100.0, 300.0, 500.0, 700.0, 900.0)
PAPER_SIZE = (512, 512)  # width and height in whose pixels the paper's TrajError counts

# (parameters, step) -> name -> value
Judge = Callable[[Mapping[str, Any], int], dict[str, float]]


def make(
    config: Mapping[str, Any],
    models: Models,
    open_split: Callable[[], pipeline.Batches],
    mesh: Mesh,
    folder: Path,
) -> Judge:
    """The judge of a job: losses at fixed timesteps for "tora", PSNR for the autoencoders.

    The "objective" is the losses' mean, or the PSNR times -1: the lower the better. `sampled` goes with "tora".

    Args:
      config: of a job.
      open_split: opens the held-out batches, in order.
      folder: for sampled videos.

    Raises:
      UserError: there are no batches, or no clips to sample from.
    """
    open_split().close()  # what is wrong with it shows now, not at the first evaluation
    tora = config["job"] == "tora"
    one = jax.jit(_tora(config, models) if tora else _psnr(config, models))
    sample = sampled(config, models, folder) if tora and config["evaluation"]["clips"] else None

    def judge(params: Mapping[str, Any], step: int) -> dict[str, float]:
        batches = _first(open_split, mesh, config["evaluation"]["batches"])
        means = _means([jax.device_get(one(params, batch)) for batch in batches])
        objective = np.mean(list(means.values())) if tora else -means["psnr"]
        return {**means, "objective": float(objective), **(sample(params, step) if sample else {})}

    return judge


def _means(found: list[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for values in found for name in values)
    return {name: float(np.mean([values[name] for values in found if name in values])) for name in names}


def _first(open_split, mesh: Mesh, count: int) -> Iterator[dict[str, jax.Array]]:
    batches = placement.Placed(open_split(), mesh)
    try:
        for _, batch in zip(range(count), batches, strict=False):
            yield batch
    finally:
        batches.close()


def psnr_near_objects(video: jax.Array, truth: jax.Array, object_mask: jax.Array) -> jax.Array:
    """dB of all clips together, of pixels in and near objects alone (`losses.near_objects`); both in [-1, 1]."""
    near = losses.near_objects(object_mask)[..., None]
    error = (jnp.square(video - truth) * near).sum() / jnp.maximum(3 * near.sum(), 1)
    return -10 * jnp.log10(jnp.maximum(error / 4, 1e-10))


def _psnr(config: Mapping[str, Any], models: Models) -> Callable:
    """Of the reconstruction from the posteriors' means: by both VAEs, or by the spatial one while it trains alone."""
    part = config["job"]
    vae, pixels = models.parts[part], {"vae": "video", "motion_vae": "maps"}[part]
    spatial_only = not (config["loss"]["video"] or config["loss"]["identity"])

    def one(params, batch):
        def run(method, *args):
            return vae.apply({"params": params[part]}, *args, method=method)

        def decoded(latents):
            return jnp.clip(run("decode_frames", latents), -1, 1)

        video = to_float(batch[pixels])
        moments = run("moments", video)
        frames = decoded(moments.clip)
        found = {"psnr": psnr(frames, video, span=2).mean()}
        if "object_mask" in batch:
            found["psnr_near_objects"] = psnr_near_objects(frames, video, batch["object_mask"])
        if spatial_only:
            return found
        clip = run("decode_clip", moments.latent.mean, video.shape[1])
        return {**found, "psnr": psnr(decoded(clip), video, span=2).mean(), "psnr_frames": found["psnr"]}

    return one


def _tora(config: Mapping[str, Any], models: Models) -> Callable:
    def one(params, batch):
        keys = losses.sample_keys(jax.random.key(config["seed"]), 0, batch)
        at = {t: losses.tora_loss_at(models.backbone, models.parts, t) for t in TIMESTEPS}
        return {f"loss_at_{t:g}": loss(params, batch, keys)[0].mean() for t, loss in at.items()}

    return one


class Clip(NamedTuple):
    """A task of `sampled`: caption, tracks, the first frame, and the colours of sprites."""

    caption: str
    tracks: traj_error.Tracks
    first: UInt8[np.ndarray, "h w 3"]
    colours: tuple[str, ...]
    fps: float


def sampled(config: Mapping[str, Any], models: Models, folder: Path) -> Judge:
    """Samples videos for the captions and along the tracks of held-out clips, and writes them with the tracks drawn in.

    The judge gives
      traj_error: the paper's TrajError, by `track_lk.track_lk`, in pixels of a frame of 512x512;
      path_error: of sprites, the distance of an object's centroid from its path as a share of the frame's width.

    Raises:
      UserError: there are no clips to take captions and tracks from.
    """
    clips, bucket = held_out_clips(config), config["data"]["buckets"][0]
    settings = {name: config["sampling"][name] for name in ("guidance", "trajectory_guidance", "negative_prompt")}
    settings["solver"] = config["sampling"].get("solver", Settings.solver)
    settings |= {"height": bucket["height"], "width": bucket["width"], "num_frames": bucket["frames"]}
    settings |= {"fps": float(np.median([clip.fps for clip in clips])), "steps": config["evaluation"]["steps"]}
    settings = Settings(**settings)
    given = models.tora.given_channels > 0
    inputs = [Inputs(clip.caption, clip.tracks, {0: clip.first} if given else {}) for clip in clips]
    current: dict[str, Any] = {}
    models = dataclasses.replace(models, params=current)  # keeps what it has compiled while the parameters change

    def judge(params: Mapping[str, Any], step: int) -> dict[str, float]:
        if jax.process_count() > 1:
            warnings.warn("evaluation.clips: only a single process samples while it trains", stacklevel=2)
            return {}
        current.update(params)
        with nn.logical_axis_rules(()):  # so few clips need not divide over the mesh
            results = generate_batch(models, inputs, settings, seeds=range(len(clips)))
        current.clear()
        folder.mkdir(parents=True, exist_ok=True)
        found = []
        for i, (clip, result) in enumerate(zip(clips, results, strict=True)):
            write_video(folder / f"{step:06}_{i}.mp4", overlay.draw_tracks(result.video, clip.tracks), clip.fps)
            tracks, visible = track_lk.track_lk(result.video, clip.tracks[:, 0])
            found.append({"traj_error": traj_error.traj_error(clip.tracks, tracks, visible, PAPER_SIZE)["l1"]})
            if clip.colours:
                found[-1]["path_error"] = sprite_metrics.path_error(result.video, clip.colours, clip.tracks)["error"]
        return _means(found)

    return judge


def held_out_clips(config: Mapping[str, Any]) -> list[Clip]:
    """The first clips of `evaluation.source` with tracks, at the size of the first bucket.

    Tracks are the given ones, or one that follows the flow where something moves.

    Raises:
      UserError: there is no such clip, or no such folder.
    """
    data, evaluation = config["data"], config["evaluation"]
    source = evaluation["source"] or data["sources"][0]
    if not evaluation["source"] and (made := sources.open_source(source, data["split"]).made):
        source = made["source"]
    if not files.path(source).exists():
        raise UserError(
            f"{source}: no such folder or file; evaluation.source names the clips whose tracks are followed"
        )
    data = {**data, "sources": (source,), "motion": "sparse", "crop": 0}
    held_out = clips.Clips(data, evaluation["split"])
    load = held_out.loader(data["buckets"][0], None, training=False, latent_frames=1)
    chosen = []
    for index in load.fitting:
        rng, record = np.random.default_rng(index), held_out.source[index]
        clip, truth = load.excerpt(record, index, rng)
        tracks = truth.get("tracks", ())[: data["max_tracks"]]
        if not len(tracks):
            tracks, _ = motion.draw_tracks(rng, motion.dense_flow(clip["video"]), 1)
        objects = record.get("objects", {"colour": ()})["colour"]
        colours = tuple(name.decode() for name in objects) if len(objects) == len(tracks) else ()
        if len(tracks):
            chosen.append(Clip(record["caption"], tracks, clip["video"][0], colours, float(clip["fps"])))
        if len(chosen) == evaluation["clips"]:
            break
    if not chosen:
        raise UserError(f"{source}: nothing moves in the clips of split {evaluation['split']!r}")
    return chosen


def changes_latents(trained: Iterable[str]) -> bool:
    """Whether training these leaves of a VAE changes its latents: any but those of the decoders.

    Args:
      trained: paths, as of `optim.split`.
    """
    return not all(re.fullmatch(r".*/(decoder|post_quant_conv)/.*", path) for path in trained)


def latent_statistics(
    config: Mapping[str, Any], models: Models, open_split: Callable[[], pipeline.Batches], mesh: Mesh
) -> Callable[[Mapping[str, Any]], dict[str, np.ndarray]]:
    """A trained VAE's parameters -> `shift` and `scale` that normalise its latents on held-out clips."""
    part = config["job"]
    vae, pixels = models.parts[part], {"vae": "video", "motion_vae": "maps"}[part]

    @jax.jit
    def moments(params, batch):  # of drawn frames, as training has them
        return vae.apply({"params": params}, to_float(batch[pixels]), jax.random.key(0), method="moments").latent

    def statistics(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found = [
            sharding.to_host(moments(params, batch))
            for batch in _first(open_split, mesh, config["evaluation"]["batches"])
        ]
        axes = (0, 1, 2, 3)
        mean = np.mean([latent.mean.mean(axes) for latent in found], 0)
        second = np.mean([(np.square(latent.mean) + np.exp(latent.logvar)).mean(axes) for latent in found], 0)
        return {"shift": mean.astype(np.float32), "scale": np.sqrt(second - np.square(mean)).astype(np.float32)}

    return statistics
