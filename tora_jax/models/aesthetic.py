"""LAION's aesthetic predictors: linear layers on CLIP ViT-L/14's image embedding."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

V2 = ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1))  # the improved predictor's layers


class AestheticHead(nn.Module):
    """An embedding of length 1 -> a score of about 1 to 10.

    Without dropout, which is for training, nothing lies between the layers.

    Fields:
      features: width of the embedding.
      layers: place in the checkpoint's list, and width; () = a single linear layer, as in version 1.

    Source: LAION-AI/aesthetic-predictor, and christophschuhmann/improved-aesthetic-predictor.
    """

    features: int = 768
    layers: tuple[tuple[int, int], ...] = V2

    @nn.compact
    def __call__(self, embedding: Float[Array, "b c"]) -> Float[Array, "b"]:
        """Raises ValueError for an embedding of another width."""
        if embedding.shape[-1] != self.features:
            raise ValueError(f"embedding of width {embedding.shape[-1]}: the head takes {self.features}")
        x = embedding
        for place, width in self.layers:
            x = nn.Dense(width, dtype=jnp.float32, name=f"layers_{place}")(x)
        if not self.layers:
            x = nn.Dense(1, dtype=jnp.float32, name="linear")(x)
        return x[..., 0]
