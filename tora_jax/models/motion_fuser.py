"""Motion-guidance fusers (Tora, section 3.3): how a block's hidden states take in the motion features.

A new fuser is a Linen module with the fields `num_heads` and `dtype`, and one line in FUSERS. It maps (hidden tokens
[b, t, h * w, c], features [b2, t, h, w, m]) to tokens of the same shape. b2 divides b: the passes of guidance share a
trajectory. Its last layer starts at zero, so that an untrained fuser changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tora_jax.models.layers import CrossAttention, Dtype, gathered_conv3d

PLACEMENTS = ("temporal", "spatial", "both")

# Logical axes (see sharding.py) of tokens [b, t, s, c] where each device holds whole frames.
FRAMES = ("batch", "time", None, None)

ZEROS = nn.initializers.zeros


class AdaptiveNorm(nn.Module):
    """h = gamma(f) * h + beta(f) + h; the best in the paper.

    The released code group-normalises h before gamma; the paper's formula does not, and this follows the paper.
    """

    num_heads: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b t s c"], features: Float[Array, "b2 t h w m"]
    ) -> Float[Array, "b t s c"]:
        def scale_or_shift(name: str) -> Float[Array, "b t s c"]:
            """3x3 convolution in space to c / 4, then kernel 3 over time to c, frames repeated at both ends."""
            x = _conv(width // 4, (1, 3, 3), self.dtype, nn.initializers.kaiming_normal(), f"{name}_spatial")(features)
            x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
            x = _conv(width, (3, 1, 1), self.dtype, ZEROS, f"{name}_temporal", padding="VALID")(x)
            return einops.repeat(x, "b t h w c -> (r b) t (h w) c", r=repeats)

        width, repeats = hidden.shape[-1], hidden.shape[0] // features.shape[0]
        gamma, beta = (scale_or_shift(name) for name in ("gamma", "beta"))
        return gamma.astype(jnp.float32) * hidden + beta.astype(jnp.float32) + hidden


class MotionAttention(nn.Module):
    """h = CrossAttn(h, f) + h; each token attends to the motion of its own frame."""

    num_heads: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b t s c"], features: Float[Array, "b2 t h w m"]
    ) -> Float[Array, "b t s c"]:
        repeats = hidden.shape[0] // features.shape[0]
        options = {"qk_norm": True, "out_init": ZEROS, "axes": FRAMES[:3], "dtype": self.dtype}
        cross = CrossAttention(self.num_heads, **options, name="attention")
        return cross(hidden, einops.repeat(features, "b t h w m -> (r b) t (h w) m", r=repeats)) + hidden


class ExtraChannels(nn.Module):
    """h = Conv([h, f]) + h."""

    num_heads: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "b t s c"], features: Float[Array, "b2 t h w m"]
    ) -> Float[Array, "b t s c"]:
        (h, w), repeats = features.shape[2:4], hidden.shape[0] // features.shape[0]
        grid = einops.rearrange(hidden, "b t (h w) c -> b t h w c", h=h, w=w)
        features = einops.repeat(features, "b t h w m -> (r b) t h w m", r=repeats)
        both = jnp.concatenate([grid, features.astype(grid.dtype)], axis=-1)
        update = _conv(hidden.shape[-1], (1, 3, 3), self.dtype, ZEROS, "conv")(both)
        return einops.rearrange(update, "b t h w c -> b t (h w) c") + hidden


# By the name that the configs use.
FUSERS: dict[str, Callable[..., nn.Module]] = {
    "adaptive_norm": AdaptiveNorm,
    "cross_attention": MotionAttention,
    "extra_channels": ExtraChannels,
}


def fuse(
    fuser: nn.Module,
    hidden: Float[Array, "b t s c"],
    features: Float[Array, "b2 t h w m"],
    has_motion: Bool[Array, "b"] | None = None,
) -> Float[Array, "b t s c"]:
    """Fuses the motion features of a block into its input.

    Args:
      fuser: one of FUSERS.
      hidden: the block's input tokens, s = h * w.
      features: of this block. Their batch may be smaller and divide b: then it is repeated.
      has_motion: False = null trajectory: that sample's hidden states pass through untouched, bit for bit. None = all
        True.
    """
    hidden = nn.with_logical_constraint(hidden, FRAMES)
    fused = fuser(hidden, features).astype(hidden.dtype)
    fused = fused if has_motion is None else jnp.where(has_motion[:, None, None, None], fused, hidden)
    return nn.with_logical_constraint(fused, FRAMES)


def _conv(features: int, kernel: tuple[int, ...], dtype: Dtype, init: Any, name: str, padding: str = "SAME") -> nn.Conv:
    options = {"kernel_init": init, "dtype": dtype, "conv_general_dilated": gathered_conv3d}
    return nn.Conv(features, kernel, padding=padding, name=name, **options)
