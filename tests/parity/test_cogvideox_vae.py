"""CogVideoX's VAE against diffusers' and the authors' own."""

import functools

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.mapping import flatten, from_state_dict, plan
from convert_weights.tables import cogvideox_vae as tables
from tests.parity import golden
from tests.parity.cogvideox import weights
from tora_jax.models.cogvideox_vae import CogVideoXVAE, decoded_frames


def channels_last(x: np.ndarray):
    return jnp.asarray(einops.rearrange(x, "b c t h w -> b t h w c"))


def fields_of(config: dict) -> dict:
    """Fields of `CogVideoXVAE` for diffusers' options."""
    return {
        "channels": tuple(config["block_out_channels"]),
        "layers_per_block": config["layers_per_block"],
        "norm_groups": config["norm_num_groups"],
        "latent_channels": config["latent_channels"],
        "scaling": config["scaling_factor"],
    }


def sat_fields_of(config: dict) -> dict:
    """The same for the authors' options; their code encodes the whole clip at once."""
    return {
        "channels": tuple(config["ch"] * m for m in config["ch_mult"]),
        "layers_per_block": config["num_res_blocks"],
        "latent_channels": config["z_channels"],
        "encoder_chunk": 0,
    }


def param_shapes(model: CogVideoXVAE):
    side = model.space_factor
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1, side, side, 3)))["params"]


class Case:
    """A VAE's file: model, parameters and compiled functions."""

    def __init__(self, name: str, fields: dict, table, **changes):
        self.data = golden.load(name)
        self.model = CogVideoXVAE(**fields | changes)
        params = from_state_dict(table, weights(self.data), param_shapes(self.model), tables.DROPPED)
        self.apply = functools.partial(self.model.apply, {"params": params})

    def moments(self, x):
        return jax.jit(functools.partial(self.apply, method="moments"))(channels_last(x)).latent

    def decode(self, z):
        """Of latents that are not normalised."""
        decode = functools.partial(self.apply, method="decode", num_frames=decoded_frames(z.shape[2]))
        return jax.jit(decode)(channels_last(z) * self.model.scaling)

    def close(self, got, want: str):
        golden.assert_close(got, channels_last(self.data[want]), 1e-5)


def diffusers(name: str, **changes) -> Case:
    return Case(name, fields_of(golden.load(name).config["vae"]), tables.TABLE, **changes)


def config_of(name: str) -> dict:
    return golden.load(name).config


@pytest.mark.parametrize("frames", config_of("cogvideox_vae")["frames"])
def test_in_chunks(frames):
    case = diffusers("cogvideox_vae", encoder_chunk=config_of("cogvideox_vae")["frame_batch"][0])
    got = case.moments(case.data[f"in/x_{frames}"])
    assert got.mean.shape[1] == case.model.latent_frames(frames)
    case.close(got.mean, f"out/mean_{frames}")
    case.close(got.logvar, f"out/logvar_{frames}")
    recon = case.decode(case.data[f"out/mean_{frames}"])
    case.close(recon, f"out/recon_{frames}")


@pytest.mark.parametrize("frames", config_of("cogvideox_vae")["z_frames"])
def test_decoding_any_number_of_latents(frames):
    case = diffusers("cogvideox_vae")
    got = case.decode(case.data[f"in/z_{frames}"])
    case.close(got, f"out/decoded_{frames}")


def whole_clips() -> list[int]:
    prefix = "out/mean_whole_"
    return [int(k.removeprefix(prefix)) for k in golden.load("cogvideox_vae").tensors if k.startswith(prefix)]


@pytest.mark.parametrize("frames", whole_clips())
def test_whole_clip(frames):
    case = diffusers("cogvideox_vae", encoder_chunk=0)
    got = case.moments(case.data[f"in/x_{frames}"])
    case.close(got.mean, f"out/mean_whole_{frames}")
    case.close(got.logvar, f"out/logvar_whole_{frames}")


def test_authors_vae():
    case = Case("cogvideox_vae_sat", sat_fields_of(config_of("cogvideox_vae_sat")["encoder"]), tables.SAT_TABLE)
    got = case.moments(case.data["in/x"])
    golden.assert_close(jnp.concatenate([got.mean, got.logvar], axis=-1), channels_last(case.data["out/moments"]), 1e-5)
    case.close(case.decode(case.data["in/z"]), "out/decoded")


def test_tiles():
    case = diffusers("cogvideox_vae_tiled", tile=tuple(config_of("cogvideox_vae_tiled")["tile"]))
    case.close(case.moments(case.data["in/x"]).mean, "out/mean")
    case.close(case.decode(case.data["in/z"]), "out/decoded")


@pytest.mark.parametrize(("name", "table"), [("cogvideox_vae", tables.TABLE), ("cogvideox_vae_sat", tables.SAT_TABLE)])
def test_real_key_list(name, table):
    """Every key of the released VAE has its place, and every parameter its key."""
    keys = golden.checkpoint_keys(name)
    target = {path: leaf.shape for path, leaf in flatten(param_shapes(CogVideoXVAE())).items()}
    moves = plan(table, keys | {"loss.discriminator.weight": (1,)}, target, tables.DROPPED)
    assert {key for move in moves for key in move.sources} == keys.keys()
