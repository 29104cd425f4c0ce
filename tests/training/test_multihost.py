"""train.py as two processes on one machine, over loopback: python -m pytest -m slow tests/training/test_multihost.py"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import tora
from tests import training_runs
from tests.training_runs import ROOT, source
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.io.files import tuples

pytestmark = pytest.mark.slow

# SGD, so that five steps add up gradients; nothing sampled, so that what is compared is the training alone.
SETTINGS = (
    "--config.optim.optimizer=sgd",
    "--config.optim.lr=0.1",
    "--config.optim.warmup=0",
    "--config.evaluation.clips=0",
    "--config.log_every=1",
    "--config.train=('tora/.*',)",
)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return training_runs.write_records(tmp_path_factory.mktemp("data") / "clips", train=24, validation=8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The least model with fusers that do something."""
    config = tuples(tora.get_config("stage=2,runlocal").to_dict())
    params = jax.tree.map(np.asarray, assembly.load(config).params)
    rng = np.random.default_rng(0)
    params["tora"] = jax.tree.map(
        lambda leaf: (leaf + 0.05 * rng.normal(size=leaf.shape)).astype(leaf.dtype), params["tora"]
    )
    folder = tmp_path_factory.mktemp("release") / "shaken"
    sections = assembly.sections(config)
    release.save(folder, sections, params, assembly.tokenizer_path(None), "Random numbers.\n")
    return folder


def start(workdir, clips, weights, mesh, processes, index, port, devices, steps=5, *options):
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(index),
    }
    command = [sys.executable, "train.py", f"--config={ROOT}/configs/tora.py:stage=2,runlocal", "--quiet"]
    command += [f"--workdir={workdir}", f"--weights={weights}", source(clips), f"--config.mesh={mesh}", *SETTINGS]
    command += [f"--config.steps={steps}", "--config.save_every=2", f"--config.eval_every={steps}", *options]
    command += ["--config.data.buckets=({'frames':5,'height':32,'width':32,'fps':0.0,'batch':8,'weight':1.0},)"]
    command += ["--distributed"] if processes > 1 else []
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def pair(workdir, clips, weights, mesh, *rest):
    port = free_port()
    return [start(workdir, clips, weights, mesh, 2, index, port, 4, *rest) for index in range(2)]


def finish(processes, seconds=600):
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,seq=2"])
def test_the_same_as_one_process(mesh, clips, weights, tmp_path):
    finish([start(tmp_path / "one", clips, weights, mesh, 1, 0, 0, 8)])
    finish(pair(tmp_path / "two", clips, weights, mesh))
    one, two = (training_runs.metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 6
    for here, there in zip(one, two, strict=True):
        assert here == pytest.approx(there, rel=1e-6)
    one, two = (
        traverse_util.flatten_dict(release.load_part(tmp_path / name / "release", "tora"), sep="/")
        for name in ("one", "two")
    )
    for path, leaf in one.items():
        assert np.abs(leaf - two[path]).max() <= 1e-6 * np.abs(leaf).max(), path


def test_a_killed_process_ends_the_other_and_a_restart_resumes(clips, weights, tmp_path):
    workdir = tmp_path / "run"
    restart = ("--config.resume", "--config.restartable")  # the same command each time
    first, second = pair(workdir, clips, weights, "data=4,fsdp=2", 100_000, *restart)
    while len(training_runs.metrics(workdir)) < 5:
        assert first.poll() is None
        time.sleep(0.5)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output = first.communicate(timeout=90)[0]
    assert time.monotonic() - killed < 60
    assert first.returncode != 0
    assert re.search("another (process|task)", output), output
    second.communicate()
    done = int(sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())[-1])
    last = done + 2
    resumed = pair(workdir, clips, weights, "data=4,fsdp=2", last, *restart)
    finish(resumed)
    steps = [line["step"] for line in training_runs.metrics(workdir) if "loss" in line]
    assert steps == list(range(1, last + 1))
    assert (workdir / "release/config.json").is_file()


def test_alone(tmp_path):
    """--distributed without a cluster."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
    done = subprocess.run(
        [sys.executable, "train.py", "--config=configs/tora.py:runlocal", f"--workdir={tmp_path}", "--distributed"],
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: error: --distributed: ")
    assert "JAX_COORDINATOR_ADDRESS" in done.stderr
