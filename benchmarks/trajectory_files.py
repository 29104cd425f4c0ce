"""Reads back three files of each kind of `tests.trajectory_forms`: other sizes, counts and orders in each.

  python -m benchmarks.trajectory_files

Prints a line of a table for each kind: what was read of each file, and the largest error in % of the frame.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from tests import trajectory_forms as forms
from tora_jax.conditioning import trajectory
from tora_jax.conditioning.trajectory_hints import hints

FILES = (((832, 480), 2, 33), ((1280, 720), 5, 81), ((480, 640), 9, 20))  # size, paths, points


def curves(size: tuple[int, int], n: int, t: int) -> np.ndarray:
    """Smooth paths in pixels, each with a way and a speed of its own."""
    at, own = np.linspace(0, 1, t)[None], np.arange(n)[:, None]
    x = 0.1 + 0.75 * at ** (1 + own / 4)
    y = 0.1 + 0.07 * own + 0.2 * np.sin(3 * at + own) ** 2
    return np.stack([x, y], -1) * size


def error(found: list[np.ndarray], paths: np.ndarray, seen: np.ndarray) -> float:
    return max(
        np.abs(points[:, :2] - path[shown]).max() for points, path, shown in zip(found, paths, seen, strict=True)
    )


def main() -> None:
    print("| kind | said | what was read of three files | error, % |", "|---|---|---|---|", sep="\n")
    for name, kind in forms.KINDS.items():
        words, said, worst = [], "", 0.0
        for seed, (size, n, t) in enumerate(FILES):
            pixels = curves(size, n if kind.several else 1, kind.steps or t)
            rng = np.random.default_rng(seed)
            seen = forms.hide(rng, *pixels.shape[:2]) if kind.hidden else np.ones(pixels.shape[:2], bool)
            with tempfile.TemporaryDirectory() as folder:
                path = kind.write(Path(folder), pixels, size, seen)
                (reading,) = trajectory.readings(path, hints(**kind.said(size)))
            words.append(reading.line.partition(";")[0])
            said = kind.said(("W", "H"))
            worst = max(worst, error(reading.trajectories, pixels / size, seen))
        flags = " ".join(f"`--trajectory_{key}={value}`" for key, value in said.items()) or "nothing"
        print(f"| {name} | {flags} | {', '.join(words)} | {100 * worst:.4f} |")


if __name__ == "__main__":
    main()
