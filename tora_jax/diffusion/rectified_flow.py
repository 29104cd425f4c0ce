"""Rectified flow: a sample x moves on the straight line x_t = (1 - t) x + t noise, at the velocity x - noise.

Timesteps run from 1000 (noise) to 0 (clean) everywhere. All arithmetic is float32.

Source: opensora/schedulers/rf at tag v1.2.0.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PRNGKeyArray

NUM_TIMESTEPS = 1000.0


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """The process of Open-Sora v1.2.

    Attributes:
      time_scale: the reference's `transform_scale`, see `shift`; over 0.
    """

    time_scale: float = 1.0

    def add_noise(
        self, x: Float[Array, "b t h w c"], noise: Float[Array, "b t h w c"], timestep: Float[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """The point at `timestep` on the line from x to noise."""
        keep = (1 - timestep / NUM_TIMESTEPS)[:, None, None, None, None]
        return keep * x + (1 - keep) * noise

    def target(
        self, x: Float[Array, "b t h w c"], noise: Float[Array, "b t h w c"], timestep: Float[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """The velocity, the same at all timesteps."""
        return x - noise

    def clean(
        self, x: Float[Array, "b t h w c"], prediction: Float[Array, "b t h w c"], timestep: Float[Array, "b"]
    ) -> Float[Array, "b t h w c"]:
        """The end of the line through x along a velocity."""
        return x + (timestep / NUM_TIMESTEPS)[:, None, None, None, None] * prediction

    def shift(self, t, height, width, latent_frames):
        """Shifts timesteps towards noise for large and long videos: t' = r t / (1 + (r - 1) t) on the 0..1 scale,
        r = time_scale * sqrt(height * width / 512^2) * sqrt(latent frames).

        The reference counts latent frames as frames // 17 * 5, which is 0 under 17 frames; here it is the VAE's true
        count (`VideoVAE.latent_frames`), equal at 1 and at multiples of 17.

        Args:
          t: timesteps, 0..1000; NumPy or JAX arrays, as the result.
          height, width: of the video in pixels.
          latent_frames: number of latent frames.
        """
        xp = jnp if isinstance(t, jax.Array) else np
        # The order of the operations is the reference's: sampling compares these numbers with edit ratios.
        height, width, latent_frames = (xp.asarray(v, xp.float32) for v in (height, width, latent_frames))
        ratio = xp.sqrt(height * width / (512 * 512)) * xp.sqrt(latent_frames) * self.time_scale
        t = t / NUM_TIMESTEPS
        return ratio * t / (1 + (ratio - 1) * t) * NUM_TIMESTEPS

    def times(
        self, steps: int, height: float, width: float, latent_frames: int, transform: bool = True
    ) -> Float[np.ndarray, "steps_plus_2"]:
        """The sampler's timesteps, from noise to data, with the two ends that its first and last steps need.

        Args:
          steps: of the sampler.
          height, width, latent_frames: see `shift`.
          transform: False leaves the timesteps even.

        Returns:
          [1000, t_0, ..., t_{n-1}, 0]: step i goes from t_i to t_{i+1} (the last one to 0) and looks back at the
          entry before t_i to see which frames were already on their way.
        """
        t = np.asarray([(1 - i / steps) * NUM_TIMESTEPS for i in range(steps)], np.float32)
        if transform:
            # At some small sizes rounding gives 1000.0001, and a frame with edit ratio 1 would miss the first step.
            t = np.minimum(self.shift(t, height, width, latent_frames), np.float32(NUM_TIMESTEPS))
        return np.concatenate([[NUM_TIMESTEPS], t, [0]]).astype(np.float32)

    def draw_timesteps(
        self, keys: Key[Array, "b"], height: Array, width: Array, latent_frames: int, method: str, transform: bool
    ) -> Float[Array, "b"]:
        """Random training timesteps, one for each key.

        Args:
          height, width, latent_frames: see `shift`.
          method: of `sample_timesteps`.
          transform: whether `shift` applies.
        """
        t = jax.vmap(lambda key: sample_timesteps(key, 1, method)[0])(keys)
        return self.shift(t, height, width, latent_frames) if transform else t


def sample_timesteps(
    key: PRNGKeyArray, batch: int, method: str = "logit_normal", loc: float = 0.0, scale: float = 1.0
) -> Float[Array, "b"]:
    """Random training timesteps, 0..1000: "uniform", or "logit_normal" with the sigmoid of N(loc, scale^2)."""
    if method == "uniform":
        return jax.random.uniform(key, (batch,)) * NUM_TIMESTEPS
    if method == "logit_normal":
        return jax.nn.sigmoid(loc + scale * jax.random.normal(key, (batch,))) * NUM_TIMESTEPS
    raise ValueError(f'unknown timestep distribution {method!r}; use "uniform" or "logit_normal"')
