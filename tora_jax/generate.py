"""From a prompt, tracks and given frames to pixels: the one path under the command line and everything above it.

tracks -> displacement map -> RGB -> motion VAE -> extractor -> fusers in ST-DiT -> sampler -> video VAE
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from tora_jax import flow, rectified_flow, release, text
from tora_jax.errors import UserError
from tora_jax.models.t5 import T5Encoder
from tora_jax.models.tora import Tora
from tora_jax.models.video_vae import VideoVAE, latent_frames, latent_of

IMAGE_FPS = 120.0  # what the reference says of a single frame (opensora/datasets/__init__.py, IMG_FPS)


# ----------------------------------------------------------------------------------------------------------
# Models and their weights
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Models:
    """All parts of the chain with their parameters, and their compiled functions (kept for the next call).

    Attributes:
      tora, vae, motion_vae, t5: the modules.
      params: part name -> parameter tree.
      tokenizer: for `t5`.
      origin: where the parameters come from, for people: a folder, or "random weights (seed 0)".
    """

    tora: Tora
    vae: VideoVAE
    motion_vae: VideoVAE
    t5: T5Encoder
    params: Mapping[str, Any]
    tokenizer: text.Tokenizer
    origin: str

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
    def decode(self) -> Callable:
        """Latents -> uint8 video."""

        def decode(num_frames, params, latents):
            video = _apply(self.vae, params, latents, num_frames, method="decode")
            return jnp.round(jnp.clip(video, -1, 1) * 127.5 + 127.5).astype(jnp.uint8)

        return jax.jit(decode, static_argnums=0)


def _apply(module: nn.Module, params, *args, **kwargs):
    return module.apply({"params": params}, *args, **kwargs)


def _step(tora, params, x, times, guidance, trajectory_guidance, conditions, features, edit, noise):
    passes = len(conditions["text"]) // len(x)

    def predict(x: Array, timestep: Array, frame_mask: Array | None) -> Array:
        out = tora.apply(
            {"params": params},
            jnp.concatenate([x] * passes),
            jnp.concatenate([timestep] * passes),
            frame_mask=None if frame_mask is None else jnp.concatenate([frame_mask] * passes),
            features=None if features is None else jnp.concatenate([features] * passes, axis=1),
            method="denoise",
            **conditions,
        )
        return out.reshape(passes, *x.shape[:-1], -1)

    return rectified_flow.sampling_step(predict, x, times, guidance, trajectory_guidance, edit, noise)


def modules(config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """The parts that a config names.

    Raises:
      UserError: for a missing part, or a field that a part does not have.
    """
    kinds = {"tora": Tora, "vae": VideoVAE, "motion_vae": VideoVAE, "t5": T5Encoder}
    missing = [part for part in kinds if part not in config]
    if missing:
        raise UserError(f"the config has no {', '.join(missing)}; it needs {', '.join(kinds)}")
    try:
        return {part: kind(**_tuples(config[part])) for part, kind in kinds.items()}
    except TypeError as error:
        raise UserError(f"the config does not fit this version: {error}") from None


def _tuples(value: Any) -> Any:
    """Lists, as JSON gives them, into the tuples that module fields want."""
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def init_params(parts: Mapping[str, nn.Module], key: jax.Array) -> dict[str, Any]:
    """Fresh parameters for all parts; the motion VAE starts as the video VAE where they are of one shape."""
    tora, vae, t5 = parts["tora"], parts["vae"], parts["t5"]
    keys = jax.random.split(key, 4)
    channels = vae.temporal.get("latent_channels", 4)
    latents = jnp.zeros((1, 1, 2, 2, channels))
    caption = jnp.zeros((1, 1, tora.stdit.get("caption_channels", 4096)))
    one = jnp.ones(1)
    video = jnp.zeros((1, 1, 16, 16, 3))
    params = {
        "tora": tora.init(keys[0], latents, one, caption, latents, fps=one, height=one, width=one)["params"],
        "vae": vae.init(keys[1], video)["params"],
        "t5": t5.init(keys[2], jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"],
    }
    same = parts["motion_vae"] == vae
    params["motion_vae"] = params["vae"] if same else parts["motion_vae"].init(keys[3], video)["params"]
    return params


def load(config: Mapping[str, Any], weights: str | Path | None = None, seed: int = 0) -> Models:
    """Builds the parts of a config and fills them.

    Args:
      config: plain nested dict with "tora", "vae", "motion_vae" and "t5"; `release.read_config` gives that of a
        folder.
      weights: a release folder; None = random weights, which make noise.
      seed: of the random weights.

    Raises:
      UserError: when the weights are missing, broken or of another size than the config.
    """
    parts = modules(config)
    init = functools.partial(init_params, parts)
    length = parts["tora"].stdit.get("caption_length", 300)
    if weights is None:
        tokenizer = resources.files("tora_jax").joinpath("assets/tokenizer.model").read_bytes()
        # Run once, so fast to compile beats fast to run: half a minute less on a laptop.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        params = jax.jit(init, compiler_options=quick)(jax.random.key(seed))
        origin = f"random weights (seed {seed})"
    else:
        released = release.load(weights)
        tokenizer, params, origin = released.tokenizer, released.params, str(weights)
        _check_sizes(jax.eval_shape(init, jax.random.key(0)), params, origin)
    return Models(**parts, params=params, tokenizer=text.Tokenizer(tokenizer, length), origin=origin)


def _check_sizes(want: Mapping, got: Mapping, origin: str) -> None:
    want, got = (
        {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()} for tree in (want, got)
    )
    for path in want.keys() | got.keys():
        if want.get(path) != got.get(path):
            differ = sum(want.get(p) != got.get(p) for p in want.keys() | got.keys())
            raise UserError(
                f"{origin}: weights of another size than the config: {path} is {got.get(path, 'missing')}, "
                f"the config wants {want.get(path, 'none')} ({differ} tensors differ); "
                "leave --config out to use the config of the weights"
            )


# ----------------------------------------------------------------------------------------------------------
# Generation
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` gives.

    Attributes:
      video: uint8 [t, h, w, 3].
      motion: the trajectory map that the model saw, uint8 [t, h, w, 3]; None without a trajectory.
      seconds: part -> {"run": seconds, "compile": seconds}; compilation is not in "run".
    """

    video: UInt8[np.ndarray, "t h w 3"]
    motion: UInt8[np.ndarray, "t h w 3"] | None
    seconds: dict[str, dict[str, float]]


