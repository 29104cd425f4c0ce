"""v-prediction, its solvers and its guidance where the golden files say nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax import typing
from tora_jax.diffusion import solvers
from tora_jax.diffusion.v_prediction import CLEAN, GUIDANCE, VPrediction
from tora_jax.typing import Step

PROCESSES = [VPrediction(), VPrediction("sat")]


def test_what_the_loop_asks_for():
    assert all(isinstance(process, typing.Process) for process in PROCESSES)
    assert all(isinstance(solver, typing.Solver) for solver in solvers.SOLVERS.values())


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", ["dpm2m_sde", "ddim"])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_perfect_prediction_ends_at_the_data(process, name, steps):
    """A denoiser that knows the data: each step aims at them, and the last one arrives."""
    solver, times = solvers.find(name, process), process.times(steps)
    data, x = jax.random.normal(jax.random.key(0), (2, 1, 2, 2, 2, 3))
    memory = solver.init(x)
    for i in range(steps):
        levels = process.levels(times, i)
        v = (levels.read * x - data) / np.sqrt(1 - levels.read**2)
        noise = jax.random.normal(jax.random.key(i + 1), x.shape) if solver.noisy else None
        at = Step(jnp.asarray(times[i : i + 3]), solver.coefficients(process, times, i), noise)
        end, memory = solver.step(process, x, v, at, memory)
        np.testing.assert_allclose(solver.clean(process, x, end, at, memory), data, atol=1e-3)
        x = end
    np.testing.assert_allclose(x, data, atol=1e-3)


def test_where_the_last_step_ends():
    """At 7 steps diffusers' last one ends at timestep 0, which is not clean."""
    for steps, end in ((50, CLEAN), (30, CLEAN), (7, 0), (1000, CLEAN)):
        times = VPrediction().times(steps)
        assert times[-1] == end
        assert (VPrediction().levels(times, steps - 1).end == 1) == (end == CLEAN)
        assert VPrediction("sat").times(steps)[-1] == CLEAN
    with pytest.raises(ValueError, match="1 to 1000"):
        VPrediction().times(1001)


def test_guidance():
    times = VPrediction().times(50)
    scales = GUIDANCE["dynamic"](6.0, times)
    np.testing.assert_allclose(scales[:5], [2.29, 2.54, 6.97, 6.42, 2.79], atol=5e-3)
    np.testing.assert_allclose(scales[-5:], [6.86, 1.06, 1, 1, 1.12], atol=5e-3)
    np.testing.assert_array_equal(GUIDANCE["constant"](6.0, times), np.full(50, 6.0))


def test_training_timesteps():
    draw = VPrediction().draw_timesteps
    keys, size = jax.random.split(jax.random.key(0), 20000), (jnp.zeros(20000), jnp.zeros(20000), 13)
    t = draw(keys, *size, "uniform", False)
    assert (t.min(), t.max(), t.dtype) == (0, 999, jnp.float32)
    np.testing.assert_array_equal(t, jnp.round(t))
    assert abs(t.mean() - 499.5) < 8
    for method, transform in (("logit_normal", False), ("uniform", True)):
        with pytest.raises(ValueError, match="uniform"):
            draw(keys, *size, method, transform)


def test_an_unknown_spacing():
    with pytest.raises(ValueError, match="trailing or sat"):
        VPrediction("leading")
