"""RAFT: dense optical flow between two frames (arXiv 2003.12039; topology and names as in torchvision's raft_large).

Both frames become features at an eighth of their size; the products of all pairs of cells are looked up around
where each cell is thought to have moved, and a recurrent net corrects that guess again and again.
"""

from __future__ import annotations

import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax.models.layers import Dtype

EPS = 1e-5
STRIDE = 8  # pixels for each cell of the features, along one side
HIGHEST = jax.lax.Precision.HIGHEST


def _conv(features: int, kernel: int | tuple[int, int], *, dtype: Dtype, name: str, stride: int = 1) -> nn.Conv:
    """A convolution padded alike on both sides, at stride 2 too, as PyTorch pads (XLA's SAME does not)."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = tuple((k // 2, k // 2) for k in size)
    return nn.Conv(features, size, stride, padding, dtype=dtype, name=name)


class FrozenBatchNorm(nn.Module):
    """Batch norm with fixed statistics, in float32; these are parameters like the scale and the bias."""

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        ones, zeros, shape = nn.initializers.ones, nn.initializers.zeros, x.shape[-1:]
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, variance = self.param("mean", zeros, shape), self.param("variance", ones, shape)
        return (x.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + EPS) * scale + bias


def instance_norm(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Each channel of each frame alone to mean 0 and variance 1, in float32, without parameters."""
    x = x.astype(jnp.float32)
    x = x - x.mean((1, 2), keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean((1, 2), keepdims=True) + EPS)


def _norm(batch_norm: bool, name: str):
    return FrozenBatchNorm(name=name) if batch_norm else instance_norm


class ResBlock(nn.Module):
    """Convolution, norm and ReLU, twice, and a skip (a 1x1 convolution with norm where the size changes)."""

    features: int
    stride: int
    batch_norm: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h2 w2 c"]:
        skip = x
        for i, stride in ((1, self.stride), (2, 1)):
            x = _conv(self.features, 3, dtype=self.dtype, name=f"conv{i}", stride=stride)(x)
            x = nn.relu(_norm(self.batch_norm, f"norm{i}")(x))
        if self.stride != 1:
            skip = _conv(self.features, 1, dtype=self.dtype, name="shortcut", stride=self.stride)(skip)
            skip = _norm(self.batch_norm, "shortcut_norm")(skip)
        return nn.relu(x + skip)


class Encoder(nn.Module):
    """A frame -> features 8x smaller; with batch norm it is the context encoder, else the feature encoder."""

    layers: tuple[int, ...]
    batch_norm: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h8 w8 c"]:
        stem, *widths, out = self.layers
        x = _conv(stem, 7, dtype=self.dtype, name="conv_in", stride=2)(x)
        x = nn.relu(_norm(self.batch_norm, "norm_in")(x))
        for i, (width, stride) in enumerate(zip(widths, (1, 2, 2), strict=True), start=1):
            x = ResBlock(width, stride, self.batch_norm, self.dtype, name=f"level_{i}_block_0")(x)
            x = ResBlock(width, 1, self.batch_norm, self.dtype, name=f"level_{i}_block_1")(x)
        return _conv(out, 1, dtype=self.dtype, name="conv_out")(x)


