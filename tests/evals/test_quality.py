"""Measures of pixels against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from tora_jax.data.sprites.clips import make_clip
from tora_jax.evals import quality


def constant(value, shape=(2, 16, 16, 3)):
    return np.full(shape, value, np.uint8)


def test_psnr():
    assert quality.psnr(constant(100), constant(100)) == pytest.approx(100)
    assert quality.psnr(constant(100), constant(110)) == pytest.approx(20 * np.log10(25.5))
    truth = jnp.zeros((2, 3, 4, 4, 3))
    video = truth + jnp.array([0.02, 0.2]).reshape(2, 1, 1, 1, 1)
    np.testing.assert_allclose(quality.psnr(video, truth, span=2), [40, 20], rtol=1e-4)


def test_ssim_of_constants():
    """Without structure only the lightness counts."""
    a, b = 60.0, 90.0
    want = (2 * a * b + quality.C1) / (a * a + b * b + quality.C1)
    assert quality.ssim(constant(60), constant(90)) == pytest.approx(want, rel=1e-6)
    assert quality.ssim(constant(60, (1, 4, 4, 3)), constant(60, (1, 4, 4, 3))) == pytest.approx(1)


def test_ssim_by_the_formula():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 1, 24, 32, 3), np.uint8)
    y = (0.7 * x + 0.3 * y).astype(np.uint8)

    def blur(image):
        return ndimage.gaussian_filter(image, (1.5, 1.5, 0), truncate=5 / 1.5)

    a, b = x[0].astype(float), y[0].astype(float)
    va, vb, vab = blur(a * a) - blur(a) ** 2, blur(b * b) - blur(b) ** 2, blur(a * b) - blur(a) * blur(b)
    c1, c2 = 6.5025, 58.5225
    full = (2 * blur(a) * blur(b) + c1) * (2 * vab + c2) / ((blur(a) ** 2 + blur(b) ** 2 + c1) * (va + vb + c2))
    assert quality.ssim(x, y) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-4)


def test_flicker_is_what_changes_without_moving():
    still = np.repeat(make_clip(0, "benchmark_one").video[:1], 8, 0)
    assert quality.steadiness(still)["flicker"] < 0.1
    assert quality.steadiness(still)["motion"] < 0.1
    blinking = still.astype(int) + 10 * (np.arange(8) % 2)[:, None, None, None]
    assert quality.steadiness(np.clip(blinking, 0, 255).astype(np.uint8))["flicker"] == pytest.approx(10, abs=1.5)


def test_motion_is_the_flow():
    """A whole picture that slides 2 pixels a frame at 100 pixels."""
    world = np.random.default_rng(0).normal(size=(140, 140, 3))
    world = ndimage.gaussian_filter(world, (3, 3, 0))
    world = np.clip(128 + 50 * world / world.std(), 0, 255).astype(np.uint8)
    video = np.stack([world[20:120, 2 * j : 2 * j + 100] for j in range(8)])
    found = quality.steadiness(video)
    assert found["motion"] == pytest.approx(2, abs=0.1)
    assert found["flicker"] < 1.5
    assert quality.steadiness(video[:1]) == {"flicker": 0.0, "motion": 0.0}
