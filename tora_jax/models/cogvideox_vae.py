"""CogVideoX's causal 3D VAE: 8x smaller in height and width, 4x in time.

A clip goes through in chunks of frames; each causal convolution hands its last inputs to the next chunk. Norms take
statistics over the frames of a chunk, so that the chunks are part of what the VAE computes.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_cogvideox.py; the authors' own code
(sat/vae_modules/cp_enc_dec.py of alibaba/Tora at 9a23dce) differs in encoding the whole clip as one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from tora_jax import sharding
from tora_jax.errors import UserError
from tora_jax.models import layers
from tora_jax.models.layers import Dtype, conv3d, gathered, group_norm, split_moments
from tora_jax.models.video_vae import Gaussian

EPS = 1e-6
TIME_FACTOR = 4
CHUNK = 8  # frames
OVERLAP = 1 / 6, 1 / 5  # of a tile with the next one, in height and in width
CONV2D = gathered(jax.lax.conv_general_dilated, None, None, None, None)
CONV3D = gathered(conv3d, None, None, None, None, None)


def latent_frames(num_frames: int) -> int:
    """Latent frames of a clip of `num_frames`, encoded in chunks of CHUNK."""
    return sum(-(-(-(-n // 2)) // 2) for n in chunk_sizes(num_frames, CHUNK))


def decoded_frames(latents: int) -> int:
    """Frames that so many latent frames are decoded to: 4n - 3 of an odd number n, 4n of an even one."""
    return TIME_FACTOR * latents - (TIME_FACTOR - 1 if latents % 2 else 0)


def chunk_sizes(length: int, size: int) -> list[int]:
    """Frames of each chunk: all of `size` but the first, which takes the rest as well; size 0 = one chunk."""
    count = max(length // size, 1) if size else 1
    return [length - (count - 1) * size] + [size] * (count - 1)


class Caches:
    """Frames that causal convolutions keep between chunks, in the order in which they run.

    Attributes:
      new: what the convolutions that ran so far keep.
    """

    def __init__(self, old: Sequence[Array] | None):
        self._old = None if old is None else iter(old)
        self.new: list[Array] = []

    def extend(self, x: Float[Array, "b t h w c"], frames: int) -> Float[Array, "b t2 h w c"]:
        """x with `frames` frames in front: those kept from the chunk before, or else copies of the first one."""
        front = jnp.repeat(x[:, :1], frames, axis=1) if self._old is None else next(self._old)
        x = jnp.concatenate([front.astype(x.dtype), x], axis=1)
        self.new.append(x[:, -frames:])
        return x


class CausalConv(nn.Module):
    """A 3x3x3 convolution: zeros around it in space, frames of the past in time."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w _"], caches: Caches) -> Float[Array, "b t h w c"]:
        padding = ((0, 0), (1, 1), (1, 1))
        conv = nn.Conv(
            self.features, (3, 3, 3), padding=padding, dtype=self.dtype, conv_general_dilated=CONV3D, name="conv"
        )
        return conv(caches.extend(x, 2))


def pointwise(features: int, *, dtype: Dtype, name: str) -> nn.Conv:
    """A 1x1x1 convolution."""
    return nn.Conv(features, (1, 1, 1), dtype=dtype, conv_general_dilated=CONV3D, name=name)


