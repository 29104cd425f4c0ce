"""Trainings that are disturbed, and gone on with on other meshes, against the same training left alone; JSON on stdout.

  pip install 'tora_jax[cloud,train]' gcp-storage-emulator
  python -m benchmarks.soak disturbed [--minutes 30] [--disturbances 12] [--steps 1000] [--seed 0] [--out soak]
  python -m benchmarks.soak sizes [--steps 50] [--out soak]

Both train `configs/tora.py:stage=2,runlocal` with `--config.resume --config.restartable`, workdir and clips in a bucket
of `benchmarks/gcs.py`. When a process ends otherwise than with 0, all are started again, as a launcher does.

  disturbed  in two processes. At moments drawn by the seed a process is killed or told to stop, the bucket refuses for
             10 s, or the copies of files in it vanish. Aims: no step lost or twice, losses and weights equal to the bit
  sizes      one process and data=4, then two with fsdp=8, one device, two with data=4,seq=2. Aim: the losses of all
             steps within 1e-3, relative
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import gcs
from tora_jax.checkpoints import release
from tora_jax.data.sprites.dataset import SpritesConfig, build_sprites
from tora_jax.io import files
from tora_jax.training import log

KINDS = ("kill", "stop", "refuse", "cache")
REFUSED_SECONDS = 10
END_SECONDS = 90  # for the others to notice that a process has ended; then they are killed
BUCKETS = "({'frames':5,'height':32,'width':32,'fps':0.0,'batch':8,'weight':1.0},)"
SETTINGS = ("evaluation.clips=0", "eval_every=100000", "log_every=1", "save_every=5", f"data.buckets={BUCKETS}")


# A run of one step, with whose weights the others begin. To draw random ones, the second process would compile each
# time (in JAX's cache are the first one's programs alone), and Gloo waits no longer than 30 seconds for it.
WEIGHTS = "weights"


class Size(NamedTuple):
    """Of a run: a mesh over so many processes, each with so many devices."""

    mesh: str
    processes: int
    devices: int


SIZES = (Size("data=4", 1, 4), Size("fsdp=8", 2, 4), Size("", 1, 1), Size("data=4,seq=2", 2, 4))


class Place(NamedTuple):
    """Where things are: a folder of this machine, and one in the bucket, with the clips; and what refuses it."""

    here: Path
    bucket: Path
    refuse: Path


@contextlib.contextmanager
def place(out: Path) -> Iterator[Place]:
    """A bucket with clips in it."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    least = SpritesConfig(name="least", side=32, frames=5, clips={"train": 32, "validation": 8})
    clips = build_sprites(out / "data", least)
    with gcs.serve(refuse=out / "refuse") as port:
        os.environ |= gcs.environment(port)
        found = Place(out, files.path(f"gs://{gcs.BUCKET}"), out / "refuse")
        found.refuse.unlink(missing_ok=True)
        for name in files.sizes(clips):
            (found.bucket / "clips" / name).send(clips / name)
        finish(found, WEIGHTS, 1, Size("", 1, 1))
        yield found


