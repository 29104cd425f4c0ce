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
      front_end: whose numbers are followed where the two that run these weights differ: "sat", the authors' own, which
        they were trained in, or "diffusers". See backbones/cogvideox.py.
      guidance: "dynamic", as both run them, or "constant"; see `v_prediction.GUIDANCE`.
      keep_fusion: gamma and beta of all blocks are made once for a video, not at each step: 7 % less to compute, and
        9 GB more at 480x720 and 49 frames in bfloat16.
    """

    cogvideox: Mapping[str, Any]
    motion_features: int = 128
    front_end: str = "sat"
    guidance: str = "dynamic"
    keep_fusion: bool = False

    @property
    def in_channels(self) -> int:
        """Channels of the latents, without what is given beside them."""
        return self._cogvideox.out_channels

    @property
    def given_channels(self) -> int:
        """Channels of what is given beside the latents: those of the first frame's, for image to video; else 0."""
        return self._cogvideox.in_channels - self._cogvideox.out_channels

    @property
    def caption_channels(self) -> int:
        """Width of the text encoder's output."""
        return self._cogvideox.caption_channels

    @property
    def caption_length(self) -> int:
        """Tokens of a caption."""
        return self._cogvideox.caption_length

    @property
    def patch(self) -> int:
        """Latent cells for each token, along one side."""
        return size_of(self._cogvideox.variant).patch

    @property
    def depth(self) -> int:
        """Blocks; the extractor makes a feature map for each."""
        return size_of(self._cogvideox.variant).depth

    @property
    def eight_bit(self) -> bool:
        """Whether the blocks' kernels are in 8 bits."""
        return self._cogvideox.eight_bit

    @property
    def _cogvideox(self) -> CogVideoX:
        return CogVideoX(**self.cogvideox, parent=None)

    @nn.nowrap
    def check_grid(self, grid: tuple[int, int, int]) -> None:
        """Of a video: see `CogVideoX.check_grid`."""
        self._cogvideox.check_grid(grid, self.caption_length)

    def setup(self):
        inner = self._cogvideox
        options = {"remat": inner.remat, "dtype": inner.dtype}
        self.extractor = MotionExtractor(self.depth, self.patch, self.motion_features, **options, name="extractor")
        self.denoiser = CogVideoX(**self.cogvideox, name="cogvideox")

    def extract(self, motion: Float[Array, "b t h w c"]) -> Float[Array, "depth b t h2 w2 m"]:
        """Motion latents -> features; see `MotionExtractor`."""
        return self.extractor(motion)

    def fusion(self, features: Float[Array, "depth b t h2 w2 m"]) -> Fusion:
        """Features -> gamma and beta of all blocks. They serve every step; see `CogVideoX.fusion`."""
        return self.denoiser.fusion(features)

    def denoise(self, x, timestep, text, *, features=None, **conditions) -> Float[Array, "b t h w c"]:
        """One forward pass with what `extract` or `fusion` gave, or None for plain CogVideoX; see `CogVideoX`."""
        return self.denoiser(x, timestep, text, features=features, **conditions)

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        timestep: Float[Array, "b"],
        text: Float[Array, "b n _"],
        motion: Float[Array, "b t h w c"] | None,
        **conditions,
    ) -> Float[Array, "b t h w c"]:
        """Extracts and denoises in one pass, as training does. `conditions`: keyword arguments of `CogVideoX`."""
        features = None if motion is None else self.extract(motion)
        return self.denoise(x, timestep, text, features=features, **conditions)
