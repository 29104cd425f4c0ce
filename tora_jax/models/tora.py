"""Tora: the trajectory extractor, ST-DiT and the motion fusers inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax.diffusion.rectified_flow import NUM_TIMESTEPS
from tora_jax.models.motion_fuser import FUSERS, PLACEMENTS
from tora_jax.models.stdit import STDiT, parse_variant
from tora_jax.models.trajectory_extractor import TrajectoryExtractor


class Tora(nn.Module):
    """Trajectory-controlled denoiser (Tora, section 3).

    The parameter tree is {"stdit": ..., "extractor": ...}; without the leaves named "*_fuser", "stdit" is plain
    Open-Sora's tree.

    A velocity has all of the noise in it, which must then get through every block; a net whose width is no more than
    the numbers in a patch has room for little else. Clean latents lie on far fewer dimensions (Li and He 2025, "Back to
    basics: let denoising generative models denoise", predicts them). `data_std` makes the velocity of the noisy latents
    x_t and of ST-DiT's output F as Karras et al. 2022 (EDM, section 5) do, written for the straight line between data
    and noise, t in 0..1, and s = `data_std`:

      v = ((s^2 (1 - t) - t) x_t + sqrt(d) F) / d, d = s^2 (1 - t)^2 + t^2

    F stands for the data where the noise is larger than s, and for what is left of the noise where it is smaller.

    Attributes:
      stdit: fields of `STDiT` but for its fuser and placement.
      fuser, placement: see `FUSERS` and `STDiT`.
      motion_features: channels of the extractor.
      data_std: see above; None = the output is the velocity, as that of the released weights.
      time_scale: of `RectifiedFlow`, in training and in sampling; over 0.
    """

    stdit: Mapping[str, Any]
    fuser: str = "adaptive_norm"
    placement: str = "temporal"
    motion_features: int = 128
    data_std: float | None = None
    time_scale: float = 1.0

    @property
    def in_channels(self) -> int:
        """Channels of the latents."""
        return self._stdit.in_channels

    @property
    def given_channels(self) -> int:
        """0: given frames stand in their places."""
        return 0

    @property
    def caption_channels(self) -> int:
        """Width of the text encoder's output."""
        return self._stdit.caption_channels

    @property
    def caption_length(self) -> int:
        """Tokens of a caption."""
        return self._stdit.caption_length

    @property
    def patch(self) -> int:
        """Latent cells for each token, along one side."""
        return parse_variant(self._stdit.variant).patch

    @property
    def depth(self) -> int:
        """Pairs of blocks; the extractor makes a feature map for each."""
        return parse_variant(self._stdit.variant).depth

    @property
    def _stdit(self) -> STDiT:
        return STDiT(**self.stdit, parent=None)

    def setup(self):
        if self.fuser not in FUSERS:
            raise ValueError(f"unknown fuser {self.fuser!r}; choose one of {', '.join(FUSERS)}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"unknown placement {self.placement!r}; choose one of {', '.join(PLACEMENTS)}")
        if self.data_std is not None and self.data_std <= 0:
            raise ValueError(f"data_std={self.data_std}: it must be over 0, or None")
        if self.time_scale <= 0:
            raise ValueError(f"time_scale={self.time_scale}: it must be over 0")
        remat, dtype = self._stdit.remat, self._stdit.dtype
        self.extractor = TrajectoryExtractor(
            self.depth, self.patch, self.motion_features, remat, dtype, name="extractor"
        )
        self.denoiser = STDiT(**self.stdit, fuser=self.fuser, placement=self.placement, name="stdit")

    def extract(self, motion: Float[Array, "b t h w c"]) -> Float[Array, "depth b t2 h2 w2 m"]:
        """Motion latents -> features; see `TrajectoryExtractor`."""
        return self.extractor(motion)

    def denoise(self, x, timestep, text, *, features=None, **conditions) -> Float[Array, "b t h w c2"]:
        """One forward pass with features that `extract` gave, or None for plain Open-Sora; see `STDiT`."""
        output = self.denoiser(x, timestep, text, features=features, **conditions)
        if self.data_std is None:
            return output
        output, rest = jnp.split(output, 2, axis=-1)
        t, variance = (timestep / NUM_TIMESTEPS)[:, None, None, None, None], self.data_std**2
        d = variance * (1 - t) ** 2 + t**2
        velocity = (variance * (1 - t) - t) / d * x + output / jnp.sqrt(d)
        return jnp.concatenate([velocity, rest], axis=-1)

    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        timestep: Float[Array, "b"],
        text: Float[Array, "b n _"],
        motion: Float[Array, "b t h w c"] | None,
        **conditions,
    ) -> Float[Array, "b t h w c2"]:
        """Extracts and denoises in one pass, as training does. `conditions`: keyword arguments of `STDiT`."""
        features = None if motion is None else self.extract(motion)
        return self.denoise(x, timestep, text, features=features, **conditions)
