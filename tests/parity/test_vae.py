"""The VAEs against the reference implementations, and the tables against the real checkpoint's key list."""

import functools
import math

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.mapping import convert, flatten, from_state_dict, plan, revert
from convert_weights.tables import autoencoder_kl, vae
from tests.parity import golden
from tora_jax.models.autoencoder_kl import AutoencoderKL
from tora_jax.models.causal_vae import CausalVAE
from tora_jax.models.video_vae import VideoVAE

V1_2_SHIFT, V1_2_SCALE = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)


def spatial_fields(config: dict, latent_channels: int) -> dict:
    return {
        "channels": tuple(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
        "norm_groups": config["norm_num_groups"],
        "latent_channels": latent_channels,
    }


def temporal_fields(config: dict) -> dict:
    return {
        "channels": config["in_out_channels"],
        "latent_channels": config["embed_dim"],
        "inner_channels": config["latent_embed_dim"],
        "filters": config["filters"],
        "channel_multipliers": tuple(config["channel_multipliers"]),
        "num_res_blocks": config["num_res_blocks"],
        "norm_groups": config["num_groups"],
        "temporal_downsample": tuple(config["temporal_downsample"]),
    }


def channels_last(x: np.ndarray) -> np.ndarray:
    return einops.rearrange(x, "b c ... -> b ... c")


def channels_first(x) -> np.ndarray:
    return einops.rearrange(np.asarray(x), "b ... c -> b c ...")


def shapes(model, x: np.ndarray):
    """The parameter tree's shapes for an input as the golden files hold it."""
    return jax.eval_shape(model.init, jax.random.key(0), channels_last(x))["params"]


def run(model, params, method: str, x, **static):
    function = functools.partial(model.apply, method=method, **static)
    return jax.jit(function)({"params": params}, jnp.asarray(x))


def spatial_case(data):
    model = AutoencoderKL(**spatial_fields(data.config, data.config["latent_channels"]))
    return model, data["in/x"], autoencoder_kl.TABLE


def temporal_case(data):
    model = CausalVAE(**temporal_fields(data.config))
    return model, data[f"in/x_{data.config['frames'][0]}"], vae.CAUSAL_VAE


def pipeline_case(data):
    config = data.config
    model = VideoVAE(
        spatial=spatial_fields(config["spatial"], config["temporal"]["in_out_channels"]),
        temporal=temporal_fields(config["temporal"]),
        micro_frame_size=config["micro_frame_size"] or 0,
        spatial_scaling=config["spatial"]["scaling"],
        latent_shift=tuple(data["params/shift"].ravel().tolist()),
        latent_scale=tuple(data["params/scale"].ravel().tolist()),
        frame_batch=4,
    )
    return model, data[f"in/x_{config['frames'][0]}"], vae.TABLE


CASES = {"autoencoder_kl": spatial_case, "vae_temporal": temporal_case, "video_vae_pipeline": pipeline_case}


def load(name: str):
    """The golden file, our model of its sizes, and its weights as our parameters."""
    data = golden.load(name)
    model, x, table = CASES[name](data)
    return data, model, from_state_dict(table, data.params, shapes(model, x))


def frame_counts(name: str) -> list[int]:
    return golden.load(name).config["frames"]


def test_autoencoder_kl():
    data, model, params = load("autoencoder_kl")
    mean, logvar = run(model, params, "encode", channels_last(data["in/x"]))
    golden.assert_close(channels_first(mean), data["out/mean"], 1e-5)
    golden.assert_close(channels_first(logvar), data["out/logvar"], 1e-5)
    recon = run(model, params, "decode", channels_last(data["out/mean"]))
    golden.assert_close(channels_first(recon), data["out/recon"], 1e-5)


@pytest.mark.parametrize("frames", frame_counts("vae_temporal"))
def test_vae_temporal(frames):
    data, model, params = load("vae_temporal")
    mean, logvar = run(model, params, "encode", channels_last(data[f"in/x_{frames}"]))
    golden.assert_close(channels_first(mean), data[f"out/mean_{frames}"], 1e-5)
    golden.assert_close(channels_first(logvar), data[f"out/logvar_{frames}"], 1e-5)
    recon = run(model, params, "decode", channels_last(data[f"out/mean_{frames}"]), num_frames=frames)
    golden.assert_close(channels_first(recon), data[f"out/recon_{frames}"], 1e-5)


@pytest.mark.parametrize("frames", frame_counts("video_vae_pipeline"))
def test_video_vae(frames):
    data, model, params = load("video_vae_pipeline")
    z = run(model, params, "encode", channels_last(data[f"in/x_{frames}"]))
    assert z.shape[1] == model.latent_frames(frames)
    golden.assert_close(channels_first(z), data[f"out/z_{frames}"], 1e-5)
    recon = run(model, params, "decode", channels_last(data[f"out/z_{frames}"]), num_frames=frames)
    golden.assert_close(channels_first(recon), data[f"out/recon_{frames}"], 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_weights_go_back_unchanged(name):
    data = golden.load(name)
    model, x, table = CASES[name](data)
    target = {path: leaf.shape for path, leaf in flatten(shapes(model, x)).items()}
    moves = plan(table, {k: v.shape for k, v in data.params.items()}, target)
    back = revert(moves, convert(moves, data.params.__getitem__))
    assert back.keys() == data.params.keys()
    for key, array in data.params.items():
        assert back[key].shape == array.shape
        assert back[key].tobytes() == array.tobytes()


def full_size():
    """The released video VAE: every field's default is its value."""
    model = VideoVAE(spatial={}, temporal={}, frame_batch=4)
    return model, jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, 16, 16, 3)))["params"]


def test_real_checkpoint_fits():
    _, target = full_size()
    keys = golden.checkpoint_keys("opensora_vae_v1_2")
    sizes = {path: leaf.shape for path, leaf in flatten(target).items()}
    moves = plan(vae.TABLE, keys, sizes)
    assert {key for move in moves for key in move.sources} == set(keys)
    assert sum(math.prod(s) for s in sizes.values()) == sum(math.prod(s) for s in keys.values())


@pytest.mark.slow
def test_video_vae_full():
    data = golden.load("video_vae_full")
    seed, constants = data.config["seed"], {"shift": V1_2_SHIFT, "scale": V1_2_SCALE}
    keys = golden.checkpoint_keys("opensora_vae_v1_2")
    state = {
        key: np.float32(constants[key]).reshape(shape) if key in constants else golden.procedural(key, shape, seed)
        for key, shape in keys.items()
    }
    model, target = full_size()
    params = from_state_dict(vae.TABLE, state, target)
    x = golden.procedural_input("in/x", data.config["x"], seed) * np.float32(data.config["x_factor"])
    z = run(model, params, "encode", channels_last(x))
    golden.assert_close(channels_first(z), data["out/z"], 1e-4)
    recon = run(model, params, "decode", channels_last(data["out/z"]), num_frames=x.shape[2])
    golden.assert_close(channels_first(recon), data["out/recon"], 1e-4)
