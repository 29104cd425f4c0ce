"""Open-Sora's buckets for training: which clip is cut to which size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tora_jax.conditioning import resolutions
from tora_jax.errors import UserError, closest

MIN_AREA = 0.8  # of a resolution's area, for a clip that fits it


SIZES = ("frames", "height", "width", "batch")  # what a bucket of a config has: whole numbers,
NUMBERS = ("fps", "weight")  # other numbers,
OF_TABLE = ("resolution", "share")  # and these of Open-Sora's table, where height, width and weight are not needed


def check(buckets: Any) -> None:
    """Checks the buckets of a config (data.buckets).

    Raises:
      UserError: for the first entry that is missing, unknown, or of a type or value that cannot be.
    """
    if not isinstance(buckets, Sequence) or isinstance(buckets, str):
        raise UserError(f"data.buckets is {buckets!r}; give a tuple of buckets, each with its comma: (bucket,)")
    for place, bucket in enumerate(buckets):
        name = f"data.buckets[{place}]"
        if not isinstance(bucket, Mapping):
            raise UserError(f"{name} is {bucket!r}; give a dict of {', '.join(SIZES + NUMBERS)}")
        known = {*SIZES, *NUMBERS, *OF_TABLE}
        for key in bucket.keys() - known:
            raise UserError(f"{name} has an unknown {key!r}; did you mean {closest(key, known) or ', '.join(known)}?")
        by_table = OF_TABLE[0] in bucket or OF_TABLE[1] in bucket
        needed = ("frames", "batch", "fps", *OF_TABLE) if by_table else SIZES + NUMBERS
        if missing := [key for key in needed if key not in bucket]:
            raise UserError(f"{name} has no {missing[0]}; a bucket has {', '.join(needed)}")
        _check_values(name, bucket, by_table)
    if len({(OF_TABLE[0] in bucket) for bucket in buckets}) > 1:
        raise UserError("data.buckets: some have a resolution and some have none; give buckets of one kind")


def _check_values(name: str, bucket: Mapping[str, Any], by_table: bool) -> None:
    for key in filter(bucket.__contains__, SIZES + NUMBERS):
        value, least = bucket[key], 0 if key == "fps" or (by_table and key in ("height", "width", "weight")) else 1
        kind, what = (int, "a whole number") if key in SIZES else (int | float, "a number")
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
            raise UserError(f"{name}: {key} is {value!r}; give {what}")
        if value < least and not (key == "weight" and value > 0):
            raise UserError(f"{name}: {key} is {value!r}; give {'more than 0' if least else 'at least 0'}")
    if by_table and not isinstance(bucket["resolution"], str):
        raise UserError(f"{name}: resolution is {bucket['resolution']!r}; give a name, such as '240p'")
    if by_table:
        share = bucket["share"]
        both = share if isinstance(share, tuple | list) and len(share) == 2 else (share,)
        if not all(isinstance(each, int | float) and not isinstance(each, bool) for each in both):
            raise UserError(f"{name}: share is {share!r}; give a probability from 0 to 1, or two")


class Bucket(NamedTuple):
    """Clips of one size. `ratio` is height / width, a key of the table."""

    resolution: str
    frames: int
    ratio: str
    height: int
    width: int
    batch: int


class Buckets:
    """Draws the bucket of a clip, as Open-Sora's training does.

    A clip tries the resolutions from the largest to the smallest, and the lengths of each from the longest to the
    shortest. Chance takes it or passes it on, so that large clips are shared out among the resolutions.

    Args:
      table: resolution -> length in frames -> (probability, batch size). In place of the probability may stand a pair:
        of the resolution, once the length is chosen, and of the length. Lengths may be strings, as in JSON.

    Raises:
      UserError: there is no such resolution or length, a probability is not in 0..1, or a batch is empty.

    Source: Open-Sora v1.2, opensora/datasets/bucket.py.
    """

    def __init__(self, table: Mapping[str, Mapping[int | str, Any]]):
        sizes = resolutions.table()["sizes"]
        if unknown := [name for name in table if name not in sizes]:
            raise UserError(f"buckets: unknown resolution {unknown[0]!r}; choose from {', '.join(sizes)}")
        self._sizes = {name: sizes[name] for name in table}
        self._lengths: dict[str, dict[int, tuple[int, float, float | None, int]]] = {}
        number = 0  # of a resolution and length; what is drawn for a clip depends on it
        for name in sorted(table, key=lambda name: -sizes[name]["area"]):
            lengths = {_whole(length, f"buckets {name}: length"): entry for length, entry in table[name].items()}
            self._lengths[name] = {}
            for length in sorted(lengths, reverse=True):
                share, batch = lengths[length]
                keep, reach = share if isinstance(share, tuple | list) else (share, None)
                if not (0 <= keep <= 1 and 0 <= (reach or 0) <= 1):
                    raise UserError(f"buckets {name}, {length} frames: {share} is no probability; give 0 to 1")
                batch = _whole(batch, f"buckets {name}, {length} frames: batch size")
                self._lengths[name][length] = (number, float(keep), reach, batch)
                number += 1

    def __iter__(self) -> Iterator[Bucket]:
        """All buckets."""
        for name, lengths in self._lengths.items():
            for length, (*_, batch) in lengths.items():
                for ratio, (height, width) in self._sizes[name]["hw"].items():
                    yield Bucket(name, length, ratio, height, width, batch)

    def __call__(self, frames: int, height: int, width: int, seed: int, interval: int = 1) -> Bucket | None:
        """The bucket of a clip; None if none fits or chance leaves the clip out.

        Args:
          frames: of the clip; 1 = an image.
          seed: of the clip; the same seed, the same bucket.
          interval: between the frames that are taken. A clip of exactly the needed length is too short, as in the
            source.
        """
        for name, lengths in self._lengths.items():
            if height * width < self._sizes[name]["area"] * MIN_AREA:
                continue
            for length, (number, keep, reach, batch) in lengths.items():
                fits = frames == length if 1 in (frames, length) else frames > length * interval
                if not fits:
                    continue
                rng = np.random.default_rng(seed + number)
                if reach is not None and rng.random() > reach:
                    continue
                if keep < 1 and rng.random() >= keep:
                    break
                shapes = self._sizes[name]["hw"]
                ratio = min(shapes, key=lambda ratio: abs(float(ratio) - height / width))
                return Bucket(name, length, ratio, *shapes[ratio], batch)
        return None


def _whole(value: Any, name: str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"{name} {value!r} is no whole number above 0")
    return int(value)
