"""Trains the small model from nothing: python -m benchmarks.train_demo --out DIR.

Runs the commands of docs/demo.md one after the other, each in a process of its own. Stopped at any point, it goes on
from the last checkpoint when it is started again. Prints the seconds of each stage as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax

from tora_jax import command_line
from tora_jax.errors import UserError

# This process and train.py's share a GPU; JAX would give most of its memory to the first.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def launch() -> tuple[dict[str, str], list[str]]:
    """Environment and flags for train.py on this machine.

    XLA keeps two cores busier as two devices, each with half of a batch, than as one: 1.6 against 1.3 steps a second.
    """
    if jax.default_backend() != "cpu":
        return dict(os.environ), []
    return os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, ["--config.mesh=data=2"]


def stages(out: Path, steps: int | None = None) -> list[tuple[str, Path, list[str]]]:
    """(name, what is there when it is done, command) of each stage, in order; `steps` of the last one."""
    clips = out / "data/sprites/128x17x6000_seed0/1.1.0"
    flags = launch()[1]

    def train(name: str, config: str, source: Path, weights: str | None = None, *more: str):
        command = ["train.py", f"--config=configs/{config}", f"--workdir={out / name}"]
        command += ["--config.resume", "--config.restartable", f"--config.data.sources=('{source}',)", *flags, *more]
        if weights:
            command.append(f"--weights={out / weights / 'release'}")
        return name, out / name / "release", command

    def cache(name: str, motion: str, split: str):
        options = [f"--out={out / name}", f"--motion={motion}", f"--split={split}", "--tracks=given", "--max_tracks=3"]
        size = ["--num_frames=17", "--height=128", "--width=128", "--batch=8", "--text=ids"]
        command = ["-m", "tora_jax.data.precompute", f"--source={clips}", f"--weights={out / 'motion_vae/release'}"]
        return name, out / name, [*command, *options, *size]

    splits = ["--config.data.split=train[:-64]", "--config.data.validation=train[-64:]"]  # of a cached set's only one
    longer = [] if steps is None else [f"--config.steps={steps}"]
    cached = [*splits, "--config.evaluation.clips=0"]  # no clips to draw over
    return [
        ("sprites", clips, ["-m", "tora_jax.data.sprites", f"--out={out / 'data'}"]),
        train("spatial", "vae.py:phase=spatial,small", clips),
        train("vae", "vae.py:phase=causal,small", clips, "spatial"),
        train("motion_spatial", "motion_vae.py:phase=spatial,small", clips, "vae"),
        train("motion_vae", "motion_vae.py:phase=causal,small", clips, "motion_spatial"),
        cache("dense", "dense", "train[:400]"),
        cache("sparse", "sparse", "train[:2000]"),
        train("stage1", "tora.py:stage=1,small", out / "dense", "motion_vae", *cached),
        train("stage2", "tora.py:stage=2,small", out / "sparse", "stage1", *cached, *longer),
    ]


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.train_demo", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder, kept for the next start")
    parser.add_argument("--steps", type=int, help="of stage 2, in place of the config's")
    args = parser.parse_args(argv[1:])
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "seconds.json"
    seconds = json.loads(log.read_text()) if log.exists() else {}
    for name, done, command in stages(out, args.steps):
        if done.exists():
            continue
        start = time.time()
        try:
            subprocess.run([sys.executable, *command], check=True, env=launch()[0])
        except subprocess.CalledProcessError as error:
            raise UserError(f"{name}: stopped with exit code {error.returncode}; start again to go on") from None
        finally:
            seconds[name] = round(seconds.get(name, 0) + time.time() - start)
            log.write_text(json.dumps(seconds))
    print(json.dumps({"seconds": seconds, "total": sum(seconds.values()), "release": str(stages(out)[-1][1])}))


if __name__ == "__main__":
    command_line.run(main, ["train_demo", *sys.argv[1:]])
