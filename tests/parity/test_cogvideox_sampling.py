"""Schedules, guidance and whole samplings of the released Tora against its two front ends."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.mapping import from_state_dict
from convert_weights.tables import cogvideox_vae as vae_tables
from tests.parity import cogvideox, golden, test_cogvideox_vae
from tests.parity.cogvideox import channels_last
from tora_jax.diffusion import solvers
from tora_jax.diffusion.v_prediction import GUIDANCE, VPrediction, signal_levels
from tora_jax.models.cogvideox_vae import CogVideoXVAE
from tora_jax.typing import Step

FILES = ["cogvideox_sampler_dpm", "cogvideox_sampler_ddim", "cogvideox_sampler_i2v"]


def process_of(scheduler: dict, spacing: str = "trailing") -> VPrediction:
    c = scheduler
    return VPrediction(spacing, c["num_train_timesteps"], c["beta_start"], c["beta_end"], c.get("snr_shift_scale", 1.0))


# ----------------------------------------------------------------------------------------------------------
# Schedules
# ----------------------------------------------------------------------------------------------------------


def schedule() -> golden.Golden:
    return golden.load("cogvideox_schedule")


def test_tables():
    data = schedule()
    levels = signal_levels(process_of(data.config["scheduler"]))
    golden.assert_close(levels**2, data["out/alphas_cumprod"], 1e-6)
    golden.assert_close(levels, data["out/sat_table"], 1e-6)
    assert levels[-1] == 0


@pytest.mark.parametrize("steps", schedule().config["steps"])
def test_timesteps(steps):
    data = schedule()
    times = process_of(data.config["scheduler"]).times(steps)
    np.testing.assert_array_equal(times[1:-1], data[f"out/timesteps_{steps}"])
    got = GUIDANCE["dynamic"](data.config["guidance"], times)
    golden.assert_close(got, data[f"out/guidance_{steps}"], 1e-9)

    sat = process_of(data.config["scheduler"], "sat")
    times = sat.times(steps)
    np.testing.assert_array_equal(times[1:-1], np.sort(data[f"out/sat_timesteps_{steps}"])[::-1])
    want = np.sort(data[f"out/sat_alphas_cumprod_sqrt_{steps}"])
    golden.assert_close([sat.levels(times, i).now for i in range(steps)], want, 1e-6)


def test_noise_and_v_give_back_the_data():
    process = VPrediction()
    x, noise = jax.random.normal(jax.random.key(0), (2, 5, 1, 2, 2, 3))
    timestep = jnp.asarray([0.0, 1.0, 500.0, 999.0, -1.0])
    noisy = process.add_noise(x, noise, timestep)
    np.testing.assert_array_equal(noisy[3], noise[3])
    np.testing.assert_array_equal(noisy[4], x[4])
    golden.assert_close(process.clean(noisy, process.target(x, noise, timestep), timestep), x, 1e-6)


# ----------------------------------------------------------------------------------------------------------
# Samplings
# ----------------------------------------------------------------------------------------------------------


def of_vae(x) -> jax.Array:
    """B C F H W, as the files have what comes from the VAE."""
    return jnp.asarray(einops.rearrange(x, "b c t h w -> b t h w c"))


def solve(name, process, predict, x, config, noise) -> list:
    """Each step's latents and clean latents.

    Args:
      predict: (x, timestep) -> the passes without and with the caption.
      noise: step -> the noise that it draws, or None.
    """
    solver, times = solvers.find(name, process), process.times(config["steps"])
    guidance = GUIDANCE["dynamic" if config.get("dynamic_guidance", True) else "constant"](config["guidance"], times)

    @jax.jit
    def step(x, timestep, scale, at, memory):
        null, full = predict(x, timestep)
        return solver.step(process, x, null + scale * (full - null), at, memory)

    memory, results = solver.init(x), []
    for i, (t, scale) in enumerate(zip(times[1:-1], guidance, strict=True)):
        drawn = noise(i) if solver.noisy else None
        at = Step(jnp.asarray(times[i : i + 3]), solver.coefficients(process, times, i), drawn)
        x, memory = step(x, jnp.float32(t), jnp.float32(scale), at, memory)
        results.append((x, memory))
    return results


class Chain:
    """A sampler's file: both models, and the conditions."""

    def __init__(self, name: str):
        self.data = golden.load(name)
        config, length = self.data.config, self.data["in/text"].shape[1]
        sat = "sat" in config
        self.model = cogvideox.tora_of(config, length)
        params = cogvideox.load_params(self.model, cogvideox.weights(self.data, "" if sat else "transformer."))
        self.apply = functools.partial(self.model.apply, {"params": params})

    def predict(self, text, features, given):
        """For `solve`: text of both passes, features of one or of both."""

        def passes(x, timestep):
            both = [None if y is None else jnp.concatenate([y, y]) for y in (x, given)]
            t = jnp.broadcast_to(timestep, len(text))
            return jnp.split(self.apply(both[0], t, text, features=features, given=both[1], method="denoise"), 2)

        return passes

    def features(self, latents):
        return jax.jit(functools.partial(self.apply, method="extract"))(latents)


