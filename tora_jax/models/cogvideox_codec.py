"""Encoder and decoder of CogVideoX's VAE, for one chunk of a clip.

Each causal convolution hands its last inputs to the next chunk.

Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_cogvideox.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax import sharding
from tora_jax.models.layers import Dtype, conv3d, gathered, group_norm

EPS = 1e-6
TIME_FACTOR = 4
# Logical axes of maps [b, t, h, w, c]: each device holds some rows of all frames. Convolutions send the rows at the
# edges, norms their sums, and what XLA fills rows up with reaches neither: it masks what it adds by itself.
ROWS = ("batch", None, "space", None, None)
CONV2D = gathered(jax.lax.conv_general_dilated, None, None, None, None)
CONV3D = gathered(conv3d, None, None, None, None, None)


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
        x = jnp.concatenate([front, x], axis=1)
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
        return conv(caches.extend(x.astype(self.dtype), 2))


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
        skip = x = sharding.constrain(x, ROWS, uneven=True)
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
