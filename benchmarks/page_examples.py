"""The videos of the page's examples for the small model, made again with the weights that ship.

python -m benchmarks.page_examples
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import tora_jax
from tora_jax import command_line
from tora_jax.app import examples
from tora_jax.checkpoints import release
from tora_jax.io.video import write_video


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    command_line.Parser("python -m benchmarks.page_examples", "The videos of the page's examples.").parse_args(argv[1:])
    models = tora_jax.load()
    for each in examples.read(str(release.DEMO)):
        drawn = {"canvas": [1, 1], "trajectories": each["trajectories"]}
        result = tora_jax.generate(models, each["prompt"], drawn, seed=each["seed"])
        path = Path(examples.video(str(release.DEMO), each["title"]))
        write_video(path, result.video, models.sampling["fps"])
        print(f"{path.name}: {path.stat().st_size // 1024} KB")
        check_interrupt()


if __name__ == "__main__":
    command_line.run(main, ["page_examples", *sys.argv[1:]])