class VAEOfChain:
    def __init__(self, data: golden.Golden):
        self.model = CogVideoXVAE(**test_cogvideox_vae.fields_of(data.config["vae"]))
        shapes = test_cogvideox_vae.param_shapes(self.model)
        params = from_state_dict(vae_tables.TABLE, cogvideox.weights(data, "vae."), shapes)
        self.apply = functools.partial(self.model.apply, {"params": params})

    def sample(self, video: np.ndarray, noise: np.ndarray):
        """Latents of uint8 pixels B F C H W, with the file's own draw."""
        x = channels_last(video).astype(jnp.float32) / 127.5 - 1
        moments = jax.jit(functools.partial(self.apply, method="moments"))(x).latent
        return (moments.mean + jnp.exp(moments.logvar / 2) * of_vae(noise)) * self.model.scaling


@pytest.mark.parametrize("name", FILES)
def test_diffusers_chain(name):
    """RGB map -> latents -> every step -> pixels."""
    chain = Chain(name)
    data, c = chain.data, chain.data.config
    vae = VAEOfChain(data)
    flow = vae.sample(data["in/flow_rgb"], data["in/posterior_noise"])
    golden.assert_close(flow, channels_last(data["out/flow_latents"]), 1e-5)
    given = None
    if "in/image" in data.tensors:
        image = vae.sample(data["in/image"][:, None], data["in/image_noise"])
        given = jnp.pad(image, ((0, 0), (0, flow.shape[1] - 1), *((0, 0),) * 3))
        golden.assert_close(given, channels_last(data["out/image_latents"]), 1e-4)

    process = process_of(c["scheduler"])
    times = process.times(c["steps"])
    np.testing.assert_array_equal(times[1:-1], data["out/timesteps"])
    kind = "dynamic" if c["dynamic_guidance"] else "constant"
    golden.assert_close(GUIDANCE[kind](c["guidance"], times), data["out/guidance_scales"], 1e-9)

    text = jnp.concatenate([data["in/negative_text"], data["in/text"]])
    solver = "ddim" if name.endswith("ddim") else "dpm2m_sde"
    noise = data.get("in/step_noise")
    predict = chain.predict(text, chain.features(flow), given)
    results = solve(solver, process, predict, channels_last(data["in/latents"]), c, lambda i: channels_last(noise[i]))
    for (got, _), want in zip(results, data["out/latents_steps"], strict=True):
        golden.assert_close(got, channels_last(want), 1e-4)
    golden.assert_close(results[-1][0], channels_last(data["out/latents"]), 1e-4)
    if "out/video" in data.tensors:
        decode = functools.partial(vae.apply, method="decode", num_frames=c["num_frames"])
        got = jax.jit(decode)(results[-1][0])
        golden.assert_close(got, of_vae(data["out/video"]), 1e-4)


def test_authors_chain():
    """Two draws of the map's posterior, one for each pass, and zeros as the caption left out."""
    chain = Chain("cogvideox_sampler_sat")
    data, c = chain.data, chain.data.config
    process = VPrediction("sat")
    times = process.times(c["steps"])
    np.testing.assert_array_equal(times[1:-1], np.sort(data["out/timesteps"])[::-1])
    levels = [process.levels(times, i).now for i in range(c["steps"])]
    golden.assert_close([*levels, 1.0], np.sort(data["out/alphas_cumprod_sqrt"]), 1e-6)
    golden.assert_close(GUIDANCE["dynamic"](c["guidance"], times), data["out/guidance_scales"], 1e-9)

    text = jnp.concatenate([jnp.zeros_like(data["in/text"]), data["in/text"]])
    features = chain.features(channels_last(data["in/flow"]))
    predict = chain.predict(text, features, channels_last(data["in/image_latents"]))
    # The last step ends clean and draws nothing.
    noise = np.append(data["in/step_noise"], np.zeros_like(data["in/step_noise"][:1]), axis=0)
    x = channels_last(data["in/latents"])
    results = solve("dpm2m_sde", process, predict, x, c, lambda i: channels_last(noise[i]))
    for i, (latents, clean) in enumerate(results):
        golden.assert_close(latents, channels_last(data["out/latents_steps"][i]), 1e-4)
        golden.assert_close(clean, channels_last(data["out/denoised_steps"][i]), 1e-4)
    golden.assert_close(results[-1][0], channels_last(data["out/latents"]), 1e-4)
