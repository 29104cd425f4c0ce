"""I3D against the Flax I3D of google-research/magvit, the table against the public file's key list, and both files
through the converter."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import save_file

from convert_weights import mapping
from convert_weights.tables import i3d as table
from tests.converting import main
from tests.parity import golden
from tora_jax.checkpoints import release
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


@pytest.fixture(scope="module")
def state():
    return {key: weight(key, shape, seed=0) for key, shape in golden.checkpoint_keys(KEYS).items()}


def as_torch(state):
    """The same weights as pytorch-i3d names and turns them."""
    ours = mapping.plan(table.FLAX, {key: leaf.shape for key, leaf in state.items()}, shapes_of())
    flat = mapping.flatten(mapping.convert(ours, state.__getitem__))
    rules = {rule.target: rule for rule in table.TORCH}
    torch = {}
    for path, leaf in flat.items():
        turned = leaf.transpose(4, 3, 0, 1, 2) if leaf.ndim == 5 else leaf
        torch[rules[path].source] = np.ascontiguousarray(turned)
    for key in [key for key in torch if key.endswith(".bn.bias")]:
        torch[key.replace("bias", "weight")] = np.ones_like(torch[key])
        torch[key.replace("bias", "num_batches_tracked")] = np.array(0)
    return flat, torch


def shapes_of():
    return {path: leaf.shape for path, leaf in mapping.flatten(params_shape(I3D())).items()}


def read(folder):
    return {path: np.asarray(leaf) for path, leaf in mapping.flatten(release.load_part(folder, "i3d")).items()}


def test_both_files_become_the_same_weights(state, tmp_path):
    want, torch = as_torch(state)
    tree = {"params": traverse_util.unflatten_dict({tuple(key.split("/")): leaf for key, leaf in state.items()})}
    (tmp_path / "i3d_k400.flax").write_bytes(serialization.msgpack_serialize(tree))
    save_file(torch, tmp_path / "rgb_imagenet.safetensors")
    for i, file in enumerate(("i3d_k400.flax", "rgb_imagenet.safetensors")):
        assert main(["i3d", str(tmp_path / file), str(tmp_path / f"{i}")]) == 0
        assert release.part_config(tmp_path / f"{i}", "i3d") == {"num_classes": 400}
        got = read(tmp_path / f"{i}")
        assert got.keys() == want.keys()
        for path in want:
            np.testing.assert_array_equal(got[path], want[path], strict=True)


def test_scales_that_are_not_one(state, tmp_path, capsys):
    _, torch = as_torch(state)
    torch["Mixed_4f.b2b.bn.weight"][3] = 1.5
    save_file(torch, tmp_path / "other.safetensors")
    assert main(["i3d", str(tmp_path / "other.safetensors"), str(tmp_path / "out")]) == 2
    assert "Mixed_4f.b2b.bn.weight: is not 1 everywhere (1 such)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_broken_flax_file(tmp_path, capsys):
    (tmp_path / "i3d.flax").write_bytes(b"no tree")
    assert main(["i3d", str(tmp_path / "i3d.flax"), str(tmp_path / "out")]) == 2
    assert "is no file of Flax's serialization" in capsys.readouterr().err
