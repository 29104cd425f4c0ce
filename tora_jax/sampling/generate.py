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

from tora_jax import sharding
from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import motion_maps, text
from tora_jax.conditioning.images import Given, Images
from tora_jax.diffusion import rectified_flow, sampler
from tora_jax.diffusion.sampler import Savings
from tora_jax.errors import UserError

Tracks = Float[np.ndarray, "_ t 2"]  # each video may have another number of them


STEPS = 30
SEED_STEP = 0x9E3779B9  # between the seeds of a video's segments; any odd number would do
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
    steps: int = STEPS,
    guidance: float = 7.0,
    trajectory_guidance: float = 1.0,
    negative_prompt: str = "",
    heads: Sequence[Float[np.ndarray, "k h8 w8 c"]] | None = None,
    max_norms: Sequence[float] | None = None,
    mesh: Mesh | None = None,
    savings: Savings = Savings(),  # noqa: B008 (immutable)
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
      savings: what is left out to be faster.
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
    savings.check()
    images = [{}] * len(prompts) if images is None else [_all_given(each) for each in images]
    _check_inputs(prompts, tracks, images, seeds, num_frames, size)
    seconds: dict[str, dict[str, float]] = {}
    part = functools.partial(timed, seconds)
    keys = [jax.random.split(jax.random.key(seed)) for seed in seeds]
    params, vae = models.params, models.vae
    frames = vae.latent_frames(num_frames)
    shape = (1, frames, *(side // vae.space_factor for side in size), models.tora.in_channels)
    spread = (lambda tree: tree) if mesh is None else functools.partial(_spread, mesh)

    with part("text"):
        conditions = _conditions(models, prompts, negative_prompt, guidance, trajectory_guidance, tracks)
        rows = len(conditions["text"])
        told = {"fps": IMAGE_FPS if num_frames == 1 else fps, "height": height, "width": width}
        conditions.update({name: jnp.full(rows, value, jnp.float32) for name, value in told.items()})
        conditions = jax.block_until_ready(spread(conditions))

    motion, features = [None] * len(prompts), None
    if tracks is not None:
        with part("motion"):
            maps = [motion_maps.displacement_maps(np.asarray(track), *size) for track in tracks]
            norms = max_norms or [None] * len(maps)
            motion = [motion_maps.flow_to_rgb(*each) for each in zip(maps, norms, strict=True)]
            colors = jnp.asarray(np.stack([motion_maps.flow_to_color(*each) for each in zip(maps, norms, strict=True)]))
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
        times = rectified_flow.sampling_times(steps, height, width, frames, scale=models.tora.time_scale)

        def noise(step: int) -> Array:
            return spread(jnp.concatenate([rectified_flow.step_noise(key, step, shape) for _, key in keys]))

        weights = guidance, trajectory_guidance
        x = sampler.run(models, x, times, weights, conditions, features, edit, noise, savings, progress)
        del conditions, features  # the decoder may need the room

    with part("decode"):
        videos, finite = models.decode(num_frames, params["vae"], x)
        if not finite:
            raise UserError(
                f"{models.origin}: the video is not finite; the weights are damaged, or the guidance too large"
            )
        videos, latents = np.asarray(videos), np.asarray(x)
    return [Result(video, rgb, seconds, z) for video, rgb, z in zip(videos, motion, latents, strict=True)]


# ----------------------------------------------------------------------------------------------------------
# Videos longer than the model's own
# ----------------------------------------------------------------------------------------------------------


class Segments(NamedTuple):
    """How a video is made piece by piece.

    Attributes:
      starts: the first frame of each segment.
      length: frames of a segment.
      latents, shared: latent frames, and the frames in them, that a segment takes over from the one before.
      aligned: they are whole micro-frames in both, so the latents themselves are taken over; otherwise the frames are
        encoded again.
    """

    starts: range
    length: int
    latents: int
    shared: int
    aligned: bool


def segments(models: Models, num_frames: int, segment: int, overlap: int = 0) -> Segments:
    """Cuts a video of `num_frames` into segments of at most `segment` frames.

    Args:
      segment: what the model makes at once.
      overlap: latent frames that a segment takes over; 0 = a micro-frame's where a segment has several, else 2 (fewer
        where it has no more).

    Raises:
      UserError: a segment would bring nothing new.
    """
    if num_frames <= segment:
        return Segments(range(1), num_frames, 0, 0, True)
    if segment < 1 or overlap < 0:
        raise UserError(f"segment is {segment} and overlap {overlap}; they must be at least 1 and 0")
    latents, shared, whole = models.vae.reusable(segment, overlap)
    if shared >= segment:
        raise UserError(f"an overlap of {latents} latent frames leaves nothing of a segment of {segment} frames")
    step = segment - shared
    starts = range(0, step * math.ceil((num_frames - shared) / step), step)
    return Segments(starts, segment, latents, shared, whole)


def generate_pieces(
    models: Models,
    prompts: Sequence[str | Sequence[str]],
    tracks: Sequence[Tracks] | None = None,
    images: Sequence[Images] | None = None,
    *,
    seeds: Sequence[int],
    num_frames: int,
    segment: int,
    overlap: int = 0,
    progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> Iterator[list[Result]]:
    """Makes videos of any length: `generate_batch`, segment after segment, each begun with the end of the one before.

    The device and the host hold one segment at a time. Tracks are cut without a jump, and one displacement has full
    colour in the maps of the whole video.

    Args:
      prompts: for each video one, or several: the segments are shared out among them in equal parts.
      tracks, images: as in `generate_batch`, over the whole video.
      segment, overlap: see `segments`.
      progress: called after each step with the number of steps done in all segments.
      settings: of `generate_batch`.

    Yields:
      for each segment, what is new: its frames after those that it took over.

    Raises:
      UserError: for a value out of its range.
    """
    plan = segments(models, num_frames, segment, overlap)
    prompts = [[each] if isinstance(each, str) else list(each) for each in prompts]
    if not all(prompts):
        raise UserError("a video has no prompt")
    images = [_all_given(each) for each in images or [None] * len(prompts)]
    windows = [(start, start + plan.length) for start in plan.starts]
    norms = None
    if tracks is not None and len(windows) > 1:
        size = video_size(models, settings["height"], settings["width"])
        _check_inputs(prompts, tracks, images, seeds, num_frames, size)
        norms = [
            max(
                motion_maps.largest_norm(motion_maps.displacement_maps(_window(track, *window), *size))
                for window in windows
            )
            for track in tracks
        ]
    results: list[Result] = []
    for i, window in enumerate(windows):
        given = [_within(each, *window, plan.shared if i else 0) for each in images] if len(windows) > 1 else images
        if i and not plan.aligned:
            given = [{**each, 0: Given(r.video[-plan.shared :])} for each, r in zip(given, results, strict=True)]
        results = generate_batch(
            models,
            [each[i * len(each) // len(windows)] for each in prompts],
            None if tracks is None else [_window(track, *window) for track in tracks],
            given,
            seeds=[(seed + i * SEED_STEP) % 2**32 for seed in seeds],
            num_frames=plan.length,
            heads=[r.latents[-plan.latents :] for r in results] if i and plan.aligned else None,
            max_norms=norms,
            progress=progress and (lambda step, i=i: progress(i * settings.get("steps", STEPS) + step)),
            **settings,
        )
        new = slice(plan.shared if i else 0, num_frames - window[0])
        yield [
            dataclasses.replace(r, video=r.video[new], motion=None if r.motion is None else r.motion[new])
            for r in results
        ]


def _window(track: Tracks, start: int, stop: int) -> Float[np.ndarray, "_ _ 2"]:
    """The frames from `start` to `stop` of tracks that rest after their end."""
    return np.asarray(track)[:, np.clip(np.arange(start, stop), 0, track.shape[1] - 1)]


def _within(images: Mapping[int, Given], start: int, stop: int, taken: int) -> dict[int, Given]:
    """What is given for the frames of a segment, as it counts them; the first `taken` are made already."""
    found = {}
    for frame, (pixels, edit) in images.items():
        clip = pixels if pixels.ndim == 4 else pixels[None]
        first, last = max(frame, start + taken), min(frame + len(clip), stop)
        if first < last:
            part = clip[first - frame : last - frame]
            found[first - start] = Given(part if pixels.ndim == 4 else part[0], edit)
    return found


def joined(pieces: Sequence[Result]) -> Result:
    """The pieces of one video as one; its seconds are theirs together."""
    seconds: dict[str, dict[str, float]] = {}
    for piece in pieces:
        add_seconds(seconds, piece.seconds)
    video = np.concatenate([piece.video for piece in pieces])
    motion = None if pieces[0].motion is None else np.concatenate([piece.motion for piece in pieces])
    return Result(video, motion, seconds, pieces[0].latents if len(pieces) == 1 else None)


def add_seconds(total: dict[str, dict[str, float]], more: Mapping[str, Mapping[str, float]]) -> None:
    """Adds the seconds of each part of a `Result` to others."""
    for part, spent in more.items():
        before = total.get(part, {})
        total[part] = {name: before.get(name, 0.0) + value for name, value in spent.items()}


# ----------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------


def video_size(models: Models, height: int, width: int) -> tuple[int, int]:
    """Pixels (height, width) of the video that a size gives: whole cells of the VAE, what is over is cut off.

    Raises:
      UserError: for a size under one patch of the denoiser.
    """
    cell = models.vae.space_factor
    smallest = cell * models.tora.patch
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
    if not 0.01 <= fps <= 1000:  # NaN too
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

    def latent(frame: int) -> int:
        return models.vae.latent_of(frame, num_frames)

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
        for part in models.vae.parts(num_frames):
            if part.stop <= frame or part.start >= frame + len(clip):
                continue
            first = latent(part.start)
            alone = wanted == {first} and models.vae.encoded_alone(part) and part.start >= frame
            index = np.asarray(part[:1] if alone else part) - frame
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
