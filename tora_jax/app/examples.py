"""Examples to start from: for the small model's weights, or for those of natural videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tora_jax
from tora_jax.checkpoints import release

ASSETS = Path(tora_jax.__file__).parent / "assets" / "examples"


def folder(origin: str) -> Path:
    """The folder of the examples for weights, which the page serves: examples.json, and videos that they made.

    Args:
      origin: of `Models`: the weights' folder, or something else.
    """
    return ASSETS / ("small" if Path(origin) == release.DEMO else "natural")


def video(origin: str, title: str) -> Path:
    """Where the video of an example is, if there is one."""
    return folder(origin) / f"{title.lower().replace(' ', '_')}.mp4"


def read(origin: str) -> list[dict[str, Any]]:
    """The examples.

    Returns:
      for each "title", "prompt", "trajectories" (paths of [x, y] in 0..1), "seed", and "video": its path, or "".
    """
    found = json.loads((folder(origin) / "examples.json").read_text())
    for each in found:
        path = video(origin, each["title"])
        each["video"] = str(path) if path.is_file() else ""
    return found
