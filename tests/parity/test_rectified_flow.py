"""Sampling and losses against the reference RFLOW scheduler driving a small STDiT3."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stepping import Stepper
from tests.parity import golden
from tests.parity.test_stdit import arguments, channels_last, load_params, model_of
from tora_jax.diffusion.loss import training_loss
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.models.video_vae import VideoVAE

FILES = ["rflow_t2v", "rflow_frame_mask"]


class Setup:
    def __init__(self, name):
        self.data = golden.load(name)
        self.config = self.data.config
        self.model = model_of(self.config["stdit"], self.data.params)
        self.params = load_params(self.model, self.data.params)
        self.text = jnp.asarray(self.data["in/y"])
        mask = self.data.get("in/y_mask")
        self.text_mask = None if mask is None else jnp.asarray(mask, bool)
        self.frames = VideoVAE(None, {}).latent_frames(self.config["num_frames"])

    def apply(self, x, timestep, frame_mask=None, drop_text=None):
        """The model on a batch that holds the captions once or more."""
        times = len(x) // len(self.text)
        tile = lambda a: None if a is None else jnp.concatenate([a] * times)  # noqa: E731
        return self.model.apply(
            {"params": self.params},
            x,
            timestep,
            tile(self.text),
            text_mask=tile(self.text_mask),
            drop_text=drop_text,
            frame_mask=tile(frame_mask),
            **arguments(x, self.config),
        )

    def passes(self, x, timestep, frame_mask):
        """With the caption and without it."""
        b = len(x)
        both = self.apply(jnp.concatenate([x, x]), jnp.concatenate([timestep] * 2), frame_mask, jnp.arange(2 * b) >= b)
        return both.reshape(2, b, *both.shape[1:])


@pytest.fixture(scope="module", params=FILES)
def setup(request):
    return Setup(request.param)


def times_of(setup):
    c = setup.config
    return RectifiedFlow().times(c["steps"], c["height"], c["width"], setup.frames, c["use_timestep_transform"])


def test_timesteps(setup):
    want = setup.data["out/t_steps"]
    np.testing.assert_allclose(times_of(setup)[1:-1], want[:, 0], rtol=1e-6)


def test_timestep_transform(setup):
    t = setup.data["in/timestep_transform_t"]
    tables = setup.data.group("out")
    names = [k for k in tables if k.startswith("timestep_transform_")]
    assert names
    for name in names:
        height, width, frames = map(int, re.findall(r"\d+", name))
        got = RectifiedFlow().shift(t, height, width, VideoVAE(None, {}).latent_frames(frames))
        golden.assert_close(got, tables[name], 1e-5)


def test_every_step(setup):
    """What the model sees at each step, from the reference's own start and with its own draws of noise."""
    # The reference's own timesteps: an edit ratio is compared with them to the last bit.
    data, times = setup.data, np.concatenate([[1000], setup.data["out/t_steps"][:, 0], [0]]).astype(np.float32)
    edit = None if data.get("in/frame_mask") is None else jnp.asarray(data["in/frame_mask"])

    seen = []
    passes = jax.jit(setup.passes)

    def predict(x, timestep, frame_mask):
        seen.append(x)
        return passes(x, timestep, frame_mask)

    step = Stepper(predict, times, guidance=setup.config["cfg_scale"], edit=edit)
    x = channels_last(data["in/z0"])
    for i, want in enumerate(data["out/z_steps"]):
        x = step(x, None if edit is None else channels_last(data["in/noise_steps"][i]), passes=2)
        golden.assert_close(seen[i], channels_last(want), 1e-4)
    golden.assert_close(x, channels_last(data["out/z"]), 1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_loss(setup, masked):
    data = setup.data
    mask = jnp.asarray(data["in/train_mask"], bool) if masked else None
    got = jax.jit(lambda *given: training_loss(RectifiedFlow(), lambda x, t: setup.apply(x, t, mask), *given))(
        channels_last(data["in/train_x"]),
        channels_last(data["in/train_noise"]),
        jnp.asarray(data["in/train_t"]),
        mask,
    )
    golden.assert_close(got, data["out/train_loss_masked" if masked else "out/train_loss"], 1e-5)
