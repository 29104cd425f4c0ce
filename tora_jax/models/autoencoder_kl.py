"""The spatial VAE: an image autoencoder with a Gaussian latent, 8x smaller in height and width.

The net of Stable Diffusion XL as diffusers' `AutoencoderKL` builds it. Open-Sora v1.2 runs it on each frame
of a video, before its causal VAE compresses time.
"""

from __future__ import annotations

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax.models.layers import Dtype, attention, dense, gathered, group_norm, split_moments

EPS = 1e-6


CONV = gathered(jax.lax.conv_general_dilated, None, None, None, None)


def _conv(features: int, *, dtype: Dtype, name: str, kernel: int = 3) -> nn.Conv:
    return nn.Conv(features, (kernel, kernel), padding="SAME", dtype=dtype, conv_general_dilated=CONV, name=name)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, and a skip (a 1x1 convolution where the width changes)."""

    features: int
    norm_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        skip = x
        for i in (1, 2):
            x = nn.silu(group_norm(self.norm_groups, EPS, name=f"norm{i}")(x))
            x = _conv(self.features, dtype=self.dtype, name=f"conv{i}")(x)
        if skip.shape[-1] != self.features:
            skip = _conv(self.features, dtype=self.dtype, name="shortcut", kernel=1)(skip)
        return x + skip


class Attention(nn.Module):
    """Self-attention between all cells of one frame, with one head as wide as the net."""

    norm_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        _, h, _, c = x.shape
        y = group_norm(self.norm_groups, EPS, name="norm")(x)
        y = einops.rearrange(y, "b h w c -> b (h w) 1 c")
        q, k, v = (dense(c, dtype=self.dtype, name=name)(y) for name in "qkv")
        y = dense(c, dtype=self.dtype, name="proj")(attention(q, k, v, axes=("frames",)))
        return x + einops.rearrange(y, "b (h w) 1 c -> b h w c", h=h)


class Middle(nn.Module):
    """Res block, attention, res block: the widest and smallest part, in the encoder and in the decoder."""

    norm_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = ResBlock(x.shape[-1], self.norm_groups, self.dtype, name="block_0")(x)
        x = Attention(self.norm_groups, self.dtype, name="attention")(x)
        return ResBlock(x.shape[-1], self.norm_groups, self.dtype, name="block_1")(x)


class Encoder(nn.Module):
    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    out_channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h8 w8 c"]:
        x = _conv(self.channels[0], dtype=self.dtype, name="conv_in")(x)
        for i, width in enumerate(self.channels):
            for j in range(self.layers_per_block):
                x = ResBlock(width, self.norm_groups, self.dtype, name=f"down_{i}_block_{j}")(x)
            if i < len(self.channels) - 1:
                x = nn.Conv(
                    width,
                    (3, 3),
                    strides=2,
                    padding=((0, 1), (0, 1)),  # right and bottom only: the released weights were trained so
                    dtype=self.dtype,
                    conv_general_dilated=CONV,
                    name=f"down_{i}_conv",
                )(x)
        x = Middle(self.norm_groups, self.dtype, name="middle")(x)
        x = nn.silu(group_norm(self.norm_groups, EPS, name="norm_out")(x))
        return _conv(self.out_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    channels: tuple[int, ...]
    layers_per_block: int
    norm_groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h8 w8 _"]) -> Float[Array, "b h w 3"]:
        x = _conv(self.channels[-1], dtype=self.dtype, name="conv_in")(z)
        x = Middle(self.norm_groups, self.dtype, name="middle")(x)
        for i, width in enumerate(reversed(self.channels)):
            for j in range(self.layers_per_block + 1):
                x = ResBlock(width, self.norm_groups, self.dtype, name=f"up_{i}_block_{j}")(x)
            if i < len(self.channels) - 1:
                x = einops.repeat(x, "b h w c -> b (h p) (w q) c", p=2, q=2)
                x = _conv(width, dtype=self.dtype, name=f"up_{i}_conv")(x)
        x = nn.silu(group_norm(self.norm_groups, EPS, name="norm_out")(x))
        return _conv(3, dtype=self.dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
    """Image <-> Gaussian latent, 2x smaller a side after each level but the last.

    A side that is no multiple of that factor is rounded down at each stride, as in the reference: 20 pixels
    give 2 latent cells, and these decode to 16 pixels.

    Fields:
      channels: width of each level, from full resolution down.
      layers_per_block: res blocks of a level in the encoder; the decoder has one more.
      norm_groups: of each GroupNorm.
      latent_channels: of the latent.
      dtype: of the matrix products; norms run in float32.

    Source: diffusers, models/autoencoders/autoencoder_kl.py and vae.py.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    latent_channels: int = 4
    dtype: Dtype = jnp.float32

    @property
    def space_factor(self) -> int:
        """Pixels for each latent cell, along one side."""
        return 2 ** (len(self.channels) - 1)

    def setup(self):
        shape = (self.channels, self.layers_per_block, self.norm_groups)
        self.encoder = Encoder(*shape, 2 * self.latent_channels, self.dtype)
        self.decoder = Decoder(*shape, self.dtype)
        self.quant_conv = nn.Conv(2 * self.latent_channels, (1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b h8 w8 c"], Float[Array, "b h8 w8 c"]]:
        """Pixels in [-1, 1] -> mean and log-variance (-30..20) of the posterior, float32, unscaled."""
        return split_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z: Float[Array, "b h8 w8 c"]) -> Float[Array, "b h w 3"]:
        """A latent as `encode` gives it (unscaled) -> pixels, about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z))

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 3"]:
        """The reconstruction from the posterior's mean."""
        return self.decode(self.encode(x)[0])
