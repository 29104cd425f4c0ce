"""The converter's command: what it writes, the way back, and one clear line for whatever is wrong."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from convert_weights import sources
from convert_weights.__main__ import main
from tests.parity import golden
from tora_jax import checkpoint, cli, release, sharding
from tora_jax.errors import UserError

ROOT = Path(__file__).parent.parent


def norm_groups(count: int) -> dict:
    return {"norm_groups": count}


def stdit_variant(c: dict) -> str:
    return f"{c['depth']}x{c['hidden_size']}x{c['num_heads']}/2"


# Golden file -> (kind, part, what shapes cannot tell).
CASES = {
    "stdit3_text_mask": ("stdit3", "stdit", stdit_variant),
    "stdit3_image_no_qknorm": ("stdit3", "stdit", stdit_variant),
    "autoencoder_kl": ("vae2d", "autoencoder_kl", lambda c: json.dumps(norm_groups(c["norm_num_groups"]))),
    "video_vae_pipeline": (
        "vae",
        "vae",
        lambda c: json.dumps(
            {
                "spatial": norm_groups(c["spatial"]["norm_num_groups"]),
                "temporal": norm_groups(c["temporal"]["num_groups"]),
            }
        ),
    ),
    "t5_encoder": ("t5", "t5", lambda c: None),
    "raft_narrow": (
        "raft",
        "raft",
        lambda c: json.dumps({"corr_levels": c["corr_block_num_levels"], "corr_radius": c["corr_block_radius"]}),
    ),
    "clip": (
        "clip",
        "clip",
        lambda c: json.dumps({t: {"num_heads": c[t]["num_attention_heads"]} for t in ("text", "vision")}),
    ),
}


def write_source(path: Path, name: str, **changes: np.ndarray | None) -> list[str]:
    """A golden file's weights under PyTorch's names; returns the arguments that convert them."""
    kind, _, variant = CASES[name]
    data = golden.load(name)
    state = {key: value for key, value in (data.params | changes).items() if value is not None}
    save_file(state, path, metadata={"format": "pt"})
    given = variant(data.config)
    return [kind, str(path), *(["--variant", given] if given else [])]


@pytest.fixture
def t5_source(tmp_path):
    """A small checkpoint and the arguments that convert it."""
    return write_source(tmp_path / "t5.safetensors", "t5_encoder")


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(capsys, argv: list[str], *words: str, lines: int = 1) -> str:
    """The command fails with exit code 2, one message with these words, and writes nothing beside its sources."""
    folder = Path(argv[1]).parent if Path(argv[1]).parent.is_dir() else None
    before = contents(folder) if folder else None
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    message = error[error.index("convert_weights: error: ") :]
    assert message.count("\n") == lines, message
    for word in words:
        assert word in message, message
    assert folder is None or contents(folder) == before
    return message


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
    got = release.load_part(tmp_path / "ours", "t5")["norm"]["scale"]
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
# Sources
# ----------------------------------------------------------------------------------------------------------


def shard(folder: Path, state: dict[str, np.ndarray]) -> Path:
    """Two files and their index; returns the index."""
    folder.mkdir(parents=True)
    names = [f"model-0000{i + 1}-of-00002.safetensors" for i in range(2)]
    for i, name in enumerate(names):
        save_file(dict(list(state.items())[i::2]), folder / name)
    index = {key: names[i % 2] for i, key in enumerate(state)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder / "model.safetensors.index.json"


@pytest.fixture
def shards(tmp_path):
    return shard(tmp_path / "source" / "t5", golden.load("t5_encoder").params).parent


def test_shards_and_tokenizer(shards, tmp_path):
    shutil.copyfile(golden.GOLDEN_DIR / "tokenizer.model", shards / "spiece.model")
    write_source(tmp_path / "one.safetensors", "t5_encoder")
    assert main(["t5", str(shards), str(tmp_path / "a")]) == 0
    assert main(["t5", str(tmp_path / "one.safetensors"), str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "t5.safetensors").read_bytes() == (tmp_path / "b" / "t5.safetensors").read_bytes()
    assert contents(tmp_path / "a") - contents(tmp_path / "b") == {"tokenizer.model"}


def test_hub_id(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    argv = ["t5", "someone/t5", str(tmp_path / "ours")]
    refused(capsys, argv, "someone/t5", "not in the hub cache", "hf download someone/t5")
    model = tmp_path / "hub" / "models--someone--t5"
    snapshot = shard(model / "snapshots" / "abc" / "text_encoder", golden.load("t5_encoder").params).parent.parent
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    assert main(["t5", "someone/t5/text_encoder", str(tmp_path / "ours")]) == 0
    refused(capsys, ["t5", "someone/t5/nope", str(tmp_path / "no")], "cached copy", "nope")


def test_shard_missing(shards, tmp_path, capsys):
    (shards / "model-00002-of-00002.safetensors").unlink()
    refused(capsys, ["t5", str(shards), str(tmp_path / "ours")], "shard missing", "model-00002-of-00002.safetensors")


def test_index_names_an_absent_file(shards, tmp_path, capsys):
    path = shards / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001", "model-00007"))
    refused(capsys, ["t5", str(shards), str(tmp_path / "ours")], "index names model-00007-of-00002.safetensors")
    path.write_text(path.read_text().replace("model-00007", "../model-00001"))
    refused(capsys, ["t5", str(shards), str(tmp_path / "ours")], "index names", "not a file beside it")


def test_index_and_shard_disagree(shards, tmp_path, capsys):
    path = shards / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"encoder.final_layer_norm.weight"', '"encoder.other"'))
    refused(capsys, ["t5", str(shards), str(tmp_path / "ours")], "does not fit its index", "encoder.")


def test_folders_without_one_answer(tmp_path, capsys):
    folder = tmp_path / "source" / "x"
    folder.mkdir(parents=True)
    refused(capsys, ["t5", str(folder), str(tmp_path / "ours")], "no weights inside")
    for name in ("a", "b"):
        write_source(folder / f"{name}.safetensors", "t5_encoder")
    refused(capsys, ["t5", str(folder), str(tmp_path / "ours")], "which weights", "a.safetensors, b.safetensors")
    shutil.copyfile(folder / "a.safetensors", folder / "model.safetensors")
    assert main(["t5", str(folder), str(tmp_path / "ours")]) == 0


def test_nothing_there(tmp_path, capsys):
    refused(capsys, ["t5", str(tmp_path / "no" / "such.safetensors"), str(tmp_path / "o")], "no such file or folder")


# ----------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------


def test_truncated(t5_source, tmp_path, capsys):
    path = Path(t5_source[1])
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(capsys, [*t5_source, str(tmp_path / "ours")], path.name, "truncated")
    path.write_bytes(whole + b"more")
    refused(capsys, [*t5_source, str(tmp_path / "ours")], "4 bytes too many")


def test_wrong_magic(t5_source, tmp_path, capsys):
    Path(t5_source[1]).write_bytes(b"GGUF" + bytes(1000))
    refused(capsys, [*t5_source, str(tmp_path / "ours")], "not a safetensors file")


def test_missing_extra_and_misshapen(tmp_path, capsys):
    """All in one list."""
    key, *_, last = (k for k in golden.load("t5_encoder").params if k.endswith(".wo.weight"))
    changes = {key: None, "encoder.new.weight": np.zeros(3, "f4"), last: np.zeros((2, 2), "f4")}
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **changes)
    message = refused(capsys, [*argv, str(tmp_path / "ours")], "+ encoder.new.weight [3]", "does not fit t5", lines=3)
    assert "! blocks/mlp/wo/kernel: wants layers 0 to" in message
    changes = {"encoder.final_layer_norm.weight": np.zeros(3, "f4")}
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **changes)
    refused(capsys, [*argv, str(tmp_path / "ours")], "! norm/scale: wants", "gives [[3]]", lines=2)
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **{"encoder.final_layer_norm.weight": None})
    refused(capsys, [*argv, str(tmp_path / "ours")], "- norm/scale", "missing in the checkpoint", lines=2)


def test_numbers_that_are_no_weights(tmp_path, capsys):
    name = "encoder.final_layer_norm.weight"
    whole = golden.load("t5_encoder").params[name].astype(np.int32)
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **{name: whole})
    refused(capsys, [*argv, str(tmp_path / "ours")], name, "not floating point", lines=2)


def test_layers_of_two_dtypes(tmp_path, capsys):
    name, *_ = (k for k in golden.load("t5_encoder").params if k.endswith(".wo.weight"))
    half = golden.load("t5_encoder").params[name].astype(np.float16)
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **{name: half})
    refused(capsys, [*argv, str(tmp_path / "ours")], "blocks/mlp/wo/kernel", "give --dtype", lines=2)
    assert main([*argv, str(tmp_path / "ours"), "--dtype", "float32"]) == 0


def test_wrong_variant(tmp_path, capsys):
    argv = write_source(tmp_path / "s.safetensors", "stdit3_text_mask")
    config = golden.load("stdit3_text_mask").config
    words = "wrong variant", "XL/2", f"depth {config['depth']}, not 28"
    refused(capsys, [*argv[:2], "--variant", "XL/2", str(tmp_path / "ours")], *words)
    refused(capsys, [*argv[:2], "--variant", "XXL", str(tmp_path / "ours")], "unknown variant", "3B/2")
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder")
    refused(capsys, [*argv, "--variant", "XXL", str(tmp_path / "ours")], "wrong variant", "vocab_size")


def test_another_model(tmp_path, capsys):
    _, path, *_ = write_source(tmp_path / "s.safetensors", "t5_encoder")
    refused(capsys, ["stdit3", path, str(tmp_path / "ours")], "no tensor of a stdit3 checkpoint")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_nonfinite(bad, dtype, tmp_path, capsys):
    name = "encoder.final_layer_norm.weight"
    params = {k: v.astype(jnp.dtype(dtype)) for k, v in golden.load("t5_encoder").params.items()}
    params[name][-1] = bad
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder", **params)
    refused(capsys, [*argv, str(tmp_path / "ours")], name, "NaN or Inf", "--allow_nonfinite")
    report = tmp_path / "report.json"
    assert main([*argv, str(tmp_path / "ours"), "--allow_nonfinite", "--report", str(report)]) == 0
    assert json.loads(report.read_text())["nonfinite"] == [name]
    assert main(["t5", str(tmp_path / "ours"), str(tmp_path / "back"), "--reverse", "--allow_nonfinite"]) == 0
    assert (tmp_path / "back").read_bytes() == (tmp_path / "t5.safetensors").read_bytes()


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"\x80\x02ctorch"])
def test_pickle(start, tmp_path, capsys):
    """Refused, with the command that allows it; under a wrong name too."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(start + bytes(100))
        argv = ["t5", str(tmp_path / name), str(tmp_path / "my model")]
        command = f"python -m convert_weights t5 {tmp_path / name} '{tmp_path / 'my model'}' --allow_pickle"
        refused(capsys, argv, "a pickle", command)


