"""What the jobs minimise."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tora_jax.configs import common

from tests.training.batches import BATCH, LOSS, make_batch, on_device, without_motion
from tora_jax.backbones import opensora
from tora_jax.errors import UserError
from tora_jax.models.tora import Tora
from tora_jax.models.video_vae import Gaussian, Moments
from tora_jax.training import losses


def test_the_time_scale_of_the_weights_holds_in_training(parts, params):
    """Timesteps of the same draws: t' = s t / (1 + (s - 1) t) for a scale of s times as much."""

    def timesteps(scale: float) -> np.ndarray:
        seen = []

        class Recorder(Tora):
            def apply(self, variables, x, t, *args, **conditions):
                seen.append(np.asarray(t))
                return x

        recorder = Recorder(parts["tora"].stdit, time_scale=scale)
        batch = on_device(make_batch(0))
        keys = losses.sample_keys(jax.random.key(0), 0, batch)
        losses.tora_loss(opensora, {**parts, "tora": recorder}, LOSS)(params, batch, keys)
        return seen[0] / 1000

    one = timesteps(1.0)
    np.testing.assert_allclose(timesteps(5.0), 5 * one / (1 + 4 * one), rtol=1e-5)


def test_near_paths():
    """A cell that differs weighs more, with its neighbours in space and time; a still clip has none."""
    motion = np.zeros((2, 5, 8, 8, 3), np.float32) + np.float32([0.3, -1, 2])
    motion[0, 2, 4, 4] += 1
    near = np.asarray(losses.near_paths(jnp.asarray(motion)))
    touched = np.zeros((5, 8, 8), bool)
    touched[1:4, 3:6, 3:6] = True
    assert near[0][touched].min() > 0.8
    assert np.abs(near[0][~touched]).max() == np.abs(near[1]).max() == 0


def test_weight_beside_the_paths(parts, params):
    """It changes the losses of samples with motion, and them alone."""
    batch = on_device(make_batch(0))
    keys = losses.sample_keys(jax.random.key(0), 0, batch)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def found(batch, weight, drop):
        config = {**LOSS, "path_weight": weight, "drop_motion": drop}
        return losses.tora_loss(opensora, parts, config)(params, batch, keys)[0]

    assert (found(batch, 5.0, 0.0) > found(batch, 0.0, 0.0)).all()
    # Equal but for the rounding of two programs.
    np.testing.assert_allclose(found(batch, 5.0, 1.0), found(batch, 0.0, 1.0), rtol=1e-6)
    still = without_motion(batch)
    np.testing.assert_allclose(found(still, 5.0, 0.0), found(still, 0.0, 0.0), rtol=1e-6)


class Means(nn.Module):
    """A VAE whose latents are the means of 8x8 pixels: it loses nothing of frames in cells of one colour."""

    def moments(self, video, rng):
        clip = nn.avg_pool(video, (1, 8, 8), strides=(1, 8, 8))
        posterior = Gaussian(clip, jnp.zeros_like(clip))
        return Moments(posterior, clip, posterior)

    def decode_frames(self, clip):
        return clip.repeat(8, axis=2).repeat(8, axis=3)


@pytest.mark.parametrize(("cell", "expected"), [(16, 0.0), (8, 0.25)])
def test_coarse_frames(cell, expected):
    """Means of 2x2 latents are to be half the frame: they are where cells are twice as wide as a latent's."""
    rows, columns = np.indices((24, 40)) // cell  # the latents' odd row and column have no half
    checks = np.where((rows + columns) % 2, 255, 0).astype(np.uint8)
    batch = {"video": jnp.asarray(np.broadcast_to(checks[None, None, :, :, None], (2, 3, 24, 40, 3)))}
    config = {**common.vae_loss("spatial"), "l1": 0.0, "kl_spatial": 0.0, "frame": 0.0, "coarse": 0.25}
    loss = losses.vae_loss(Means(), "vae", config)
    total, terms = loss({"vae": {}}, batch, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(total, [expected] * 2, atol=1e-6)
    np.testing.assert_allclose(terms["coarse"], 4 * expected, atol=1e-6)


class Black(Means):
    """A VAE that decodes all latents to black."""

    def decode_frames(self, clip):
        return jnp.full_like(super().decode_frames(clip), -1.0)


def test_objects_weigh_more():
    """An error of 1 in one of 40x40 pixels: as many times the plain loss as that pixel weighs more than the mean."""
    video = np.zeros((2, 1, 40, 40, 3), np.uint8)
    video[:, 0, 20, 20] = 255
    mask = np.zeros((2, 1, 40, 40), bool)
    mask[0, 0, 17, 23] = True  # as far as the outline goes
    mask[1, 0, 16, 20] = True  # further
    batch = {"video": jnp.asarray(video), "object_mask": jnp.asarray(mask)}
    config = {**common.vae_loss("decoder"), "l1": 0.0}
    keys = jax.random.split(jax.random.key(0), 2)
    plain, _ = losses.vae_loss(Black(), "vae", {**config, "near_objects": 0.0})({"vae": {}}, batch, keys)
    loss, _ = losses.vae_loss(Black(), "vae", config)({"vae": {}}, batch, keys)
    mean = 1 + 8 * 7 * 7 / 40**2
    np.testing.assert_allclose(loss / plain, [9 / mean, 1 / mean], rtol=1e-5)


def test_batches_without_object_masks(parts, params):
    loss = losses.vae_loss(parts["vae"], "vae", common.vae_loss("decoder"))
    batch = {"video": jnp.zeros((1, 1, 32, 32, 3), jnp.uint8)}
    with pytest.raises(UserError, match="near_objects needs batches that say where objects are"):
        loss(params, batch, jax.random.split(jax.random.key(0), 1))


def test_batches_without_pixels(parts, params):
    loss = losses.vae_loss(parts["motion_vae"], "motion_vae", common.vae_loss("joint"))
    with pytest.raises(UserError, match="the batches hold no maps: motion_vae trains on clips"):
        loss(params, on_device(make_batch(0)), jax.random.split(jax.random.key(0), BATCH))
