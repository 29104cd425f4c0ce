"""Where a training stands: `python -m tora_jax.training.status WORKDIR`, of one that runs, is stopped or finished.

Reads what the training writes and touches nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from tora_jax import command_line
from tora_jax.checkpoints import manager
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.training import log, record

RECENT = 100  # steps whose losses are averaged
FLUSHES = 10  # whose speeds are averaged
UNITS = ("steps", "tokens")


def describe(workdir: Path, now: float) -> list[str]:
    """The lines that the command prints.

    Args:
      now: seconds since 1970.

    Raises:
      UserError: there is no run in the folder, or its files cannot be read.
    """
    run = record.read(workdir)
    if run is None:
        raise UserError(f"{workdir}: no run is here, for there is no {record.NAME}; name the --workdir of a training")
    try:
        metrics, progress = (log.read_lines(workdir / name) for name in (log.METRICS, log.PROGRESS))
    except ValueError as error:
        raise UserError(f"{workdir}: {log.METRICS} or {log.PROGRESS} cannot be read ({error})") from None
    finished = (workdir / "release").is_dir()
    steps = [line for line in metrics if "loss" in line]
    return [
        _run(run),
        *_position(progress, finished, now),
        *_losses(steps),
        *_judged([line for line in metrics if "loss" not in line]),
        *_checkpoints(workdir, metrics),
    ]


def _run(run: Mapping[str, Any]) -> str:
    mesh = ",".join(f"{axis}={size}" for axis, size in run["mesh"].items() if size > 1) or "one device"
    commit = f", commit {run['git'][:12]}" if run["git"] else ""
    job, seed = (run["config"][name] for name in ("job", "seed"))
    return f"{job}, seed {seed}, on {mesh}, tora_jax {run['versions']['tora_jax']}{commit}"


def _position(progress: Sequence[Mapping], finished: bool, now: float) -> Iterator[str]:
    """How far, since when and how fast."""
    if not progress:
        yield "no step yet"
        return
    starts = [i for i, line in enumerate(progress) if "of" in line]
    step, total = progress[-1]["step"], progress[starts[-1]]["of"]
    yield f"step {step} of {total} ({100 * step / max(1, total):.1f} %){', finished' if finished else ''}"
    started = f", started {len(starts)} times" if len(starts) > 1 else ""
    silent = _duration(now - progress[-1]["time"])
    yield f"begun {_moment(progress[0]['time'])}{started}, last heard of {silent} ago"
    flushes = progress[starts[-1] + 1 :]
    if recent := (flushes[1:] or flushes)[-FLUSHES:]:  # the first one after a start waits for the compiler
        # Harmonic means, for about as many steps lie between any two of them.
        steps, tokens = (len(recent) / sum(1 / line[f"{unit}_per_second"] for line in recent) for unit in UNITS)
        yield f"{steps:.3g} steps/s, {tokens:.3g} tokens/s"
        if not finished:
            left = (total - step) / steps
            yield f"ends {_moment(progress[-1]['time'] + left)} if it goes on so, {_duration(left)} from its last word"


def _losses(steps: Sequence[Mapping[str, float]]) -> Iterator[str]:
    if not steps:
        return
    good = [line["loss"] for line in steps[-RECENT:] if "skipped" not in line]
    mean = f", {np.mean(good):.4g} on average over the last {len(good)}" if good else ""
    yield f"loss {steps[-1]['loss']:.4g} at step {steps[-1]['step']}{mean}"
    skipped = [line["step"] for line in steps if "skipped" in line]
    if skipped:
        last = f"step {skipped[-1]} last: loss or gradient not finite, or a spike"
        yield f"skipped {len(skipped)} of {len(steps)} steps, {last}"


def _judged(lines: Sequence[Mapping[str, float]]) -> Iterator[str]:
    if lines:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in lines[-1].items() if name != "step")
        yield f"held out, at step {lines[-1]['step']}: {figures}"


def _checkpoints(workdir: Path, metrics: Sequence[Mapping[str, float]]) -> Iterator[str]:
    folder = workdir / "checkpoints"
    names, steps = [path.name for path in folder.glob("*")], manager.whole_steps(folder)
    judged = [(line["objective"], line["step"]) for line in metrics if "objective" in line and line["step"] in steps]
    best = min(judged, default=(None, None))[1]
    told = ", ".join(f"{step} (best)" if step == best else str(step) for step in steps)
    yield f"checkpoints of steps: {told or 'none yet'}"
    broken = sorted(name for name in names if name.endswith(".broken"))
    if broken:
        yield f"broken and passed over: {', '.join(broken)}"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")


def _duration(seconds: float) -> str:
    """Such as "0:00:12" or "3 days, 4:05:06"."""
    return str(timedelta(seconds=round(max(0, seconds))))


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m tora_jax.training.status", __doc__)
    parser.add_argument("workdir", type=files.path, help="of train.py, on this machine or in a bucket")
    args = parser.parse_args(argv[1:])
    print(*describe(args.workdir, time.time()), sep="\n")


if __name__ == "__main__":
    command_line.run(main, ["status", *sys.argv[1:]])
