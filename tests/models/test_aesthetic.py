"""The aesthetic head: converted weights give the layers' product, of both published versions."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.converting import main
from tora_jax.checkpoints import release
from tora_jax.models.aesthetic import V2, AestheticHead


def state(version: str, features: int = 6) -> dict[str, np.ndarray]:
    """A checkpoint under PyTorch's names, with the layers of a version, narrower."""
    rng = np.random.default_rng(0)
    widths = {"v1": {"": 1}, "v2": {f"layers.{place}.": min(width, 5) for place, width in V2}}[version]
    tensors = {}
    for name, width in widths.items():
        tensors[name + "weight"] = rng.normal(size=(width, features)).astype(np.float32)
        tensors[name + "bias"] = rng.normal(size=width).astype(np.float32)
        features = width
    return tensors


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_converted(version, tmp_path):
    tensors = state(version)
    source, ours, back = tmp_path / "head.safetensors", tmp_path / "ours", tmp_path / "back.safetensors"
    save_file(tensors, source, metadata={"format": "pt"})
    assert main(["aesthetic", str(source), str(ours)]) == 0
    fields = release.read_config(ours)["aesthetic"]
    x = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    got = AestheticHead(**fields).apply({"params": release.load_part(ours, "aesthetic")}, jnp.asarray(x))
    for name in sorted(name for name in tensors if name.endswith("weight")):
        x = x @ tensors[name].T + tensors[name.replace("weight", "bias")]
    np.testing.assert_allclose(got, x[:, 0], rtol=1e-5)
    assert main(["aesthetic", str(ours), str(back), "--reverse"]) == 0
    assert back.read_bytes() == source.read_bytes()
    (ours / "source.json").unlink()
    back.unlink()
    assert main(["aesthetic", str(ours), str(back), "--reverse"]) == 0
    assert load_file(back).keys() == tensors.keys()


@pytest.mark.parametrize(
    ("layers", "parameters"), [((), 769), (V2, 768 * 1024 + 1024 * 128 + 128 * 64 + 64 * 16 + 16 + 1233)]
)
def test_released_sizes(layers, parameters):
    head = AestheticHead(layers=layers)
    shapes = jax.eval_shape(lambda: head.init(jax.random.key(0), jnp.zeros((1, 768))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


def test_released_versions_are_recognised(tmp_path, capsys):
    head = AestheticHead(layers=())
    tensors = {"weight": np.zeros((1, head.features), np.float32), "bias": np.zeros(1, np.float32)}
    save_file(tensors, tmp_path / "head.safetensors")
    assert main(["aesthetic", str(tmp_path / "head.safetensors"), str(tmp_path / "ours")]) == 0
    assert "none of the released sizes" not in capsys.readouterr().err
    assert json.loads((tmp_path / "ours" / "config.json").read_text()) == {"aesthetic": {"features": 768, "layers": []}}


def test_another_width():
    with pytest.raises(ValueError, match="embedding of width 5: the head takes 6"):
        AestheticHead(features=6).init(jax.random.key(0), jnp.zeros((1, 5)))
