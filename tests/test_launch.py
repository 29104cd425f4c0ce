"""launch/ and the Dockerfile, as far as they can be tried without a cloud: scripts run among fakes of the commands."""

import math
import os
import re
import subprocess
import tomllib

import pytest
import yaml
from tora_jax.configs import common

from tests.training_runs import ROOT, train
from tora_jax import command_line

# Writes down how it was called; what there is to say or to fail with comes from the test.
FAKE = """#!/bin/bash
name=${0##*/}
(IFS=$'\\t'; echo "$name"$'\\t'"$*" >> "$FAKES/calls")
. "$FAKES/behaviour"
"""
COMMANDS = ("docker", "gcloud", "python", "scontrol", "sleep", "srun")


@pytest.fixture
def launched(tmp_path):
    """Runs a script; its exit code and the commands that it called."""
    for command in COMMANDS:
        (tmp_path / command).write_text(FAKE)
        (tmp_path / command).chmod(0o755)

    def run(script: str, behaviour: str, **environment: str) -> tuple[int, list[list[str]]]:
        (tmp_path / "behaviour").write_text(behaviour)
        (tmp_path / "calls").write_text("")
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "launch" / script],
            env={**os.environ, "PATH": path, "FAKES": str(tmp_path), **environment},
            timeout=60,
            capture_output=True,
            text=True,
        )
        return done.returncode, [call.split("\t") for call in (tmp_path / "calls").read_text().splitlines()]

    return run


def check(words: list[str], devices: int, several: bool) -> None:
    """What follows "python" is read by train.py's own flags, and is what may be started again."""
    assert words[0] == "train.py"
    flags = command_line.parse(words, train.define_flags, "", common.training())
    assert flags.config.resume
    assert flags.config.restartable
    assert flags.config.data.sources
    assert flags.workdir
    assert flags.weights
    assert flags.distributed == several
    assert math.prod(int(size) for size in re.findall(r"=(\d+)", flags.config.mesh)) == devices


@pytest.fixture(autouse=True)
def in_a_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_a_box_starts_again_until_it_is_finished(launched):
    fails_twice = '[ $name = python ] || exit 0; [ "$(grep -c train.py "$FAKES/calls")" -gt 2 ]'
    code, calls = launched("box.sh", fails_twice)
    assert code == 0
    assert [call[0] for call in calls] == ["python", "sleep", "python", "sleep", "python"]
    check(calls[-1][1:], 8, several=False)
    code, calls = launched("box.sh", "[ $name = sleep ] && kill -TERM $PPID; exit 1")
    assert code == 143
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("behaviour", "restarts", "code", "ends"),
    [
        ("exit 0", "", 0, "srun"),
        ("[ $name = scontrol ]", "3", 0, "scontrol"),  # killed, or its time is up
        ("[ $name = scontrol ]", "100", 1, "srun"),
        ("kill -TERM $PPID; exit 143", "", 143, "srun"),  # scancel
    ],
)
def test_slurm_queues_what_is_not_finished(launched, behaviour, restarts, code, ends):
    found, calls = launched("slurm.sh", behaviour, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=restarts)
    assert found == code
    assert calls[-1][0] == ends
    if ends == "scontrol":
        assert calls[-1][1:] == ["requeue", "7"]
    settings = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", (ROOT / "launch/slurm.sh").read_text(), re.MULTILINE))
    assert settings["ntasks-per-node"] == settings["gpus-per-node"]
    check(calls[0][calls[0].index("python") + 1 :], int(settings["nodes"]) * int(settings["gpus-per-node"]), True)


def test_a_tpu_pod_is_asked_for_again_and_given_back(launched):
    """Taken away once; each host runs its startup script."""
    behaviour = """
[ $name = gcloud ] || exit 0
count() { grep -c -- "$1" "$FAKES/calls"; }
case "$*" in
  *"storage ls gs://"*/release/config.json) [ "$(count queued-resources.create)" -gt 1 ] ;;
  *describe*) case $(count describe) in 1) exit 1 ;; 2) echo ACTIVE ;; 3) echo SUSPENDED ;; *) exit 1 ;; esac ;;
  *create*) last=${@: -1}; bash "${last##*startup-script=}" ;;
esac
"""
    code, calls = launched("tpu_pod.sh", behaviour)
    assert code == 0
    queued = [call[4] for call in calls if call[:4] == ["gcloud", "compute", "tpus", "queued-resources"]]
    assert queued == ["describe", "create", "describe", "describe", "delete", "describe", "create", "delete"]
    (create, _) = (call for call in calls if "create" in call)
    chips = next(int(word.rpartition("-")[2]) for word in create if word.startswith("--accelerator-type="))
    first, _ = (call for call in calls if call[:2] == ["docker", "run"])
    check(first[first.index("python") + 1 :], chips, several=True)


def test_the_jobset_of_gke():
    found = yaml.safe_load((ROOT / "launch/gke.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert all(isinstance(value, str) for value in found["metadata"]["annotations"].values())
    [job] = found["spec"]["replicatedJobs"]
    assert found["spec"]["failurePolicy"]["maxRestarts"] > 0
    job = job["template"]["spec"]
    assert job["backoffLimit"] == 0  # else a pod would start again by itself, without the others
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert job["parallelism"] == job["completions"]
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == chips
    python, *words = container["command"] + container["args"]
    assert python == "python"
    check(words, chips, several=True)


def test_the_image():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.1[1-3]\.\d+-", text, re.MULTILINE)
    named = re.search(r"# (.*)\nARG EXTRA=(\w+)", text)
    assert {named[2], "tpu"} <= set(re.findall(r"\b[a-z]+\d*\b", named[1])) & extras.keys()
