"""How the files of two folders differ, value by value: for benchmarks.same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tora_jax.io.video import read_video

VOLATILE = {"seconds", "versions", "python", "device"}  # keys of JSON files that tell of the run, not of its result
VALUES_ALONE = (".json", ".npz")  # files that hold times: equal values are enough
MAX_LINES = 5  # for each file


def differences(here: Path, there: Path, patterns: Sequence[str] = ("*",)) -> list[dict[str, Any]]:
    """The files of two folders that differ, and how: [{"file": ..., "how": [...]}].

    Args:
      patterns: which files, inside both folders. No file at all is a difference.
    """
    found = [(side, path) for side in (here, there) for pattern in patterns for path in side.glob(pattern)]
    names = sorted({path.relative_to(side).as_posix() for side, path in found if path.is_file()})
    if not names:
        return [{"file": "", "how": ["neither side wrote a file"]}]
    return [{"file": name, "how": how} for name in names if (how := difference(here / name, there / name))]


def difference(here: Path, there: Path) -> list[str]:
    """How two files differ, in lines; none where they are the same."""
    if missing := [side for side, path in (("here", here), ("there", there)) if not path.is_file()]:
        return [f"is missing {missing[0]}"]
    if here.read_bytes() == there.read_bytes():
        return []
    lines = changes(values(here), values(there))
    if not lines and here.suffix not in VALUES_ALONE:
        lines = ["the values are the same, the bytes are not"]
    return lines[:MAX_LINES] + [f"and {len(lines) - MAX_LINES} more"] * (len(lines) > MAX_LINES)


def values(path: Path) -> dict[str, np.ndarray]:
    """What a file holds, by name: arrays, frames, leaves of JSON, or lines."""
    if path.suffix == ".npz":
        return dict(np.load(path))
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".mp4":
        return {"frames": read_video(path)[0]}
    text = path.read_text(errors="replace")
    if path.suffix == ".json":
        return leaves(json.loads(text))
    lines = text.splitlines()
    return leaves([json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines)


def leaves(tree: Any, name: str = "") -> dict[str, np.ndarray]:
    """Leaves of parsed JSON by their paths."""
    if not isinstance(tree, dict | list) or not tree:
        return {name: np.asarray(tree if isinstance(tree, int | float | str) else repr(tree))}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {k: v for key, item in items if key not in VOLATILE for k, v in leaves(item, f"{name}/{key}").items()}


def changes(here: Mapping[str, np.ndarray], there: Mapping[str, np.ndarray]) -> list[str]:
    """How named arrays differ, in lines."""
    lines = [f"{name}: is missing there" for name in here.keys() - there.keys()]
    lines += [f"{name}: is missing here" for name in there.keys() - here.keys()]
    return sorted(lines) + [line for name in here if name in there and (line := change(name, here[name], there[name]))]


def change(name: str, here: np.ndarray, there: np.ndarray) -> str:
    """How two arrays differ; "" where they are the same to the bit."""
    kinds = [f"{array.dtype.name}{list(array.shape)}" for array in (here, there)]
    if here.tobytes() == there.tobytes() and kinds[0] == kinds[1]:
        return ""
    if here.ndim == there.ndim == 0:
        return f"{name}: {here.item()!r} here, {there.item()!r} there"
    if kinds[0] != kinds[1]:
        return f"{name}: {kinds[0]} here, {kinds[1]} there"
    one, other = here.astype(np.float64), there.astype(np.float64)
    return (
        f"{name}: {(one != other).sum()} of {one.size} values, by {np.abs(one - other).max():.3g} at most "
        f"(largest {np.abs(other).max():.3g})"
    )
