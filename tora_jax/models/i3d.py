"""I3D trained on Kinetics-400 (arXiv 1705.07750): the video features of FVD, the Frechet Video Distance."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EPS = 1e-3
SIZE = 224
MIN_FRAMES = 9  # fewer leave less than the two steps in time that the last pooling takes

# Channels of a mixed block: the 1x1x1 branch; the 1x1x1 and 3x3x3 of two branches; the 1x1x1 after pooling.
Widths = tuple[int, int, int, int, int, int]
MIXED: dict[str, Widths] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


class I3DFeatures(NamedTuple):
    """What metrics read.

    logits: class scores before the softmax, averaged over time; FVD compares these.
    mixed_4f: output of the block "4f", averaged over time and space.
    """

    logits: Float[Array, "b _"]
    mixed_4f: Float[Array, "b c"]


def _conv(features: int, kernel: int, *, name: str, stride: int = 1, bias: bool = False) -> nn.Conv:
    # Full float32 on every device, as in the reference: scores are compared across machines.
    return nn.Conv(
        features, (kernel,) * 3, (stride,) * 3, use_bias=bias, precision=jax.lax.Precision.HIGHEST, name=name
    )


def _max_pool(x: Float[Array, "b t h w c"], window: tuple[int, int, int], stride: tuple[int, int, int]) -> Array:
    return nn.max_pool(x, window, stride, "SAME")


class Unit(nn.Module):
    """Convolution, batch norm with fixed statistics and without a scale, ReLU."""

    features: int
    kernel: int = 1
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w _"]) -> Float[Array, "b t2 h2 w2 c"]:
        x = _conv(self.features, self.kernel, name="conv", stride=self.stride)(x)
        zeros, shape = nn.initializers.zeros, (self.features,)
        mean, bias = self.param("mean", zeros, shape), self.param("bias", zeros, shape)
        variance = self.param("variance", nn.initializers.ones, shape)
        return nn.relu((x - mean) * jax.lax.rsqrt(variance + EPS) + bias)


class Mixed(nn.Module):
    """Four branches side by side, their channels joined (an Inception block)."""

    widths: Widths

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w _"]) -> Float[Array, "b t h w c"]:
        plain, reduce_1, wide_1, reduce_2, wide_2, pooled = self.widths
        branches = [
            Unit(plain, name="branch_0")(x),
            Unit(wide_1, 3, name="branch_1")(Unit(reduce_1, name="branch_1_reduce")(x)),
            Unit(wide_2, 3, name="branch_2")(Unit(reduce_2, name="branch_2_reduce")(x)),
            Unit(pooled, name="branch_3")(_max_pool(x, (3, 3, 3), (1, 1, 1))),
        ]
        return jnp.concatenate(branches, axis=-1)


class I3D(nn.Module):
    """A clip -> features. All in float32, and at full precision on every device.

    Source: google-research/magvit, videogvt/train_lib/frechet_distance.py, which follows DeepMind's
    kinetics-i3d. That code takes pixels in 0..1 and resizes them itself; this one takes the project's range.
    """

    num_classes: int = 400

    @nn.compact
    def __call__(self, video: Float[Array, "b t h w 3"]) -> I3DFeatures:
        """The features of clips.

        Args:
          video: pixels in [-1, 1], 224x224, at least 9 frames.

        Raises:
          ValueError: for other sizes, or fewer frames.
        """
        _, t, h, w, _ = video.shape
        if (h, w) != (SIZE, SIZE):
            raise ValueError(f"clips of {h}x{w}: I3D takes {SIZE}x{SIZE}; resize them")
        if t < MIN_FRAMES:
            raise ValueError(f"clips of {t} frames: I3D takes at least {MIN_FRAMES}")

        x = Unit(64, 7, 2, name="conv_1a")(video.astype(jnp.float32))
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = Unit(64, name="conv_2b")(x)
        x = Unit(192, 3, name="conv_2c")(x)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        for block in ("3b", "3c"):
            x = Mixed(MIXED[block], name=f"mixed_{block}")(x)
        x = _max_pool(x, (3, 3, 3), (2, 2, 2))
        for block in ("4b", "4c", "4d", "4e", "4f"):
            x = Mixed(MIXED[block], name=f"mixed_{block}")(x)
        mixed_4f = x.mean((1, 2, 3))
        x = _max_pool(x, (2, 2, 2), (2, 2, 2))
        for block in ("5b", "5c"):
            x = Mixed(MIXED[block], name=f"mixed_{block}")(x)
        x = nn.avg_pool(x, (2, 7, 7))  # all of the 7x7 cells, windows of 2 in time
        logits = _conv(self.num_classes, 1, name="logits", bias=True)(x)
        return I3DFeatures(logits.mean((1, 2, 3)), mixed_4f)
