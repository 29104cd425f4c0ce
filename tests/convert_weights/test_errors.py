"""The converter's command before whatever is wrong: one clear line, exit code 2, nothing left behind."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.converting import ROOT, contents, main, refused, shard, write_source
from tests.parity import golden


@pytest.fixture
def t5_source(tmp_path):
    """A small checkpoint and the arguments that convert it."""
    return write_source(tmp_path / "t5.safetensors", "t5_encoder")


# ----------------------------------------------------------------------------------------------------------
# Where the files lie
# ----------------------------------------------------------------------------------------------------------


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
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing answers there
    argv = ["t5", "someone/t5", str(tmp_path / "ours")]
    refused(capsys, argv, "someone/t5", "not whole in the hub cache", "hf download someone/t5")
    model = tmp_path / "hub" / "models--someone--t5"
    snapshot = shard(model / "snapshots" / "abc" / "text_encoder", golden.load("t5_encoder").params).parent.parent
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(snapshot.name)
    assert main(["t5", "someone/t5/text_encoder", str(tmp_path / "ours")]) == 0
    refused(capsys, ["t5", "someone/t5/nope", str(tmp_path / "no")], "someone/t5/nope", "the hub gives no answer")


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
