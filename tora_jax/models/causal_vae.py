"""The causal 3D VAE: an autoencoder of MAGVIT-v2's style without the codebook.

Strides in time and in space are fields. Without spatial strides it is the temporal half of Open-Sora v1.2's
video VAE, which works on the spatial VAE's latents; with three of them it is a whole motion VAE, from pixels
to a latent 8x smaller in space and 4x in time (Tora, section 3.2).
"""

from __future__ import annotations

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax.models.layers import Dtype, conv3d, gathered, group_norm, split_moments

EPS = 1e-5
SHORTCUT_LOGVAR = -6.0  # of the posterior at the first step: a deviation of 0.05
CONV = gathered(conv3d, None, None, None, None, None)


class CausalConv(nn.Module):
    """A 3D convolution whose output frame i sees no input frame after stride * (i + 1) - 1.

    Time is padded in front only, with zeros, so that t frames give t / stride. Space keeps its size at stride
    1; at stride 2 it is padded right and bottom only, as in AutoencoderKL: both VAEs then give the same grid.
    """

    features: int
    kernel: int = 3
    time_stride: int = 1
    space_stride: int = 1
    use_bias: bool = True
    zero: bool = False  # starts at zero
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w _"]) -> Float[Array, "b t2 h2 w2 c"]:
        half = self.kernel // 2
        space = (half, half) if self.space_stride == 1 else (0, self.kernel - self.space_stride)
        return nn.Conv(
            self.features,
            (self.kernel,) * 3,
            strides=(self.time_stride, self.space_stride, self.space_stride),
            padding=((self.kernel - self.time_stride, 0), space, space),
            use_bias=self.use_bias,
            kernel_init=nn.initializers.zeros if self.zero else nn.linear.default_kernel_init,
            dtype=self.dtype,
            conv_general_dilated=CONV,
            name="conv",
        )(x)


class ResBlock(nn.Module):
    """Norm, SiLU and a convolution without bias, twice, and a skip."""

    features: int
    norm_groups: int
    causal_norm: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w _"]) -> Float[Array, "b t h w c"]:
        skip = x
        for i in (1, 2):
            x = nn.silu(group_norm(self.norm_groups, EPS, name=f"norm{i}", per_frame=self.causal_norm)(x))
            x = CausalConv(self.features, use_bias=False, dtype=self.dtype, name=f"conv{i}")(x)
        if skip.shape[-1] != self.features:
            skip = CausalConv(self.features, kernel=1, use_bias=False, dtype=self.dtype, name="shortcut")(skip)
        return x + skip


class Encoder(nn.Module):
    """Clip -> features of the latent's grid."""

    filters: int
    widths: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]  # (time, space) between level i and level i + 1
    num_res_blocks: int
    norm_groups: int
    causal_norm: bool
    out_channels: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w _"]) -> Float[Array, "b t4 h2 w2 c"]:
        norm = (self.norm_groups, self.causal_norm)
        x = CausalConv(self.filters, use_bias=False, dtype=self.dtype, name="conv_in")(x)
        for i, (width, stride) in enumerate(zip(self.widths, (*self.strides, (1, 1)), strict=True)):
            for j in range(self.num_res_blocks):
                x = ResBlock(width, *norm, self.dtype, name=f"level_{i}_block_{j}")(x)
            if stride != (1, 1):
                x = CausalConv(width, 3, *stride, dtype=self.dtype, name=f"stride_{i}")(x)
        for j in range(self.num_res_blocks):
            x = ResBlock(self.widths[-1], *norm, self.dtype, name=f"last_block_{j}")(x)
        x = nn.silu(group_norm(self.norm_groups, EPS, name="norm_out", per_frame=self.causal_norm)(x))
        return CausalConv(self.out_channels, kernel=1, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Features of the latent's grid -> clip."""

    widths: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]
    num_res_blocks: int
    norm_groups: int
    causal_norm: bool
    out_channels: int
    zero: bool
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b t4 h2 w2 _"]) -> Float[Array, "b t h w c"]:
        norm = (self.norm_groups, self.causal_norm)
        x = CausalConv(self.widths[-1], dtype=self.dtype, name="conv_in")(z)
        for j in range(self.num_res_blocks):
            x = ResBlock(self.widths[-1], *norm, self.dtype, name=f"first_block_{j}")(x)
        for i in reversed(range(len(self.widths))):
            for j in range(self.num_res_blocks):
                x = ResBlock(self.widths[i], *norm, self.dtype, name=f"level_{i}_block_{j}")(x)
            if i > 0 and self.strides[i - 1] != (1, 1):
                time, space = self.strides[i - 1]
                width = self.widths[i] * time * space * space
                x = CausalConv(width, dtype=self.dtype, name=f"stride_{i - 1}")(x)
                x = einops.rearrange(x, "b t h w (c p q r) -> b (t p) (h q) (w r) c", p=time, q=space, r=space)
        x = nn.silu(group_norm(self.norm_groups, EPS, name="norm_out", per_frame=self.causal_norm)(x))
        return CausalConv(self.out_channels, zero=self.zero, dtype=self.dtype, name="conv_out")(x)


