"""CogVideoX's causal 3D VAE: 8x smaller in height and width, 4x in time.

A clip goes through in chunks of frames. Norms take statistics over the frames of a chunk, so that the chunks are part
of what the VAE computes.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_cogvideox.py; the authors' own code
(sat/vae_modules/cp_enc_dec.py of alibaba/Tora at 9a23dce) differs in encoding the whole clip as one chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from tora_jax import sharding
from tora_jax.errors import UserError
from tora_jax.io.video import as_float
from tora_jax.models.cogvideox_codec import TIME_FACTOR, Decoder, Encoder
from tora_jax.models.layers import Dtype, split_moments
from tora_jax.models.video_vae import Gaussian, Moments, Reusable

CHUNK = 8  # frames
OVERLAP = 1 / 6, 1 / 5  # of a tile with the next one, in height and in width


def decoded_frames(latents: int) -> int:
    """Frames that so many latent frames are decoded to: 4n - 3 of an odd number n, 4n of an even one."""
    return TIME_FACTOR * latents - (TIME_FACTOR - 1 if latents % 2 else 0)


def chunk_sizes(length: int, size: int) -> list[int]:
    """Frames of each chunk: all of `size` but the first, which takes the rest as well; size 0 = one chunk."""
    count = max(length // size, 1) if size else 1
    return [length - (count - 1) * size] + [size] * (count - 1)


class CogVideoXVAE(nn.Module):
    """A video <-> normalised latents, 8x smaller in height and width at the default sizes, 4x in time.

    Only 8k and 8k + 1 frames come back as many, and only 8k + 1 are causal: 1, 9, 17 ... 49. Others are encoded by the
    same rule; see `decoded_frames` for what comes back.

    Fields:
      channels: width of each level, from full resolution down.
      layers_per_block: res blocks of a level in the encoder; the decoder has one more.
      norm_groups: of each GroupNorm.
      latent_channels: of the latent.
      scaling: of the latents, towards unit variance.
      encoder_chunk: frames that the encoder takes at once: 8 as in diffusers, 0 = the whole clip, as the authors' own
        code does and the released weights were trained. The decoder takes 2 latents at once in both.
      tile: (height, width) in pixels of tiles that run one after the other, with blended overlaps, where a frame is
        larger; None = whole frames. Tiles change the result.
      dtype: of the convolutions; norms, posteriors and latents are float32.
    """

    channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = 3
    norm_groups: int = 32
    latent_channels: int = 16
    scaling: float = 0.7
    encoder_chunk: int = CHUNK
    tile: tuple[int, int] | None = None
    dtype: Dtype = jnp.float32

    @property
    def time_factor(self) -> int:
        """Frames for each latent frame."""
        return TIME_FACTOR

    @property
    def shift(self) -> float:
        """What is taken from raw latents to normalise them."""
        return 0.0

    @property
    def scale(self) -> float:
        """What raw latents are then divided by."""
        return 1 / self.scaling

    @property
    def space_factor(self) -> int:
        """Pixels for each latent cell, along one side."""
        return 2 ** (len(self.channels) - 1)

    @nn.nowrap
    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` (1 or more): 1 -> 1, 8 -> 2, 9 -> 3, 49 -> 13."""
        return sum(math.ceil(size / TIME_FACTOR) for size in chunk_sizes(num_frames, self.encoder_chunk))

    @nn.nowrap
    def latent_of(self, frame: int, num_frames: int) -> int:
        """The latent frame that holds `frame` (0 .. num_frames - 1) of a video of `num_frames`.

        Where a chunk is halved and its number of frames is odd, its first frame stays alone: of 8k + 1 frames, frame j
        lives in latent ceil(j / 4).
        """
        latents = 0
        for size in chunk_sizes(num_frames, self.encoder_chunk):
            if frame < size:
                for _ in range(2):
                    frame, size = (frame + size % 2) // 2, math.ceil(size / 2)
                return latents + frame
            frame, latents = frame - size, latents + math.ceil(size / TIME_FACTOR)
        raise ValueError(f"a video of {num_frames} frames has no frame {frame}")

    @nn.nowrap
    def parts(self, num_frames: int) -> list[range]:
        """The frames of each part that is encoded for itself: all, as each chunk begins with what the last one left."""
        return [range(num_frames)]

    @nn.nowrap
    def encoded_alone(self, part: range) -> bool:
        """Whether the first frame of one of `parts` has a latent for itself: a still there is encoded as one frame."""
        return len(part) % TIME_FACTOR == 1

    @nn.nowrap
    def reusable(self, num_frames: int, latents: int = 0) -> Reusable:
        """What a video of `num_frames` can take over from the end of another one of that length, encoded again.

        Args:
          latents: the latent frames that are wanted; 0 = 2 (fewer where it has no more).
        """
        latents = latents or max(min(2, self.latent_frames(num_frames) - 1), 1)
        frames = sum(self.latent_of(frame, num_frames) < latents for frame in range(num_frames))
        return Reusable(latents, frames, False)

    def setup(self):
        shape = (self.channels, self.layers_per_block, self.norm_groups)
        self.encoder = Encoder(*shape, 2 * self.latent_channels, self.dtype)
        self.decoder = Decoder(*shape, self.dtype)

    def moments(self, video: Real[Array, "b t h w 3"], rng: PRNGKeyArray | None = None) -> Moments:
        """The posterior of a video in [-1, 1], or uint8, not normalised; log-variances are clipped to -30..20.

        There is no spatial VAE inside: `spatial` is None, `clip` the video, and `rng` draws nothing.

        Raises:
          UserError: a frame is smaller than one latent cell.
        """
        video = as_float(video)
        _, _, h, w, _ = video.shape
        if min(h, w) < self.space_factor:
            cell = f"{self.space_factor}x{self.space_factor}"
            raise UserError(f"frames of {w}x{h} pixels are too small: give at least {cell}")

        def encode(x: Array) -> Array:
            return _in_chunks(Encoder.__call__, self.encoder, x, self.encoder_chunk)

        x = self._in_tiles(encode, video, self.tile, 1 / self.space_factor)
        return Moments(None, video, Gaussian(*split_moments(x)))

    def encode(self, video: Real[Array, "b t h w 3"], rng: PRNGKeyArray | None = None) -> Float[Array, "b t4 h8 w8 c"]:
        """A video in [-1, 1], or uint8 -> normalised latents, float32.

        Args:
          rng: samples the posterior, as the released code does; None takes its mean.

        Raises:
          UserError: a frame is smaller than one latent cell.
        """
        return self.moments(video).latent.sample(rng) * self.scaling

    def decode_clip(self, z: Float[Array, "b t4 h8 w8 c"], num_frames: int) -> Float[Array, "b t h w 3"]:
        """A sample of `moments(...).latent`, not normalised -> the video; see `decode`."""
        return self.decode(z * self.scaling, num_frames)

    def decode_frames(self, clip: Float[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
        """The video as it is: there is no spatial VAE inside."""
        return clip

    def decode(self, latents: Float[Array, "b t4 h8 w8 c"], num_frames: int, finish: Callable = lambda x: x) -> Any:
        """Normalised latents -> the video of `num_frames`, about [-1, 1], not clipped; float32.

        Args:
          finish: makes of the video what is wanted of it.

        Raises:
          ValueError: these latents are decoded to another number of frames; see `decoded_frames`.
        """
        if num_frames != (frames := decoded_frames(latents.shape[1])):
            raise ValueError(f"{latents.shape[1]} latent frames are decoded to {frames} frames, not {num_frames}")

        def decode(z: Array) -> Array:
            return _in_chunks(Decoder.__call__, self.decoder, z, CHUNK // TIME_FACTOR)

        size = None if self.tile is None else tuple(side // self.space_factor for side in self.tile)
        video = self._in_tiles(decode, latents / self.scaling, size, self.space_factor)
        return finish(video.astype(jnp.float32))

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 3"]:
        """The reconstruction from the posterior's mean."""
        latents = self.encode(video)
        return self.decode(latents, decoded_frames(latents.shape[1]))

    def _in_tiles(self, run: Callable, x: Array, tile: tuple[int, int] | None, factor: float) -> Array:
        """`run` on tiles of x, put together again; `factor`: of sides, from x to the result."""
        if tile is None or (x.shape[2] <= tile[0] and x.shape[3] <= tile[1]):
            return run(x)
        steps = [int(side * (1 - part)) for side, part in zip(tile, OVERLAP, strict=True)]
        sides = [int(side * factor) for side in tile]
        blends = [int(side * part) for side, part in zip(sides, OVERLAP, strict=True)]
        above: list[Array] = []
        rows = []
        for top in range(0, x.shape[2], steps[0]):
            row: list[Array] = []
            for left in range(0, x.shape[3], steps[1]):
                part = run(x[:, :, top : top + tile[0], left : left + tile[1]])
                if above:
                    part = _blend(above[len(row)], part, 2, blends[0])
                if row:
                    part = _blend(row[-1], part, 3, blends[1])
                row.append(part)
            above = row
            keep = [side - blend for side, blend in zip(sides, blends, strict=True)]
            rows.append(jnp.concatenate([part[:, :, : keep[0], : keep[1]] for part in row], axis=3))
        return jnp.concatenate(rows, axis=2)


def _blend(before: Array, after: Array, axis: int, extent: int) -> Array:
    """`after`, its first `extent` rows mixed with the last ones of `before`, linearly."""
    extent = min(extent, before.shape[axis], after.shape[axis])
    if not extent:
        return after
    last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    first, rest = jnp.split(after, [extent], axis=axis)
    share = jnp.arange(extent).reshape(-1, *(1,) * (after.ndim - 1 - axis)) / extent
    return jnp.concatenate([last * (1 - share) + first * share, rest], axis=axis)


def _in_chunks(
    run: Callable, module: nn.Module, x: Float[Array, "b t h w c"], size: int
) -> Float[Array, "b t2 h2 w2 _"]:
    """run(module, chunk, caches) -> (result, caches), chunk after chunk; the equal ones are compiled once.

    On a CPU all chunks are unrolled: gradients of convolutions inside a loop are many times slower there.
    """
    first, *rest = chunk_sizes(x.shape[1], size)
    y, caches = run(module, x[:, :first], None)
    if not rest:
        return y
    chunks = einops.rearrange(x[:, first:], "b (n t) h w c -> n b t h w c", t=size)

    def step(module, caches, chunk):
        y, caches = run(module, chunk, caches)
        return caches, y

    unroll = len(rest) if len(rest) == 1 or sharding.platform() == "cpu" else 1
    options = {"variable_broadcast": "params", "split_rngs": {"params": False}, "unroll": unroll}
    _, ys = nn.scan(step, **options)(module, caches, chunks)
    return jnp.concatenate([y, einops.rearrange(ys, "n b t h w c -> b (n t) h w c")], axis=1)
