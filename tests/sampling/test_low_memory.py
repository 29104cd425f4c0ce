"""Parameters in the host's memory: the same videos, and nothing stays on the device."""

import jax
import numpy as np
import pytest
from tora_jax.configs.sampling import Settings

import tora_jax
from tora_jax.backbones import assembly
from tora_jax.errors import UserError
from tora_jax.sampling.__main__ import sample
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs

SETTINGS = {"height": 32, "width": 48, "num_frames": 5, "steps": 3, "guidance": 3.0, "trajectory_guidance": 2.0}
TRACKS = np.linspace((0.2, 0.5), (0.8, 0.5), 5, dtype=np.float32)[None]
INPUTS = [Inputs("a star.", TRACKS, {0: np.full((32, 48, 3), 90, np.uint8)})]


@pytest.fixture(scope="module")
def both(tiny_release):
    return assembly.load(weights=tiny_release), assembly.load(weights=tiny_release, low_memory=True)


def shapes(arrays) -> list[tuple]:
    return sorted(each.shape for each in arrays)


@pytest.mark.parametrize("changes", [{}, {"solver": "ab2", "guidance_every": 2, "cache_every": 2}])
def test_the_same_bytes(both, changes):
    (plain,), (low,) = (generate_batch(m, INPUTS, Settings(**SETTINGS, **changes), seeds=[0]) for m in both)
    np.testing.assert_array_equal(low.latents, plain.latents)
    np.testing.assert_array_equal(low.video, plain.video)


def test_only_the_denoiser_is_there_while_sampling(both):
    _, low = both
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(low.params))
    before, during = {id(each) for each in jax.live_arrays()}, []

    def new() -> list[jax.Array]:
        return [each for each in jax.live_arrays() if id(each) not in before]

    generate_batch(low, INPUTS, Settings(**SETTINGS), seeds=[0], progress=lambda *_: during.append(shapes(new())))
    assert not new()
    for part, there in (("tora", True), ("t5", False), ("vae", False)):
        large = max((leaf.shape for leaf in jax.tree.leaves(low.params[part])), key=np.prod)
        assert all((large in each) == there for each in during), part


def test_random_weights(tiny_config):
    models = tora_jax.load(config=tiny_config, low_memory=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(models.params))


def test_weights_without_a_form_in_eight_bits(tiny_config):
    with pytest.raises(UserError, match="no form in 8 bits; try low_memory"):
        tora_jax.load(config=tiny_config, eight_bit=True)


def test_the_flag(tiny_release, tmp_path, capsys):
    flags = ["sample.py", f"--weights={tiny_release}", "--low_memory", "--quiet", f"--out={tmp_path / 'tora.mp4'}"]
    sample(flags)
    assert (tmp_path / "tora.mp4").is_file()
    with pytest.raises(SystemExit) as ended:
        sample([*flags, "--mesh=seq=2"])
    assert ended.value.code == 2
    assert "--low_memory is for one device" in capsys.readouterr().err
