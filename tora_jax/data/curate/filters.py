"""Which clips are kept: limits of their scores, and no copies of other clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np

from tora_jax.data.curate import work
from tora_jax.data.curate.appearance import BITS

# The reasons for which a clip is dropped; the first that holds counts.
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
    "caption in another encoding",
)

# All that is known of a clip: name, source, size, scores, and `reason`, for which it is dropped ("" = it is kept).
ClipFacts = Mapping[str, Any]


def reason(clip: ClipFacts, limits: Mapping[str, Any]) -> str:
    """The reason for which a clip's own scores drop it; "" if they keep it.

    Args:
      clip: `height`, `width`, `black`, `frozen`, `flow`, `foreground`, `camera`, `aesthetic` (or None) and `name`.
      limits: with all of
        min_side: pixels of the shorter side.
        max_black: share of black frames.
        max_frozen: seconds without any change.
        min_flow: flow score, under which nothing moves.
        min_foreground: share of pixels that move by themselves; with less, a clip is "still" if the camera is static,
          and "camera motion" if it moves.
        cameras: camera motions that are kept with moving objects.
        strong: flow score from which a clip is kept with probability 1 - score / 100 (Tora), by the hash of its name.
        min_aesthetic: of the score, where there is one.
    """
    static = clip["camera"] == "static"
    objects = clip["foreground"] >= limits["min_foreground"]
    kept = work.chance(clip["name"]) < 1 - clip["flow"] / 100
    found = {
        "small": min(clip["height"], clip["width"]) < limits["min_side"],
        "black": clip["black"] > limits["max_black"],
        "frozen": clip["frozen"] > limits["max_frozen"],
        "still": static and (not objects or clip["flow"] < limits["min_flow"]),
        "camera motion": not static and (not objects or clip["camera"] not in limits["cameras"]),
        "strong motion": clip["flow"] > limits["strong"] and not kept,
        "not aesthetic": clip["aesthetic"] is not None and clip["aesthetic"] < limits["min_aesthetic"],
    }
    return next((name for name in REASONS if found.get(name)), "")


def bands(code: bytes, most: int) -> Iterator[tuple[int, bytes]]:
    """(number, bits) of each part of a perceptual hash; hashes that differ in at most `most` bits share a part."""
    bits = np.unpackbits(np.frombuffer(code, np.uint8))
    for number, part in enumerate(np.array_split(bits, most + 1)):
        yield number, np.packbits(part).tobytes()


def copies(clips: Sequence[ClipFacts], most: int) -> Iterator[tuple[str, str]]:
    """(name, name of the better one) of each clip whose perceptual hash is within `most` bits of a better one's.

    Better is the larger picture, then the longer clip, then the name that sorts first. A copy of a copy is a copy, so
    that the result does not depend on the order.
    """
    clips = sorted(clips, key=lambda clip: (-clip["height"] * clip["width"], -clip["seconds"], clip["name"]))
    codes = np.array([np.frombuffer(bytes.fromhex(clip["hash"]), np.uint8) for clip in clips]).reshape(-1, BITS // 8)
    for i in range(1, len(clips)):
        near = np.flatnonzero(np.bitwise_count(codes[:i] ^ codes[i]).sum(1, dtype=int) <= most)
        if len(near):
            yield clips[i]["name"], clips[near[0]]["name"]


class Copies(beam.PTransform):
    """Clips -> the same; those that look like a better one get the reason "copy".

    Args:
      most: bits of the perceptual hash that may differ.
    """

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def expand(self, clips: beam.PCollection) -> beam.PCollection:
        better = (
            clips
            | "parts" >> beam.FlatMap(_parts, self._most)
            | "alike" >> beam.GroupByKey()
            | "compare" >> beam.FlatMap(_compare, self._most)
        )
        named = clips | "name" >> beam.Map(lambda clip: (clip["name"], clip))
        return {"row": named, "better": better} | "join" >> beam.CoGroupByKey() | "mark" >> beam.Map(_mark)


def _parts(clip: ClipFacts, most: int) -> Iterator[tuple[tuple[int, bytes], ClipFacts]]:
    for band in bands(bytes.fromhex(clip["hash"]), most):
        yield band, {name: clip[name] for name in ("name", "hash", "height", "width", "seconds")}


def _compare(group: tuple[tuple[int, bytes], Iterable[ClipFacts]], most: int) -> Iterator[tuple[str, str]]:
    return copies(list(group[1]), most)


def _mark(joined: tuple[str, Mapping[str, Iterable]]) -> ClipFacts:
    (clip,), better = list(joined[1]["row"]), sorted(joined[1]["better"])
    return {**clip, "reason": "copy", "copy_of": better[0]} if better else clip
