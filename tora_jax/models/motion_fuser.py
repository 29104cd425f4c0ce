"""Motion-guidance Fuser (Tora, section 3.3): how a block's hidden states take in the motion features."""

from __future__ import annotations

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tora_jax.models.layers import CrossAttention, Dtype, gathered_conv3d

FORMS = ("adaptive_norm", "cross_attention", "extra_channels")
PLACEMENTS = ("temporal", "spatial", "both")

# Logical axes (see sharding.py) of tokens [b, t, s, c] where each device holds whole frames.
FRAMES = ("batch", "time", None, None)


class MotionFuser(nn.Module):
    """Fuses motion features into hidden states, in one of the paper's three forms:

      adaptive_norm    h = gamma(f) * h + beta(f) + h      (default, and the best in the paper)
      cross_attention  h = CrossAttn(h, f) + h             each token attends to the motion of its own frame
      extra_channels   h = Conv([h, f]) + h

    The last layer of every form starts at zero, so that an untrained fuser changes nothing.

    The released code group-normalises h before gamma; the paper's formula does not, and this follows the paper.
    """

    form: str = "adaptive_norm"
    num_heads: int = 16
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "b t s c"],
        features: Float[Array, "b2 t h w m"],
        has_motion: Bool[Array, "b"] | None = None,
    ) -> Float[Array, "b t s c"]:
        """Fuses.

        Args:
          hidden: the block's input tokens, s = h * w.
          features: the motion features of this block. Their batch may be smaller and divide b: then it is repeated,
            as for the passes of guidance, which share a trajectory.
          has_motion: False = null trajectory: that sample's hidden states pass through untouched, bit for bit.
            None = all True.
        """
        hidden = nn.with_logical_constraint(hidden, FRAMES)
        h, w = features.shape[2:4]
        width = hidden.shape[-1]
        repeats = hidden.shape[0] // features.shape[0]
        if self.form == "adaptive_norm":
            gamma, beta = (
                einops.repeat(self._scale_or_shift(features, width, name), "b t h w c -> (r b) t (h w) c", r=repeats)
                for name in ("gamma", "beta")
            )
            fused = gamma.astype(jnp.float32) * hidden + beta.astype(jnp.float32) + hidden
        elif self.form == "cross_attention":
            cross = CrossAttention(
                self.num_heads,
                qk_norm=True,
                out_init=nn.initializers.zeros,
                axes=FRAMES[:3],
                dtype=self.dtype,
                name="attention",
            )
            per_frame = cross(
                hidden,
                einops.repeat(features, "b t h w m -> (r b) t (h w) m", r=repeats),
            )
            fused = per_frame + hidden
        elif self.form == "extra_channels":
            grid = einops.rearrange(hidden, "b t (h w) c -> b t h w c", h=h, w=w)
            features = einops.repeat(features, "b t h w m -> (r b) t h w m", r=repeats)
            both = jnp.concatenate([grid, features.astype(grid.dtype)], axis=-1)
            update = self._spatial_conv(both, width, "conv", zero=True)
            fused = einops.rearrange(update, "b t h w c -> b t (h w) c") + hidden
        else:
            raise ValueError(f"unknown fuser form {self.form!r}; choose one of {', '.join(FORMS)}")
        fused = fused.astype(hidden.dtype)
        fused = fused if has_motion is None else jnp.where(has_motion[:, None, None, None], fused, hidden)
        return nn.with_logical_constraint(fused, FRAMES)

    def _scale_or_shift(self, features: Array, width: int, name: str) -> Float[Array, "b t h w c"]:
        """3x3 convolution in space to c / 4, then kernel 3 over time to c, frames repeated at both ends."""
        x = self._spatial_conv(features, width // 4, f"{name}_spatial")
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)), mode="edge")
        zeros = nn.initializers.zeros
        options = {"kernel_init": zeros, "dtype": self.dtype, "conv_general_dilated": gathered_conv3d}
        conv = nn.Conv(width, (3, 1, 1), padding="VALID", name=f"{name}_temporal", **options)
        return conv(x)

    def _spatial_conv(self, x: Array, features: int, name: str, zero: bool = False) -> Array:
        init = nn.initializers.zeros if zero else nn.initializers.kaiming_normal()
        options = {"kernel_init": init, "dtype": self.dtype, "conv_general_dilated": gathered_conv3d}
        return nn.Conv(features, (1, 3, 3), name=name, **options)(x)
