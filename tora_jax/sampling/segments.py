"""Videos longer than the model's own: segment after segment, each begins with the end of the one before."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import motion_maps
from tora_jax.conditioning.images import Given
from tora_jax.conditioning.trajectory import Tracks
from tora_jax.configs.sampling import Settings
from tora_jax.errors import UserError
from tora_jax.sampling.generate import Progress, Result, add_seconds, generate_batch, video_size
from tora_jax.sampling.inputs import Inputs, check_inputs

SEED_STEP = 0x9E3779B9  # between the seeds of a video's segments; any odd number would do


class Segments(NamedTuple):
    """The plan of a video made piece by piece.

    Attributes:
      starts: the first frame of each segment.
      length: frames of a segment.
      latents, shared: latent frames that a segment takes over from the one before, and the frames in them.
      aligned: the shared frames are whole micro-frames in both segments, so the next takes the latents themselves;
        otherwise it encodes the frames again.
    """

    starts: range
    length: int
    latents: int
    shared: int
    aligned: bool


def plan(models: Models, num_frames: int, segment: int, overlap: int = 0) -> Segments:
    """Cuts a video of `num_frames` into segments of at most `segment` frames.

    Args:
      segment: frames that the model makes at once.
      overlap: latent frames that a segment takes over; 0 = those of a micro-frame where a segment has several, else 2
        (fewer in a shorter segment).

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
    inputs: Sequence[Inputs],
    settings: Settings,
    *,
    seeds: Sequence[int],
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> Iterator[list[Result]]:
    """Makes videos of any length: `generate_batch`, segment after segment; each begins with the end of the one before.

    The device and the host hold one segment at a time. Tracks are cut without a jump, and full colour means the same
    displacement in all maps of the video.

    Args:
      inputs: of the whole videos. Segments share several prompts in equal parts.
      settings: `segment` and `overlap` as in `plan`; the others as in `generate_batch`.
      seeds, mesh: as in `generate_batch`.
      progress: as in `generate_batch`; it counts the steps of all segments.

    Yields:
      The new frames of each segment, after those that it took over.

    Raises:
      UserError: for a value out of its range.
    """
    cut = plan(models, settings.num_frames, settings.segment, settings.overlap)
    windows = [(start, start + cut.length) for start in cut.starts]
    size = video_size(models, settings.height, settings.width)
    inputs = check_inputs(models, inputs, settings, seeds, size)
    inputs = [each._replace(prompt=_prompts(each.prompt)) for each in inputs]
    if len(windows) > 1 and inputs[0].tracks is not None:
        inputs = [each._replace(max_norm=_largest_norm(each.tracks, windows, size)) for each in inputs]
    results: list[Result] = []
    for i, window in enumerate(windows):
        parts = [_part(each, *window, i * len(each.prompt) // len(windows), cut.shared if i else 0) for each in inputs]
        if i:
            parts = [_begun(part, result, cut) for part, result in zip(parts, results, strict=True)]
        results = generate_batch(
            models,
            parts,
            dataclasses.replace(settings, num_frames=cut.length),
            seeds=[(seed + i * SEED_STEP) % 2**32 for seed in seeds],
            mesh=mesh,
            progress=progress and (lambda step, clean, i=i: progress(i * settings.steps + step, clean)),
        )
        new = slice(cut.shared if i else 0, settings.num_frames - window[0])
        yield [
            dataclasses.replace(r, video=r.video[new], motion=None if r.motion is None else r.motion[new])
            for r in results
        ]


def joined(pieces: Sequence[Result]) -> Result:
    """Joins the pieces of one video, and adds up their seconds."""
    seconds: dict[str, dict[str, float]] = {}
    for piece in pieces:
        add_seconds(seconds, piece.seconds)
    video = np.concatenate([piece.video for piece in pieces])
    motion = None if pieces[0].motion is None else np.concatenate([piece.motion for piece in pieces])
    return Result(video, motion, seconds, pieces[0].latents if len(pieces) == 1 else None)


def _prompts(given: str | Sequence[str]) -> tuple[str, ...]:
    prompts = (given,) if isinstance(given, str) else tuple(given)
    if not prompts:
        raise UserError("a video has no prompt")
    return prompts


def _largest_norm(tracks: Tracks, windows: Sequence[tuple[int, int]], size: tuple[int, int]) -> float:
    """The largest displacement in the maps of all segments, in pixels."""
    return max(
        motion_maps.largest_norm(motion_maps.displacement_maps(_window(tracks, *window), *size)) for window in windows
    )


def _part(inputs: Inputs, start: int, stop: int, prompt: int, taken: int) -> Inputs:
    """The inputs of one segment, with frames counted from its start; the first `taken` exist already."""
    return inputs._replace(
        prompt=inputs.prompt[prompt],
        tracks=None if inputs.tracks is None else _window(inputs.tracks, start, stop),
        images=_within(inputs.images, start, stop, taken),
    )


def _begun(inputs: Inputs, before: Result, cut: Segments) -> Inputs:
    """The inputs of a segment that begins with the end of the one before."""
    if cut.aligned:
        return inputs._replace(prefix=before.latents[-cut.latents :])
    return inputs._replace(images={**inputs.images, 0: Given(before.video[-cut.shared :])})


def _window(tracks: Tracks, start: int, stop: int) -> Float[np.ndarray, "_ _ 2"]:
    """The frames from `start` to `stop` of tracks that rest after their end."""
    return np.asarray(tracks)[:, np.clip(np.arange(start, stop), 0, tracks.shape[1] - 1)]


def _within(images: Mapping[int, Given], start: int, stop: int, taken: int) -> dict[int, Given]:
    """The images of a segment, with frames counted from its start; the first `taken` exist already."""
    found = {}
    for frame, (pixels, edit) in images.items():
        clip = pixels if pixels.ndim == 4 else pixels[None]
        first, last = max(frame, start + taken), min(frame + len(clip), stop)
        if first < last:
            part = clip[first - frame : last - frame]
            found[first - start] = Given(part if pixels.ndim == 4 else part[0], edit)
    return found
