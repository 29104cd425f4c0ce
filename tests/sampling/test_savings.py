"""What may be left out of sampling to be faster: what is computed when, and what comes out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tora_jax.configs.sampling import Settings

from tora_jax.conditioning.images import Given
from tora_jax.diffusion import rectified_flow
from tora_jax.errors import UserError
from tora_jax.sampling.conditions import Inputs
from tora_jax.sampling.generate import generate_batch

SIZE = {"height": 32, "width": 32, "num_frames": 5, "steps": 6, "guidance": 3.0}


@pytest.fixture
def calls(monkeypatch, tiny_models):
    """(passes, were the blocks computed?) of each step."""
    seen = []
    real = type(tiny_models).saving_step.func(tiny_models)

    def spy(params, x, window, guidance, weight, conditions, features, edit, noise, memory, ratio, residual):
        seen.append((len(conditions["text"]), residual is None))
        return real(params, x, window, guidance, weight, conditions, features, edit, noise, memory, ratio, residual)

    monkeypatch.setitem(tiny_models.__dict__, "saving_step", spy)
    return seen


def run(models, images=None, **changes):
    inputs, settings = Inputs("a red star.", images=images or {}), Settings(**{**SIZE, **changes})
    return generate_batch(models, [inputs], settings, seeds=[0])[0].latents


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"solver": "ab2"}, [(2, True)] * 6),
        ({"guidance_from": 0.5}, [(1, True)] * 3 + [(2, True)] * 3),
        ({"guidance_to": 0.5}, [(2, True)] * 3 + [(1, True)] * 3),
        ({"guidance_every": 3}, [(2, True), (1, True), (1, True)] * 2),
        ({"cache_every": 2}, [(2, True), (2, True), (2, True), (2, False), (2, True), (2, True)]),
    ],
)
def test_what_is_computed(tiny_models, calls, changes, want):
    plain = run(tiny_models)
    assert not calls
    got = run(tiny_models, **changes)
    assert calls == want
    assert np.isfinite(got).all()
    assert np.abs(got - plain).max() > 0


def test_nothing_left_out_is_the_plain_sampler(tiny_models, calls):
    """Through the saving step, too: guidance in the whole of the steps, though `guidance_to` says it otherwise."""
    plain = run(tiny_models, images={0: np.zeros((32, 32, 3), np.uint8)})
    saved = run(tiny_models, cache_every=100, images={0: np.zeros((32, 32, 3), np.uint8)}, steps=2)
    assert calls == [(2, True)] * 2
    np.testing.assert_array_equal(saved[0], plain[0])  # what is given stays
    again = run(tiny_models, images={0: np.zeros((32, 32, 3), np.uint8)}, steps=2)
    np.testing.assert_allclose(saved, again, atol=1e-5)


def test_nothing_is_kept_over_the_start_of_a_frame(tiny_models, calls):
    given = {4: Given(np.zeros((32, 32, 3), np.uint8), 0.5)}
    run(tiny_models, guidance_every=100, cache_every=100, images=given)
    start = next(i for i, t in enumerate(rectified_flow.sampling_times(6, 32, 32, 2)[1:]) if t <= 500)
    want = [(2, True), (1, True), *[(1, False)] * 3, (1, True)]
    want[start] = (2, True)
    if start < 4:
        want[start + 1] = (1, True)  # the blocks' part of one pass is not that of two
    assert calls == want


def test_the_order_of_the_solvers():
    """On dx/ds = x, solved over 1: halving the steps doubles Euler's error, and quadruples Adams-Bashforth's."""

    def error(steps: int, order: int) -> float:
        times = np.concatenate([[1000], np.linspace(1000, 0, steps + 1)]).astype(np.float32)
        x = jnp.ones((1, 1, 1, 1, 1))
        memory = rectified_flow.Memory(jnp.zeros_like(x), jnp.zeros_like(x))
        for i in range(steps):
            ratio = 1.0 if order == 2 and i else 0.0
            x, memory = rectified_flow.saving_step(
                lambda x, t, mask: x[None], x, times[i : i + 3], 1.0, 1.0, None, None, memory, ratio
            )
        return abs(float(x[0, 0, 0, 0, 0]) - np.e)

    assert error(16, 1) / error(32, 1) == pytest.approx(2, rel=0.1)
    assert error(16, 2) / error(32, 2) == pytest.approx(4, rel=0.15)
    assert error(16, 2) < error(16, 1) / 5


def test_guidance_that_is_kept_is_guidance():
    """With velocities that do not change, keeping what guidance adds changes nothing."""
    velocities = jax.random.normal(jax.random.key(0), (3, 2, 2, 1, 1, 4))
    x, times = jnp.zeros((2, 2, 1, 1, 4)), np.float32([1000, 800, 500])
    memory = rectified_flow.Memory(jnp.zeros_like(x), jnp.zeros_like(x))
    want = rectified_flow.sampling_step(lambda *_: velocities, x, times, 3.0, 2.0)
    got, memory = rectified_flow.saving_step(lambda *_: velocities, x, times, 3.0, 2.0, None, None, memory)
    kept, _ = rectified_flow.saving_step(lambda *_: velocities[:1], x, times, 3.0, 2.0, None, None, memory)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(kept, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"solver": "rk4"},
        {"guidance_from": 0.6, "guidance_to": 0.5},
        {"guidance_to": float("nan")},
        {"guidance_every": 0},
        {"cache_every": 0},
    ],
)
def test_wrong_values(tiny_models, changes):
    with pytest.raises(UserError):
        run(tiny_models, **changes)
