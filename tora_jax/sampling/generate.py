"""From prompts, tracks and given frames to pixels: the one path under the command line and everything above it.

tracks -> displacement map -> RGB -> motion VAE -> extractor -> fusers inside the denoiser -> solver -> video VAE
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from tora_jax import programs
from tora_jax.backbones.assembly import Models
from tora_jax.configs.sampling import Settings
from tora_jax.diffusion import sampler
from tora_jax.errors import UserError
from tora_jax.sampling.inputs import Inputs, check_inputs

Progress = Callable[[int, Callable[[], Array]], None]  # see `sampler.run`


@dataclasses.dataclass(frozen=True)
class Result:
    """A video, or a piece of one.

    Attributes:
      video: uint8 [t, h, w, 3].
      motion: the motion map that the model saw, uint8 [t, h, w, 3]; None without a trajectory.
      seconds: part -> {"run": seconds, "compile": seconds} of the whole batch; compilation is not in "run".
      latents: the clean latents of `video`, before decoding, float32.
    """

    video: UInt8[np.ndarray, "t h w 3"]
    motion: UInt8[np.ndarray, "t h w 3"] | None
    seconds: dict[str, dict[str, float]]
    latents: Float[np.ndarray, "t4 h8 w8 c"] | None = None


def generate_batch(
    models: Models,
    inputs: Sequence[Inputs],
    settings: Settings,
    *,
    seeds: Sequence[int],
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Makes videos, all at once; each equals the same video made alone, but for rounding.

    Args:
      models: of `assembly.load`.
      inputs: of each video.
      settings: of all videos, with their size in pixels and their length in frames. The model is told this size; the
        videos have `video_size` of it. Fields that `inputs` and `seeds` replace, and those of segments, are not read.
      seeds: of each video's noise. The same seed gives the same pixels on the same machine.
      mesh: shares out the videos; its "data" axis divides their number, and the parameters lie on the mesh already
        (`assembly.load` with a `place`).
      progress: called after each step with the number of steps done and a function that gives the estimate of the clean
        latents, see `sampler.run`; an exception from it (or Ctrl-C) stops the generation.

    Raises:
      UserError: for a value out of its range.
    """
    for seed in seeds:
        dataclasses.replace(settings, seed=seed).check()
    size, num_frames = video_size(models, settings.height, settings.width), settings.num_frames
    inputs = check_inputs(models, inputs, settings, seeds, size)
    method = models.method(settings.solver)
    seconds: dict[str, dict[str, float]] = {}
    part = functools.partial(timed, seconds)
    spread = (lambda tree: tree) if mesh is None else functools.partial(_spread, mesh)

    backbone, keys = models.backbone, jnp.stack([jax.random.key(seed) for seed in seeds])
    frames = models.vae.latent_frames(num_frames)
    shape = (1, frames, *(side // models.vae.space_factor for side in size), models.tora.in_channels)
    latents = jax.ShapeDtypeStruct((len(inputs), *shape[1:]), jnp.float32)
    # The longest compilation goes on beside text and motion, whose own leave a core idle.
    threading.Thread(target=models.decode.prepare, args=(num_frames, models.params["vae"], latents)).start()

    with part("text"):
        told = jax.block_until_ready(spread(backbone.conditions(models, inputs, settings)))
    motion, features = [None] * len(inputs), None
    if inputs[0].tracks is not None:
        with part("motion"):
            maps = [backbone.motion_map(each.tracks, size, each.max_norm) for each in inputs]
            motion, colors = [picture for picture, _ in maps], jnp.asarray(np.stack([color for _, color in maps]))
            features = jax.block_until_ready(models.extract(models.params, *spread((colors, keys))))
            del maps, colors
    with part("images") if any(each.images for each in inputs) else contextlib.nullcontext():
        given, more = backbone.given(models, inputs, settings, keys)
        told |= spread(more)

    with part("sample"):
        start, noise = _noise(seeds, shape, spread)
        x, edit = spread(_place(start, given, [each.prefix for each in inputs]))
        del start
        times = method.process.times(settings.steps, settings.height, settings.width, frames)
        told, weights = sampler.Told(told, features, edit), backbone.guidance(models, settings, times)
        params = models.params["tora"]
        x = sampler.run(method, params, x, times, told, weights, noise, settings.acceleration, progress)
        del told, features  # the decoder may need the room

    with part("decode"):
        videos, finite = models.decode(num_frames, models.params["vae"], x)
        if not finite:
            raise UserError(
                f"{models.origin}: the video is not finite; the weights are damaged, or the guidance too large"
            )
        videos, latents = np.asarray(videos), np.asarray(x)
    return [Result(video, rgb, seconds, z) for video, rgb, z in zip(videos, motion, latents, strict=True)]


def _noise(
    seeds: Sequence[int], shape: tuple[int, ...], spread: Callable[[Any], Any]
) -> tuple[Float[Array, "b t h w c"], Callable[[int], Array]]:
    """The noise at the start of the videos, and a function: step -> the noise for frames that start there."""
    keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]

    def at_step(step: int) -> Array:
        return spread(jnp.concatenate([sampler.step_noise(key, step, shape) for _, key in keys]))

    return jnp.concatenate([jax.random.normal(start, shape) for start, _ in keys]), at_step


def _place(
    x: Float[Array, "b t h w c"],
    given: Sequence[Mapping[int, tuple[Array, float]]],
    prefixes: Sequence[Float[np.ndarray, "k h w c"] | None],
) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t"] | None]:
    """Puts given latents into the noise. Also returns the edit ratio of each latent; None if no latent is given."""
    if not any(given) and all(prefix is None for prefix in prefixes):
        return x, None
    edit = jnp.ones(x.shape[:2])
    for row, (latents, prefix) in enumerate(zip(given, prefixes, strict=True)):
        begun = {} if prefix is None else {i: (jnp.asarray(latent)[None], 0.0) for i, latent in enumerate(prefix)}
        for i, (latent, ratio) in (latents | begun).items():
            x, edit = x.at[row, i].set(latent[0]), edit.at[row, i].set(ratio)
    return x, edit


def video_size(models: Models, height: int, width: int) -> tuple[int, int]:
    """Cuts a size to whole cells of the VAE: pixels (height, width) of the video.

    Raises:
      UserError: for a size under one patch of the denoiser.
    """
    cell = models.vae.space_factor
    smallest = cell * models.tora.patch
    if min(height, width) < smallest:
        raise UserError(f"the size {width}x{height} is too small; each side needs at least {smallest} pixels")
    return height // cell * cell, width // cell * cell


def _spread(mesh: Mesh, tree: Any) -> Any:
    """Shares out arrays over the mesh by their first axis, which counts videos or passes of videos."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


@contextlib.contextmanager
def timed(seconds: dict[str, dict[str, float]], part: str) -> Iterator[None]:
    """Adds the wall time of a part to `seconds`, compilation (tracing and lowering included) apart."""
    compiling, thread = 0.0, threading.get_ident()

    def listen(event: str, duration: float, **_) -> None:
        nonlocal compiling
        here = threading.get_ident() == thread  # what another one compiles meanwhile takes none of this part's time
        if here and (event.startswith("/jax/core/compile/") or event == programs.READING):
            compiling += duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    try:
        yield
    finally:
        total = time.perf_counter() - start
        jax.monitoring.unregister_event_duration_listener(listen)
        seconds[part] = {"run": max(total - compiling, 0.0), "compile": compiling}


def add_seconds(total: dict[str, dict[str, float]], more: Mapping[str, Mapping[str, float]]) -> None:
    """Adds the seconds of each part, as in a `Result`, to a total."""
    for part, spent in more.items():
        before = total.get(part, {})
        total[part] = {name: before.get(name, 0.0) + value for name, value in spent.items()}
