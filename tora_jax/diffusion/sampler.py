"""The sampling loop: one step after the other from noise to latents, and what may be left out to be faster.

No model is known here: the denoiser comes in as a function, see `Method`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from tora_jax.diffusion.guidance import guide
from tora_jax.diffusion.rectified_flow import NUM_TIMESTEPS
from tora_jax.errors import UserError
from tora_jax.programs import Program
from tora_jax.typing import Process, Solver, Step


@dataclasses.dataclass(frozen=True)
class Method:
    """What the steps are compiled for.

    Attributes:
      denoise: (params, x, timestep [b], **conditions) -> (output, whose first channels are the prediction; what the
        blocks added, or None). Among the conditions are `features`, `frame_mask` and, where the blocks are not to be
        computed, `residual`: what they added at another step.
      process, solver: see `typing`.
    """

    denoise: Callable[..., tuple[Array, Array | None]]
    process: Process
    solver: Solver


class Told(NamedTuple):
    """What the denoiser is told, the same at every step.

    Attributes:
      conditions: of `Method.denoise`, "text" among them, for all passes of `guide`, stacked along the batch.
      features: of the motion, or None; their batch is one pass's.
      edit: for each latent frame, 1 = generate, 0 = keep, between = edit ratio: the frame stays as given until the
        timestep falls under 1000 * ratio, is then mixed with noise, and goes along from there. None = all 1.
    """

    conditions: Mapping[str, Array]
    features: Any = None
    edit: Float[Array, "b t"] | None = None


class Kept(NamedTuple):
    """What a step leaves to the next, so that it need not be computed again.

    Attributes:
      extra: what guidance added to the pass with everything, the last time that it was computed.
      residual: what the denoiser's blocks added; None = they are computed.
    """

    extra: Float[Array, "b t h w c"]
    residual: Array | None = None


@dataclasses.dataclass(frozen=True)
class Acceleration:
    """What may be left out to be faster; nothing by default. docs/sampling.md has what each saves and costs.

    Attributes:
      guidance_from, guidance_to: the part of the steps, 0..1, in which there is guidance at all.
      guidance_every: the passes of guidance are computed at every so many steps; what they add is kept between.
      cache_every: the blocks are computed at every so many steps; what they add is kept between. The first two steps
        and the last are always computed.
    """

    guidance_from: float = 0.0
    guidance_to: float = 1.0
    guidance_every: int = 1
    cache_every: int = 1

    def check(self) -> None:
        """Raises a `UserError` for a value out of its range."""
        if not 0 <= self.guidance_from <= self.guidance_to <= 1:
            span = f"{self.guidance_from} to {self.guidance_to}"
            raise UserError(f"guidance_from and guidance_to are {span}; give two numbers that rise within 0 to 1")
        for name in ("guidance_every", "cache_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def leave_out(self, i: int, steps: int, told: Told, kept: Kept, starting: bool) -> tuple[Told, Kept]:
        """The passes that step `i` computes, and what it takes from before.

        Args:
          starting: whether a given frame starts to move: what was kept says nothing of it.
        """
        guided = self.guidance_from <= i / steps < self.guidance_to
        first = math.ceil(self.guidance_from * steps)
        if not guided:
            kept = kept._replace(extra=jnp.zeros_like(kept.extra))
        if not guided or ((i - first) % self.guidance_every and not starting):
            batch = len(kept.extra)
            told = told._replace(conditions=jax.tree.map(lambda rows: rows[:batch], told.conditions))
        known = kept.residual is not None and len(kept.residual) == len(told.conditions["text"])
        cached = known and not starting and 1 < i < steps - 1 and i % self.cache_every > 0
        return told, kept if cached else kept._replace(residual=None)


def run(
    method: Method,
    params: Any,
    x: Float[Array, "b t h w c"],
    times: Float[np.ndarray, "steps_plus_2"],
    told: Told,
    weights: Float[np.ndarray, "steps 2"],
    noise: Callable[[int], Array] | None = None,
    acceleration: Acceleration = Acceleration(),
    progress: Callable[[int, Callable[[], Array]], None] | None = None,
) -> Float[Array, "b t h w c"]:
    """All steps from noise to latents. The denoiser's parameters are on the device as long as this runs.

    Args:
      params: of the denoiser.
      x: noise, and what is given; donated.
      times: of `Process.times`.
      weights: of guidance and of trajectory guidance at each step.
      noise: step -> Gaussian noise; needed with `told.edit`, and by a solver that is noisy.
      progress: called after each step with the number of steps done, and with a function that gives the estimate of the
        clean latents; it costs a moment, and only where it is called, which must be before `progress` returns.
    """
    params, steps, solver = jax.device_put(params), len(times) - 2, method.solver
    memory, kept = solver.init(x), None if acceleration == Acceleration() else Kept(jnp.zeros_like(x))
    edit = None if told.edit is None else np.asarray(told.edit)
    for i in range(steps):
        window = times[i : i + 3]
        drawn = noise(i) if edit is not None or solver.noisy else None
        at = Step(jnp.asarray(window), solver.coefficients(method.process, times, i), drawn)
        passes = told
        if kept is not None:
            starting = edit is not None and bool(moving_frames(edit, window)[1].any())
            passes, kept = acceleration.leave_out(i, steps, told, kept, starting)
        before = None if progress is None else jnp.copy(x)
        x, memory, kept = step(method, params, x, at, tuple(map(jnp.float32, weights[i])), passes, memory, kept)
        # Waiting here keeps the progress bar honest, and Ctrl-C within one step.
        x.block_until_ready()
        if progress is not None:
            progress(i + 1, functools.partial(estimate, method, before, x, at, told.edit, memory))
    return x


@functools.partial(Program, static_argnums=0, donate_argnums=2)
def step(
    method: Method,
    params: Any,
    x: Float[Array, "b t h w c"],
    at: Step,
    weights: tuple[Array, Array],
    told: Told,
    memory: Any,
    kept: Kept | None = None,
) -> tuple[Array, Any, Kept | None]:
    """One step; the latents are donated.

    Args:
      x: latents at `at.times[1]`; given frames hold their clean latents until they start to move.
      weights: of `guide`.
      told: with the conditions of all passes, or of the first alone: then what guidance added before is added again.
      memory: the solver's.
      kept: None = nothing is taken from the step before, and nothing is left to the next.
    """
    moving, fresh, start = _start(method.process, x, at, told.edit)
    outputs, residual = _passes(method.denoise, params, start, at.times[1], moving, told, kept and kept.residual)
    predictions = outputs[..., : x.shape[-1]].astype(jnp.float32)
    if kept is not None and len(predictions) == 1:
        prediction, extra = predictions[0] + kept.extra, kept.extra
    else:
        prediction = guide(predictions, *weights)
        extra = prediction - predictions[0]
    end, memory = method.solver.step(method.process, start, prediction, at._replace(fresh=fresh), memory)
    end = end if told.edit is None else jnp.where(moving[:, :, None, None, None], end, x)
    return end, memory, None if kept is None else Kept(extra, residual)


@functools.partial(Program, static_argnums=0)
def estimate(
    method: Method, x: Array, end: Array, at: Step, edit: Array | None, memory: Any
) -> Float[Array, "b t h w c"]:
    """The clean latents that the step from `x` to `end` aimed at; what is given and does not move stays."""
    moving, fresh, start = _start(method.process, x, at, edit)
    clean = method.solver.clean(method.process, start, end, at._replace(fresh=fresh), memory)
    return clean if edit is None else jnp.where(moving[:, :, None, None, None], clean, end)


def moving_frames(edit, times) -> tuple[Any, Any]:
    """Which latent frames move at a step, and which of them start to: bool [b, t] both, NumPy's or JAX's.

    Args:
      edit: of `Told`.
      times: the timestep before, this one, the next one.
    """
    before, now, _ = times
    moving = edit * np.float32(NUM_TIMESTEPS) >= now
    return moving, moving & ~(edit * np.float32(NUM_TIMESTEPS) >= before)


def _start(
    process: Process, x: Array, at: Step, edit: Array | None
) -> tuple[Bool[Array, "b t"] | None, Bool[Array, "b t"] | None, Array]:
    """`moving_frames`, and the latents with noise in those that start to."""
    if edit is None:
        return None, None, x
    moving, fresh = moving_frames(edit, at.times)
    noisy = process.add_noise(x, at.noise, jnp.broadcast_to(at.times[1], len(x)))
    return moving, fresh, jnp.where(fresh[:, :, None, None, None], noisy, x)


def _passes(denoise, params, x, now, frame_mask, told: Told, residual) -> tuple[Array, Array | None]:
    """The passes of `guide`, stacked, and what the blocks added."""
    passes = len(told.conditions["text"]) // len(x)
    optional = {} if residual is None else {"residual": residual}
    out, residual = denoise(
        params,
        jnp.concatenate([x] * passes),
        jnp.concatenate([jnp.broadcast_to(now, len(x))] * passes),
        frame_mask=None if frame_mask is None else jnp.concatenate([frame_mask] * passes),
        features=told.features,
        **told.conditions,
        **optional,
    )
    return out.reshape(passes, *x.shape[:-1], -1), residual


def step_noise(key: PRNGKeyArray, step: int | Array, shape: tuple[int, ...]) -> Float[Array, "b t h w c"]:
    """The noise of step `step`, the same whatever runs the steps."""
    return jax.random.normal(jax.random.fold_in(key, step), shape)
