"""Weights, checkpoints and batches that the code before the redesign (commit 65ee8fe) wrote: read as ever.

`tests/golden/written_before` holds
  release: a release folder in float16, of a model as the tests' tiny one with narrower VAEs;
  params: the text encoder of it in Orbax's format;
  training: the checkpoint of step 2 of 4 of train.py, with the metrics of all 4 steps;
  batch: what `sample.py --weights ../release --batch jobs.jsonl --out out --steps 1 --guidance 3` left, without videos.
"""

import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import training_runs
from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release, weights
from tora_jax.sampling import __main__ as sampling

BEFORE = Path(__file__).parent.parent / "golden" / "written_before"
# Number of parameters, and the sum of what they are above or below 0.
SUMS = {
    "tora": (23936, 2348.087684),
    "vae": (5305, 852.467854),
    "motion_vae": (5305, 852.467854),
    "t5": (8728, 6651.782791),
}


def test_release_folder():
    found = release.load(BEFORE / "release")
    leaves = {part: [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(found.params[part])] for part in SUMS}
    assert {part: sum(leaf.size for leaf in leaves[part]) for part in SUMS} == {p: n for p, (n, _) in SUMS.items()}
    for part, (_, total) in SUMS.items():
        assert sum(np.abs(leaf).sum() for leaf in leaves[part]) == pytest.approx(total, abs=1e-5)
    assembly.load(weights=BEFORE / "release")  # of the sizes that its config names


def test_orbax_parameters():
    got, want = weights.restore(BEFORE / "params", only="t5"), release.load_part(BEFORE / "release", "t5")
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), got, want)


def test_checkpoint_of_a_training(tmp_path):
    """It goes on at the step, and with the batches, at which it stopped."""
    shutil.copytree(BEFORE / "training", tmp_path / "run")
    before = training_runs.metrics(tmp_path / "run")
    clips = training_runs.write_records(tmp_path / "clips", train=6, validation=2)
    kernels = "('vae/spatial_vae/encoder/conv_out/kernel','vae/spatial_vae/decoder/conv_in/kernel')"
    adapter = ("--config.lora.rank=1", f"--config.lora.kernels={kernels}", "--config.resume")
    config = "vae.py:phase=spatial,runlocal"
    outcome = training_runs.run(config, tmp_path / "run", training_runs.source(clips), *adapter)
    assert outcome.code == 0, outcome.stderr
    assert [line["step"] for line in outcome.metrics] == [1, 2, 3, 4, 4]
    for got, want in zip(outcome.metrics, before, strict=True):
        assert got == pytest.approx(want, rel=1e-3)


def test_finished_batch(tmp_path, monkeypatch, capsys):
    shutil.copytree(BEFORE / "batch", tmp_path / "batch")
    monkeypatch.chdir(tmp_path / "batch")
    flags = ["--batch", "jobs.jsonl", "--out", "out", "--steps", "1", "--guidance", "3"]
    reports = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    command_line.run(sampling._sample, ["sample.py", "--weights", os.fspath(BEFORE / "release"), *flags])
    assert "out: 0 videos made, 3 there before, 0 failed" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == reports
