"""Tora: the trajectory extractor, ST-DiT and the motion fusers inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tora_jax.models.layers import Dtype
from tora_jax.models.motion_fuser import FORMS, PLACEMENTS
from tora_jax.models.stdit import STDiT, parse_variant
from tora_jax.models.trajectory_extractor import TrajectoryExtractor
from tora_jax.rectified_flow import NUM_TIMESTEPS

PREDICTIONS = ("velocity", "data")
LEAST_TIME = 0.05  # on the 0..1 scale, at which the data's error stops to count more; the paper's


class Tora(nn.Module):
    """Trajectory-controlled denoiser (Tora, section 3).

    The parameter tree is {"stdit": ..., "extractor": ...}; without the leaves named "*_fuser", "stdit" is plain
    Open-Sora's tree.

    With `prediction="data"` ST-DiT's output is the clean latents x, and the velocity (x - x_t) / t is made of that. A
    velocity has all of the noise in it, which must then get through every block; a net whose width is no more than the
    numbers in a patch has no room for anything else. Clean latents lie on far fewer dimensions (Li and He 2025, "Back
    to basics: let denoising generative models denoise").

    Attributes:
      stdit: fields of `STDiT` but for its fuser and placement.
      fuser, placement: see `MotionFuser` and `STDiT`.
      motion_features: channels of the extractor.
      prediction: what ST-DiT's output is: "velocity", as the released weights, or "data".
    """

    stdit: Mapping[str, Any]
    fuser: str = "adaptive_norm"
    placement: str = "temporal"
    motion_features: int = 128
    prediction: str = "velocity"

    def setup(self):
        if self.fuser not in FORMS:
            raise ValueError(f"unknown fuser {self.fuser!r}; choose one of {', '.join(FORMS)}")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"unknown placement {self.placement!r}; choose one of {', '.join(PLACEMENTS)}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {self.prediction!r}; choose one of {', '.join(PREDICTIONS)}")
        size = parse_variant(self.stdit.get("variant", STDiT.variant))
        dtype: Dtype = self.stdit.get("dtype", STDiT.dtype)
        remat = self.stdit.get("remat", STDiT.remat)
        self.extractor = TrajectoryExtractor(
            size.depth, size.patch, self.motion_features, remat, dtype, name="extractor"
        )
        self.denoiser = STDiT(**self.stdit, fuser=self.fuser, placement=self.placement, name="stdit")

    def extract(self, motion: Float[Array, "b t h w c"]) -> Float[Array, "depth b t2 h2 w2 m"]:
        """Motion latents -> features; see `TrajectoryExtractor`."""
        return self.extractor(motion)

    def denoise(self, x, timestep, text, *, features=None, **conditions) -> Float[Array, "b t h w c2"]:
        """One forward pass with features that `extract` gave, or None for plain Open-Sora; see `STDiT`."""
        output = self.denoiser(x, timestep, text, features=features, **conditions)
        if self.prediction == "velocity":
            return output
        data, rest = jnp.split(output, 2, axis=-1)
        time = jnp.maximum(timestep / NUM_TIMESTEPS, LEAST_TIME)[:, None, None, None, None]
        return jnp.concatenate([(data - x) / time, rest], axis=-1)

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
