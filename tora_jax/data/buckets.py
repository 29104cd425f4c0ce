"""Open-Sora's buckets for training: which clip is cut to which size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tora_jax.conditioning import resolutions
from tora_jax.errors import UserError

MIN_AREA = 0.8  # of a resolution's area, for a clip that fits it


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
