"""What is run on the released Tora's real files, on small seeded ones.

A whole run, but for the side of diffusers, is slow:

  pytest -m slow tests/benchmarks/test_released.py
"""

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import released
from tests.convert_weights.test_cogvideox import add_counters, denoiser, write_pipeline
from tests.parity import golden
from tora_jax.errors import UserError

FLAGS = ["--height=32", "--width=48", "--steps=8", "--prompt=a"]


def run(capsys, *flags) -> dict:
    capsys.readouterr()
    released.main(["released.py", *map(str, flags)], lambda: None)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def source(tmp_path):
    """A pipeline folder as diffusers and transformers save it."""
    folder = write_pipeline(tmp_path / "source", add_counters(denoiser()))
    options = golden.load("t5_encoder").config
    options = {key: value for key, value in options.items() if key != "model"}
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**options, "model_type": "t5"}))
    index = folder / "transformer" / "model.safetensors.index.json"
    index.rename(index.with_name(f"diffusion_pytorch_{index.name}"))
    config = folder / "transformer" / "config.json"
    width = options["d_model"]
    config.write_text(json.dumps({**json.loads(config.read_text()), "text_embed_dim": width}))
    return folder


def test_a_source_folder(source, tmp_path, capsys):
    """What its headers and its config files say; a plain base with one tensor of its own."""
    base = shutil.copytree(source, tmp_path / "base")
    shard = sorted((base / "transformer").glob("*.safetensors"))[0]
    state = load_file(shard)
    name = next(key for key in state if key.startswith("transformer_blocks"))
    save_file(state | {name: 2 * state[name]}, shard)
    report = run(capsys, source, "--base", base, f"--out={tmp_path / 'report.json'}")
    assert report == json.loads((tmp_path / "report.json").read_text())
    held = report["keys"]["source"]
    assert held.keys() == {"transformer", "vae", "text_encoder"}
    assert held["transformer"]["dtypes"] == ["float32"]
    assert all(key.endswith("num_batches_tracked") for key in held["transformer"]["unused"])
    points = report["open_points"]
    assert points["configs"]["vae/config.json"]["scaling_factor"] == {"found": 0.7, "presumed": 0.7}
    assert points["configs"]["scheduler/scheduler_config.json"] == {"not_run": "no such file"}
    same = points["base_is_cogvideox"]
    assert (same["differ"], same["first"], same["largest_relative"]) == (1, [name], 0.5)
    assert same["equal"] > 50
    assert "--converted" in report["traj_error"]["not_run"]


def test_what_is_missing(tmp_path, capsys):
    with pytest.raises(UserError, match="no such folder"):
        run(capsys, tmp_path / "none")


@pytest.mark.slow
def test_a_pipeline(source, tmp_path, capsys, monkeypatch):
    """The whole run, which converts the folder on its way; then the converted folder alone."""
    monkeypatch.setattr(released, "PATHS", {name: released.PATHS[name] for name in ("arc", "fall")})
    ours = tmp_path / "ours"
    report = run(capsys, source, "--converted", ours, "--num_frames=17", "--reference_python=false", *FLAGS)
    assert "not_run" in report["against_diffusers"]
    points = report["open_points"]
    assert 0 < points["step_in_bfloat16_relative"] < 0.1
    assert 0 < points["map_encoded_in_chunks"]["relative"] < 2
    assert points["learned_positions"] == {"not_run": "text-to-video weights have none"}
    errors = report["traj_error"]["paths"]
    assert errors.keys() == {"arc", "fall"}
    assert all(0 <= each["l1"] < 1024 for each in errors.values())

    again = run(capsys, ours, "--num_frames=9", *FLAGS)
    assert again["keys"] == {"converted": report["keys"]["converted"]}
    assert "pipeline folder" in again["against_diffusers"]["not_run"]
    assert again["open_points"]["map_encoded_in_chunks"] == {"not_run": "9 frames are one chunk"}