def nearest(z: Float[Array, "b t2 h2 w2 c"], shape: Sequence[int]) -> Float[Array, "b t h w c"]:
    """A latent's map on the grid (t, h, w) of features: each cell repeated.

    Where t is odd and over 1, the first frame stands for the first alone.
    """
    t, h, w = shape
    z = einops.repeat(z, "b t h w c -> b t (h p) (w q) c", p=h // z.shape[2], q=w // z.shape[3])
    if t % 2 and t > 1:
        rest = jnp.repeat(z[:, 1:], (t - 1) // (z.shape[1] - 1), axis=1)
        return jnp.concatenate([z[:, :1], rest], axis=1)
    return jnp.repeat(z, t // z.shape[1], axis=1)


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are maps of the latent."""

    norm_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"], z: Float[Array, "b t2 h2 w2 _"]) -> Float[Array, "b t h w c"]:
        # Products of single cells: before they are repeated, there are fewer of them.
        scale, shift = (pointwise(x.shape[-1], dtype=self.dtype, name=name)(z) for name in ("scale", "shift"))
        scale, shift = (nearest(y, x.shape[1:4]).astype(jnp.float32) for y in (scale, shift))
        return group_norm(self.norm_groups, EPS, name="norm")(x) * scale + shift


class ResBlock(nn.Module):
    """Norm, SiLU and a causal convolution, twice, and a skip; the norms are spatial where there is a latent."""

    features: int
    norm_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w _"], caches: Caches, z: Float[Array, "b t2 h2 w2 _"] | None = None
    ) -> Float[Array, "b t h w c"]:
        skip = x
        for i in (1, 2):
            if z is None:
                x = group_norm(self.norm_groups, EPS, name=f"norm{i}")(x)
            else:
                x = SpatialNorm(self.norm_groups, self.dtype, name=f"norm{i}")(x, z)
            x = CausalConv(self.features, self.dtype, name=f"conv{i}")(nn.silu(x), caches)
        if skip.shape[-1] != self.features:
            skip = pointwise(self.features, dtype=self.dtype, name="shortcut")(skip)
        return x + skip


def halve_time(x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h w c"]:
    """Means of pairs of frames; of an odd number the first stays alone."""
    first = x[:, : x.shape[1] % 2]
    pairs = einops.reduce(x[:, first.shape[1] :], "b (t p) h w c -> b t h w c", "mean", p=2)
    return jnp.concatenate([first, pairs], axis=1)


def double_time(x: Float[Array, "b t h w c"]) -> Float[Array, "b t2 h w c"]:
    """Each frame twice; of an odd number the first one once."""
    first = x[:, : x.shape[1] % 2]
    return jnp.concatenate([first, jnp.repeat(x[:, first.shape[1] :], 2, axis=1)], axis=1)


class Encoder(nn.Module):
    """A chunk of pixels -> mean and log-variance of its latent, side by side."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    out_channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t h w _"], old: list[Array] | None
    ) -> tuple[Float[Array, "b t4 h8 w8 c"], list[Array]]:
        """Encodes; `old`: what the chunk before left, None for the first. Returns what this one leaves as well."""
        caches = Caches(old)
        x = CausalConv(self.channels[0], self.dtype, name="conv_in")(x, caches)
        for i, width in enumerate(self.channels):
            for j in range(self.layers_per_block):
                x = ResBlock(width, self.norm_groups, self.dtype, name=f"down_{i}_block_{j}")(x, caches)
            if i < len(self.channels) - 1:
                x = halve_time(x) if 2**i < TIME_FACTOR else x
                x = nn.Conv(
                    width,
                    (3, 3),
                    strides=2,
                    padding=((0, 1), (0, 1)),  # right and bottom only
                    dtype=self.dtype,
                    conv_general_dilated=CONV2D,
                    name=f"down_{i}_conv",
                )(x)
        for j in range(2):
            x = ResBlock(self.channels[-1], self.norm_groups, self.dtype, name=f"middle_block_{j}")(x, caches)
        x = nn.silu(group_norm(self.norm_groups, EPS, name="norm_out")(x))
        return CausalConv(self.out_channels, self.dtype, name="conv_out")(x, caches), caches.new


class Decoder(nn.Module):
    """A chunk of latents -> pixels."""

    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, z: Float[Array, "b t4 h8 w8 _"], old: list[Array] | None
    ) -> tuple[Float[Array, "b t h w 3"], list[Array]]:
        """Decodes; `old` as in `Encoder`."""
        caches = Caches(old)
        widths = self.channels[::-1]
        x = CausalConv(widths[0], self.dtype, name="conv_in")(z, caches)
        for j in range(2):
            x = ResBlock(widths[0], self.norm_groups, self.dtype, name=f"middle_block_{j}")(x, caches, z)
        for i, width in enumerate(widths):
            for j in range(self.layers_per_block + 1):
                x = ResBlock(width, self.norm_groups, self.dtype, name=f"up_{i}_block_{j}")(x, caches, z)
            if i < len(widths) - 1:
                x = double_time(x) if 2**i < TIME_FACTOR else x
                x = einops.repeat(x, "b t h w c -> b t (h p) (w q) c", p=2, q=2)
                options = {"padding": "SAME", "dtype": self.dtype, "conv_general_dilated": CONV2D}
                x = nn.Conv(width, (3, 3), **options, name=f"up_{i}_conv")(x)
        x = nn.silu(SpatialNorm(self.norm_groups, self.dtype, name="norm_out")(x, z))
        return CausalConv(3, self.dtype, name="conv_out")(x, caches), caches.new