def generate(
    models: Models,
    prompt: str,
    tracks: Float[np.ndarray, "n t 2"] | None = None,
    images: Mapping[int, UInt8[np.ndarray, "h w 3"]] | None = None,
    *,
    height: int,
    width: int,
    num_frames: int,
    fps: float = 24.0,
    steps: int = 30,
    guidance: float = 7.0,
    trajectory_guidance: float = 1.0,
    negative_prompt: str = "",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Makes a video.

    Args:
      models: of `load`.
      prompt: a caption, not cleaned yet.
      tracks: one (x, y) for each frame, in 0..1 of the frame (`trajectory.tracks`); None = plain Open-Sora, the
        fusers are left out.
      images: frame number -> a picture of the video's size that this frame shall show.
      height, width: pixels of the video; each at least two latent cells; rounded down to whole ones.
      num_frames, fps: length and speed.
      steps: of the sampler.
      guidance: weight of the caption; 1 = none.
      trajectory_guidance: extra weight of the trajectory; 1 = none. Another value costs a third pass.
      negative_prompt: takes the null caption's place under guidance.
      seed: of the noise. The same seed gives the same pixels on the same machine.
      progress: called after each step with the number of steps done; an exception from it (or Ctrl-C) stops the
        generation.

    Raises:
      UserError: for a value out of its range.
    """
    check_settings(
        num_frames=num_frames,
        steps=steps,
        height=height,
        width=width,
        fps=fps,
        guidance=guidance,
        trajectory_guidance=trajectory_guidance,
        seed=seed,
    )
    _check_inputs(tracks, images, num_frames, (height, width))
    seconds: dict[str, dict[str, float]] = {}
    timed = functools.partial(_timed, seconds)
    key_start, key_steps = jax.random.split(jax.random.key(seed))
    params, cell = models.params, models.vae.space_factor
    frames = latent_frames(num_frames, models.vae.micro_frame_size, models.vae.time_factor)
    channels = models.vae.temporal.get("latent_channels", 4)
    shape = (1, frames, height // cell, width // cell, channels)

    with timed("text"):
        conditions = _conditions(models, prompt, negative_prompt, guidance, trajectory_guidance, tracks)
        batch = len(conditions["text"])
        sizes = {"fps": IMAGE_FPS if num_frames == 1 else fps, "height": height, "width": width}
        conditions.update({name: jnp.full(batch, value, jnp.float32) for name, value in sizes.items()})

    motion, features = None, None
    if tracks is not None:
        with timed("motion"):
            maps = flow.displacement_maps(np.asarray(tracks), height // cell * cell, width // cell * cell)
            motion = flow.flow_to_rgb(maps)
            features = jax.block_until_ready(models.extract(params, flow.flow_to_color(maps)[None]))

    x, edit = jax.random.normal(key_start, shape), None
    if images:
        with timed("images"):
            x, edit = _place_images(models, x, images, num_frames)

    times = rectified_flow.sampling_times(steps, height, width, frames)
    with timed("sample"):
        for i in range(steps):
            noise = None if edit is None else rectified_flow.step_noise(key_steps, i, shape)
            weights = jnp.float32(guidance), jnp.float32(trajectory_guidance)
            window = jnp.asarray(times[i : i + 3])
            x = models.step(params["tora"], x, window, *weights, conditions, features, edit, noise)
            # Waiting here keeps the progress bar honest, and Ctrl-C within one step.
            x.block_until_ready()
            if progress is not None:
                progress(i + 1)

    with timed("decode"):
        video = np.asarray(models.decode(num_frames, params["vae"], x)[0])
    return Result(video, motion, seconds)


CHECKED = ("num_frames", "steps", "height", "width", "fps", "guidance", "trajectory_guidance", "seed")
SMALLEST = 16  # pixels: one patch of the denoiser


def check_settings(*, num_frames, steps, height, width, fps, guidance, trajectory_guidance, seed) -> None:
    """Checks the ranges of what a user sets; `generate` calls it, and so may a caller before it loads weights.

    Raises:
      UserError: for the first value out of its range.
    """
    for name, value in (("num_frames", num_frames), ("steps", steps)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    if min(height, width) < SMALLEST:
        raise UserError(f"the size {width}x{height} is too small; each side needs at least {SMALLEST} pixels")
    for name, value in (("guidance", guidance), ("trajectory_guidance", trajectory_guidance)):
        if not math.isfinite(value):
            raise UserError(f"{name} is {value}; give a finite number (1 = off)")
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise UserError(f"fps is {fps}; give a number above 0, at most 1000")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; give a whole number from 0 to 4294967295")


def _check_inputs(tracks, images, num_frames: int, size: tuple[int, int]) -> None:
    if tracks is not None and np.shape(tracks)[1:] != (num_frames, 2):
        raise UserError(f"tracks of shape {np.shape(tracks)}; they need [n, {num_frames}, 2], one point a frame")
    for frame, image in (images or {}).items():
        if not 0 <= frame < num_frames:
            raise UserError(f"an image is given for frame {frame}; the video has frames 0 to {num_frames - 1}")
        if image.shape != (*size, 3):
            raise UserError(f"the image for frame {frame} has shape {image.shape}; it needs the video's size, {size}")


def _conditions(models, prompt, negative_prompt, guidance, trajectory_guidance, tracks) -> dict[str, Array]:
    """What the denoiser is told in each pass of `rectified_flow.guide`, stacked along the batch."""
    ids, mask = models.tokenizer([text.clean(prompt), text.clean(negative_prompt)])
    embedded = models.encode_text(models.params["t5"], ids, mask)
    third = tracks is not None and trajectory_guidance != 1
    passes = 3 if third else 1 if guidance == 1 else 2
    negative = 1 if negative_prompt else 0
    # The null caption keeps the prompt's own mask, as in the reference; a negative prompt brings its own.
    rows = np.array([0, negative, 0])[:passes]
    return {
        "text": embedded[rows],
        "text_mask": jnp.asarray(mask)[rows],
        "drop_text": jnp.asarray([False, not negative_prompt, False][:passes]),
        "has_motion": None if tracks is None else jnp.asarray([True, True, False][:passes]),
    }


def _place_images(models: Models, x: Array, images: Mapping[int, np.ndarray], num_frames: int):
    """Puts the images' latents into the noise; returns it with the edit ratios, 0 where a frame is given.

    A latent holds several frames, so a still is encoded as a clip in which it stands still, as long as the
    micro-frame that it belongs to. A frame with a latent of its own (the head of a micro-frame) is encoded
    alone, as the reference does with its reference images.
    """
    vae = models.vae
    size, factor = vae.micro_frame_size or num_frames, vae.time_factor
    edit = jnp.ones(x.shape[:2])
    for frame, image in sorted(images.items()):
        start = frame - frame % size
        length = min(size, num_frames - start)
        latent = latent_of(frame, num_frames, size, factor)
        first = latent_of(start, num_frames, size, factor)
        alone = latent == first and length % factor == 1
        still = np.broadcast_to(image, (1, 1 if alone else length, *image.shape))
        encoded = models.encode_video(models.params["vae"], jnp.asarray(still, jnp.float32) / 127.5 - 1)
        x = x.at[:, latent].set(encoded[:, latent - first])
        edit = edit.at[:, latent].set(0)
    return x, edit


# ----------------------------------------------------------------------------------------------------------
# Timing
# ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _timed(seconds: dict[str, dict[str, float]], part: str) -> Iterator[None]:
    """Adds the wall time of a part to `seconds`, compilation (tracing and lowering included) apart."""
    compiling = 0.0

    def listen(event: str, duration: float, **_) -> None:
        nonlocal compiling
        if event.startswith("/jax/core/compile/"):
            compiling += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        yield
    finally:
        total = time.perf_counter() - start
        jax.monitoring.unregister_event_duration_listener(listen)
        seconds[part] = {"run": max(total - compiling, 0.0), "compile": compiling}
