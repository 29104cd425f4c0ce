"""The comparison with an earlier commit: what counts as equal, what is told of a difference, and a wrong case name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.file_differences import differences
from tora_jax.io.video import write_video

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def sides(tmp_path):
    for side in ("here", "there"):
        (tmp_path / side / "release").mkdir(parents=True)
    return tmp_path / "here", tmp_path / "there"


def write(path: Path, frames: np.ndarray, **report) -> None:
    """One file of each kind, made of the same numbers."""
    write_video(path / "video.mp4", frames, 8.0)
    np.savez(path / "latents.npz", latents=frames / 255)
    save_file({"kernel": np.float32(frames)}, path / "release" / "vae.safetensors")
    (path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": float(frames.mean())}) + "\n")
    (path / "video.json").write_text(json.dumps({"settings": {"steps": 4}, **report}))


def test_equal(sides):
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    for i, side in enumerate(sides):
        write(side, frames, seconds={"load": i}, versions={"jax": str(i)}, device=f"{i}")
    assert differences(*sides, ("*", "release/*")) == []


def test_different_values(sides):
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    other = frames.copy()
    other[1, 2, 3, 0] ^= 128
    for side, pixels, key in zip(sides, (frames, other), ("a", "b"), strict=True):
        write(side, pixels, key=key)
    found = {each["file"]: each["how"] for each in differences(*sides, ("*", "release/*"))}
    assert found.keys() == {"video.mp4", "latents.npz", "release/vae.safetensors", "metrics.jsonl", "video.json"}
    assert found["video.json"] == ["/key: 'a' here, 'b' there"]
    assert found["release/vae.safetensors"][0].startswith("kernel: 1 of 9216 values, by 128 at most")
    assert found["latents.npz"][0].startswith("latents: 1 of 9216 values, by 0.502 at most")
    assert found["metrics.jsonl"][0].startswith("/0/loss: ")
    assert differences(*sides, ("release/*.mp4",))[0]["how"] == ["neither side wrote a file"]


def test_different_bits(sides):
    """The same to `==`: signs of zero, dtypes, shapes, the order of tensors in a file."""
    arrays = {"sign": np.float32([0]), "dtype": np.float32([1]), "shape": np.ones(4), "nan": np.float32([np.nan])}
    changed = {"sign": np.float32([-0.0]), "dtype": np.float64([1]), "shape": np.ones((2, 2))}
    for side, values in zip(sides, (arrays, {**arrays, **changed}), strict=True):
        np.savez(side / "values.npz", **values)
        save_file({"a": values["nan"]}, side / "values.safetensors", {"side": side.name})
    found = {each["file"]: each["how"] for each in differences(*sides)}
    assert [line.partition(":")[0] for line in found["values.npz"]] == ["sign", "dtype", "shape"]
    assert found["values.safetensors"] == ["the values are the same, the bytes are not"]


def test_missing_files_and_values(sides):
    (sides[0] / "only.md").write_text("here\n")
    np.savez(sides[0] / "values.npz", a=np.ones(2), b=np.ones(2))
    np.savez(sides[1] / "values.npz", a=np.ones(2))
    assert differences(*sides) == [
        {"file": "only.md", "how": ["is missing there"]},
        {"file": "values.npz", "how": ["b: is missing there"]},
    ]


def test_unknown_case():
    argv = [sys.executable, "-m", "benchmarks.same", "--against", "HEAD", "--only", "default,sound"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("same: error: 'sound' is no case; there are default, ")
    assert done.stderr.count("\n") == 1
