"""benchmarks.aot: what it counts, its jobs on devices that are there, and on TPUs that are not."""

import json
import subprocess
import sys
from pathlib import Path

import jax
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
    assert chips.find("TPU v5 lite").memory == 15.75
    assert chips.find("TPU v5p") == chips.find("TPU v5")
    assert chips.find("TPU v4").memory < 16  # half a chip
    assert chips.find("TPU7x").peak == 1153.5
    assert chips.find("NVIDIA H100 80GB HBM3").peak == 989
    assert chips.find("cpu") is None


OLD = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G."
PLANNED = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (65.50G) exceeds "
    "available HBM (15.75G)."
)
NEW = (  # libtpu 0.0.52
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (98.00G) exceeds available HBM (94.74G). HLO module: jit_f.\nSee https://openxla.org/xla/errors"
)


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (OLD, {"total_gib": 20.5, "chip_gib": 15.75}),
        (PLANNED, {"total_gib": 65.5, "chip_gib": 15.75}),
        (NEW, {"total_gib": 98.0, "chip_gib": 94.74}),
        ("RESOURCE_EXHAUSTED: in other words", {}),
        ("INTERNAL: Mosaic failed to compile", None),
    ],
)
def test_what_does_not_fit(message, wanted):
    """The words of the compilers that there are; other words of the same status are the same, without numbers."""
    assert aot.wanted_memory(jax.errors.JaxRuntimeError(message)) == wanted


def test_the_compiler_that_jax_is_made_for(monkeypatch):
    requires = ["jaxlib==0.10.2", 'libtpu==0.0.42.*; extra == "tpu"']
    monkeypatch.setattr(aot.metadata, "requires", lambda _: requires)
    versions = {"jax": "0.10.2", "libtpu": "0.0.52"}
    monkeypatch.setattr(aot, "version", versions.get)
    assert aot.install() == "jax 0.10.2 is made for libtpu 0.0.42.*, not 0.0.52: pip install 'jax[tpu]==0.10.2'"
    versions["libtpu"] = "0.0.42.1"
    assert "pip install" not in aot.install()
    versions["libtpu"] = "none"
    assert "not none: pip install" in aot.install()


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
    assert figures["fits"] is None  # nobody knows how much memory a CPU has
    assert figures["temporary_gib"] < 1
    assert figures["batch"] == (4 if job in ("train", "encode") else 1)
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
