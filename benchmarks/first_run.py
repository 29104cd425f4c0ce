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
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import trees
from tora_jax import command_line


def sides(against: str | None, folder: Path) -> dict[str, Path]:
    """The trees: this one, and that of a commit."""
    here = {"here": trees.ROOT}
    return here | {"there": trees.export(trees.commit(against), folder / "there")} if against else here


def medians(found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, float]:
    """What was run -> side -> seconds, in turns: the median of each, and of the ratios of two sides."""
    figures = {}
    for what, of in found.items():
        figures |= {f"{what}_{side}_s": round(statistics.median(seconds), 1) for side, seconds in of.items()}
        if len(of) > 1:
            ratios = [here / there for here, there in zip(*of.values(), strict=True)]
            figures[f"{what}_ratio"] = round(statistics.median(ratios), 2)
    return figures


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
        both = sides(options.against, folder)
        found: dict[str, dict[str, list[float]]] = {what: {side: [] for side in both} for what in ("cold", "warm")}
        for number in range(2 * options.repeats):
            what = "cold" if number < options.repeats else "warm"
            for side, tree in both.items():
                check_interrupt()
                cache = folder / f"{side}{number if what == 'cold' else 0}"
                found[what][side].append(run(tree, cache, folder / f"{side}.mp4"))
        report = json.loads((folder / "here.json").read_text())
    machine = {"repeats": options.repeats, "cores": os.cpu_count(), "warm_parts_s": report["seconds"]}
    print(json.dumps(medians(found) | machine))


if __name__ == "__main__":
    command_line.run(main, ["first_run", *sys.argv[1:]])
