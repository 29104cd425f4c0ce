"""Solvers, from noise to data; see `typing.Solver`. Those here solve the flow's equation dx = v dt.

A new solver is a frozen dataclass and one line in SOLVERS.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tora_jax.diffusion import v_prediction
from tora_jax.diffusion.rectified_flow import NUM_TIMESTEPS, RectifiedFlow
from tora_jax.errors import UserError
from tora_jax.typing import Process, Solver, Step


@dataclasses.dataclass(frozen=True)
class Euler:
    """First order: the velocity at the start of the step holds for all of it."""

    process: ClassVar[type] = RectifiedFlow
    noisy: ClassVar[bool] = False

    def init(self, x: Array) -> tuple:
        return ()

    def coefficients(self, process: Process, times: np.ndarray, step: int) -> tuple:
        return ()

    def step(self, process: Process, x: Array, prediction: Array, at: Step, memory: tuple) -> tuple[Array, tuple]:
        return x + prediction * _length(at), memory

    def clean(self, process: Process, x: Array, end: Array, at: Step, memory: tuple) -> Array:
        return process.clean(end, (end - x) / _length(at), jnp.broadcast_to(at.times[2], len(x)))


@dataclasses.dataclass(frozen=True)
class AdamsBashforth2:
    """Second order: two steps' velocities are extrapolated to the middle of the step.

    The memory is the velocity of the step before. A frame that starts to move takes Euler's step: the velocity before
    was that of a frame without noise.
    """

    process: ClassVar[type] = RectifiedFlow
    noisy: ClassVar[bool] = False

    def init(self, x: Array) -> Array:
        return jnp.zeros_like(x)

    def coefficients(self, process: Process, times: np.ndarray, step: int) -> np.float32:
        """The length of this step over that of the one before; 0 = Euler's step."""
        before, length = (float(times[i] - times[i + 1]) for i in (step, step + 1))
        return np.float32(length / before if step else 0.0)

    def step(self, process: Process, x: Array, prediction: Array, at: Step, memory: Array) -> tuple[Array, Array]:
        ratio = at.coefficients
        if at.fresh is not None:
            ratio = jnp.where(at.fresh, 0.0, ratio)[:, :, None, None, None]
        middle = prediction + ratio / 2 * (prediction - memory)
        return x + middle * _length(at), prediction

    def clean(self, process: Process, x: Array, end: Array, at: Step, memory: Array) -> Array:
        return process.clean(end, memory, jnp.broadcast_to(at.times[2], len(x)))


def _length(at: Step) -> Float[Array, ""]:
    """Of the step, on the 0..1 scale."""
    _, now, after = at.times
    return (now - after) / NUM_TIMESTEPS


# By the name that `--solver` and the configs use.
SOLVERS: dict[str, Solver] = {
    "euler": Euler(),
    "ab2": AdamsBashforth2(),
    "dpm2m_sde": v_prediction.DPM2MSDE(),
    "ddim": v_prediction.DDIM(),
}


def find(name: str, process: Process | None = None) -> Solver:
    """The solver of that name.

    Args:
      process: that it must solve; None = any.

    Raises:
      UserError: there is none.
    """
    known = [each for each, solver in SOLVERS.items() if process is None or isinstance(process, solver.process)]
    if name not in known:
        raise UserError(f"solver is {name!r}; choose {' or '.join(known)}")
    return SOLVERS[name]
