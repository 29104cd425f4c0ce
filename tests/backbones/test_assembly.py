"""Loading: models of one config share what is compiled, and weights are held against their config once."""

import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tora_jax.backbones import assembly
from tora_jax.errors import UserError


def test_models_of_one_config_share_their_functions(tiny_config, tiny_models, tiny_release):
    again = assembly.load(None, tiny_release)
    for name in ("encode_text", "encode_video", "extract", "decode", "denoise"):
        assert getattr(again, name) is getattr(tiny_models, name), name
    other = assembly.load({**tiny_config, "tora": {**tiny_config["tora"], "placement": "both"}})
    assert other.denoise is not tiny_models.denoise
    assert other.decode is tiny_models.decode


def test_random_weights_are_those_of_the_seed(tiny_config, tiny_models):
    first, same, other = (assembly.load(tiny_config, seed=seed).params for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    jax.tree.map(np.testing.assert_array_equal, first, dict(tiny_models.params))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of compiled programs that nobody has used."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def test_weights_that_fit_are_not_traced_again(kept, tiny_config, tiny_release, tmp_path, monkeypatch):
    traced, init_params = [], assembly.init_params
    monkeypatch.setattr(assembly, "init_params", lambda *args: traced.append(1) or init_params(*args))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_release, copy)

    def load(config=None):
        before = len(traced)
        assembly.load(config, copy)
        return len(traced) > before

    assert [load(), load()] == [True, False]
    other = {**tiny_config, "tora": {**tiny_config["tora"], "motion_features": 16}}
    for _ in range(2):  # what does not fit is never noted
        with pytest.raises(UserError, match="weights of another size than the config"):
            load(other)
    assert not load()
    path = copy / "t5.safetensors"
    tensors = load_file(path)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file(tensors | {name: tensors[name][:-1]}, path)
    with pytest.raises(UserError, match="weights of another size than the config"):
        load()


def test_without_a_folder_of_programs_weights_are_checked_each_time(kept, tiny_release):
    jax.config.update("jax_compilation_cache_dir", None)
    assembly.load(None, tiny_release)
    assert not kept.exists()
