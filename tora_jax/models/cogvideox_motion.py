"""The motion modules of the released Tora: an extractor of feature maps, and the fuser inside a block of CogVideoX.

Source: alibaba/Tora at 9a23dce, diffusers-version/tora/traj_module.py (TrajExtractor, MGF).

They differ from the paper's, which `trajectory_extractor` and `motion_fuser` follow: BatchNorm with running statistics
in place of LayerNorm, and a group norm of the hidden states before gamma. The letters of shapes are those of `layers`.
"""

from __future__ import annotations

from typing import NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax.models import layers
from tora_jax.models.layers import Dtype

NORM_GROUPS = 32
EPS = 1e-5
MOMENTUM = 0.1  # of the statistics, towards a batch's: that of PyTorch's module
FEATURES = ("batch", None, "space", None, None)  # logical axes; as those of the tokens
CONV = layers.gathered(jax.lax.conv_general_dilated, None, None, None, "hidden")


def conv3x3(features: int, *, dtype: Dtype, name: str) -> nn.Conv:
    """A 3x3 convolution of each frame alone, zeros around it."""
    return nn.Conv(features, (3, 3), padding="SAME", dtype=dtype, conv_general_dilated=CONV, name=name)


class BatchNorm(nn.Module):
    """Batch norm in float32. Its running statistics are parameters like the scale and the bias.

    They are what it normalises by, unless the collection "batch_stats" is mutable, as in training: then it normalises
    by the batch's, and sows there what the running ones become.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, variance = self.param("mean", zeros, shape), self.param("variance", ones, shape)
        x = x.astype(jnp.float32)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            running, axes = (mean, variance), tuple(range(x.ndim - 1))
            mean, variance = x.mean(axes), x.var(axes)
            unbiased = variance * (count := x.size // x.shape[-1]) / max(count - 1, 1)
            for name, old, new in zip(("mean", "variance"), running, (mean, unbiased), strict=True):
                moved = jax.lax.stop_gradient((1 - MOMENTUM) * old + MOMENTUM * new)
                self.sow("batch_stats", name, moved, reduce_fn=lambda _, new: new, init_fn=lambda: None)
        return (x - mean) * (jax.lax.rsqrt(variance + EPS) * scale) + bias


class ExtractorBlock(nn.Module):
    """Norm, ReLU and a 3x3 convolution, twice, and a skip."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "b t h w m"], _: None = None
    ) -> tuple[Float[Array, "b t h w m"], Float[Array, "b t h w m"]]:
        x = features
        for i in (1, 2):
            x = nn.relu(BatchNorm(name=f"norm{i}")(x))
            x = conv3x3(x.shape[-1], dtype=self.dtype, name=f"conv{i}")(x)
        features = features + x
        return features, features


class MotionExtractor(nn.Module):
    """Motion latents -> a feature map for each block of the denoiser.

    Attributes:
      depth: blocks of the denoiser.
      patch: of the denoiser.
      features: channels of the maps.
      blocks_per_map: residual blocks from one map to the next.
      remat: see `layers.remat`.
      dtype: of the convolutions; norms run in float32.
    """

    depth: int
    patch: int = 2
    features: int = 128
    blocks_per_map: int = 2
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, motion: Float[Array, "b t h w c"]) -> Float[Array, "depth b t h2 w2 m"]:
        """Extracts.

        Args:
          motion: latents of the trajectory map, on the grid of the video's; sides that are no multiple of the patch
            are filled up with zeros right and below.
        """
        p, (h, w) = self.patch, motion.shape[2:4]
        x = jnp.pad(motion.astype(self.dtype), ((0, 0), (0, 0), (0, -h % p), (0, -w % p), (0, 0)))
        x = einops.rearrange(x, "b t (h p) (w q) c -> b t h w (c p q)", p=p, q=p)
        x = conv3x3(self.features, dtype=self.dtype, name="conv_in")(x)
        count = self.blocks_per_map * self.depth
        blocks = nn.scan(
            layers.remat(ExtractorBlock, self.remat),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=count,
            unroll=layers.unroll(count),
        )
        _, maps = blocks(self.dtype, name="blocks")(x, None)
        return maps[self.blocks_per_map - 1 :: self.blocks_per_map]


