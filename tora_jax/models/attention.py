"""Softmax attention: one function for all models, and the kernels behind it.

  xla      plain products and a softmax, with all scores in memory
  cudnn    fused, on NVIDIA GPUs, 16-bit alone
  splash   fused, on TPUs: JAX's Pallas kernel (Dao, FlashAttention-2); elsewhere it is interpreted, for tests
  auto     the kernel of the mesh's devices, or of JAX's own where there is no mesh, if it can do what is asked

The letters of shapes are those of `layers`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tora_jax import sharding

BACKENDS = ("auto", "xla", "cudnn", "splash")
LANES = 128  # widths and lengths that the TPU's kernel works on are multiples
FEW = 128  # keys that plain attention is as good for: tracks of latents


def attention(
    q: Float[Array, "b *l k d"],
    k: Float[Array, "b *n k d"],
    v: Float[Array, "b *n k d"],
    key_mask: Bool[Array, "b n"] | None = None,
    *,
    bias: Float[Array, "1 k l n"] | None = None,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
    axes: Sequence[str | None] = (),
    heads: str = "hidden",
) -> Float[Array, "b *l k d"]:
    """Softmax attention, the softmax in float32.

    Axes stay apart, because merged ones could not be sharded both.

    Args:
      q, k, v: axes after b that all have hold attentions of their own, axes that q alone has hold further queries.
      key_mask: True = may be attended to.
      bias: added to the scores; for "xla" alone.
      scale: of the scores; None = 1 / sqrt(d).
      causal: a query sees no key after it; for "xla" alone.
      backend: one of BACKENDS.
      axes: logical names of q's leading axes (see `sharding`), for kernels that XLA cannot cut by itself.
      heads: the logical name of the heads' axis, for the same.

    Raises:
      ValueError: for another backend, or one that cannot do what is asked.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention {backend!r}; choose one of {', '.join(BACKENDS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend == "auto":
        backend = _best(q, k, plain=bias is None and not causal)
    elif backend != "xla" and (bias is not None or causal):
        raise ValueError(f"attention {backend!r} has neither biases nor a causal form; use 'xla'")
    if backend != "xla":
        kernel = _cudnn if backend == "cudnn" else _splash
        return _on_devices(functools.partial(kernel, scale=scale), q, k, v, key_mask, axes, heads)
    return _plain(q, k, v, key_mask, bias, scale=scale, causal=causal)


def _plain(
    q: Array, k: Array, v: Array, key_mask: Array | None, bias: Array | None, *, scale: float, causal: bool
) -> Array:
    """Heads in front, and the division by the softmax's sum last: on CPUs a third of `jax.nn.dot_product_attention`'s
    time, which turns the scores around where q has further axes.
    """
    own = k.ndim - 3  # leading axes that q and k share
    q, k, v = (jnp.moveaxis(x, -2, own) for x in (q, k, v))
    batch = tuple(range(own + 1))
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    scores = scale * dot(q, k, (((q.ndim - 1,), (k.ndim - 1,)), (batch, batch)))
    if bias is not None:
        scores = scores + bias
    lowest = 0.7 * jnp.finfo(jnp.float32).min  # of finite numbers, so that a query without a key gets no NaN
    if key_mask is not None:
        key_mask = key_mask.reshape(len(key_mask), *(1,) * (scores.ndim - 2), -1)
        scores = jnp.where(key_mask, scores, lowest)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[-2:], dtype=bool), scores, lowest)
    scores = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = dot(scores.astype(v.dtype), v, (((scores.ndim - 1,), (own + 1,)), (batch, batch)))
    out = out / scores.sum(-1, keepdims=True)
    return jnp.moveaxis(out, own, -2).astype(v.dtype)


