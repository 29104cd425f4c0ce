"""benchmarks.aot: what it counts, its jobs on devices that are there, and on TPUs that are not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import aot, chips, flops, jobs
from configs import tora
from tests import training_runs
from tora_jax import sharding
from tora_jax.io.files import tuples

ROOT = Path(__file__).parent.parent.parent
SIZE = {"num_frames": 5, "height": 32, "width": 32}


@pytest.mark.parametrize(("latents", "tflop"), [((15, 60, 106), 56.5), ((30, 90, 160), 284), ((60, 90, 160), 568)])
def test_operations_of_open_sora(latents, tflop):
    """Without the extractor and the fusers, and what those add: under 8 %."""
    found = flops.forward(tora.get_config().tora.to_dict(), *latents)
    added = found["extractor"] + found["fuser"]
    assert (sum(found.values()) - added) / 1e12 == pytest.approx(tflop, rel=0.01)
    assert added < 0.08 * (sum(found.values()) - added)


def test_operations_of_training():
    found = {"spatial": 10.0, "temporal": 10.0, "attention": 5.0, "fuser": 1.0}
    assert flops.training(found, {"spatial", "temporal", "fuser"}) == 3 * 26
    assert flops.training(found, {"temporal", "fuser"}) == 3 * 26 - 10


def test_chips():
    assert chips.find("TPU v5 lite").memory == 16
    assert chips.find("TPU v5p").memory == 95
    assert chips.find("NVIDIA H100 80GB HBM3").peak == 989
    assert chips.find("cpu") is None


MODULE = """
  %all-to-all.1 = bf16[1,15,4,900,1152]{4,3,2,1,0} all-to-all(%x), replica_groups={{0,1}}
  ROOT %all-reduce.3 = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%a, %b), to_apply=%add
  %all-gather-start.2 = (f32[4,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%y), dimensions={0}
  %all-gather-done.2 = f32[8,2]{1,0} all-gather-done(%all-gather-start.2)
  %fusion = f32[8]{0} fusion(%all-reduce.3), kind=kLoop
"""


def test_collectives():
    tokens = 15 * 4 * 900 * 1152
    assert aot.sent(MODULE) == [("all-to-all", tokens, 2 * tokens), ("all-reduce", 12, 48), ("all-gather", 16, 64)]
    assert aot.collectives(MODULE)["all-to-all"] == {"count": 1, "gib": round(2 * tokens / 2**30, 3)}


@pytest.mark.parametrize("job", tuple(jobs.JOBS))
def test_jobs(job):
    """The jobs of the smallest model, compiled for this machine's devices."""
    config = tuples(tora.get_config("runlocal").to_dict())
    figures = aot.measure(config, sharding.make_mesh("data=2,fsdp=2,seq=2"), job, SIZE)
    assert figures["fits"]
    assert figures["temporary_gib"] < 1
    assert figures["batch"] == (4 if job == "train" else 1)
    assert job not in ("train", "sample") or figures["tflop"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "code"), [("v5e:2x4", 0), ("v5e:2x2", 1)])
def test_for_tpus(topology, code):
    """With libtpu: pip install libtpu && pytest -m slow tests/benchmarks/test_aot.py; one fits, the other does not."""
    mesh = "fsdp=8" if code == 0 else "data=4"
    command = ["--topology", topology, "--mesh", mesh, "--config.tora.stdit.remat=none", "--num_frames=17"]
    command += ["--height=240", "--width=426"] if code == 0 else []
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot", *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    figures = json.loads(done.stdout)
    assert figures["fits"] == (code == 0)
    assert figures["device"] == "TPU v5 lite"


@pytest.mark.slow
def test_one_compilation_for_each_bucket(tmp_path, monkeypatch):
    """A run over two sizes of clips compiles its step twice, and not again when it goes on."""
    made, make = [], training_runs.train.jit_train_step
    monkeypatch.setattr(training_runs.train, "jit_train_step", lambda *args: made.append(make(*args)) or made[-1])
    clips = training_runs.write_records(tmp_path / "clips")
    bucket = "{'frames':%d,'height':32,'width':32,'fps':0.0,'batch':2,'weight':1.0}"
    options = (training_runs.source(clips), f"--config.data.buckets=({bucket % 5},{bucket % 4})")
    outcome = training_runs.run(
        "tora.py:runlocal", tmp_path / "run", *options, "--config.evaluation.clips=0", "--config.steps=8"
    )
    assert outcome.code == 0, outcome.stderr
    assert made[0]._cache_size() == 2
