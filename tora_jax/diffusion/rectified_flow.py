"""Rectified flow: noise, training loss, and Euler sampling with guidance and frame masks.

A sample x moves on the straight line x_t = (1 - t) x + t noise; the model predicts the velocity x - noise.
Timesteps are on the 0 (clean) to 1000 (noise) scale everywhere. All arithmetic is float32. Nothing here knows a
model: a model comes in as a function.

Source: opensora/schedulers/rf at tag v1.2.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

NUM_TIMESTEPS = 1000.0


def transform_timesteps(t, height, width, latent_frames, scale: float = 1.0):
    """Shifts timesteps towards noise for large and long videos: t' = r t / (1 + (r - 1) t) on the 0..1 scale,
    r = scale * sqrt(height * width / 512^2) * sqrt(latent frames).

    The reference counts latent frames as frames // 17 * 5, which is 0 under 17 frames; here it is the VAE's true
    count (`VideoVAE.latent_frames`), equal at 1 and at multiples of 17.

    Args:
      t: timesteps, 0..1000; NumPy or JAX arrays, as the result.
      height, width: of the video in pixels.
      latent_frames: number of latent frames.
      scale: the reference's `transform_scale`.
    """
    xp = jnp if isinstance(t, jax.Array) else np
    # The order of the operations is the reference's: sampling compares these numbers with edit ratios.
    height, width, latent_frames = (xp.asarray(v, xp.float32) for v in (height, width, latent_frames))
    ratio = xp.sqrt(height * width / (512 * 512)) * xp.sqrt(latent_frames) * scale
    t = t / NUM_TIMESTEPS
    return ratio * t / (1 + (ratio - 1) * t) * NUM_TIMESTEPS


def sample_timesteps(
    key: PRNGKeyArray, batch: int, method: str = "logit_normal", loc: float = 0.0, scale: float = 1.0
) -> Float[Array, "b"]:
    """Random training timesteps, 0..1000: "uniform", or "logit_normal" with the sigmoid of N(loc, scale^2)."""
    if method == "uniform":
        return jax.random.uniform(key, (batch,)) * NUM_TIMESTEPS
    if method == "logit_normal":
        return jax.nn.sigmoid(loc + scale * jax.random.normal(key, (batch,))) * NUM_TIMESTEPS
    raise ValueError(f'unknown timestep distribution {method!r}; use "uniform" or "logit_normal"')


def add_noise(
    x: Float[Array, "b t h w c"], noise: Float[Array, "b t h w c"], timestep: Float[Array, "b"]
) -> Float[Array, "b t h w c"]:
    """The point at `timestep` on the line from x to noise."""
    keep = (1 - timestep / NUM_TIMESTEPS)[:, None, None, None, None]
    return keep * x + (1 - keep) * noise


def training_loss(
    predict: Callable[[Array, Array], Array],
    x: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    timestep: Float[Array, "b"],
    frame_mask: Bool[Array, "b t"] | None = None,
    weight: Float[Array, "b t h w"] | None = None,
) -> Float[Array, "b"]:
    """Mean squared error of the velocity, for each sample.

    Args:
      predict: (noisy latents, timesteps [b]) -> prediction, whose first c channels are the velocity.
      x, noise: data and Gaussian noise.
      timestep: 0..1000.
      frame_mask: False = a conditioned frame, which gets no noise and no loss; the mean is over the others.
        A sample without a frame to generate has loss 0.
      weight: of each cell's error. One that depends on the conditions alone leaves the best prediction as it is.
    """
    x_t = add_noise(x, noise, timestep)
    if frame_mask is not None:
        x_t = jnp.where(frame_mask[:, :, None, None, None], x_t, x)
    velocity = predict(x_t, timestep)[..., : x.shape[-1]].astype(jnp.float32)
    error = jnp.square(velocity - (x - noise)).mean(4)
    error = (error if weight is None else weight * error).mean((2, 3))
    if frame_mask is None:
        return error.mean(1)
    return jnp.where(frame_mask, error, 0).sum(1) / jnp.maximum(frame_mask.sum(1), 1)


def sampling_times(
    num_steps: int, height: float, width: float, latent_frames: int, transform: bool = True, scale: float = 1.0
) -> Float[np.ndarray, "steps_plus_2"]:
    """The sampler's timesteps, from noise to data, with the two ends that its first and last steps need.

    Args:
      num_steps: of the sampler.
      height, width, latent_frames, scale: see `transform_timesteps`.
      transform: False leaves the timesteps even.

    Returns:
      [1000, t_0, ..., t_{n-1}, 0]: step i goes from t_i to t_{i+1} (the last one to 0) and looks back at the
      entry before t_i to see which frames were already on their way.
    """
    t = np.asarray([(1 - i / num_steps) * NUM_TIMESTEPS for i in range(num_steps)], np.float32)
    if transform:
        # At some small sizes rounding gives 1000.0001, and a frame with edit ratio 1 would miss the first step.
        t = np.minimum(transform_timesteps(t, height, width, latent_frames, scale), np.float32(NUM_TIMESTEPS))
    return np.concatenate([[NUM_TIMESTEPS], t, [0]]).astype(np.float32)


def guide(
    velocities: Float[Array, "passes b t h w c"],
    guidance: float | Array,
    trajectory_guidance: float | Array = 1.0,
) -> Float[Array, "b t h w c"]:
    """Combines up to three passes: v(c, tau); v(0, tau), without the caption; v(c, 0), without the trajectory.

    v = v(0, tau) + g [v(c, tau) - v(0, tau)] + (w - 1) [v(c, tau) - v(c, 0)]

    Args:
      velocities: the passes in that order; one pass is returned as it is, two leave out the last term.
      guidance: g, 1 = no guidance.
      trajectory_guidance: w, 1 = no extra weight on the trajectory.
    """
    full = velocities[0]
    if len(velocities) == 1:
        return full
    no_text = velocities[1]
    v = no_text + guidance * (full - no_text)
    if len(velocities) == 3:
        v = v + (trajectory_guidance - 1) * (full - velocities[2])
    return v


def sampling_step(
    predict: Callable[[Array, Array, Array | None], Array],
    x: Float[Array, "b t h w c"],
    times: Float[Array | np.ndarray, "3"],
    guidance: float | Array,
    trajectory_guidance: float | Array = 1.0,
    edit: Float[Array, "b t"] | None = None,
    noise: Float[Array, "b t h w c"] | None = None,
) -> Float[Array, "b t h w c"]:
    """One Euler step.

    Args:
      predict: (latents, timestep [b], frame mask [b, t] or None) -> the passes of `guide`, stacked.
      x: latents at times[1]; conditioned frames hold their clean latents until they start to move.
      times: three neighbours in `sampling_times`: the timestep before, this one, the next one.
      guidance, trajectory_guidance: see `guide`.
      edit: for each latent frame, 1 = generate, 0 = keep, between = edit ratio: the frame stays as given until
        the timestep falls under 1000 * ratio, is then mixed with noise, and goes along from there.
      noise: Gaussian, for the frames that start at this step; needed with `edit`.
    """
    _, now, after = times
    moving, _, start = _start(x, times, edit, noise)
    velocities = predict(start, jnp.broadcast_to(now, len(x)), moving)[..., : x.shape[-1]].astype(jnp.float32)
    end = start + guide(velocities, guidance, trajectory_guidance) * ((now - after) / NUM_TIMESTEPS)
    return end if edit is None else jnp.where(moving[:, :, None, None, None], end, x)


def moving_frames(edit, times):
    """Which latent frames move at a step, and which of them start to: bool [b, t] both; arguments of `sampling_step`,
    NumPy's or JAX's, as the result."""
    before, now, _ = times
    moving = edit * np.float32(NUM_TIMESTEPS) >= now
    return moving, moving & ~(edit * np.float32(NUM_TIMESTEPS) >= before)


def _start(x: Array, times, edit: Array | None, noise: Array | None) -> tuple[Array | None, Array | None, Array]:
    """`moving_frames`, and the latents with noise in those that start to."""
    if edit is None:
        return None, None, x
    moving, starts = moving_frames(edit, times)
    noisy = add_noise(x, noise, jnp.broadcast_to(times[1], len(x)))
    return moving, starts, jnp.where(starts[:, :, None, None, None], noisy, x)


class Memory(NamedTuple):
    """What a step of `saving_step` leaves to the next.

    Attributes:
      velocity: guided.
      extra: what guidance added to the pass with everything, the last time that it was computed.
    """

    velocity: Float[Array, "b t h w c"]
    extra: Float[Array, "b t h w c"]


def saving_step(
    predict: Callable[[Array, Array, Array | None], Array],
    x: Float[Array, "b t h w c"],
    times: Float[Array | np.ndarray, "3"],
    guidance: float | Array,
    trajectory_guidance: float | Array,
    edit: Float[Array, "b t"] | None,
    noise: Float[Array, "b t h w c"] | None,
    memory: Memory,
    ratio: float | Array = 0.0,
) -> tuple[Float[Array, "b t h w c"], Memory]:
    """`sampling_step` that may leave passes out, and may be of second order.

    Where `predict` gives a single pass, what guidance added before is added again (`Memory.extra`; zeros: no guidance).

    Args:
      ratio: length of this step over that of the one before: the two-step Adams-Bashforth method, which extrapolates
        the velocity to the middle of the step. 0 = Euler. A frame that starts to move takes Euler's step: the velocity
        before was that of a frame without noise.
    """
    _, now, after = times
    moving, starts, start = _start(x, times, edit, noise)
    velocities = predict(start, jnp.broadcast_to(now, len(x)), moving)[..., : x.shape[-1]].astype(jnp.float32)
    if len(velocities) == 1:
        velocity, extra = velocities[0] + memory.extra, memory.extra
    else:
        velocity = guide(velocities, guidance, trajectory_guidance)
        extra = velocity - velocities[0]
    if edit is not None:
        ratio = jnp.where(starts, 0.0, ratio)[:, :, None, None, None]
    middle = velocity + ratio / 2 * (velocity - memory.velocity)
    end = start + middle * ((now - after) / NUM_TIMESTEPS)
    end = end if edit is None else jnp.where(moving[:, :, None, None, None], end, x)
    return end, Memory(velocity, extra)


def step_noise(key: PRNGKeyArray, step: int | Array, shape: tuple[int, ...]) -> Float[Array, "b t h w c"]:
    """The noise of step `step`, the same whichever loop runs the steps."""
    return jax.random.normal(jax.random.fold_in(key, step), shape)


def sample(
    predict: Callable[[Array, Array, Array | None], Array],
    x: Float[Array, "b t h w c"],
    times: Float[Array | np.ndarray, "steps_plus_2"],
    guidance: float | Array,
    trajectory_guidance: float | Array = 1.0,
    edit: Float[Array, "b t"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "b t h w c"]:
    """All steps as one `lax.scan`, for compilation as a whole; arguments as in `sampling_step`.

    Args:
      times: of `sampling_times`.
      key: for `step_noise`; needed with `edit`.
    """
    times = jnp.asarray(times)

    def body(x: Array, step: Array) -> tuple[Array, None]:
        noise = None if edit is None else step_noise(key, step, x.shape)
        window = jax.lax.dynamic_slice(times, (step,), (3,))
        return sampling_step(predict, x, window, guidance, trajectory_guidance, edit, noise), None

    return jax.lax.scan(body, x, jnp.arange(len(times) - 2))[0]
