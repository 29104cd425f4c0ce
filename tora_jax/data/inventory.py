"""What of the sources trains: clips found, used, left out and why; captions that are lost."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tora_jax.conditioning import text
from tora_jax.data.clips import Clips, size_name, stride, uses_table
from tora_jax.errors import UserError

CAPTIONS = 2000  # looked at, spread evenly over the clips; cleaning takes 1 ms each
Filled = Sequence[tuple[Mapping[str, Any], Sequence[int]]]  # buckets, each with the numbers of its clips


def table(clips: Clips, filled: Filled, tokenizer: text.Tokenizer | None) -> str:
    """A line for each thing to know, with its count.

    Args:
      filled: the buckets with their clips.
      tokenizer: for the captions; None = they are not used.
    """
    used = np.zeros(len(clips.infos), bool)
    for _, numbers in filled:
        used[list(numbers)] = True
    rows = [("found", len(used), ", ".join(map(str, clips.config["sources"]))), ("used", int(used.sum()), "")]
    for bucket, numbers in filled if len(filled) > 1 else ():
        rows.append(("", len(numbers), f"in bucket {size_name(bucket)}"))
    left_out = collections.defaultdict(list)
    for index in np.flatnonzero(~used).tolist():
        left_out[_reason(clips, index, [bucket for bucket, _ in filled])].append(index)
    for reason, indices in sorted(left_out.items(), key=lambda item: -len(item[1])):
        rows.append(("left out", len(indices), f"{reason}, such as {clips.source.name(indices[0])}"))
    for what, count in clips.source.passed_over.items():
        rows.append(("passed over", count, what))
    if tokenizer is not None and used.any():
        rows += _captions(clips, np.flatnonzero(used), tokenizer)
    return "\n".join(f"{label:<12}{count:>8}  {what}".rstrip() for label, count, what in rows)


def _reason(clips: Clips, index: int, buckets: Sequence[Mapping[str, Any]]) -> str:
    """Why a clip is in none of the buckets."""
    if index in clips.reasons:
        return clips.reasons[index]
    frames, height, width, fps = clips.infos[index]
    if uses_table(clips.config):
        shortest = min(bucket["frames"] * stride(fps, bucket["fps"]) for bucket in clips.config["buckets"])
        if frames <= shortest:
            return f"too short ({frames:g} frames; more than {shortest} are needed)"
        return f"too small, or left out by the buckets' shares ({height:g}x{width:g})"
    if clips.source.made:
        return f"of another size ({frames:g}x{height:g}x{width:g})"
    shortest = min(bucket["frames"] for bucket in buckets)
    if frames < shortest:
        return f"too short (under {shortest} frames)"
    if all(height < bucket["height"] or width < bucket["width"] for bucket in buckets):
        least = min(buckets, key=lambda bucket: bucket["height"] * bucket["width"])
        return f"too small (under {least['height']}x{least['width']})"
    return "too short for the buckets that are small enough"


def _captions(clips: Clips, indices: np.ndarray, tokenizer: text.Tokenizer) -> list[tuple[str, int, str]]:
    looked = indices[np.unique(np.linspace(0, len(indices) - 1, min(CAPTIONS, len(indices))).round().astype(int))]
    lost: dict[str, list[str]] = collections.defaultdict(list)
    for index in looked.tolist():
        try:
            losses = tokenizer.losses(clips.source.caption(index))
        except UserError:  # a damaged record, which the loader will name
            continue
        for loss in losses:
            lost[loss.kind].append(f"{clips.source.name(index)}: {loss}")
    of = "" if len(looked) == len(indices) else f", of {len(looked)} looked at"
    return [("captions", len(found), f"{kind}{of}, such as {found[0]}") for kind, found in lost.items()]
