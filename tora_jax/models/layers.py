"""Layers that several models share.

Dimension key, used in every shape annotation of the project:

  b  batch                          h w  height and width: pixels of a video, cells of a latent
  t  frames of a video or latent    s    spatial tokens of one frame, h * w after patchify
  c  channels, model width          n    text tokens
  k  attention heads                d    channels of one head
  l  length of a sequence           m    channels of the motion features
  depth  number of (spatial block, temporal block) pairs

Numerics: parameters are float32; `dtype` is what matrix products run in. Norms, modulation, softmax, rotary and
timestep embeddings are always float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tora_jax import sharding
from tora_jax.models.attention import attention

Dtype = jnp.dtype | type | str  # "bfloat16", as configs have it, is fine


def dot(x: Array, kernel: Array, dimensions, **options) -> Array:
    """`jax.lax.dot_general` for products with kernels.

    In bfloat16 on a CPU the sums leave it as float32: only so does XLA take the instructions made for them (AMX), which
    are four times as fast. The result is the same.
    """
    if x.dtype != jnp.bfloat16 or sharding.platform() != "cpu":
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    sums = jax.lax.dot_general(x, kernel, dimensions, **options | {"preferred_element_type": jnp.float32})
    return sums.astype(x.dtype)


def gathered(product: Callable, *names: str | None) -> Callable:
    """A product (x, kernel, ...) on a mesh whose kernel is put together before, but for the axes with these names.

    So weights move and activations stay, as is cheaper. And XLA's partitioner (jax 0.10) gets some gradients wrong
    otherwise: of a batch split over two axes of a mesh, and a kernel that is split over the second of them and a third.
    """

    def product_of_gathered(x: Array, kernel: Array, *args, **kwargs) -> Array:
        return product(x, nn.with_logical_constraint(kernel, names), *args, **kwargs)

    return product_of_gathered


INWARD = ("proj", "fc2", "linear")  # layers whose input is what "hidden" names in `sharding.PARAMS`; else the output


def dense(features: int, *, dtype: Dtype, name: str, kernel_init: Callable | None = None, bias: bool = True):
    """A linear layer with the reference's initialisation (Xavier uniform, zero bias)."""
    init = kernel_init or nn.initializers.xavier_uniform()
    product = gathered(dot, *(("hidden", None) if name in INWARD else (None, "hidden")))
    return nn.Dense(features, use_bias=bias, dtype=dtype, kernel_init=init, dot_general=product, name=name)


def layer_norm(x: Float[Array, "*l c"], eps: float = 1e-6) -> Float[Array, "*l c"]:
    """LayerNorm over channels without parameters, in float32 (adaLN brings its own scale and shift)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def modulate(x: Float[Array, "*l c"], shift: Array, scale: Array) -> Float[Array, "*l c"]:
    """adaLN's modulation, with a scale around zero."""
    return x * (1 + scale) + shift


def group_norm(groups: int, eps: float, *, name: str, per_frame: bool = False) -> nn.GroupNorm:
    """GroupNorm in float32 over all axes but the first; `per_frame`: over h, w and c of each frame alone."""
    axes = (-3, -2, -1) if per_frame else None
    return nn.GroupNorm(groups, epsilon=eps, dtype=jnp.float32, reduction_axes=axes, use_fast_variance=False, name=name)


def conv3d(x: Array, kernel: Array, strides, padding, *, precision, **_) -> Array:
    """A convolution over (time, height, width), for `nn.Conv(conv_general_dilated=conv3d)`.

    The frames under the kernel become channels, and one convolution over images does the rest: XLA's CPU backend is
    slow at three dimensions and far slower at their gradients. TPUs take them as they are, in 2/3 of the memory and of
    the time that their compiler expects (docs/LOG.md).
    """
    if sharding.platform() == "tpu" and len(kernel) > 1:
        axes = ("NTHWC", "THWIO", "NTHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=axes, precision=precision)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:3], strides, padding)
    batch = len(x)
    x = jnp.pad(x, ((0, 0), padding[0], (0, 0), (0, 0), (0, 0)))
    last = x.shape[1] - kernel.shape[0]
    x = jnp.concatenate([x[:, i : i + last + 1 : strides[0]] for i in range(kernel.shape[0])], axis=-1)
    kernel = einops.rearrange(kernel, "k p q c d -> p q (k c) d")
    if kernel.shape[:2] == (1, 1) and tuple(strides[1:]) == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=precision)
    x = einops.rearrange(x, "b t h w c -> (b t) h w c")
    axes = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, kernel, strides[1:], padding[1:], dimension_numbers=axes, precision=precision)
    return einops.rearrange(x, "(b t) h w c -> b t h w c", b=batch)


