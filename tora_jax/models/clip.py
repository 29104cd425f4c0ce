"""CLIP's text and image towers (arXiv 2103.00020; layout as in transformers' CLIPModel), for CLIPSIM and the
aesthetic score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tora_jax.models.layers import Dtype, attention, dense

# Of each colour, 0..1: the image tower takes (pixel - MEAN) / STD.
MEAN = np.float32([0.48145466, 0.4578275, 0.40821073])
STD = np.float32([0.26862954, 0.26130258, 0.27577711])

EPS = 1e-5
LEGACY_EOS = 2  # what transformers' configs of OpenAI's models say by mistake; the real id is the largest one


def _activation(name: str, x: Array) -> Array:
    """`hidden_act` of the checkpoint's config: "quick_gelu" (OpenAI's) or "gelu" (the exact one)."""
    if name == "quick_gelu":
        return x * nn.sigmoid(1.702 * x)
    if name == "gelu":
        return nn.gelu(x, approximate=False)
    raise ValueError(f"activation {name!r}: CLIP has quick_gelu or gelu")


def _layer_norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(EPS, dtype=jnp.float32, use_fast_variance=False, name=name)


class CLIPBlock(nn.Module):
    """Pre-norm attention and MLP, all with biases."""

    num_heads: int
    mlp_dim: int
    causal: bool
    activation: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x, _):
        width = x.shape[-1]
        y = _layer_norm("norm1")(x)
        q, k, v = (
            einops.rearrange(dense(width, dtype=self.dtype, name=name)(y), "b l (k d) -> b l k d", k=self.num_heads)
            for name in "qkv"
        )
        y = attention(q, k, v, causal=self.causal)
        x = x + dense(width, dtype=self.dtype, name="proj")(einops.rearrange(y, "b l k d -> b l (k d)"))
        y = dense(self.mlp_dim, dtype=self.dtype, name="fc1")(_layer_norm("norm2")(x))
        return x + dense(width, dtype=self.dtype, name="fc2")(_activation(self.activation, y)), None


class CLIPText(nn.Module):
    """The text tower: a causal transformer, read at the end mark. Defaults: ViT-L/14's.

    Padding after the end mark needs no mask: the attention is causal.
    """

    vocab_size: int = 49408
    max_length: int = 77
    width: int = 768
    mlp_dim: int = 3072
    depth: int = 12
    num_heads: int = 12
    eos_id: int = LEGACY_EOS
    activation: str = "quick_gelu"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b c"]:
        init = nn.initializers.normal(0.02)
        position = self.param("position", init, (self.max_length, self.width))
        x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="embed")(ids)
        x = (x + position[: ids.shape[1]]).astype(jnp.float32)
        x = _blocks(self, causal=True)(x)
        x = _layer_norm("norm")(x)
        # The first end mark of each row; with the legacy id the largest token, which is the real end mark.
        end = jnp.argmax(ids if self.eos_id == LEGACY_EOS else ids == self.eos_id, axis=1)
        return jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]


class CLIPVision(nn.Module):
    """The image tower: a ViT, read at its class token. Defaults: ViT-L/14's."""

    image_size: int = 224
    patch: int = 14
    width: int = 1024
    mlp_dim: int = 4096
    depth: int = 24
    num_heads: int = 16
    activation: str = "quick_gelu"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
        if pixels.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(f"images of {pixels.shape[1:3]}, CLIP's image tower takes {self.image_size} squared")
        init = nn.initializers.normal(0.02)
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, "VALID", use_bias=False, dtype=self.dtype, name="patch_embed")(pixels)
        x = einops.rearrange(x, "b h w c -> b (h w) c")
        token = self.param("class_token", init, (self.width,))
        position = self.param("position", init, (x.shape[1] + 1, self.width))
        token = jnp.broadcast_to(token, (len(x), 1, self.width))
        x = (jnp.concatenate([token, x.astype(token.dtype)], axis=1) + position).astype(jnp.float32)
        x = _blocks(self, causal=False)(_layer_norm("pre_norm")(x))
        return _layer_norm("norm")(x[:, 0])


def _blocks(tower: CLIPText | CLIPVision, causal: bool):
    """The tower's transformer blocks, stacked; to be called inside its `__call__`."""
    scan = nn.scan(
        CLIPBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=tower.depth,
    )
    blocks = scan(tower.num_heads, tower.mlp_dim, causal, tower.activation, tower.dtype, name="blocks")
    return lambda x: blocks(x, None)[0]


class CLIP(nn.Module):
    """Both towers and the projections to the space that they share.

    Attributes:
      text, vision: the towers.
      features: width of the shared space.
    """

    text: CLIPText
    vision: CLIPVision
    features: int = 768

    def setup(self):
        init = nn.initializers.normal(0.02)
        self.text_projection = nn.Dense(self.features, use_bias=False, dtype=jnp.float32, kernel_init=init)
        self.image_projection = nn.Dense(self.features, use_bias=False, dtype=jnp.float32, kernel_init=init)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def encode_text(self, ids: Int[Array, "b n"]) -> Float[Array, "b c"]:
        """Embeddings of length 1 of CLIP's own tokens (begin mark, words, end mark, any padding)."""
        return _unit(self.text_projection(self.text(ids)))

    def encode_image(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b c"]:
        """Embeddings of length 1 of images at the tower's size, normalised by MEAN and STD."""
        return _unit(self.image_projection(self.vision(pixels)))

    def __call__(
        self, ids: Int[Array, "b n"], pixels: Float[Array, "i h w 3"]
    ) -> tuple[Float[Array, "b c"], Float[Array, "i c"], Float[Array, "i b"]]:
        """Text embeddings, image embeddings, and the scaled similarity of each image (row) with each text."""
        text, image = self.encode_text(ids), self.encode_image(pixels)
        return text, image, jnp.exp(self.logit_scale) * image @ text.T


def _unit(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def from_fields(text: Mapping[str, Any], vision: Mapping[str, Any], **fields: Any) -> CLIP:
    """CLIP of plain nested fields, as a config.json holds them."""
    return CLIP(CLIPText(**text), CLIPVision(**vision), **fields)


def clip(variant: str, dtype: Dtype = jnp.float32) -> CLIP:
    """A published model: "ViT-L/14" (the aesthetic score's) or "ViT-B/32" (CLIPSIM's).

    Raises:
      ValueError: for another name.
    """
    if variant == "ViT-L/14":
        return CLIP(CLIPText(dtype=dtype), CLIPVision(dtype=dtype), features=768)
    if variant == "ViT-B/32":
        text = CLIPText(width=512, mlp_dim=2048, num_heads=8, dtype=dtype)
        vision = CLIPVision(patch=32, width=768, mlp_dim=3072, depth=12, num_heads=12, dtype=dtype)
        return CLIP(text, vision, features=512)
    raise ValueError(f"CLIP variant {variant!r}: known are ViT-L/14 and ViT-B/32")
