"""What may be left out of sampling to be faster: what is computed when, and what comes out."""

import numpy as np
import pytest
from tora_jax.configs.sampling import Settings

from tora_jax.conditioning.images import Given
from tora_jax.diffusion import sampler
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.errors import UserError
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs

SIZE = {"height": 32, "width": 32, "num_frames": 5, "steps": 6, "guidance": 3.0}


@pytest.fixture
def calls(monkeypatch):
    """(passes, were the blocks computed?) of each step that keeps something."""
    seen, real = [], sampler.step

    def spy(method, params, x, at, weights, told, memory, kept):
        if kept is not None:
            seen.append((len(told.conditions["text"]), kept.residual is None))
        return real(method, params, x, at, weights, told, memory, kept)

    monkeypatch.setattr(sampler, "step", spy)
    return seen


def run(models, images=None, **changes):
    inputs, settings = Inputs("a red star.", images=images or {}), Settings(**{**SIZE, **changes})
    return generate_batch(models, [inputs], settings, seeds=[0])[0].latents


@pytest.mark.parametrize(
    ("changes", "want"),
    [
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
    """Through steps that keep something, too: guidance in all of them, though `guidance_to` says it otherwise."""
    plain = run(tiny_models, images={0: np.zeros((32, 32, 3), np.uint8)})
    kept = run(tiny_models, cache_every=100, images={0: np.zeros((32, 32, 3), np.uint8)}, steps=2)
    assert calls == [(2, True)] * 2
    np.testing.assert_array_equal(kept[0], plain[0])  # what is given stays
    again = run(tiny_models, images={0: np.zeros((32, 32, 3), np.uint8)}, steps=2)
    np.testing.assert_allclose(kept, again, atol=1e-5)


def test_nothing_is_kept_over_the_start_of_a_frame(tiny_models, calls):
    given = {4: Given(np.zeros((32, 32, 3), np.uint8), 0.5)}
    run(tiny_models, guidance_every=100, cache_every=100, images=given)
    start = next(i for i, t in enumerate(RectifiedFlow().times(6, 32, 32, 2)[1:]) if t <= 500)
    want = [(2, True), (1, True), *[(1, False)] * 3, (1, True)]
    want[start] = (2, True)
    if start < 4:
        want[start + 1] = (1, True)  # the blocks' part of one pass is not that of two
    assert calls == want


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
