"""The Frechet distance against closed forms, and FVD's resizing against TensorFlow 1's rule."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tora_jax.errors import UserError
from tora_jax.evals import fvd
from tora_jax.models.i3d import I3D, I3DFeatures


def exact(mean, root, count, seed=0):
    """Features with exactly this mean, and root^T root as covariance."""
    x = np.random.default_rng(seed).standard_normal((count, len(mean)))
    x -= x.mean(0)
    white = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)
    return white @ root + mean


def by_sqrtm(first, second):
    """The usual way: scipy's square root of the product of the covariances."""
    covariances = [np.cov(x, rowvar=False) for x in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    apart = np.square(first.mean(0) - second.mean(0)).sum()
    return apart + sum(np.trace(c) for c in covariances) - 2 * np.trace(root).real


@pytest.mark.parametrize("count", [20, 200])
def test_equal_sets(count):
    """Exactly 0, also where the covariance is singular."""
    features = np.random.default_rng(0).normal(3, 5, (count, 100)).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fvd.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
        assert fvd.frechet_distance(features, features[::-1]) == pytest.approx(0, abs=1e-6)


def test_gaussians_of_known_moments():
    """Covariances that commute: |m1 - m2|^2 + sum of (s1 - s2)^2."""
    rng = np.random.default_rng(1)
    turn = scipy.linalg.qr(rng.standard_normal((12, 12)))[0]
    means, deviations = rng.normal(0, 3, (2, 12)), rng.uniform(0.1, 4, (2, 12))
    first, second = (
        exact(mean, np.diag(s) @ turn, n, n) for mean, s, n in zip(means, deviations, (50, 80), strict=True)
    )
    want = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert fvd.frechet_distance(first, second) == pytest.approx(want, abs=1e-3)


def test_one_number():
    first, second = np.array([[0.0], [2.0]]), np.array([[5.0], [5.0], [8.0]])
    want = (1 - 6) ** 2 + (np.sqrt(2) - np.sqrt(3)) ** 2
    assert fvd.frechet_distance(first, second) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    first, second = (
        rng.standard_normal((n, 40)) @ rng.normal(0, 1, (40, 40)) + rng.normal(0, 2, 40) for n in (300, 200)
    )
    assert fvd.frechet_distance(first, second) == pytest.approx(by_sqrtm(first, second), rel=1e-6)


def test_small_samples_warn_and_too_small_ones_stop():
    features = np.random.default_rng(0).standard_normal((5, 8))
    with pytest.warns(UserWarning, match="FVD from 5 videos, 8 features each: biased upwards"):
        fvd.frechet_distance(features, features + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fvd.frechet_distance(features[:, :4], features[:, :4])
    with pytest.raises(UserError, match="at least 2 videos in each set; there are 1"):
        fvd.frechet_distance(features, features[:1])
    with pytest.raises(UserError, match="not finite"):
        fvd.frechet_distance(features, features * np.nan)


@pytest.mark.parametrize("size", [(3, 5), (300, 480), (224, 224), (1, 7)])
def test_resizing_is_tensorflows_of_old(size):
    """Pixel i of the result lies at i * old / new of the picture; the last pixels go on beyond its edge."""
    video = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    got = fvd.resize(video)
    assert got.shape == (2, 224, 224, 3)
    assert got.dtype == np.float32
    height, width = size
    for i, j in ((0, 0), (0, 223), (223, 223), (100, 57), (161, 8)):
        y, x = i * height / 224, j * width / 224
        y0, x0 = int(y), int(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        rows = [video[0, row, x0] * (1 - x + x0) + video[0, row, x1] * (x - x0) for row in (y0, y1)]
        want = (rows[0] * (1 - y + y0) + rows[1] * (y - y0)) / 127.5 - 1
        np.testing.assert_allclose(got[0, i, j], want, atol=1e-4)


@pytest.fixture
def fake_i3d(monkeypatch):
    """In the place of the network and its folder: the logits are means of the video's corners, times a weight."""

    class Network:
        def apply(self, variables, video):
            assert video.shape[2:] == (224, 224, 3)
            corners = jnp.stack([video[0, :, 0, 0].mean(), video[0, :, -1, -1].mean()])
            return I3DFeatures(corners[None] * variables["params"], jnp.zeros((1, 1)))

    monkeypatch.setattr(fvd.release, "load_model", lambda folder, part, build: (Network(), jnp.float32(2)))


def test_features(fake_i3d):
    features = fvd.load("weights")
    video = np.full((9, 20, 30, 3), 255, np.uint8)
    video[:, :5, :5] = 0
    np.testing.assert_allclose(features(video), [-2, 2], atol=1e-6)
    with pytest.raises(UserError, match="at least 9 frames; this one has 8"):
        features(video[:8])


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        fvd.load(tmp_path / "i3d")
    (tmp_path / "config.json").write_text('{"clip": {}}')
    with pytest.raises(UserError, match="holds clip, but no i3d"):
        fvd.load(tmp_path)


def test_the_network_takes_what_resize_gives():
    video = jax.ShapeDtypeStruct((1, *fvd.resize(np.zeros((9, 8, 8, 3), np.uint8)).shape), np.float32)
    shapes = jax.eval_shape(lambda x: I3D().init_with_output(jax.random.key(0), x)[0], video)
    assert shapes.logits.shape == (1, 400)
