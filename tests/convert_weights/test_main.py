"""The converter's command: what it writes, and the way back."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert_weights import sources
from convert_weights.tables import vae
from tests.converting import CASES, contents, main, refused, tora_variant, write_source, write_tora_sources
from tests.parity import golden
from tora_jax.checkpoints import release
from tora_jax.errors import UserError
from tora_jax.sampling.__main__ import sample


@pytest.fixture
def t5_source(tmp_path):
    """A small checkpoint and the arguments that convert it."""
    return write_source(tmp_path / "t5.safetensors", "t5_encoder")


# ----------------------------------------------------------------------------------------------------------
# Forth and back
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_round_trip_is_exact(name, tmp_path):
    """Not only the tensors: the file that comes back is the same, byte for byte."""
    source, ours, back = tmp_path / "source.safetensors", tmp_path / "ours", tmp_path / "back.safetensors"
    kind, *_ = argv = write_source(source, name)
    assert main([*argv, str(ours)]) == 0
    assert main([kind, str(ours), str(back), "--reverse"]) == 0
    assert back.read_bytes() == source.read_bytes()
    assert contents(tmp_path) == {"source.safetensors", "ours", "back.safetensors"}
    config = json.loads((ours / "config.json").read_text())
    assert config.keys() == {CASES[name][1]}


@pytest.mark.parametrize("name", ["stdit3_text_mask", "video_vae_pipeline", "t5_encoder", "raft_narrow"])
def test_way_back_without_the_record(name, tmp_path):
    """What was trained here has no source.json: names and shapes come from the table alone."""
    source, ours, back = tmp_path / "source.safetensors", tmp_path / "ours", tmp_path / "back.safetensors"
    kind, *_ = argv = write_source(source, name)
    assert main([*argv, str(ours)]) == 0
    (ours / "source.json").unlink()
    assert main([kind, str(ours), str(back), "--reverse"]) == 0
    got, want = load_file(back), load_file(source)
    counters = {key for key in want if key.endswith(".num_batches_tracked")}
    constants = {"rope.freqs"} if kind == "stdit3" else set()
    assert got.keys() == want.keys() - counters | constants
    for key, array in want.items():
        if key not in counters:
            np.testing.assert_array_equal(got[key], array, strict=True)


def test_rotary_frequencies_go_along(tmp_path):
    """Our model computes them; PyTorch's has them in its state dict, so the way back writes them."""
    heads = golden.load("stdit3_text_mask").config
    half = heads["hidden_size"] // heads["num_heads"] // 2
    argv = write_source(tmp_path / "s.safetensors", "stdit3_text_mask", **{"rope.freqs": np.arange(half, dtype="f4")})
    assert main([*argv, str(tmp_path / "ours")]) == 0
    assert main(["stdit3", str(tmp_path / "ours"), str(tmp_path / "back"), "--reverse"]) == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


@pytest.mark.parametrize("names", [[0], [1], [0, 1]])
def test_tied_names_of_t5(names, tmp_path):
    tied = "shared.weight", "encoder.embed_tokens.weight"
    params = golden.load("t5_encoder").params
    table = next(params[key] for key in tied if key in params)
    changes = {key: table if i in names else None for i, key in enumerate(tied)}
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **changes)
    report = tmp_path / "report.json"
    assert main([*argv, str(tmp_path / "ours"), "--report", str(report)]) == 0
    assert json.loads(report.read_text())["tied_names"] == [tied[i] for i in names]
    assert main(["t5", str(tmp_path / "ours"), str(tmp_path / "back"), "--reverse"]) == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "t5.safetensors").read_bytes()