def start(at: Place, name: str, steps: int, size: Size) -> list[subprocess.Popen]:
    """The processes of a run; what they say is appended to NAME-INDEX.log."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    config = [f"--config.{setting}" for setting in (*SETTINGS, f"steps={steps}", f"mesh={size.mesh}")]
    config += [f"--config.data.sources=('{at.bucket}/clips',)", "--config.resume", "--config.restartable"]
    command = [sys.executable, "train.py", "--config=configs/tora.py:stage=2,runlocal", "--quiet"]
    command += [f"--workdir={at.bucket}/{name}", *config] + ["--distributed"] * (size.processes > 1)
    command += [f"--weights={at.bucket}/{WEIGHTS}/release"] * (name != WEIGHTS)
    processes = []
    for index in range(size.processes):
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={size.devices} --xla_backend_optimization_level=0",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(size.processes),
            "JAX_PROCESS_ID": str(index),
            "JAX_COMPILATION_CACHE_DIR": str(at.here / "programs"),
            "XDG_CACHE_HOME": str(at.here / "cache"),
        }
        with (at.here / f"{name}-{index}.log").open("a") as said:
            processes.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
    return processes


def ended(processes: Sequence[subprocess.Popen]) -> bool:
    """Whether any process has ended; if so, waits for the others."""
    if all(process.poll() is None for process in processes):
        return False
    for process in processes:
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return True


def disturb(at: Place, kind: str, processes: Sequence[subprocess.Popen], draw: random.Random) -> None:
    if kind == "kill":
        draw.choice(processes).kill()
    elif kind == "stop":
        draw.choice(processes).send_signal(signal.SIGTERM)
    elif kind == "refuse":
        at.refuse.touch()
        time.sleep(REFUSED_SECONDS)
        at.refuse.unlink()
    else:
        shutil.rmtree(at.here / "cache", ignore_errors=True)


def finish(at: Place, name: str, steps: int, size: Size, plan: Sequence[tuple[float, str]] = (), seed: int = 0) -> int:
    """Starts a run until it is finished, and disturbs it.

    Args:
      plan: (seconds after the first start, what of KINDS).

    Returns:
      how often it was started.

    Raises:
      SystemExit: it was started again without need 20 times.
    """
    plan, draw, starts, began = list(plan), random.Random(seed), 0, time.monotonic()
    for starts in range(1, 20 + 2 * len(plan)):
        processes = start(at, name, steps, size)
        while not ended(processes):
            if plan and time.monotonic() - began > plan[0][0]:
                disturb(at, plan.pop(0)[1], processes, draw)
            time.sleep(0.2)
        if all(process.returncode == 0 for process in processes):
            return starts
    sys.exit(f"{name} does not end; see {at.here}/{name}-0.log")


def losses(at: Place, name: str) -> dict[int, float]:
    """Step -> loss.

    Raises:
      ValueError: a step is missing, or is there twice.
    """
    lines = [line for line in log.read_lines(at.bucket / name / log.METRICS) if "loss" in line]
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        raise ValueError(f"{name}: its steps are {[line['step'] for line in lines]}")
    return {line["step"]: line["loss"] for line in lines}


def distance(at: Place, one: str, other: str) -> float:
    """The largest relative distance of the losses of two runs.

    Raises:
      ValueError: as `losses`, or one has more steps.
    """
    here, there = (list(losses(at, name).values()) for name in (one, other))
    if len(here) != len(there):
        raise ValueError(f"{one} has {len(here)} steps, {other} {len(there)}")
    return float(np.max(np.abs(np.subtract(here, there)) / np.abs(here)))


def disturbed(at: Place, minutes: float, disturbances: int, steps: int, seed: int) -> dict[str, Any]:
    draw, size = random.Random(seed), Size("data=4,fsdp=2", 2, 4)
    moments = sorted(draw.uniform(0, 60 * minutes) for _ in range(disturbances))
    kinds = [KINDS[i % len(KINDS)] for i in range(disturbances)]
    draw.shuffle(kinds)
    finish(at, "alone", steps, size)
    began = time.monotonic()
    starts = finish(at, "disturbed", steps, size, list(zip(moments, kinds, strict=True)), seed)
    seconds = time.monotonic() - began
    names = [f"release/{part}.safetensors" for part in release.PARTS]
    same = [len({(at.bucket / run / name).read_bytes() for run in ("alone", "disturbed")}) == 1 for name in names]
    happened = Counter(kind for moment, kind in zip(moments, kinds, strict=True) if moment < seconds)
    return {
        "minutes": round(seconds / 60, 1),
        "disturbances": dict(happened),
        "starts": starts,
        "steps": len(losses(at, "disturbed")),
        "losses_equal": distance(at, "alone", "disturbed") == 0,
        "weights_equal": all(same),
    }


def sizes(at: Place, steps: int) -> dict[str, Any]:
    finish(at, "alone", steps, SIZES[0])
    for number, size in enumerate(SIZES, 1):
        files.remove(at.bucket / "changed/release")  # of the steps before, which count as finished
        finish(at, "changed", steps * number // len(SIZES), size)
    return {"sizes": [size._asdict() for size in SIZES], "steps": steps, "distance": distance(at, "alone", "changed")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("disturbed", "sizes"))
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--disturbances", type=int, default=12)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("soak"), help="empty folder for clips, logs and caches")
    args = parser.parse_args()
    with place(args.out) as at:
        if args.kind == "sizes":
            print(json.dumps(sizes(at, args.steps or 50), indent=2))
        else:
            print(json.dumps(disturbed(at, args.minutes, args.disturbances, args.steps or 1000, args.seed), indent=2))


if __name__ == "__main__":
    main()