def _cudnn(q: Array, k: Array, v: Array, key_mask: Array | None, *, scale: float) -> Array:
    own = k.ndim - 3  # leading axes that q and k share
    shape, mask = q.shape, None
    q = q.reshape(-1, math.prod(shape[own:-2]), *shape[-2:])
    k, v = (x.reshape(-1, *x.shape[-3:]) for x in (k, v))
    if key_mask is not None:
        mask = jnp.repeat(key_mask, len(k) // len(key_mask), axis=0)[:, None, None]
        mask = jnp.broadcast_to(mask, (len(k), 1, q.shape[1], k.shape[1]))  # cuDNN wants a row for each query
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=scale, implementation="cudnn").reshape(shape)


def _best(q: Array, k: Array, plain: bool) -> str:
    if not plain or k.shape[-3] <= FEW:
        return "xla"
    if (platform := sharding.platform()) == "tpu":
        return "splash"
    fits = q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    return "cudnn" if platform in ("gpu", "cuda") and fits else "xla"


def _on_devices(
    attend, q: Array, k: Array, v: Array, key_mask: Array | None, axes: Sequence[str | None], heads: str
) -> Array:
    """`attend` on each device's own part of the arrays; axes that the mesh does not divide are whole on all."""
    if not sharding.in_use():
        return attend(q, k, v, key_mask)
    names = (*axes, *(None,) * (q.ndim - 2 - len(axes)), heads, None)
    of_q = sharding.spec(q.shape, names)
    of_k = sharding.spec(k.shape, (*names[: k.ndim - 3], None, heads, None))
    of_mask = None if key_mask is None else sharding.spec(key_mask.shape, (*names[:1], None))
    cut = jax.shard_map(attend, in_specs=(of_q, of_k, of_k, of_mask), out_specs=of_q, check_vma=False)
    return cut(q, k, v, key_mask)


def _splash(q: Array, k: Array, v: Array, key_mask: Array | None, *, scale: float) -> Array:
    """Attention of the shapes in `attention` by the TPU's kernel, with widths and lengths padded to its blocks."""
    # Half a second to import, and used on few machines.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    own = k.ndim - 3  # leading axes that q and k share
    shape, heads, lengths = q.shape, q.shape[-2], (math.prod(q.shape[own:-2]), k.shape[-3])
    block = tuple(map(_block, lengths))

    def prepare(x: Array, length: int, to: int) -> Array:
        x = einops.rearrange(x.reshape(-1, length, *x.shape[-2:]), "b l k d -> b k l d")
        return jnp.pad(x, ((0, 0), (0, 0), (0, -length % to), (0, -x.shape[-1] % LANES)))

    q = prepare((q * scale).astype(q.dtype), lengths[0], block[0])
    k, v = (prepare(x, lengths[1], block[1]) for x in (k, v))
    segments, masked = None, key_mask is not None
    if masked or lengths[1] % block[1]:
        valid = key_mask if masked else jnp.ones((1, lengths[1]), bool)
        valid = jnp.repeat(valid, len(k) // len(valid), axis=0)
        valid = jnp.pad(valid, ((0, 0), (0, -lengths[1] % block[1]))).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.ones((len(q), q.shape[2]), jnp.int32), valid)
    sizes = splash.BlockSizes(
        block_q=block[0],
        block_kv=block[1],
        block_q_dkv=block[0],
        block_kv_dkv=block[1],
        block_kv_dkv_compute=block[1],
        block_q_dq=block[0],
        block_kv_dq=block[1],
    )
    mask = splash_attention_mask.FullMask((q.shape[2], k.shape[2]))
    kernel = splash.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=sharding.platform() != "tpu",
    )
    out = jax.vmap(kernel)(q, k, v, segments)[:, :, : lengths[0], : shape[-1]]
    return einops.rearrange(out, "b k l d -> b l k d").reshape(shape)


def _block(length: int) -> int:
    """The block, a multiple of LANES, that cuts a length with the least padding; of equals the largest."""
    return LANES if length <= LANES else min((512, 384, 256), key=lambda size: -(-length // size) * size)