class Fusion(NamedTuple):
    """What a fuser makes of its features. It depends neither on the step nor on the noise.

    Attributes:
      gamma, beta: scale of the normalised hidden states, and what is added; "b t h w c", or stacked over blocks.
    """

    gamma: Float[Array, "*depth b t h w c"]
    beta: Float[Array, "*depth b t h w c"]


class TemporalConv(nn.Module):
    """A convolution over time alone, of kernel 3, each end repeated; it starts at zero."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w _"]) -> Float[Array, "b t h w c"]:
        shape = (3, x.shape[-1], self.features)
        zeros = nn.initializers.zeros
        kernel, bias = self.param("kernel", zeros, shape), self.param("bias", zeros, (self.features,))
        t = x.shape[1]
        x = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
        x = jnp.concatenate([x[:, i : i + t] for i in range(3)], axis=-1)
        kernel = jnp.asarray(kernel, self.dtype).reshape(-1, self.features)
        kernel = nn.with_logical_constraint(kernel, (None, "hidden"))
        return layers.dot(x, kernel, (((4,), (0,)), ((), ()))) + jnp.asarray(bias, self.dtype)


class MotionFuser(nn.Module):
    """h + GroupNorm(h) * gamma(f) + beta(f), the norm over each frame alone and 1/32 of the channels.

    gamma and beta start at zero, so that an untrained fuser changes nothing.

    Attributes:
      width: channels of the hidden states.
      dtype: of the convolutions; the norm and the sum run in float32.
    """

    width: int
    dtype: Dtype = jnp.float32

    def setup(self):
        self.gamma_spatial = conv3x3(self.width // 4, dtype=self.dtype, name="gamma_spatial")
        self.beta_spatial = conv3x3(self.width // 4, dtype=self.dtype, name="beta_spatial")
        self.gamma_temporal, self.beta_temporal = (TemporalConv(self.width, self.dtype) for _ in range(2))
        self.norm = layers.group_norm(NORM_GROUPS, EPS, name="norm", per_frame=True)

    def fusion(self, features: Float[Array, "b t h w m"]) -> Fusion:
        """Gamma and beta of this block's features."""
        gamma = self.gamma_temporal(self.gamma_spatial(features))
        return Fusion(gamma, self.beta_temporal(self.beta_spatial(features)))

    def __call__(
        self,
        hidden: Float[Array, "b t h w c"],
        features: Float[Array, "b2 t h w m"] | Fusion,
        strength: Float[Array, "b"] | None = None,
        rows: int | None = None,
    ) -> Float[Array, "b t h w c"]:
        """Fuses.

        Args:
          hidden: tokens of the video, on the grid of patches.
          features: this block's, or what `fusion` made of them. Their batch may be smaller and divide b: then
            it is repeated, as for passes of guidance that share a trajectory.
          strength: of what the fuser adds to each video; 0 = `hidden`, None = 1.
          rows: of the grid; those behind are padding, which the norm leaves out. None = all.

        Returns:
          float32.
        """
        gamma, beta = features if isinstance(features, Fusion) else self.fusion(features)
        repeats = len(hidden) // len(gamma)
        gamma, beta = (einops.repeat(x, "b t h w c -> (r b) t h w c", r=repeats) for x in (gamma, beta))
        hidden = hidden.astype(jnp.float32)
        mask = None
        if rows is not None and rows < hidden.shape[2]:
            there = jnp.arange(hidden.shape[2]) < rows
            mask = jnp.broadcast_to(there[:, None, None], (len(there), 1, self.width))
        added = self.norm(hidden, mask=mask) * gamma.astype(jnp.float32) + beta.astype(jnp.float32)
        return hidden + (added if strength is None else strength[:, None, None, None, None] * added)