def gathered_conv3d(x: Array, kernel: Array, *args, **kwargs) -> Array:
    """`conv3d` for activations of the logical axes ("batch", "time", None, None, None), see `gathered`.

    Where both axes are sharded, each device convolves its own frames: merged with the batch they could not be.
    """
    ours, theirs = ("batch", "time", None, None, None), (None, None, None, None, "hidden")
    kernel = nn.with_logical_constraint(kernel, theirs)
    run = functools.partial(conv3d, **kwargs)
    if sharding.shards("time") == 1 or len(kernel) > 1:  # taps of other frames: XLA sends what is at the edges
        return run(x, kernel, *args)
    of_x, of_kernel = sharding.spec(x.shape, ours), sharding.spec(kernel.shape, theirs)
    out = jax.sharding.PartitionSpec(*of_x[:-1], of_kernel[-1])
    cut = jax.shard_map(
        lambda x, kernel: run(x, kernel, *args), in_specs=(of_x, of_kernel), out_specs=out, check_vma=False
    )
    return cut(x, kernel)


def unroll(depth: int) -> int:
    """Layers that a step of a loop over `depth` layers holds: all, where they are few.

    XLA's CPU backend is many times slower at gradients of convolutions inside a loop, so that small models want none;
    large ones want the loop, which compiles in the time of one layer.
    """
    return depth if depth <= 8 else 1


def split_moments(x: Float[Array, "*l _"]) -> tuple[Float[Array, "*l c"], Float[Array, "*l c"]]:
    """The two channel halves of an encoder's output, in float32: mean, log-variance clipped to -30..20."""
    mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, in float32."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*l c"]) -> Float[Array, "*l c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return (scale * x32).astype(x.dtype)


def rotate(x: Float[Array, "*b l k d"], base: float = 10000.0) -> Float[Array, "*b l k d"]:
    """Rotary position embedding over l with interleaved pairs (channels 2i and 2i + 1 turn together)."""
    length, half = x.shape[-3], x.shape[-1] // 2
    angle = np.repeat(np.arange(length)[:, None] * base ** (-np.arange(half) / half), 2, axis=-1)
    cos, sin = (jnp.asarray(f(angle), jnp.float32)[:, None, :] for f in (np.cos, np.sin))
    # A product exchanges neighbours, exactly: an axis of pairs would have TPUs turn whole arrays around in float32.
    swap = np.kron(np.eye(half), [[0, 1], [-1, 0]]).astype(x.dtype)
    other = jnp.matmul(x, swap, precision="highest").astype(jnp.float32)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head self-attention over l: fused qkv with bias, RMS norm of q and k over the head, optional rotary.

    `backend`, `axes`: see `attention`.
    """

    num_heads: int
    qk_norm: bool = True
    rotary: bool = False
    out_init: Callable | None = None
    backend: str = "auto"
    axes: Sequence[str | None] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *e l c"], mask: Bool[Array, "b l"] | None = None) -> Float[Array, "b *e l c"]:
        width = x.shape[-1]
        qkv = dense(3 * width, dtype=self.dtype, name="qkv")(x)
        q, k, v = einops.rearrange(qkv, "... (three k d) -> three ... k d", three=3, k=self.num_heads)
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        if self.rotary:
            q, k = rotate(q), rotate(k)
        x = attention(q, k, v, mask, backend=self.backend, axes=self.axes)
        x = einops.rearrange(x, "... k d -> ... (k d)")
        return dense(width, dtype=self.dtype, name="proj", kernel_init=self.out_init)(x)


class CrossAttention(nn.Module):
    """Multi-head attention from x to a context, both with axes as `attention` has; fields as in `SelfAttention`."""

    num_heads: int
    qk_norm: bool = False
    out_init: Callable | None = None
    backend: str = "auto"
    axes: Sequence[str | None] = ()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b *l c"],
        context: Float[Array, "b *n _"],
        context_mask: Bool[Array, "b n"] | None = None,
    ) -> Float[Array, "b *l c"]:
        width = x.shape[-1]
        q = dense(width, dtype=self.dtype, name="q")(x)
        kv = dense(2 * width, dtype=self.dtype, name="kv")(context)
        q = einops.rearrange(q, "... (k d) -> ... k d", k=self.num_heads)
        k, v = einops.rearrange(kv, "... (two k d) -> two ... k d", two=2, k=self.num_heads)
        if self.qk_norm:
            q, k = RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k)
        x = attention(q, k, v, context_mask, backend=self.backend, axes=self.axes)
        x = einops.rearrange(x, "... k d -> ... (k d)")
        return dense(width, dtype=self.dtype, name="proj", kernel_init=self.out_init)(x)


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between."""

    hidden: int
    features: int
    out_init: Callable | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*l _"]) -> Float[Array, "*l c"]:
        x = nn.gelu(dense(self.hidden, dtype=self.dtype, name="fc1")(x), approximate=True)
        return dense(self.features, dtype=self.dtype, name="fc2", kernel_init=self.out_init)(x)


class ScalarEmbedder(nn.Module):
    """A scalar (a timestep on 0..1000, frames per second) -> [c]: 256 sinusoids, cosines first, and an MLP."""

    features: int
    kernel_init: Callable | None = None
    out_init: Callable | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b"]) -> Float[Array, "*b c"]:
        # The exponent rounded to float32 as in the reference: times a timestep of 1000, its last bit is seen.
        exponent = np.float32(-np.log(10000.0)) * np.arange(128, dtype=np.float32) / np.float32(128)
        frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
        angle = x.astype(jnp.float32)[..., None] * frequencies
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1).astype(self.dtype)
        x = nn.silu(dense(self.features, dtype=self.dtype, name="fc1", kernel_init=self.kernel_init)(x))
        return dense(self.features, dtype=self.dtype, name="fc2", kernel_init=self.out_init)(x)


