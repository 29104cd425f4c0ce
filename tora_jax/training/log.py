"""What a training writes down as it goes on, and reads again."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from tora_jax.io.files import Outbox, write_text
from tora_jax.io.video import read_video

METRICS, PROGRESS = "metrics.jsonl", "progress.jsonl"
SEND_SECONDS = 30  # between two copies to a bucket, where no checkpoint asks for one


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; [] where it is missing. A last line that was cut off is passed over."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Log:
    """metrics.jsonl with every step, TensorBoard, and a progress bar; of several processes, the first one's.

    In a bucket nothing can be appended to, so files there grow now and then: see `flush`.

    Values stay on the device until `flush`, so that steps are not waited for one by one. Times and speeds are in
    progress.jsonl, for metrics.jsonl is the same whenever the same run is made. Each start is a line there, with the
    step that it goes on from and the last one ("of"), and each `flush`, with the speed since the one before; "time" is
    in seconds since 1970.

    Attributes:
      skipped: how many steps in a row were skipped, the longest row since the start that `flush` has seen; a row that
        the start falls into counts whole.
    """

    def __init__(self, folder: Path, start: int, total: int, quiet: bool, first: bool):
        before = [line for line in read_lines(folder / METRICS) if line["step"] <= start]
        self._outbox, self._sends = Outbox(folder), first
        metrics, progress = (self._outbox.folder / name for name in (METRICS, PROGRESS))
        if first:
            _write_lines(metrics, before)  # what came after the checkpoint comes again
            _write_lines(progress, read_lines(folder / PROGRESS))
        self._file = (metrics if first else Path(os.devnull)).open("a")
        self._progress = (progress if first else Path(os.devnull)).open("a")
        self._note(step=start, of=total)
        # With a bounded queue the training would wait for ever once a full disk has ended the thread that writes.
        self._board = SummaryWriter(str(self._outbox.folder), purge_step=start + 1, max_queue=0, write_to_disk=first)
        self._bar = tqdm(total=total, initial=start, unit="step", disable=quiet or not first, mininterval=1)
        self._waiting: list[tuple[int, dict, int]] = []
        self._since = self._last_sent = time.perf_counter()
        self._row = self.skipped = 0
        for line in before:
            self._count(line)
        self.skipped = 0

    def add(self, step: int, metrics: dict, tokens: int) -> None:
        """Keeps a step's metrics, arrays on the device, and the number of tokens that it worked on."""
        self._waiting.append((step, metrics, tokens))

    def flush(self, send: bool = False) -> None:
        """Writes what was added; "skipped" where it is not 0.

        Args:
          send: to a bucket now, because a checkpoint follows; else when SEND_SECONDS have passed.
        """
        waiting, self._waiting = self._waiting, []
        for step, metrics, _ in waiting:
            values = jax.device_get(metrics)
            values = self.write(step, {k: v for k, v in values.items() if k != "skipped" or v})
            self._count(values)
        self._file.flush()
        if waiting:
            seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
            speed = {"steps": len(waiting) / seconds, "tokens": sum(tokens for *_, tokens in waiting) / seconds}
            speed = {f"{name}_per_second": value for name, value in speed.items()}
            for name, value in speed.items():
                self._board.add_scalar(name, value, step)
            self._note(step=step, **speed)
            told = f"loss {values['loss']:.4g}, {speed['tokens_per_second']:.3g} tokens/s"
            self._bar.set_postfix_str(told + ", skipped" * bool(self._row), refresh=False)
            self._bar.update(step - self._bar.n)
        if self._sends and (send or time.perf_counter() - self._last_sent > SEND_SECONDS):
            # What a checkpoint does not wait for is tried again the next time.
            with contextlib.nullcontext() if send else contextlib.suppress(OSError):
                self._outbox.send()
            self._last_sent = time.perf_counter()

    def _count(self, values: dict) -> None:
        if "loss" in values:  # a step, not what it was judged by
            self._row = self._row + 1 if "skipped" in values else 0
            self.skipped = max(self.skipped, self._row)

    def _note(self, **values: float) -> None:
        self._progress.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
        self._progress.flush()

    def write(self, step: int, values: dict) -> dict[str, float]:
        """Writes a line of numbers now, and returns them."""
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX complains of others in lines of its own
                self._board.add_scalar(name, value, step)
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        return values

    def show(self, step: int, folder: Path) -> None:
        """Eight frames of each clip that was sampled at this step."""
        for path in sorted(folder.glob(f"{step:06}_*.mp4")):
            frames, _ = read_video(path)
            chosen = frames[np.linspace(0, len(frames) - 1, 8).round().astype(int)]
            self._board.add_images(f"clip{path.stem.partition('_')[2]}", chosen, step, dataformats="NHWC")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.flush()
        self._file.close()
        self._progress.close()
        self._board.close()
        self._bar.close()
        if self._sends:
            self._outbox.close()


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
