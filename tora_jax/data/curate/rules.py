"""Which clips are kept: rules on their scores, and copies of other clips."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tora_jax.data.curate import files
from tora_jax.data.curate.looks import BITS

# What a clip is dropped for, in the order in which it is asked.
REASONS = (
    "damaged",
    "small",
    "black",
    "frozen",
    "still",
    "camera motion",
    "strong motion",
    "not aesthetic",
    "copy",
    "no caption",
)

Row = Mapping[str, Any]


def reason(row: Row, limits: Mapping[str, Any]) -> str:
    """Why a clip is dropped; "" if it is kept, as far as its own scores tell.

    Args:
      row: `height`, `width`, `black`, `frozen`, `flow`, `foreground`, `camera`, `aesthetic` (or None) and `name`.
      limits: with all of
        min_side: pixels of the shorter side.
        max_black: share of black frames.
        max_frozen: seconds without any change.
        min_flow: flow score, under which nothing moves.
        min_foreground: share of pixels that move by themselves: with less of them a clip is "still" if the camera
          is static, and "camera motion" if it moves.
        cameras: camera motions that are kept with moving objects.
        strong: flow score from which a clip is kept with probability 1 - score / 100 (Tora), by the hash of its name.
        min_aesthetic: of the score, where there is one.
    """
    static = row["camera"] == "static"
    objects = row["foreground"] >= limits["min_foreground"]
    kept = files.chance(row["name"]) < 1 - row["flow"] / 100
    found = {
        "small": min(row["height"], row["width"]) < limits["min_side"],
        "black": row["black"] > limits["max_black"],
        "frozen": row["frozen"] > limits["max_frozen"],
        "still": static and (not objects or row["flow"] < limits["min_flow"]),
        "camera motion": not static and (not objects or row["camera"] not in limits["cameras"]),
        "strong motion": row["flow"] > limits["strong"] and not kept,
        "not aesthetic": row["aesthetic"] is not None and row["aesthetic"] < limits["min_aesthetic"],
    }
    return next((name for name in REASONS if found.get(name)), "")


def bands(code: bytes, most: int) -> Iterator[tuple[int, bytes]]:
    """Parts of a perceptual hash, of which two clips share at least one if at most `most` of their bits differ."""
    bits = np.unpackbits(np.frombuffer(code, np.uint8))
    for number, part in enumerate(np.array_split(bits, most + 1)):
        yield number, np.packbits(part).tobytes()


def copies(rows: Sequence[Row], most: int) -> Iterator[tuple[str, str]]:
    """(name, name of the better one) of each row whose perceptual hash is within `most` bits of a better one's.

    Better is the larger picture, then the longer clip, then the name that sorts first. A clip is a copy even if the
    better one is itself a copy of a third: what is kept does not depend on the order.
    """
    rows = sorted(rows, key=lambda row: (-row["height"] * row["width"], -row["seconds"], row["name"]))
    codes = np.array([np.frombuffer(bytes.fromhex(row["hash"]), np.uint8) for row in rows]).reshape(-1, BITS // 8)
    for i in range(1, len(rows)):
        near = np.flatnonzero(np.bitwise_count(codes[:i] ^ codes[i]).sum(1, dtype=int) <= most)
        if len(near):
            yield rows[i]["name"], rows[near[0]]["name"]
