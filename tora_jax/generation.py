"""From a prompt, tracks and given frames to pixels: the one path under the command line and everything above it.

tracks -> displacement map -> RGB -> motion VAE -> extractor -> fusers in ST-DiT -> sampler -> video VAE
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from tora_jax import flow, rectified_flow, sharding, text
from tora_jax.chain import Models
from tora_jax.errors import UserError
from tora_jax.models.stdit import STDiT, parse_variant
from tora_jax.models.video_vae import latent_frames, latent_of

Tracks = Float[np.ndarray, "_ t 2"]  # each video may have another number of them
Pixels = UInt8[np.ndarray, "... h w 3"]


class Given(NamedTuple):
    """A visual condition.

    Attributes:
      pixels: a picture [h, w, 3], or a clip [n, h, w, 3] whose first frame stands at the condition's frame.
      edit: 0 = keep it; up to 1 = the share of the way from noise that it goes along, and so may change
        (Open-Sora's edit ratio).
    """

    pixels: Pixels
    edit: float = 0.0


Images = Mapping[int, Pixels | Given]  # by frame number

IMAGE_FPS = 120.0  # what the reference says of a single frame (opensora/datasets/__init__.py, IMG_FPS)


@dataclasses.dataclass(frozen=True)
class Result:
    """What `generate` gives.

    Attributes:
      video: uint8 [t, h, w, 3].
      motion: the trajectory map that the model saw, uint8 [t, h, w, 3]; None without a trajectory.
      seconds: part -> {"run": seconds, "compile": seconds} of the whole batch; compilation is not in "run".
      latents: that `video` was decoded from, float32.
    """

    video: UInt8[np.ndarray, "t h w 3"]
    motion: UInt8[np.ndarray, "t h w 3"] | None
    seconds: dict[str, dict[str, float]]
    latents: Float[np.ndarray, "t4 h8 w8 c"] | None = None


def generate(
    models: Models,
    prompt: str,
    tracks: Tracks | None = None,
    images: Images | None = None,
    *,
    seed: int = 0,
    **settings: Any,
) -> Result:
    """Makes a video: `generate_batch` for one, whose arguments these are."""
    given = None if tracks is None else [tracks], None if images is None else [images]
    return generate_batch(models, [prompt], *given, seeds=[seed], **settings)[0]


def generate_batch(
    models: Models,
    prompts: Sequence[str],
    tracks: Sequence[Tracks] | None = None,
    images: Sequence[Images] | None = None,
    *,
    seeds: Sequence[int],
    height: int,
    width: int,
    num_frames: int,
    fps: float = 24.0,
    steps: int = 30,
    guidance: float = 7.0,
    trajectory_guidance: float = 1.0,
    negative_prompt: str = "",
    heads: Sequence[Float[np.ndarray, "k h8 w8 c"]] | None = None,
    max_norms: Sequence[float] | None = None,
    mesh: Mesh | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Makes videos, all at once; each comes out as it does alone, but for rounding.

    Args:
      models: of `chain.load`.
      prompts: a caption for each video, not cleaned yet.
      tracks: for each video one (x, y) for each frame, in 0..1 of the frame (`trajectory.tracks`); None = plain
        Open-Sora, the fusers are left out.
      images: for each video, frame number -> what is to be seen there, of the size that `video_size` gives: a picture,
        a clip from that frame on, or either as `Given`. A clip sets the latents that it fills, a picture its frame's.
      seeds: of each video's noise. The same seed gives the same pixels on the same machine.
      height, width: pixels, as the model is told; the video has `video_size` of them.
      num_frames, fps: length and speed.
      steps: of the sampler.
      guidance: weight of the caption; 1 = none.
      trajectory_guidance: extra weight of the trajectory; 1 = none. Another value costs a third pass.
      negative_prompt: takes the null caption's place under guidance.
      heads: for each video the latents of its first frames, from the `Result` of the piece before.
      max_norms: for each video, the displacement in pixels that has full colour in its map (`flow.flow_to_color`);
        None = its own largest.
      mesh: the videos are shared out over it, whose "data" axis divides their number; the parameters lie on it
        already (`place`).
      progress: called after each step with the number of steps done; an exception from it (or Ctrl-C) stops the
        generation.

    Raises:
      UserError: for a value out of its range.
    """
    for seed in seeds:
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
    size = video_size(models, height, width)
    images = [{}] * len(prompts) if images is None else [_all_given(each) for each in images]
    _check_inputs(prompts, tracks, images, seeds, num_frames, size)
    seconds: dict[str, dict[str, float]] = {}
    part = functools.partial(timed, seconds)
    keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]
    params, vae = models.params, models.vae
    frames = latent_frames(num_frames, vae.micro_frame_size, vae.time_factor)
    channels = models.tora.stdit.get("in_channels", STDiT.in_channels)
    shape = (1, frames, *(side // vae.space_factor for side in size), channels)
    spread = (lambda tree: tree) if mesh is None else functools.partial(_spread, mesh)

    with part("text"):
        conditions = _conditions(models, prompts, negative_prompt, guidance, trajectory_guidance, tracks)
        rows = len(conditions["text"])
        told = {"fps": IMAGE_FPS if num_frames == 1 else fps, "height": height, "width": width}
        conditions.update({name: jnp.full(rows, value, jnp.float32) for name, value in told.items()})
        conditions = spread(conditions)

    motion, features = [None] * len(prompts), None
    if tracks is not None:
        with part("motion"):
            maps = [flow.displacement_maps(np.asarray(track), *size) for track in tracks]
            norms = max_norms or [None] * len(maps)
            motion = [flow.flow_to_rgb(*each) for each in zip(maps, norms, strict=True)]
            colors = jnp.asarray(np.stack([flow.flow_to_color(*each) for each in zip(maps, norms, strict=True)]))
            features = jax.block_until_ready(models.extract(params, spread(colors)))

    placed = [{}] * len(prompts)
    if any(images):
        with part("images"):
            placed = [_encode_images(models, given, num_frames) for given in images]
    for row, head in enumerate(heads or ()):
        placed[row] = placed[row] | {i: (jnp.asarray(latent)[None], 0.0) for i, latent in enumerate(head)}

    with part("sample"):
        x = jnp.concatenate([jax.random.normal(start, shape) for start, _ in keys])
        edit = jnp.ones(x.shape[:2]) if any(placed) else None
        for row, latents in enumerate(placed):
            for latent, (image, ratio) in latents.items():
                x, edit = x.at[row, latent].set(image[0]), edit.at[row, latent].set(ratio)
        x, edit = spread((x, edit))
        weights = jnp.float32(guidance), jnp.float32(trajectory_guidance)
        times = rectified_flow.sampling_times(steps, height, width, frames)
        for i in range(steps):
            noise = None
            if edit is not None:
                noise = spread(jnp.concatenate([rectified_flow.step_noise(key, i, shape) for _, key in keys]))
            window = jnp.asarray(times[i : i + 3])
            x = models.step(params["tora"], x, window, *weights, conditions, features, edit, noise)
            # Waiting here keeps the progress bar honest, and Ctrl-C within one step.
            x.block_until_ready()
            if progress is not None:
                progress(i + 1)

    with part("decode"):
        videos, finite = models.decode(num_frames, params["vae"], x)
        if not finite:
            raise UserError(
                f"{models.origin}: the video is not finite; the weights are damaged, or the guidance too large"
            )
        videos, latents = np.asarray(videos), np.asarray(x)
    return [Result(video, rgb, seconds, z) for video, rgb, z in zip(videos, motion, latents, strict=True)]


def video_size(models: Models, height: int, width: int) -> tuple[int, int]:
    """Pixels (height, width) of the video that a size gives: whole cells of the VAE, what is over is cut off.

    Raises:
      UserError: for a size under one patch of the denoiser.
    """
    cell = models.vae.space_factor
    smallest = cell * parse_variant(models.tora.stdit.get("variant", STDiT.variant)).patch
    if min(height, width) < smallest:
        raise UserError(f"the size {width}x{height} is too small; each side needs at least {smallest} pixels")
    return height // cell * cell, width // cell * cell


LARGEST = 16384  # frames, or pixels a side: past any memory, and in the range of float32 whole numbers
CHECKED = ("num_frames", "steps", "height", "width", "fps", "guidance", "trajectory_guidance", "seed")


def check_settings(*, num_frames, steps, height, width, fps, guidance, trajectory_guidance, seed) -> None:
    """Checks the ranges of what a user sets; `generate` calls it, and so may a caller before it loads weights.

    Raises:
      UserError: for the first value out of its range.
    """
    for name, value in (("num_frames", num_frames), ("steps", steps), ("height", height), ("width", width)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for name, value in (("num_frames", num_frames), ("height", height), ("width", width)):
        if value > LARGEST:
            raise UserError(f"{name} is {value}; it must be at most {LARGEST}")
    if steps > 10**6:
        raise UserError(f"steps is {steps}; it must be at most a million (30 are usual)")
    for name, value in (("guidance", guidance), ("trajectory_guidance", trajectory_guidance)):
        if not abs(value) <= 1e4:  # NaN too
            raise UserError(f"{name} is {value}; give a number up to 10000 (1 = off)")
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise UserError(f"fps is {fps}; give a number from 0.01 to 1000")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; give a whole number from 0 to 4294967295")


def _all_given(images: Images | None) -> dict[int, Given]:
    return {frame: item if isinstance(item, Given) else Given(item) for frame, item in (images or {}).items()}


def _check_inputs(prompts, tracks, images, seeds, num_frames: int, size: tuple[int, int]) -> None:
    counts = [len(prompts), len(seeds), len(images), len(prompts if tracks is None else tracks)]
    if len(set(counts)) > 1 or not prompts:
        raise UserError(f"prompts, seeds, images and tracks are {counts}; there must be one for each video")
    for shape in map(np.shape, tracks or ()):
        if shape[1:] != (num_frames, 2):
            raise UserError(f"tracks of shape {shape}; they need [n, {num_frames}, 2], one point a frame")
    for frame, (pixels, edit) in (item for each in images for item in each.items()):
        last = frame if pixels.ndim == 3 else frame + len(pixels) - 1
        if not 0 <= frame <= last < num_frames:
            raise UserError(f"an image is given for frame {last}; the video has frames 0 to {num_frames - 1}")
        if pixels.shape[-3:] != (*size, 3):
            raise UserError(f"the image for frame {frame} has shape {pixels.shape}; it needs the video's size, {size}")
        if not 0 <= edit <= 1:
            raise UserError(f"the edit ratio for frame {frame} is {edit}; it must be from 0 (keep) to 1 (generate)")


def place(models: Models, mesh: Mesh, rules: sharding.Rules) -> Models:
    """The models with their parameters laid out over a mesh."""
    params = dict(models.params)
    shardings = sharding.param_shardings(params, mesh, rules)
    return dataclasses.replace(models, params=jax.device_put(params, shardings))


def _spread(mesh: Mesh, tree: Any) -> Any:
    """Arrays whose first axis counts videos, or passes of videos, shared out over the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def _conditions(models, prompts, negative_prompt, guidance, trajectory_guidance, tracks) -> dict[str, Array]:
    """What the denoiser is told in each pass of `rectified_flow.guide`, pass after pass, stacked along the batch."""
    captions = [*prompts, negative_prompt] if negative_prompt else prompts
    ids, mask = models.tokenizer([text.clean(caption) for caption in captions])
    ids, mask = jnp.asarray(ids), jnp.asarray(mask)
    embedded = models.encode_text(models.params["t5"], ids, mask)
    third = tracks is not None and trajectory_guidance != 1
    passes = 3 if third else 1 if guidance == 1 else 2
    # The null caption keeps the prompt's own mask, as in the reference; a negative prompt brings its own.
    count = len(prompts)
    each = np.arange(count)
    rows = np.concatenate([each, np.full(count, count) if negative_prompt else each, each][:passes])

    def per_pass(*values: bool) -> Array:
        return jnp.repeat(jnp.asarray(values[:passes]), count)

    return {
        "text": embedded[rows],
        "text_mask": mask[rows],
        "drop_text": per_pass(False, not negative_prompt, False),
        "has_motion": None if tracks is None else per_pass(True, True, False),
    }


def _encode_images(
    models: Models, images: Mapping[int, Given], num_frames: int
) -> dict[int, tuple[Float[Array, "b h w c"], float]]:
    """Latent frame number -> the latent of what is given for its frames, and the edit ratio.

    A latent holds several frames, so a still is encoded as a clip in which it stands still, as long as the
    micro-frame that it belongs to. A frame with a latent of its own (the head of a micro-frame) is encoded
    alone, as the reference does with its reference images.

    A clip sets the latents whose frames it gives, or, where it fills none, the one of which it gives most. Around it,
    its first and last frame are repeated up to whole micro-frames.
    """
    vae = models.vae
    size, factor = vae.micro_frame_size or num_frames, vae.time_factor

    def latent(frame: int) -> int:
        return latent_of(frame, num_frames, size, factor)

    def encode(pixels: np.ndarray) -> Array:
        return models.encode_video(models.params["vae"], jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1)

    placed = {}
    for frame, (pixels, edit) in sorted(images.items()):
        clip = pixels if pixels.ndim == 4 else pixels[None]
        wanted = {latent(frame)}
        if len(clip) > 1:
            given = [latent(j) for j in range(frame, frame + len(clip))]
            whole = [latent(j) for j in range(num_frames)]
            full = {i for i in given if given.count(i) == whole.count(i)}
            wanted = full or {max(given, key=given.count)}
        for start in range(frame - frame % size, frame + len(clip), size):
            length = min(size, num_frames - start)
            first = latent(start)
            alone = wanted == {first} and length % factor == 1 and start >= frame
            index = np.arange(start, start + (1 if alone else length)) - frame
            encoded = encode(clip[np.clip(index, 0, len(clip) - 1)])
            placed |= {i: (encoded[:, i - first], edit) for i in wanted if 0 <= i - first < encoded.shape[1]}
    return placed


@contextlib.contextmanager
def timed(seconds: dict[str, dict[str, float]], part: str) -> Iterator[None]:
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
