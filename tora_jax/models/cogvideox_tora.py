"""The released Tora: CogVideoX, its motion extractor, and the fusers inside the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from tora_jax.models.cogvideox import CogVideoX, size_of
from tora_jax.models.cogvideox_motion import Fusion, MotionExtractor


class CogVideoXTora(nn.Module):
    """Trajectory-controlled denoiser on CogVideoX.

    The parameter tree is {"cogvideox": ..., "extractor": ...}; without the leaves under "motion_fuser", "cogvideox" is
    plain CogVideoX's tree.

    Attributes:
      cogvideox: fields of `CogVideoX`.
      motion_features: channels of the extractor.
    """

    cogvideox: Mapping[str, Any]
    motion_features: int = 128

    def setup(self):
        size = size_of(self.cogvideox.get("variant", CogVideoX.variant))
        options = {name: self.cogvideox.get(name, getattr(CogVideoX, name)) for name in ("remat", "dtype")}
        self.extractor = MotionExtractor(size.depth, size.patch, self.motion_features, **options, name="extractor")
        self.denoiser = CogVideoX(**self.cogvideox, name="cogvideox")

    def extract(self, motion: Float[Array, "b t h w c"]) -> Float[Array, "depth b t h2 w2 m"]:
        """Motion latents -> features; see `MotionExtractor`."""
        return self.extractor(motion)

    def fusion(self, features: Float[Array, "depth b t h2 w2 m"]) -> Fusion:
        """Features -> gamma and beta of all blocks. They serve every step; see `CogVideoX.fusion`."""
        return self.denoiser.fusion(features)

    def denoise(self, x, timestep, text, *, motion=None, **conditions) -> Float[Array, "b t h w c"]:
        """One forward pass with what `extract` or `fusion` gave, or None for plain CogVideoX; see `CogVideoX`."""
        return self.denoiser(x, timestep, text, motion=motion, **conditions)

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        timestep: Float[Array, "b"],
        text: Float[Array, "b n _"],
        motion: Float[Array, "b t h w c"] | None,
        **conditions,
    ) -> Float[Array, "b t h w c"]:
        """Extracts and denoises in one pass, as training does. `conditions`: keyword arguments of `CogVideoX`."""
        return self.denoise(x, timestep, text, motion=None if motion is None else self.extract(motion), **conditions)