class CausalVAE(nn.Module):
    """A clip <-> Gaussian latent, 2x smaller in time and in space at each level that strides there.

    Clips are padded with zero frames in front to a multiple of the time factor, and the same number is cut
    from the front after decoding: with a factor of 4, frame j of 17 lives in latent ceil(j / 4).

    Two forms of normalisation exist, because the reference's convolutions are causal and its norms are not.
    Its GroupNorm takes statistics over all frames of a clip, so that a later frame changes earlier latents a
    little; the released weights need that. `causal_norm` takes them over each frame alone: then no later
    frame can reach an earlier latent, which is what a net trained from scratch should have.

    With `shortcut` the nets learn what to add to a code that needs none: the frames of a latent side by side as its
    channels. At the first step nothing is lost, and a small net trained for minutes does not blur what moves. Shortcuts
    without parameters around strides are DC-AE's idea (Chen et al. 2024, section 3.2).

    Fields:
      channels: of the clip, in and out: 4 for the spatial VAE's latents, 3 for pixels.
      latent_channels: of the latent.
      inner_channels: between the nets and the two 1x1x1 convolutions around the latent.
      filters: width of the first level; `channel_multipliers` times that for each level.
      num_res_blocks: of each level.
      norm_groups: of each GroupNorm.
      temporal_downsample, spatial_downsample: does level i halve time, or height and width? One entry for
        each level but the last; the empty tuple halves nowhere. A level that does neither has no convolution
        between it and the next.
      causal_norm, shortcut: see above; a shortcut wants `channels` times the frames of a latent as `latent_channels`,
        and no strides in space.
      dtype: of the convolutions; norms run in float32.

    Source: Open-Sora v1.2, opensora/models/vae/vae_temporal.py; the spatial strides, and their upsampling by
    depth to space, after MAGVIT-v2.
    """

    channels: int = 4
    latent_channels: int = 4
    inner_channels: int = 4
    filters: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 4
    norm_groups: int = 32
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    spatial_downsample: tuple[bool, ...] = ()
    causal_norm: bool = False
    shortcut: bool = False
    dtype: Dtype = jnp.float32

    @property
    def time_factor(self) -> int:
        """Frames for each latent frame."""
        return 2 ** sum(map(bool, self.temporal_downsample))

    @property
    def space_factor(self) -> int:
        """Pixels for each latent cell, along one side."""
        return 2 ** sum(map(bool, self.spatial_downsample))

    def setup(self):
        levels = len(self.channel_multipliers) - 1
        halved = [tuple(flags) or (False,) * levels for flags in (self.temporal_downsample, self.spatial_downsample)]
        if any(len(flags) != levels for flags in halved):
            raise ValueError(
                f"{levels + 1} levels want {levels} entries in temporal_downsample and spatial_downsample, "
                f"got {len(self.temporal_downsample)} and {len(self.spatial_downsample)}"
            )
        if self.shortcut and (self.space_factor, self.latent_channels) != (1, self.channels * self.time_factor):
            raise ValueError(
                f"a shortcut wants no spatial strides and latent_channels = {self.channels * self.time_factor}, "
                f"got {self.latent_channels}"
            )
        shape = (
            tuple(self.filters * m for m in self.channel_multipliers),
            tuple((2 if time else 1, 2 if space else 1) for time, space in zip(*halved, strict=True)),
            self.num_res_blocks,
            self.norm_groups,
            self.causal_norm,
        )
        self.encoder = Encoder(self.filters, *shape, 2 * self.inner_channels, self.dtype)
        self.decoder = Decoder(*shape, self.channels, self.shortcut, self.dtype)
        self.quant_conv = CausalConv(2 * self.latent_channels, kernel=1, zero=self.shortcut, dtype=self.dtype)
        self.post_quant_conv = CausalConv(self.inner_channels, kernel=1, dtype=self.dtype)

    def encode(self, x: Float[Array, "b t h w _"]) -> tuple[Float[Array, "b t4 h2 w2 c"], Float[Array, "b t4 h2 w2 c"]]:
        """A clip of any length -> mean and log-variance (-30..20, a shortcut's -36..14) of the posterior, float32."""
        front = -x.shape[1] % self.time_factor
        x = jnp.pad(x, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))
        mean, logvar = split_moments(self.quant_conv(self.encoder(x)))
        if self.shortcut:
            mean += einops.rearrange(x, "b (t p) h w c -> b t h w (p c)", p=self.time_factor)
            logvar += SHORTCUT_LOGVAR
        return mean, logvar

    def decode(self, z: Float[Array, "b t4 h2 w2 c"], num_frames: int) -> Float[Array, "b t h w _"]:
        """A latent -> the clip of `num_frames` that it was made from."""
        x = self.decoder(self.post_quant_conv(z))
        if self.shortcut:
            x += einops.rearrange(z, "b t h w (p c) -> b (t p) h w c", p=self.time_factor)
        return x[:, -num_frames % self.time_factor :]

    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h2 w2 c"]:
        """The reconstruction from the posterior's mean."""
        return self.decode(self.encode(x)[0], x.shape[1])
