"""What the tests of training share: train.py inside this process, and what it leaves behind."""

import contextlib
import io
import json
import signal
import warnings
from pathlib import Path
from typing import NamedTuple

from tests import records
from tora_jax import command_line
from tora_jax.data.sprites.clips import make_clip
from tora_jax.data.sprites.dataset import SpritesConfig
from tora_jax.io.video import write_video

_handler = signal.getsignal(signal.SIGINT)
import train  # noqa: E402

signal.signal(signal.SIGINT, _handler)  # train.py sets it for itself

ROOT = Path(__file__).parent.parent
SCALE = SpritesConfig(name="least", side=32, frames=5, fps=8.0)


class Outcome(NamedTuple):
    code: int
    stderr: str
    metrics: list[dict]


def run(config: str, workdir: Path, *arguments) -> Outcome:
    """`python train.py --config configs/CONFIG --workdir WORKDIR ...`"""
    argv = ["train.py", f"--config={ROOT}/configs/{config}", f"--workdir={workdir}", "--quiet", *map(str, arguments)]
    stderr, code = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)  # the command's own lines, as its user sees them
        try:
            command_line.run(train.main, argv)
        except SystemExit as stop:
            code = stop.code
    return Outcome(code, stderr.getvalue(), metrics(workdir))


def metrics(workdir: Path) -> list[dict]:
    path = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def source(folder: Path) -> str:
    return f"--config.data.sources=('{folder}',)"


def write_records(folder: Path, train: int = 12, validation: int = 4) -> Path:
    """A TFDS folder of drawn clips, 32x32 pixels and 5 frames."""
    counts = {"train": train, "validation": validation}
    return records.write(folder, {split: records.clips(count, split, SCALE) for split, count in counts.items()})


def write_folder(folder: Path, **counts: int) -> Path:
    """A folder of such clips as videos with captions."""
    for split, count in counts.items():
        (folder / split).mkdir(parents=True)
        for i in range(count):
            clip = make_clip(i, split, size=SCALE.side, frames=SCALE.frames, fps=SCALE.fps)
            write_video(folder / split / f"{i}.mp4", clip.video, clip.fps)
            (folder / split / f"{i}.txt").write_text(clip.caption + "\n")
    return folder
