"""Sampling and losses on models that can be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stepping import Stepper
from tora_jax.diffusion import sampler
from tora_jax.diffusion.guidance import guide
from tora_jax.diffusion.loss import training_loss
from tora_jax.diffusion.rectified_flow import RectifiedFlow, sample_timesteps

SHAPE = (2, 3, 2, 2, 4)
FLOW = RectifiedFlow()


@pytest.fixture
def data():
    return jax.random.normal(jax.random.key(0), SHAPE)


@pytest.fixture
def noise():
    return jax.random.normal(jax.random.key(1), SHAPE)


def towards(target):
    """The exact velocity field that ends at `target`, as one pass."""

    def predict(x, timestep, frame_mask):
        return ((target - x) / (timestep / 1000)[:, None, None, None, None])[None]

    return predict


@pytest.mark.parametrize("steps", [1, 7])
def test_the_exact_velocity_reaches_the_data(data, noise, steps):
    step, x = Stepper(towards(data), FLOW.times(steps, 64, 64, 3)), noise
    for _ in range(steps):
        x = step(x)
    np.testing.assert_allclose(x, data, atol=1e-5)


def test_kept_frames_stay_and_edited_frames_start_late(data, noise):
    """Frame 0 is kept to the bit; frame 2, with ratio 0.5, is untouched until the timestep falls under 500."""
    edit = jnp.tile(jnp.array([0, 1, 0.5]), (2, 1))
    start = jnp.where((edit < 1)[..., None, None, None], data, noise)
    times, key = FLOW.times(10, 512, 512, 1), jax.random.key(3)
    x, seen = start, []

    def predict(x, timestep, frame_mask):
        seen.append(np.asarray(frame_mask))
        return towards(data + 1)(x, timestep, frame_mask)

    step = Stepper(predict, times, edit=edit)
    for i in range(10):
        x = step(x, sampler.step_noise(key, i, SHAPE))
        np.testing.assert_array_equal(x[:, 0], data[:, 0])
        moved = bool(np.abs(x[:, 2] - data[:, 2]).max() > 0)
        assert moved == (times[i + 1] <= 500) == seen[i][0, 2]
    np.testing.assert_allclose(x[:, 1:], data[:, 1:] + 1, atol=1e-4)


@pytest.mark.parametrize(("side", "frames"), [(64, 5), (64, 3), (128, 5), (512, 15), (1280, 60)])
def test_frames_to_generate_move_from_the_first_step(side, frames):
    """Rounding in the timestep transform must not leave them behind."""
    times = FLOW.times(3, side, side, frames)
    assert (np.diff(times) <= 0).all()
    masks = []

    def predict(x, timestep, frame_mask):
        masks.append(np.asarray(frame_mask))
        return x[None]

    edit, x = jnp.array([[0.0, 1.0]]), jnp.zeros((1, 2, 1, 1, 1))
    Stepper(predict, times, edit=edit)(x, x)
    np.testing.assert_array_equal(masks[0], [[False, True]])


def test_guidance_formula():
    full, no_text, no_motion = jax.random.normal(jax.random.key(4), (3, *SHAPE))
    g, w = 7.0, 2.5
    np.testing.assert_array_equal(guide(full[None], g, w), full)
    two = guide(jnp.stack([full, no_text]), g, w)
    np.testing.assert_allclose(two, no_text + g * (full - no_text), rtol=1e-6)
    three = guide(jnp.stack([full, no_text, no_motion]), g, w)
    np.testing.assert_allclose(three, two + (w - 1) * (full - no_motion), rtol=1e-5, atol=1e-5)


def test_loss_of_the_exact_velocity_is_zero(data, noise):
    loss = training_loss(FLOW, lambda x, t: data - noise, data, noise, jnp.array([10.0, 990.0]))
    np.testing.assert_array_equal(loss, [0, 0])


def test_masked_frames_get_no_noise_and_no_loss(data, noise):
    mask, seen = jnp.array([[True, False, True], [False, False, False]]), []

    def predict(x, timestep):
        seen.append(x)
        return jnp.where(mask[..., None, None, None], data - noise + 2, 1e6)

    loss = training_loss(FLOW, predict, data, noise, jnp.array([500.0, 500.0]), mask)
    np.testing.assert_allclose(loss, [4, 0], rtol=1e-5)
    np.testing.assert_array_equal(seen[0][0, 1], data[0, 1])
    assert np.abs(seen[0][0, 0] - data[0, 0]).max() > 0.1


def test_only_the_velocity_channels_count(data, noise):
    predict = lambda x, t: jnp.concatenate([data - noise, jnp.full_like(data, 9)], -1)  # noqa: E731
    loss = training_loss(FLOW, predict, data, noise, jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(loss, [0, 0])


def test_training_timesteps():
    uniform = sample_timesteps(jax.random.key(5), 20000, "uniform")
    normal = sample_timesteps(jax.random.key(5), 20000)
    for t in (uniform, normal):
        assert t.min() >= 0
        assert t.max() <= 1000
        assert abs(float(t.mean()) - 500) < 10
    assert abs(float(uniform.std()) - 1000 / 12**0.5) < 5
    assert abs(float(jnp.std(jax.scipy.special.logit(normal / 1000))) - 1) < 0.03
    with pytest.raises(ValueError, match="distribution"):
        sample_timesteps(jax.random.key(5), 2, "cosine")


def test_longer_and_larger_videos_see_more_noise():
    t = np.float32([0, 250, 500, 750, 1000])
    small, large = (FLOW.shift(t, s, s, n) for s, n in ((256, 1), (512, 15)))
    assert (large[1:-1] > small[1:-1]).all()
    np.testing.assert_allclose(small[[0, -1]], [0, 1000], atol=1e-3)
    np.testing.assert_allclose(FLOW.shift(t, 512, 512, 1), t, rtol=1e-6)
    inside = jax.jit(FLOW.shift)(jnp.asarray(t), 512, 512, 15)
    np.testing.assert_allclose(inside, large, rtol=1e-5)


def test_weights_of_cells(data, noise):
    """An error of 2 everywhere, with weights 1 and 3 in halves of the cells."""
    weight = jnp.ones(data.shape[:-1]).at[..., : data.shape[-2] // 2].set(3.0)
    loss = training_loss(FLOW, lambda x, t: data - noise + 2, data, noise, jnp.array([1.0, 2.0]), None, weight)
    np.testing.assert_allclose(loss, 4 * weight.mean((1, 2, 3)), rtol=1e-5)


def test_the_process_knows_the_clean_latents(data, noise):
    timestep = jnp.array([250.0, 1000.0])
    x = FLOW.add_noise(data, noise, timestep)
    np.testing.assert_allclose(FLOW.clean(x, FLOW.target(data, noise, timestep), timestep), data, atol=1e-5)
