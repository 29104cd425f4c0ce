"""What a person gives for each video, and what the denoiser is told of it: captions, tracks and given frames.

tracks -> displacement map -> RGB -> motion VAE -> extractor -> features for the fusers
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning import motion_maps, text
from tora_jax.conditioning.images import Given, Images
from tora_jax.conditioning.trajectory import Tracks
from tora_jax.configs.sampling import Settings
from tora_jax.errors import UserError

IMAGE_FPS = 120.0  # what the reference says of a single frame (opensora/datasets/__init__.py, IMG_FPS)


class Inputs(NamedTuple):
    """What is asked for one video.

    Attributes:
      prompt: a caption, not cleaned yet; several are for the segments of a long video.
      tracks: (x, y) for each frame, in 0..1 of the frame (`trajectory.tracks`); None = plain Open-Sora, the fusers are
        left out.
      images: frame number -> what is to be seen there, of the size that `video_size` gives: a picture, a clip from that
        frame on, or either as `Given`. A clip sets the latents that it fills, a picture its frame's.
      prefix: the latents of the first frames, from the `Result` of the piece before; None = they are made.
      max_norm: the displacement in pixels that has full colour in the trajectory map (`motion_maps.flow_to_color`);
        None = the map's own largest.
    """

    prompt: str | Sequence[str]
    tracks: Tracks | None = None
    images: Images = MappingProxyType({})
    prefix: Float[np.ndarray, "k h8 w8 c"] | None = None
    max_norm: float | None = None


def checked(inputs: Sequence[Inputs], seeds: Sequence[int], num_frames: int, size: tuple[int, int]) -> list[Inputs]:
    """The inputs with each image as `Given`.

    Args:
      num_frames, size: frames and pixels (height, width) of the videos.

    Raises:
      UserError: for inputs that do not fit to the videos, or to each other.
    """
    if len(inputs) != len(seeds) or not inputs:
        raise UserError(f"inputs and seeds are {[len(inputs), len(seeds)]}; there must be one for each video")
    if len({each.tracks is None for each in inputs}) > 1:
        raise UserError("some of the videos have tracks, and some have none; make them one after the other")
    found = []
    for each in inputs:
        if each.tracks is not None and np.shape(each.tracks)[1:] != (num_frames, 2):
            shape = np.shape(each.tracks)
            raise UserError(f"tracks of shape {shape}; they need [n, {num_frames}, 2], one point a frame")
        images = {at: item if isinstance(item, Given) else Given(item) for at, item in each.images.items()}
        for frame, (pixels, edit) in images.items():
            last = frame if pixels.ndim == 3 else frame + len(pixels) - 1
            if not 0 <= frame <= last < num_frames:
                raise UserError(f"an image is given for frame {last}; the video has frames 0 to {num_frames - 1}")
            if pixels.shape[-3:] != (*size, 3):
                shape = pixels.shape
                raise UserError(f"the image for frame {frame} has shape {shape}; it needs the video's size, {size}")
            if not 0 <= edit <= 1:
                raise UserError(f"the edit ratio for frame {frame} is {edit}; it must be from 0 (keep) to 1 (generate)")
        found.append(each._replace(images=images))
    return found


def denoiser_inputs(models: Models, inputs: Sequence[Inputs], settings: Settings) -> dict[str, Array | None]:
    """What the denoiser is told in each pass of `rectified_flow.guide`, pass after pass, stacked along the batch."""
    prompts, negative = [each.prompt for each in inputs], settings.negative_prompt
    captions = [*prompts, negative] if negative else prompts
    ids, mask = models.tokenizer([text.clean(caption) for caption in captions])
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
    fps = IMAGE_FPS if settings.num_frames == 1 else settings.fps
    sizes = {"fps": fps, "height": settings.height, "width": settings.width}
    return told | {name: jnp.full(len(rows), value, jnp.float32) for name, value in sizes.items()}


def trajectory_maps(
    inputs: Sequence[Inputs], size: tuple[int, int]
) -> tuple[list[UInt8[np.ndarray, "t h w 3"]], Float[np.ndarray, "b t h w 3"]]:
    """The maps of the tracks: as pictures, and as the motion VAE takes them, in -1..1."""
    maps = [(motion_maps.displacement_maps(np.asarray(each.tracks), *size), each.max_norm) for each in inputs]
    pictures = [motion_maps.flow_to_rgb(*each) for each in maps]
    return pictures, np.stack([motion_maps.flow_to_color(*each) for each in maps])


def given_latents(
    models: Models, images: Mapping[int, Given], num_frames: int
) -> dict[int, tuple[Float[Array, "1 h w c"], float]]:
    """Latent frame number -> the latent of what is given for its frames, and the edit ratio.

    A latent holds several frames, so a still is encoded as a clip in which it stands still, as long as the
    micro-frame that it belongs to. A frame with a latent of its own (the head of a micro-frame) is encoded
    alone, as the reference does with its reference images.

    A clip sets the latents whose frames it gives, or, where it fills none, the one of which it gives most. Around it,
    its first and last frame are repeated up to whole micro-frames.
    """
    vae = models.vae

    def encode(pixels: np.ndarray) -> Array:
        return models.encode_video(models.params["vae"], jnp.asarray(pixels[None], jnp.float32) / 127.5 - 1)

    whole = [vae.latent_of(j, num_frames) for j in range(num_frames)]
    placed = {}
    for frame, (pixels, edit) in sorted(images.items()):
        clip = pixels if pixels.ndim == 4 else pixels[None]
        wanted = {whole[frame]}
        if len(clip) > 1:
            given = whole[frame : frame + len(clip)]
            full = {i for i in given if given.count(i) == whole.count(i)}
            wanted = full or {max(given, key=given.count)}
        for part in vae.parts(num_frames):
            if part.stop <= frame or part.start >= frame + len(clip):
                continue
            first = whole[part.start]
            alone = wanted == {first} and vae.encoded_alone(part) and part.start >= frame
            index = np.asarray(part[:1] if alone else part) - frame
            encoded = encode(clip[np.clip(index, 0, len(clip) - 1)])
            placed |= {i: (encoded[:, i - first], edit) for i in wanted if 0 <= i - first < encoded.shape[1]}
    return placed