def test_tied_names_must_agree(tmp_path, capsys):
    tied = "shared.weight", "encoder.embed_tokens.weight"
    table = next(v for k, v in golden.load("t5_encoder").params.items() if k in tied)
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **dict(zip(tied, (table, table + 1), strict=True)))
    refused(capsys, [*argv, str(tmp_path / "ours")], "shared.weight", "differ")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype(dtype, tmp_path):
    """Casts what it reads; and a source in that dtype comes through with its bits."""
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder")
    assert main([*argv, str(tmp_path / "ours"), "--dtype", dtype]) == 0
    params = golden.load("t5_encoder").params
    got = load_file(tmp_path / "ours/t5.safetensors")["norm/scale"]  # as it is on disk: float16 is read as float32
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, params["encoder.final_layer_norm.weight"].astype(got.dtype))
    assert main(["t5", str(tmp_path / "ours"), str(tmp_path / "back.safetensors"), "--reverse"]) == 0
    assert main(["t5", str(tmp_path / "back.safetensors"), str(tmp_path / "again")]) == 0
    first, second = (tmp_path / folder / "t5.safetensors" for folder in ("ours", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_overflow_is_told(tmp_path, capsys):
    scale = np.float32(1e6) + golden.load("t5_encoder").params["encoder.final_layer_norm.weight"]
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **{"encoder.final_layer_norm.weight": scale})
    refused(capsys, [*argv, str(tmp_path / "ours"), "--dtype", "float16"], "final_layer_norm", "overflows")


def test_older_attention_names(tmp_path):
    """Diffusers named the middle attention's layers differently once."""
    new_to_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    data, old = golden.load("autoencoder_kl"), {}
    for key, value in data.params.items():
        for new, name in new_to_old.items():
            key = key.replace(f".attentions.0.{new}.", f".attentions.0.{name}.")
        old[key] = value
    assert old.keys() != data.params.keys()
    argv = write_source(tmp_path / "new.safetensors", "autoencoder_kl")
    save_file(old, tmp_path / "old.safetensors", metadata={"format": "pt"})
    for name in ("new", "old"):
        assert main([argv[0], str(tmp_path / f"{name}.safetensors"), *argv[2:], str(tmp_path / name)]) == 0
    first, second = (tmp_path / name / "autoencoder_kl.safetensors" for name in ("new", "old"))
    assert first.read_bytes() == second.read_bytes()
    assert main(["vae2d", str(tmp_path / "old"), str(tmp_path / "back"), "--reverse"]) == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "old.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------------
# Plans and reports
# ----------------------------------------------------------------------------------------------------------


def test_dry_run(tmp_path, capsys):
    """The whole mapping and every problem; nothing is written, and the data is never read."""
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", extra=np.zeros(2, "f4"))
    params = golden.load("t5_encoder").params
    path = Path(argv[1])
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    with open(path, "r+b") as file:
        file.seek(header)
        file.write(b"\xff" * 4096)  # NaN, which a dry run does not see
    assert main([*argv, str(tmp_path / "ours"), "--dry_run"]) == 2
    out, err = capsys.readouterr()
    assert all(f"{key} {list(value.shape)} float32 -> " in out for key, value in params.items())
    assert "+ extra [2]: no place in the model" in err
    assert contents(tmp_path) == {"t5.safetensors"}
    argv = write_source(path, "t5_encoder")
    assert main([*argv, str(tmp_path / "ours"), "--dry_run"]) == 0
    assert contents(tmp_path) == {"t5.safetensors"}


def test_report(t5_source, tmp_path):
    path = tmp_path / "report.json"
    assert main([*t5_source, str(tmp_path / "ours"), "--report", str(path)]) == 0
    report = json.loads(path.read_text())
    with safe_open(tmp_path / "ours" / "t5.safetensors", "numpy") as file:
        assert sorted(report["converted"]) == sorted(file.keys())
        assert report["parameters"] == sum(file.get_tensor(name).size for name in report["converted"])
    assert report["files"] == [t5_source[1]]
    assert report["seconds"] > 0


def test_open_source_reads_headers_only(tmp_path):
    _, path, *_ = write_source(tmp_path / "t5.safetensors", "t5_encoder")
    source = sources.open_source(path)
    name = "encoder.final_layer_norm.weight"
    want = golden.load("t5_encoder").params
    assert {key: value.shape for key, value in want.items()} == source.shapes
    np.testing.assert_array_equal(source.read(name), want[name], strict=True)
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(UserError, match="truncated"):
        [source.read(key) for key in source.shapes]


# ----------------------------------------------------------------------------------------------------------
# A whole release
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Three golden checkpoints and the arguments that make a release folder of them, but for the tokenizer."""
    folder = tmp_path_factory.mktemp("tora")
    write_tora_sources(folder)
    argv = ["tora", *(arg for part in ("stdit3", "vae") for arg in (f"--{part}", str(folder / f"{part}.safetensors")))]
    return folder, [*argv, "--t5", str(folder / "t5"), "--variant", tora_variant()]


def test_tora_needs_a_tokenizer(released, tmp_path, capsys):
    _, argv = released
    assert main([*argv, str(tmp_path / "ours")]) == 2
    assert "--tokenizer FILE" in capsys.readouterr().err
    assert contents(tmp_path) == set()


def test_tora(released, tmp_path):
    """Base weights converted, fusers and extractor new, motion VAE from the video VAE; sample.py takes the folder."""
    folder, argv = released
    argv = [*argv, "--tokenizer", str(folder / "tokenizer.model"), "--report", str(tmp_path / "report.json")]
    assert main([*argv, str(tmp_path / "ours")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    params = release.load(tmp_path / "ours").params
    paths = {"/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params["tora"])}
    new = {path.removeprefix("tora/") for path in report["new"]}
    assert paths == new | {f"stdit/{path}" for path in report["parts"]["stdit"]["converted"]}
    assert all(path.startswith("extractor/") or "_fuser/" in path for path in new)
    assert report["motion_vae"] == "started from the video VAE"
    jax.tree.map(np.testing.assert_array_equal, params["motion_vae"], params["vae"])

    for kind, source in (("stdit3", "stdit3.safetensors"), ("vae", "vae.safetensors")):
        back = tmp_path / f"{kind}.safetensors"
        assert main([kind, str(tmp_path / "ours"), str(back), "--reverse"]) == 0
        assert back.read_bytes() == (folder / source).read_bytes()

    out = tmp_path / "out" / "tora.mp4"
    size = ["--height", "32", "--width", "32", "--num_frames", "1", "--steps", "1", "--quiet"]
    sample(["sample.py", "--weights", str(tmp_path / "ours"), "--out", str(out), "--prompt=a", *size])
    assert out.stat().st_size > 0
    assert json.loads(out.with_suffix(".json").read_text())["weights"] == str(tmp_path / "ours")


def test_any_number_of_latent_channels_is_read_off_the_file():
    assert len(vae.infer({"shift": (1, 8, 1, 1, 1)})["latent_shift"]) == 8
    assert "latent_shift" not in vae.infer({"shift": (1, 4, 1, 1, 1)})