def test_allowed_pickle_of_junk(tmp_path, capsys):
    """With PyTorch its own complaint in one line, without it what to install."""
    (tmp_path / "t5.bin").write_bytes(b"\x80\x02" + bytes(100))
    refused(capsys, ["t5", str(tmp_path / "t5.bin"), str(tmp_path / "ours"), "--allow_pickle"], "t5.bin", "torch")


@pytest.mark.parametrize("option", [[], ["--orbax"]])
def test_full_disk(option, t5_source, tmp_path):
    """A limit on the size of files stands in for a small disk: the system refuses the write in the same way."""
    blocks = max(Path(t5_source[1]).stat().st_size // 2048, 1)  # of a KiB: half of it fits
    command = shlex.join([sys.executable, "-m", "convert_weights", *t5_source, str(tmp_path / "ours"), *option])
    command = f"ulimit -f {blocks} && exec {command}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    *_, message = done.stderr.splitlines()
    assert message.startswith("convert_weights: error: ")
    assert "cannot write" in message
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == {"t5.safetensors"}


def test_unwritable(t5_source, tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    refused(capsys, [*t5_source, str(tmp_path / "ours")], "exists already")
    refused(capsys, [*t5_source, str(tmp_path / "t5.safetensors" / "ours")], "cannot write there")


def test_command_line(t5_source, tmp_path, capsys):
    out = str(tmp_path / "ours")
    refused(capsys, [*t5_source, out, "--dtype", "int8"], "--dtype", "float32")
    refused(capsys, [*t5_source, out, "--mesh", "fsdp"], "--mesh", "fsdp=4")
    refused(capsys, [*t5_source, out, "--mesh", "fsdp=512"], "512 devices")
    refused(capsys, [*t5_source, out, "--variant", '{"depht": 3}'], "depht")
    refused(capsys, [*t5_source, out, "--variant", "{"], "--variant", "not valid JSON")
    refused(capsys, ["t5", t5_source[1], out, "--reverse", "--mesh", "fsdp=2"], "--mesh means nothing")


def test_fuzzed_headers(tmp_path, capsys):
    """Flipped bytes and cut files: refused in a line, or the flip changed nothing that counts."""
    argv = write_source(tmp_path / "t5.safetensors", "t5_encoder")
    path, out = Path(argv[1]), tmp_path / "ours"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert main([*argv, str(out)]) == 0
    want = (out / "t5.safetensors").read_bytes()
    shutil.rmtree(out)
    rng = np.random.default_rng(0)
    refusals = 0
    for i in range(500):
        damaged = bytearray(whole)
        if i % 5 == 4:
            damaged = damaged[: rng.integers(header + 1)]
        else:
            for at in rng.integers(0, header, 1 + i % 3):
                damaged[at] ^= rng.integers(1, 256)
        path.write_bytes(damaged)
        capsys.readouterr()
        code = main([*argv, str(out)])
        error = capsys.readouterr().err
        if code == 0:
            assert (out / "t5.safetensors").read_bytes() == want
            shutil.rmtree(out)
            continue
        refusals += 1
        assert code == 2
        assert "convert_weights: error: " in error
        assert contents(tmp_path) == {"t5.safetensors"}
    assert refusals > 400


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
# Orbax
# ----------------------------------------------------------------------------------------------------------


def test_orbax_sharded(t5_source, tmp_path):
    """Written over a mesh, read without one, over another one, and back to PyTorch's names."""
    assert main([*t5_source, str(tmp_path / "plain")]) == 0
    assert main([*t5_source, str(tmp_path / "orbax"), "--mesh", "fsdp=4"]) == 0
    want = release.load_part(tmp_path / "plain", "t5")
    mesh = sharding.make_mesh("fsdp=2,tensor=2")
    sharded = checkpoint.restore(tmp_path / "orbax" / "params", mesh, only="t5")
    for got in (release.load_part(tmp_path / "orbax", "t5"), sharded):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), got, want)
    kernel = sharded["blocks"]["mlp"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert main(["t5", str(tmp_path / "orbax"), str(tmp_path / "back"), "--reverse"]) == 0
    assert (tmp_path / "back").read_bytes() == Path(t5_source[1]).read_bytes()


READER = """
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, process, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
import tensorstore
from tora_jax import checkpoint, sharding

def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(m["values"][0]["value"] for m in metrics)

mesh = sharding.make_mesh("fsdp=4")
checkpoint.shapes(folder)
before = bytes_read()
leaf = checkpoint.restore(folder, mesh)["big"]["kernel"]
print(bytes_read() - before)
want = np.random.default_rng(0).standard_normal(leaf.shape, np.float32)
assert len(leaf.addressable_shards) == 2
assert all((shard.data == want[shard.index]).all() for shard in leaf.addressable_shards)
"""


def test_each_process_reads_its_own_shards(tmp_path):
    """Two processes with two devices each: each reads half of the bytes, counted by the store."""
    noise = np.random.default_rng(0).standard_normal((256, 4096), np.float32)  # does not compress
    checkpoint.save(tmp_path / "checkpoint", [("big/kernel", noise)], sharding.make_mesh("fsdp=4"))
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", READER, address]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path / "checkpoint")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    read = [int(out.split()[-1]) for out, _ in outputs]
    assert all(0.45 * noise.nbytes < count < 0.6 * noise.nbytes for count in read), (read, noise.nbytes)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# ----------------------------------------------------------------------------------------------------------
# A whole release
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A release folder from three golden checkpoints, the denoiser's caption layers made as wide as T5's features."""
    folder = tmp_path_factory.mktemp("tora")
    stdit, width = golden.load("stdit3_text_mask"), golden.load("t5_encoder").config["d_model"]
    rng = np.random.default_rng(0)
    changes = {
        "y_embedder.y_embedding": (stdit.config["model_max_length"], width),
        "y_embedder.y_proj.fc1.weight": (stdit.config["hidden_size"], width),
    }
    normal = {key: rng.standard_normal(shape, np.float32) for key, shape in changes.items()}
    write_source(folder / "stdit3.safetensors", "stdit3_text_mask", **normal)
    *_, vae_variant = write_source(folder / "vae.safetensors", "video_vae_pipeline")
    shard(folder / "t5", golden.load("t5_encoder").params)
    argv = ["tora", *(arg for part in ("stdit3", "vae") for arg in (f"--{part}", str(folder / f"{part}.safetensors")))]
    argv += ["--t5", str(folder / "t5"), "--variant", json.dumps({"vae": json.loads(vae_variant)})]
    return folder, argv, rng


def test_tora_needs_a_tokenizer(released, tmp_path, capsys):
    _, argv, _ = released
    assert main([*argv, str(tmp_path / "ours")]) == 2
    assert "--tokenizer FILE" in capsys.readouterr().err
    assert contents(tmp_path) == set()


def test_tora(released, tmp_path):
    """Base weights converted, fusers and extractor new, motion VAE from the video VAE; sample.py takes the folder."""
    folder, argv, _ = released
    shutil.copyfile(golden.GOLDEN_DIR / "tokenizer.model", tmp_path / "spiece.model")
    argv = [*argv, "--tokenizer", str(tmp_path / "spiece.model"), "--report", str(tmp_path / "report.json")]
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
    cli.sample(["sample.py", "--weights", str(tmp_path / "ours"), "--out", str(out), *size])
    assert out.stat().st_size > 0
    assert json.loads(out.with_suffix(".json").read_text())["weights"] == str(tmp_path / "ours")