def correlate(
    first: Float[Array, "b h w c"], second: Float[Array, "b h w c"], levels: int
) -> tuple[Float[Array, "b h w _ _"], ...]:
    """Products of each cell of `first` with all cells of `second`, which are pooled 2x2 from level to level."""
    first, second = first.astype(jnp.float32) / math.sqrt(first.shape[-1]), second.astype(jnp.float32)
    pyramid = [jnp.einsum("BHWC,BYXC->BHWYX", first, second, precision=HIGHEST)]
    for _ in range(levels - 1):
        y, x = pyramid[-1].shape[-2:]
        even = pyramid[-1][..., : y // 2 * 2, : x // 2 * 2]
        pyramid.append(einops.reduce(even, "b h w (y p) (x q) -> b h w y x", "mean", p=2, q=2))
    return tuple(pyramid)


def look_up(
    pyramid: tuple[Float[Array, "b h w _ _"], ...], flow: Float[Array, "b h w 2"], radius: int
) -> Float[Array, "b h w _"]:
    """Each level's products in a square of side 2 radius + 1 around where `flow` (x, y, in cells) points.

    Bilinear between cells, zero outside. Written as two small matrix products with the bilinear weights, because
    gathers are slow on TPUs.
    """
    _, h, w, _ = flow.shape
    target = jnp.stack(jnp.meshgrid(jnp.arange(w), jnp.arange(h)), axis=-1) + flow
    offsets = jnp.arange(-radius, radius + 1)[:, None]
    found = []
    for level, products in enumerate(pyramid):
        points = target[..., None, :] / 2**level + offsets
        # Weight of cell k for a point p: 1 - |p - k|, where that is positive.
        weights_x, weights_y = (
            jnp.maximum(0, 1 - jnp.abs(points[..., axis, None] - jnp.arange(products.shape[-1 - axis])))
            for axis in (0, 1)
        )
        columns = jnp.einsum("BHWYX,BHWIX->BHWYI", products, weights_x, precision=HIGHEST)
        # The released weights want x as the slower axis of the window.
        square = jnp.einsum("BHWYI,BHWJY->BHWIJ", columns, weights_y, precision=HIGHEST)
        found.append(einops.rearrange(square, "b h w i j -> b h w (i j)"))
    return jnp.concatenate(found, axis=-1)


class MotionEncoder(nn.Module):
    """The products that were looked up, and the flow so far -> motion features; the last two are the flow."""

    corr_layers: tuple[int, ...]
    flow_layers: tuple[int, ...]
    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, flow: Float[Array, "b h w 2"], products: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        x, y = products, flow
        for i, width in enumerate(self.corr_layers, start=1):
            x = nn.relu(_conv(width, 1 if i == 1 else 3, dtype=self.dtype, name=f"corr{i}")(x))
        for i, width in enumerate(self.flow_layers, start=1):
            y = nn.relu(_conv(width, 7 if i == 1 else 3, dtype=self.dtype, name=f"flow{i}")(y))
        x = jnp.concatenate([x, y], axis=-1)
        x = nn.relu(_conv(self.features - 2, 3, dtype=self.dtype, name="conv_out")(x))
        return jnp.concatenate([x, flow.astype(x.dtype)], axis=-1)


class ConvGRU(nn.Module):
    """A gated recurrent unit with convolutions of one kernel size; the state stays float32."""

    kernel: tuple[int, int]
    dtype: Dtype

    @nn.compact
    def __call__(self, state: Float[Array, "b h w c"], x: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        def gate(name, state):
            conv = _conv(state.shape[-1], self.kernel, dtype=self.dtype, name=name)
            return conv(jnp.concatenate([state, x.astype(jnp.float32)], axis=-1)).astype(jnp.float32)

        update, reset = nn.sigmoid(gate("update", state)), nn.sigmoid(gate("reset", state))
        candidate = nn.tanh(gate("candidate", reset * state))
        return (1 - update) * state + update * candidate


class UpdateBlock(nn.Module):
    """One correction of the flow, the body of a scan: (state, flow) -> the same, corrected."""

    corr_radius: int
    motion_corr_layers: tuple[int, ...]
    motion_flow_layers: tuple[int, ...]
    motion_features: int
    flow_hidden: int
    keep: bool  # also as the scan's output for each step
    dtype: Dtype

    @nn.compact
    def __call__(self, carry, fixed):
        state, flow = carry
        context, pyramid = fixed
        flow = jax.lax.stop_gradient(flow)  # the paper trains each correction for itself
        widths = (self.motion_corr_layers, self.motion_flow_layers, self.motion_features)
        motion = MotionEncoder(*widths, self.dtype, name="motion_encoder")(
            flow, look_up(pyramid, flow, self.corr_radius)
        )
        x = jnp.concatenate([context, motion], axis=-1)
        for i, kernel in ((1, (1, 5)), (2, (5, 1))):
            state = ConvGRU(kernel, self.dtype, name=f"gru{i}")(state, x)
        x = nn.relu(_conv(self.flow_hidden, 3, dtype=self.dtype, name="flow_head1")(state))
        flow = flow + _conv(2, 3, dtype=self.dtype, name="flow_head2")(x).astype(jnp.float32)
        return (state, flow), ((state, flow) if self.keep else None)


class MaskPredictor(nn.Module):
    """The recurrent state -> logits of the weights with which `upsample` mixes nine neighbours."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, state: Float[Array, "b h w _"]) -> Float[Array, "b h w c"]:
        x = nn.relu(_conv(self.hidden, 3, dtype=self.dtype, name="conv1")(state))
        x = _conv(9 * STRIDE**2, 1, dtype=self.dtype, name="conv2")(x)
        return 0.25 * x.astype(jnp.float32)  # the reference damps this branch's gradients so


def upsample(flow: Float[Array, "b h w 2"], logits: Float[Array, "b h w c"]) -> Float[Array, "b h8 w8 2"]:
    """Flow in cells -> flow in pixels, each a weighted mean of the 3x3 cells around it (zero outside)."""
    _, h, w, _ = flow.shape
    logits = einops.rearrange(logits, "b h w (n p q) -> b h w n p q", p=STRIDE, q=STRIDE)
    padded = jnp.pad(STRIDE * flow, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cells = jnp.stack([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=3)
    flow = jnp.einsum("BHWNPQ,BHWNC->BHPWQC", nn.softmax(logits, axis=3), cells, precision=HIGHEST)
    return einops.rearrange(flow, "b h p w q c -> b (h p) (w q) c")


class RAFT(nn.Module):
    """Optical flow from one frame to another. The defaults are torchvision's `raft_large`.

    Fields:
      feature_layers, context_layers: widths of an encoder: stem, three levels, output. The context encoder's
        output is `hidden` channels of the first state and the rest, which each correction reads.
      corr_levels: halvings, and the full size, at which the products of the features are kept.
      corr_radius: cells around the guess that are looked up, on each level.
      motion_corr_layers, motion_flow_layers: widths of the motion encoder's two branches.
      motion_features: its output, the two channels of the flow included.
      hidden: channels of the recurrent state.
      flow_hidden, mask_hidden: channels inside the heads for the correction and for the upsampling.
      dtype: of the convolutions; norms, products, state and flow are float32.

    Source: torchvision 0.28, models/optical_flow/raft.py; paper, sections 3.1 to 3.3.
    """

    feature_layers: tuple[int, ...] = (64, 64, 96, 128, 256)
    context_layers: tuple[int, ...] = (64, 64, 96, 128, 256)
    corr_levels: int = 4
    corr_radius: int = 4
    motion_corr_layers: tuple[int, ...] = (256, 192)
    motion_flow_layers: tuple[int, ...] = (128, 64)
    motion_features: int = 128
    hidden: int = 128
    flow_hidden: int = 256
    mask_hidden: int = 256
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        first: Float[Array, "b h w 3"],
        second: Float[Array, "b h w 3"],
        num_flow_updates: int = 12,
        every_update: bool = False,
    ) -> Float[Array, "*n b h w 2"]:
        """Where each pixel of `first` is in `second`.

        Args:
          first, second: frames in [-1, 1].
          num_flow_updates: corrections of the flow, at least 1 (static under jit).
          every_update: return the flow after each correction, on a new leading axis, not only the last.

        Returns:
          (x, y) displacements in pixels, float32.

        Raises:
          ValueError: if a side is no multiple of 8, or so small that the last level of products is empty.
        """
        self._check(first, num_flow_updates)
        encode = Encoder(self.feature_layers, batch_norm=False, dtype=self.dtype, name="feature_encoder")
        pyramid = correlate(*jnp.split(encode(jnp.concatenate([first, second])), 2), self.corr_levels)
        context = Encoder(self.context_layers, batch_norm=True, dtype=self.dtype, name="context_encoder")(first)
        state, context = nn.tanh(context[..., : self.hidden].astype(jnp.float32)), nn.relu(context[..., self.hidden :])
        flow = jnp.zeros((*state.shape[:-1], 2), jnp.float32)

        widths = (self.motion_corr_layers, self.motion_flow_layers, self.motion_features, self.flow_hidden)
        shared = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        corrections = nn.scan(UpdateBlock, **shared, in_axes=nn.broadcast, length=num_flow_updates)
        last, every = corrections(self.corr_radius, *widths, every_update, self.dtype, name="update_block")(
            (state, flow), (context, pyramid)
        )
        predict = MaskPredictor(self.mask_hidden, self.dtype, name="mask_predictor")
        if not every_update:
            state, flow = last
            return upsample(flow, predict(state))
        state, flow = (einops.rearrange(x, "n b h w c -> (n b) h w c") for x in every)
        return einops.rearrange(upsample(flow, predict(state)), "(n b) h w c -> n b h w c", b=len(first))

    def _check(self, frame: Float[Array, "b h w 3"], num_flow_updates: int) -> None:
        h, w = frame.shape[1:3]
        if h % STRIDE or w % STRIDE:
            raise ValueError(
                f"frames of {h}x{w}: RAFT wants height and width divisible by {STRIDE}; pad them, and cut the flow"
            )
        smallest = STRIDE * 2 ** (self.corr_levels - 1)
        if min(h, w) < smallest:
            raise ValueError(
                f"frames of {h}x{w}: RAFT with {self.corr_levels} levels wants at least {smallest}x{smallest}; "
                "enlarge or pad them"
            )
        if num_flow_updates < 1:
            raise ValueError(f"num_flow_updates is {num_flow_updates}: RAFT wants at least 1")