def position_embedding(
    grid: tuple[int, int],
    features: int,
    height: Float[Array, "b"],
    width: Float[Array, "b"],
    base_resolution: float,
) -> Float[Array, "b s c"]:
    """2D sin-cos positions of an (h, w) grid of patches, the width axis in the first half of the channels.

    The grid is stretched so that a video of any size covers about the range that one of `base_resolution`
    pixels a side covers (Open-Sora v1.2, PositionEmbedding2D): positions are divided by
    sqrt(height * width) / base_resolution and multiplied by round(sqrt(number of patches)) / side.

    Args:
      grid: number of patches (h, w).
      features: c; a multiple of 4.
      height, width: of the video in pixels.
      base_resolution: `input_sq_size` of the reference, 512 for the released weights.
    """
    h, w = grid
    stretch = base_resolution / jnp.sqrt(height * width)
    base = round((h * w) ** 0.5)
    frequencies = (10000.0 ** (-np.arange(features // 4) / (features // 4))).astype(np.float32)

    def axis(side: int) -> Float[Array, "b _ _"]:
        position = np.arange(side, dtype=np.float32) * np.float32(base / side)
        angle = (stretch[:, None] * position)[..., None] * frequencies
        return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)

    x, y = axis(w), axis(h)
    table = jnp.concatenate(
        [
            jnp.broadcast_to(x[:, None, :, :], (len(x), h, w, features // 2)),
            jnp.broadcast_to(y[:, :, None, :], (len(y), h, w, features // 2)),
        ],
        axis=-1,
    )
    return einops.rearrange(table, "b h w c -> b (h w) c")


def patchify(x: Float[Array, "b t h w c"], patch: int) -> Float[Array, "b t h2 w2 _"]:
    """Groups 1 x patch x patch cells into one token; the far edges are zero-padded to a multiple of the patch."""
    _, _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -h % patch), (0, -w % patch), (0, 0)))
    return einops.rearrange(x, "b t (h p) (w q) c -> b t h w (p q c)", p=patch, q=patch)


def pad_axis(x: Array, axis: int, name: str, mode: str = "edge") -> Array:
    """Fills an axis up to a length that the mesh divides an axis of this logical name into; see `pad_end`."""
    return pad_end(x, axis, x.shape[axis] + -x.shape[axis] % sharding.shards(name), mode)


def pad_end(x: Array, axis: int, length: int, mode: str = "constant") -> Array:
    """Fills an axis up to a length, with its end ("edge") or with zeros ("constant")."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, mode=mode) if any(widths[axis]) else x


def unpatchify(x: Float[Array, "b t h2 w2 _"], patch: int, size: tuple[int, int]) -> Float[Array, "b t h w c"]:
    """The inverse of `patchify`, cut to `size` (h, w)."""
    x = einops.rearrange(x, "b t h w (p q c) -> b t (h p) (w q) c", p=patch, q=patch)
    return x[:, :, : size[0], : size[1]]


def remat(module: type[nn.Module], policy: str) -> type[nn.Module]:
    """`module` rematerialised under the `jax.checkpoint_policies` of that name; "none" keeps all activations."""
    if policy == "none":
        return module
    return nn.remat(module, policy=getattr(jax.checkpoint_policies, policy), prevent_cse=False)