class CogVideoXVAE(nn.Module):
    """A video <-> normalised latents, 8x smaller in height and width at the default sizes, 4x in time.

    Only 8k + 1 frames come back as many: 1, 9, 17 ... 49. Others are encoded by the same rule, see `latent_frames` and
    `decoded_frames`.

    Fields:
      channels: width of each level, from full resolution down.
      layers_per_block: res blocks of a level in the encoder; the decoder has one more.
      norm_groups: of each GroupNorm.
      latent_channels: of the latent.
      scaling: of the latents, towards unit variance.
      encoder_chunk: frames that the encoder takes at once: 8 as in diffusers, 0 = the whole clip, as the authors' own
        code does and the released weights were trained. The decoder takes `encoder_chunk` / 4 latents in both.
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
    def space_factor(self) -> int:
        """Pixels for each latent cell, along one side."""
        return 2 ** (len(self.channels) - 1)

    def setup(self):
        shape = (self.channels, self.layers_per_block, self.norm_groups)
        self.encoder = Encoder(*shape, 2 * self.latent_channels, self.dtype)
        self.decoder = Decoder(*shape, self.dtype)

    def moments(self, video: Float[Array, "b t h w 3"]) -> Gaussian:
        """The posterior of a video in [-1, 1], not normalised; log-variances are clipped to -30..20.

        Raises:
          UserError: a frame is smaller than one latent cell.
        """
        _, _, h, w, _ = video.shape
        if min(h, w) < self.space_factor:
            cell = f"{self.space_factor}x{self.space_factor}"
            raise UserError(f"frames of {w}x{h} pixels are too small: give at least {cell}")

        def encode(x: Array) -> Array:
            return _in_chunks(Encoder.__call__, self.encoder, x, self.encoder_chunk)

        x = self._in_tiles(encode, video, self.tile, 1 / self.space_factor)
        return Gaussian(*split_moments(x))

    def encode(self, video: Float[Array, "b t h w 3"], rng: PRNGKeyArray | None = None) -> Float[Array, "b t4 h8 w8 c"]:
        """A video in [-1, 1] -> normalised latents, float32.

        Args:
          rng: samples the posterior, as the released code does; None takes its mean.

        Raises:
          UserError: a frame is smaller than one latent cell.
        """
        return self.moments(video).sample(rng) * self.scaling

    def decode(self, latents: Float[Array, "b t4 h8 w8 c"]) -> Float[Array, "b t h w 3"]:
        """Normalised latents -> `decoded_frames` of video, about [-1, 1], not clipped; float32."""

        def decode(z: Array) -> Array:
            return _in_chunks(Decoder.__call__, self.decoder, z, CHUNK // TIME_FACTOR)

        size = None if self.tile is None else tuple(side // self.space_factor for side in self.tile)
        return self._in_tiles(decode, latents / self.scaling, size, self.space_factor).astype(jnp.float32)

    def __call__(self, video: Float[Array, "b t h w 3"]) -> Float[Array, "b t2 h2 w2 3"]:
        """The reconstruction from the posterior's mean."""
        return self.decode(self.encode(video))

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


def _in_chunks(run: Callable, module: nn.Module, x: Float[Array, "b t h w c"], size: int) -> Float[Array, "b t2 h2 w2 _"]:
    """run(module, chunk, caches) -> (result, caches), chunk after chunk; the equal ones are compiled once.

    On a CPU all chunks are unrolled: XLA's backend runs convolutions inside a loop many times slower.
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
