"""Inputs of each video, as a person gives them; the backbone makes the denoiser's conditions of them."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from tora_jax.backbones.assembly import Models
from tora_jax.conditioning.images import Given, Images
from tora_jax.conditioning.trajectory import Tracks
from tora_jax.configs.sampling import Settings
from tora_jax.errors import UserError


class Inputs(NamedTuple):
    """Inputs of one video.

    Attributes:
      prompt: a caption, not cleaned yet; several are for the segments of a long video.
      tracks: (x, y) for each frame, in 0..1 of the frame (`trajectory.tracks`); None = plain Open-Sora, the fusers are
        left out.
      images: frame number -> a picture, a clip from that frame on, or either as `Given`, of the size that `video_size`
        gives. A clip sets the latents that it fills, a picture its frame's.
      prefix: the latents of the first frames, from the `Result` of the piece before; None = the model makes them.
      max_norm: the displacement in pixels with full colour in the motion map (`motion_maps.flow_to_color`); None = the
        map's own largest.
    """

    prompt: str | Sequence[str]
    tracks: Tracks | None = None
    images: Images = MappingProxyType({})
    prefix: Float[np.ndarray, "k h8 w8 c"] | None = None
    max_norm: float | None = None


def check_inputs(
    models: Models, inputs: Sequence[Inputs], settings: Settings, seeds: Sequence[int], size: tuple[int, int]
) -> list[Inputs]:
    """Checks inputs, and returns them with each image as `Given`.

    Args:
      settings: of all videos.
      size: pixels (height, width) of the videos.

    Raises:
      UserError: for inputs that do not fit the videos, or each other.
    """
    if len(inputs) != len(seeds) or not inputs:
        raise UserError(f"inputs and seeds are {[len(inputs), len(seeds)]}; there must be one for each video")
    if len({each.tracks is None for each in inputs}) > 1:
        raise UserError("some of the videos have tracks, and some have none; make them one after the other")
    found, num_frames = [], settings.num_frames
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
    models.backbone.check(models, found, settings)
    return found
