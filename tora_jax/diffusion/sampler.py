"""The steps of the sampler one after the other, and what may be left out of them to be faster."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tora_jax.backbones.assembly import Models
from tora_jax.diffusion import rectified_flow
from tora_jax.errors import UserError


class Savings(NamedTuple):
    """What may be left out to be faster; nothing by default. docs/sampling.md has what each saves and costs.

    Attributes:
      solver: "euler", or "ab2", the two-step Adams-Bashforth method, which needs fewer steps.
      guidance_from, guidance_to: the part of the steps, 0..1, in which there is guidance at all.
      guidance_every: the passes of guidance are computed at every so many steps; what they add is kept between.
      cache_every: the blocks are computed at every so many steps; what they add is kept between. The first two steps
        and the last are always computed.
    """

    solver: str = "euler"
    guidance_from: float = 0.0
    guidance_to: float = 1.0
    guidance_every: int = 1
    cache_every: int = 1

    def check(self) -> None:
        """Raises a `UserError` for a value out of its range."""
        if self.solver not in ("euler", "ab2"):
            raise UserError(f"solver is {self.solver!r}; choose euler or ab2")
        if not 0 <= self.guidance_from <= self.guidance_to <= 1:
            span = f"{self.guidance_from} to {self.guidance_to}"
            raise UserError(f"guidance_from and guidance_to are {span}; give two numbers that rise within 0 to 1")
        for name in ("guidance_every", "cache_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")


def run(
    models: Models,
    x: Float[Array, "b t h w c"],
    times: Float[np.ndarray, "steps_plus_2"],
    weights: tuple[float, float],
    conditions: Mapping[str, Array],
    features: Float[Array, "depth b t2 h2 w2 m"] | None = None,
    edit: Float[Array, "b t"] | None = None,
    noise: Callable[[int], Array] | None = None,
    savings: Savings = Savings(),  # noqa: B008 (immutable)
    progress: Callable[[int], None] | None = None,
) -> Float[Array, "b t h w c"]:
    """All steps from noise to latents. The denoiser's parameters are on the device as long as this runs.

    Args:
      x: noise, and what is given; donated.
      times: of `rectified_flow.sampling_times`.
      weights: of guidance and of trajectory guidance.
      conditions: of the denoiser, for all passes of `rectified_flow.guide`, stacked along the batch.
      features: of `Models.extract`.
      edit: see `rectified_flow.sampling_step`.
      noise: step -> the noise for frames that start there; needed with `edit`.
      progress: called after each step with the number of steps done.
    """
    params, steps = jax.device_put(models.params["tora"]), len(times) - 2
    step = functools.partial(models.step, params)
    if savings != Savings():
        step = _saving(models, params, savings, steps, edit)
    weights = tuple(map(jnp.float32, weights))
    for i in range(steps):
        drawn = None if edit is None else noise(i)
        x = step(x, jnp.asarray(times[i : i + 3]), *weights, conditions, features, edit, drawn)
        # Waiting here keeps the progress bar honest, and Ctrl-C within one step.
        x.block_until_ready()
        if progress is not None:
            progress(i + 1)
    return x


def _saving(models: Models, params: Mapping, savings: Savings, steps: int, given: Array | None) -> Callable:
    """Steps like `Models.step`, called one after the other, that leave out what `savings` says."""
    done, memory, residual, before = 0, None, None, 0.0
    given = None if given is None else np.asarray(given)

    def step(x, window, guidance, trajectory_guidance, conditions, features, edit, noise):
        nonlocal done, memory, residual, before
        share, i = done / steps, done
        done += 1
        if memory is None:
            memory = rectified_flow.Memory(jnp.zeros_like(x), jnp.zeros_like(x))
        guided = savings.guidance_from <= share < savings.guidance_to
        first = math.ceil(savings.guidance_from * steps)
        if not guided:
            memory = memory._replace(extra=jnp.zeros_like(x))
        # What was kept says nothing of a frame that starts to move.
        starting = given is not None and rectified_flow.moving_frames(given, np.asarray(window))[1].any()
        if not guided or ((i - first) % savings.guidance_every and not starting):
            conditions = jax.tree.map(lambda rows: rows[: len(x)], conditions)
        known = residual is not None and len(residual) == len(conditions["text"])
        cached = known and not starting and 1 < i < steps - 1 and i % savings.cache_every > 0
        length = float(window[1] - window[2])
        ratio = jnp.float32(length / before if savings.solver == "ab2" and i else 0.0)
        before = length
        weights = guidance, trajectory_guidance
        rest = conditions, features, edit, noise, memory, ratio, residual if cached else None
        x, memory, residual = models.saving_step(params, x, window, *weights, *rest)
        return x

    return step
