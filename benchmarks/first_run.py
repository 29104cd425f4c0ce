"""How long the first run takes: `sample.py` without arguments, with an empty and with a warm compilation cache.

  python -m benchmarks.first_run [--repeats 3]

Prints one JSON line: seconds from start to exit, cold once and warm as the median of the repeats.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tora_jax import command_line

ROOT = Path(__file__).parent.parent


def run(cache: str, out: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--quiet", f"--out={out}/video.mp4"],
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache},
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.first_run", __doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args(argv[1:]).repeats
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as out:
        cold = run(cache, out)
        warm = [run(cache, out) for _ in range(repeats)]
        report = json.loads((Path(out) / "video.json").read_text())
    figures = {
        "cold_s": round(cold, 1),
        "warm_s": round(statistics.median(warm), 1),
        "repeats": repeats,
        "cores": os.cpu_count(),
        "warm_parts_s": report["seconds"],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    command_line.run(main, ["first_run", *sys.argv[1:]])
