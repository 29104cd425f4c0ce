"""How long `sample.py` without arguments takes, with empty and with warm caches, beside another commit's.

  python -m benchmarks.first_run [--repeats 3] [--against 65ee8fe]

Prints one JSON line: medians of the seconds from start to exit, each cold run with new caches, and the parts of the
last warm one. With `--against` both trees start in turns, and a ratio is the median of this tree's seconds through the
other's.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import trees
from tora_jax import command_line


def run(tree: Path, cache: Path, out: Path) -> float:
    start = time.perf_counter()
    trees.run(tree, "sample.py --quiet --out={out}", {"out": str(out)}, {"JAX_COMPILATION_CACHE_DIR": str(cache)})
    return time.perf_counter() - start


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.first_run", __doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", metavar="REV", help="commit to run beside this tree")
    options = parser.parse_args(argv[1:])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sides = {"here": trees.ROOT}
        if options.against:
            sides["there"] = trees.export(trees.commit(options.against), folder / "there")
        found: dict[str, list[float]] = {f"{what}_{side}": [] for what in ("cold", "warm") for side in sides}
        for number in range(options.repeats):
            check_interrupt()
            for side, tree in sides.items():
                found[f"cold_{side}"].append(run(tree, folder / f"{side}{number}", folder / f"{side}.mp4"))
        for _ in range(options.repeats):
            check_interrupt()
            for side, tree in sides.items():
                found[f"warm_{side}"].append(run(tree, folder / f"{side}0", folder / f"{side}.mp4"))
        report = json.loads((folder / "here.json").read_text())
    figures = {f"{name}_s": round(statistics.median(seconds), 1) for name, seconds in found.items()}
    if options.against:
        for what in ("cold", "warm"):
            pairs = zip(found[f"{what}_here"], found[f"{what}_there"], strict=True)
            figures[f"{what}_ratio"] = round(statistics.median(here / there for here, there in pairs), 2)
    figures |= {"repeats": options.repeats, "cores": os.cpu_count(), "warm_parts_s": report["seconds"]}
    print(json.dumps(figures))


if __name__ == "__main__":
    command_line.run(main, ["first_run", *sys.argv[1:]])
