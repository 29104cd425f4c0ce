"""Solvers on flows that can be solved by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stepping import Stepper
from tora_jax.diffusion import sampler
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.diffusion.solvers import SOLVERS
from tora_jax.typing import Step

SHAPE = (2, 3, 2, 2, 4)


def test_the_order_of_the_solvers():
    """On dx/ds = x, solved over 1: halving the steps doubles Euler's error, and quadruples Adams-Bashforth's."""

    def error(steps: int, solver: str) -> float:
        times = np.concatenate([[1000], np.linspace(1000, 0, steps + 1)])
        step, x = Stepper(lambda x, t, mask: x[None], times, solver), jnp.ones((1, 1, 1, 1, 1))
        for _ in range(steps):
            x = step(x)
        return abs(float(x[0, 0, 0, 0, 0]) - np.e)

    assert error(16, "euler") / error(32, "euler") == pytest.approx(2, rel=0.1)
    assert error(16, "ab2") / error(32, "ab2") == pytest.approx(4, rel=0.15)
    assert error(16, "ab2") < error(16, "euler") / 5


def test_second_order_steps_do_not_look_back_at_a_frame_without_noise():
    """A frame that starts to move has a constant velocity from there on; what the model said before is far off."""
    data, noise = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    edit = jnp.tile(jnp.array([0, 1, 0.5]), (2, 1))

    def predict(x, timestep, frame_mask):
        return jnp.where(frame_mask[..., None, None, None], data - noise, 1e3)[None]

    step = Stepper(predict, [1000, 1000, 750, 500, 250, 0], "ab2", edit=edit)
    x = jnp.where((edit < 1)[..., None, None, None], data, noise)
    for _ in range(4):
        x = step(x, noise)
    np.testing.assert_allclose(x, data, atol=1e-5)


def test_guidance_that_is_kept_is_guidance():
    """With velocities that do not change, keeping what guidance adds changes nothing."""
    velocities = jax.random.normal(jax.random.key(0), (3, 2, 2, 1, 1, 4))
    x, times = jnp.zeros((2, 2, 1, 1, 4)), [1000, 800, 500]
    shown = []

    def step(passes: int, kept) -> tuple:
        stepper = Stepper(lambda *_: velocities[:passes], times, "ab2", 3.0, 2.0)
        stepper.kept = kept
        shown.append(stepper(x, passes=passes))
        return stepper.kept

    step(3, None)
    kept = step(3, sampler.Kept(jnp.zeros_like(x)))
    step(1, kept)
    want, got, again = shown
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(again, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_a_step_aims_at_clean_latents(solver):
    """On a straight line, wherever the step is, that is its end."""
    data, noise = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    flow, solver, now = RectifiedFlow(), SOLVERS[solver], jnp.full(2, 750.0)
    at = Step(jnp.float32([1000, 750, 400]), solver.coefficients(flow, np.float32([1000, 750, 400]), 0))
    x = flow.add_noise(data, noise, now)
    end, memory = solver.step(flow, x, data - noise, at, solver.init(x))
    np.testing.assert_allclose(solver.clean(flow, x, end, at, memory), data, atol=1e-5)
