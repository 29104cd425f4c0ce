"""Trajectory Extractor (Tora, section 3.2): motion latents -> one feature map for each pair of blocks."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax.models.layers import Dtype, gathered_conv3d, layer_norm, pad_axis, patchify, remat, unroll


class ExtractorBlock(nn.Module):
    """A light residual convolution block, f_i = Conv_i(f_{i-1}) + f_{i-1}.

    Two 3x3 convolutions in space, frame by frame, as in the released code; a LayerNorm over channels stands in
    for its BatchNorm, so that no statistics cross samples, frames or devices.
    """

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "b t h w m"], _: None = None
    ) -> tuple[Float[Array, "b t h w m"], Float[Array, "b t h w m"]]:
        x = features
        for name in ("conv1", "conv2"):
            scale = self.param(f"{name}_norm", nn.initializers.ones, (x.shape[-1],))
            x = nn.silu(layer_norm(x) * scale)
            conv = nn.Conv(
                features.shape[-1],
                (1, 3, 3),
                kernel_init=nn.initializers.kaiming_normal(),
                dtype=self.dtype,
                conv_general_dilated=gathered_conv3d,
                name=name,
            )
            x = conv(x)
        features = features + x
        return features, features


class TrajectoryExtractor(nn.Module):
    """Patchifies motion latents as the video latents are (1 x p x p) and stacks `ExtractorBlock`s.

    The features depend neither on the noise nor on the timestep: a sampler computes them once for all steps.
    """

    depth: int
    patch: int = 2
    features: int = 128
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, motion: Float[Array, "b t h w c"]) -> Float[Array, "depth b t2 h2 w2 m"]:
        """Extracts.

        Args:
          motion: motion latents on the video latents' grid; the far edges are padded to a multiple of the patch.

        Returns:
          Feature maps, the first axis over the pairs of blocks; on a mesh with frames up to what it divides.
        """
        x = patchify(pad_axis(motion.astype(self.dtype), 1, "time"), self.patch)
        x = nn.with_logical_constraint(x, ("batch", "time", None, None, None))
        x = nn.Conv(
            self.features,
            (1, 3, 3),
            kernel_init=nn.initializers.kaiming_normal(),
            dtype=self.dtype,
            conv_general_dilated=gathered_conv3d,
            name="conv_in",
        )(x)
        blocks = nn.scan(
            remat(ExtractorBlock, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.depth,
            unroll=unroll(self.depth),
        )
        _, maps = blocks(self.dtype, name="blocks")(x, None)
        return maps
