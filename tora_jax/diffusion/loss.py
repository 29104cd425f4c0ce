"""The training loss of any process: how far the prediction is from the target, beside given frames."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tora_jax.typing import Process


def training_loss(
    process: Process,
    predict: Callable[[Array, Array], Array],
    x: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    timestep: Float[Array, "b"],
    frame_mask: Bool[Array, "b t"] | None = None,
    weight: Float[Array, "b t h w"] | None = None,
) -> Float[Array, "b"]:
    """Mean squared error of the prediction, for each sample.

    Args:
      predict: (noisy latents, timesteps [b]) -> output, whose first c channels are the prediction.
      x, noise: data and Gaussian noise.
      timestep: 0..1000.
      frame_mask: False = a given frame, which gets no noise and no loss; the mean is over the others. A sample without
        a frame to generate has loss 0.
      weight: of each cell's error. One that depends on the conditions alone leaves the best prediction as it is.
    """
    x_t = process.add_noise(x, noise, timestep)
    if frame_mask is not None:
        x_t = jnp.where(frame_mask[:, :, None, None, None], x_t, x)
    prediction = predict(x_t, timestep)[..., : x.shape[-1]].astype(jnp.float32)
    error = jnp.square(prediction - process.target(x, noise, timestep)).mean(4)
    error = (error if weight is None else weight * error).mean((2, 3))
    if frame_mask is None:
        return error.mean(1)
    return jnp.where(frame_mask, error, 0).sum(1) / jnp.maximum(frame_mask.sum(1), 1)
