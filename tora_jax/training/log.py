"""What a training writes down as it goes on."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from tora_jax.errors import UserError
from tora_jax.io.files import write_text
from tora_jax.io.video import read_video


class Log:
    """metrics.jsonl with every step, TensorBoard, and a progress bar; of several processes, the first one's.

    Values stay on the device until `flush`, so that steps are not waited for one by one.
    """

    def __init__(self, folder: Path, start: int, total: int, quiet: bool, first: bool):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if first:
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            write_text(path, "".join(kept))  # what came after the checkpoint comes again
        self._file = (path if first else Path(os.devnull)).open("a")
        # With a bounded queue the training would wait for ever once a full disk has ended the thread that writes.
        self._board = SummaryWriter(str(folder), purge_step=start + 1, max_queue=0, write_to_disk=first)
        self._bar = tqdm(total=total, initial=start, unit="step", disable=quiet or not first, mininterval=1)
        self._waiting: list[tuple[int, dict, int]] = []
        self._since = time.perf_counter()

    def add(self, step: int, metrics: dict, tokens: int) -> None:
        """Keeps a step's metrics, arrays on the device, and the number of tokens that it worked on."""
        self._waiting.append((step, metrics, tokens))

    def flush(self) -> None:
        """Writes what was added.

        Raises:
          UserError: a loss is not finite.
        """
        waiting, self._waiting = self._waiting, []
        for step, metrics, _ in waiting:
            values = self.write(step, jax.device_get(metrics))
            if not math.isfinite(values["loss"]):  # such a step is never saved
                raise UserError(f"the loss of step {step} is {values['loss']}; go on from before with a lower lr")
        self._file.flush()
        if waiting:
            seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
            speed = {"steps": len(waiting) / seconds, "tokens": sum(tokens for *_, tokens in waiting) / seconds}
            for name, value in speed.items():
                self._board.add_scalar(f"{name}_per_second", value, step)
            self._bar.set_postfix_str(f"loss {values['loss']:.4g}, {speed['tokens']:.3g} tokens/s", refresh=False)
            self._bar.update(step - self._bar.n)

    def write(self, step: int, values: dict) -> dict[str, float]:
        """Writes a line of numbers now, and returns them."""
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
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
        self._board.close()
        self._bar.close()
