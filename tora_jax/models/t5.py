"""The encoder of T5 v1.1 (arXiv 1910.10683 and 2002.05202; layout as in transformers' T5EncoderModel)."""

from __future__ import annotations

import einops
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tora_jax.models.layers import Dtype, RMSNorm, attention, dot


def relative_bucket(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "length length"]:
    """The bucket of every (query, key) pair's distance.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets hold one
    distance each, the others ever wider ranges; from `max_distance` on all distances share the last.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), exact).astype(np.float32) / np.float32(exact)
    # float32 as in the reference: a distance that falls on a bucket's edge must fall to the same side.
    steps = np.log(far) / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    log_bucket = np.minimum(exact + steps.astype(np.int32), half - 1)
    return np.where(np.abs(distance) < exact, np.abs(distance), log_bucket) + half * (distance > 0)


def linear(features: int, name: str, fan_in: int, dtype: Dtype) -> nn.Dense:
    """A matrix without bias, initialised as T5 does."""
    init = nn.initializers.normal(fan_in**-0.5)
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, dot_general=dot, name=name)


class SelfAttention(nn.Module):
    """T5's attention: a relative position bias, no other biases, no scaling (T5 has it in q's weights)."""

    num_heads: int
    head_dim: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n c"], bias: Float[Array, "1 k n n"], mask: Bool[Array, "b n"]
    ) -> Float[Array, "b n c"]:
        width, inner = x.shape[-1], self.num_heads * self.head_dim
        q, k, v = (
            einops.rearrange(linear(inner, name, fan_in, self.dtype)(x), "b n (k d) -> b n k d", k=self.num_heads)
            for name, fan_in in (("q", width * self.head_dim), ("k", width), ("v", width))
        )
        x = attention(q, k, v, mask, bias=bias, scale=1.0)
        return linear(width, "o", inner, self.dtype)(einops.rearrange(x, "b n k d -> b n (k d)"))


class GatedMLP(nn.Module):
    """Two products of the input, one through a tanh GELU, multiplied and turned back."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        width = x.shape[-1]
        gate = nn.gelu(linear(self.hidden, "wi_0", width, self.dtype)(x), approximate=True)
        value = linear(self.hidden, "wi_1", width, self.dtype)(x)
        return linear(width, "wo", self.hidden, self.dtype)(gate * value)


class T5Block(nn.Module):
    """Pre-norm attention and MLP; the carry of the scan is the residual stream."""

    num_heads: int
    head_dim: int
    mlp_dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x, bias, mask):
        attention = SelfAttention(self.num_heads, self.head_dim, self.dtype, name="attention")
        x = x + attention(RMSNorm(name="norm1")(x), bias, mask).astype(jnp.float32)
        x = x + GatedMLP(self.mlp_dim, self.dtype, name="mlp")(RMSNorm(name="norm2")(x)).astype(jnp.float32)
        return x, None


class T5Encoder(nn.Module):
    """Token ids -> text features; the defaults are T5 v1.1 XXL, Open-Sora's text encoder.

    The residual stream is float32 whatever `dtype` is. In T5 it grows to tens of thousands: bfloat16's 8 bits
    would round a block's contribution away, float16 (up to 65504) would overflow. It is read only through a
    norm, so that the products can be bfloat16 all the same. float16 is refused: the MLP's inner products
    overflow there too.

    Attributes:
      vocab_size: rows of the embedding.
      width, num_heads, head_dim, mlp_dim, depth: sizes; num_heads * head_dim need not be the width.
      relative_buckets, relative_max_distance: see `relative_bucket`.
      dtype: of the matrix products, float32 or bfloat16; norms and softmax are float32.
    """

    vocab_size: int = 32128
    width: int = 4096
    num_heads: int = 64
    head_dim: int = 64
    mlp_dim: int = 10240
    depth: int = 24
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"], mask: Bool[Array, "b n"]) -> Float[Array, "b n c"]:
        """Encodes padded captions.

        Args:
          ids: tokens, `Tokenizer`'s ids.
          mask: True for tokens, False for padding. Padding never changes the features of a token.

        Returns:
          Features of every position, float32; those of the padding mean nothing.
        """
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ValueError("T5 overflows in float16: use bfloat16 or float32")
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(1.0), name="embed")
        x = embed(ids).astype(jnp.float32)

        table = self.param(
            "relative_bias",
            nn.initializers.normal(self.width**-0.5),
            (self.relative_buckets, self.num_heads),
        )
        bucket = relative_bucket(ids.shape[1], self.relative_buckets, self.relative_max_distance)
        # Stored in the first layer, used by all of them: outside the scan.
        bias = einops.rearrange(table.astype(jnp.float32)[bucket], "q n k -> 1 k q n")

        blocks = nn.scan(
            T5Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
        )
        block = blocks(self.num_heads, self.head_dim, self.mlp_dim, self.dtype, name="blocks")
        x, _ = block(x, bias, mask)
        return RMSNorm(name="norm")(x)
