"""I3D against the Flax I3D of google-research/magvit, and the table against the public file's key list."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights import i3d as table
from convert_weights import mapping
from tests.parity import golden
from tora_jax.models.i3d import I3D

KEYS = "i3d_k400_flax"


def generator(key: str, seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode()) + seed))


def weight(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """The rule in the file's `config`; not that of the PyTorch models, whose first axis is the output."""
    w = generator(key, seed).standard_normal(shape, dtype=np.float32)
    if w.ndim >= 2:
        return w * np.float32(1.4 / np.sqrt(np.prod(shape[:-1])))
    if key.endswith("moving_variance"):
        return 1 + np.float32(0.1) * np.abs(w)
    return w * np.float32(0.1)


def params_shape(model: I3D):
    video = jax.ShapeDtypeStruct((1, 9, 224, 224, 3), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), video)["params"]


def test_features():
    data = golden.load("i3d")
    seed, frames = data.config["seed"], data.config["frames"]
    logits, mixed_4f = data["out/logits_mean"], data["out/mixed_4f_mean"]
    state = {key: weight(key, shape, seed) for key, shape in golden.checkpoint_keys(KEYS).items()}
    model = I3D()
    params = mapping.from_state_dict(table.TABLE, state, params_shape(model), table.IGNORED)
    pixels = generator("in/x", seed).random((len(logits), frames, 224, 224, 3), dtype=np.float32)
    got = jax.jit(model.apply)({"params": params}, pixels * 2 - 1)  # theirs are in 0..1
    golden.assert_close(got.mixed_4f, mixed_4f, 1e-4)
    golden.assert_close(got.logits, logits, 1e-4)


def test_public_file_fits_and_comes_back():
    """No key of the file is missing, none is left over, and reverting gives back every byte."""
    keys = golden.checkpoint_keys(KEYS)
    state = {key: weight(key, shape, seed=0) for key, shape in keys.items()}
    shapes = {path: leaf.shape for path, leaf in mapping.flatten(params_shape(I3D())).items()}
    moves = mapping.plan(table.TABLE, keys, shapes)
    back = mapping.revert(moves, mapping.convert(moves, state.__getitem__))
    assert back.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value, strict=True)


@pytest.mark.parametrize(("shape", "message"), [((8, 224, 224), "at least 9"), ((9, 224, 256), "224x256.*resize")])
def test_clips_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        I3D().init(jax.random.key(0), jnp.zeros((1, *shape, 3)))
