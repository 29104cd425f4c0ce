"""Plans the conversion of one checkpoint: what fits, what does not, and what is kept of the rest."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from convert_weights import mapping, stream, variants
from convert_weights.mapping import ConversionError, Move
from convert_weights.typing import CheckpointType, Fields, Shapes
from convert_weights.views import Source
from tora_jax.io import safetensors_io

MAX_BYTES_CARRIED = 1 << 16  # of a tensor that our model computes itself, kept for an export
MAX_PROBLEMS_SHOWN = 30  # in one message; --dry_run shows all


@dataclasses.dataclass(frozen=True)
class Part:
    """A checkpoint and its plan.

    Attributes:
      kind: of checkpoint.
      variant: the released name of its sizes, or "own sizes".
      fields: of its model.
      moves: what fits; all of it where `problems` is empty.
      ignored: source keys that no parameter needs.
      tied: those of the type's two tied names that are in the file.
    """

    kind: CheckpointType
    source: Source
    variant: str
    fields: Fields
    moves: Sequence[Move]
    problems: Sequence[str]
    ignored: Sequence[str]
    tied: Sequence[str]

    def section(self) -> Fields:
        """The fields as config.json has them."""
        return self.kind.section(self.fields)

    def check(self) -> None:
        """Checks what shapes cannot tell.

        Raises:
          ConversionError: when there is a problem, tied names hold two tensors, or the type's own check fails.
        """
        if self.problems:
            message, *details = self.complaint(MAX_PROBLEMS_SHOWN)
            raise ConversionError(message, details)
        try:
            if len(self.tied) == 2:
                self.kind.untie({key: self.source.read(key) for key in self.tied})
            if self.kind.check is not None:
                self.kind.check(self.ignored, self.source.read)
        except ConversionError as error:
            raise ConversionError(f"{self.source.name}: {error}") from None

    def complaint(self, shown: int | None = None) -> list[str]:
        """The problems, a line each under one that sums them up; `shown` cuts the list."""
        count = len(self.problems)
        lines = list(self.problems[:shown])
        if len(lines) < count:
            lines.append(f"... and {count - len(lines)} more; --dry_run shows all")
        noun = "mismatch" if count == 1 else "mismatches"
        return [f"{self.source.name}: does not fit {self.kind.name}: {count} {noun}:", *lines]

    def record(self) -> dict[str, Any]:
        """What an export needs: names and shapes of the source, and its tensors that our model does without."""
        small = (key for key in self.ignored if not _fits(self.kind.dropped, key) and self._is_small(key))
        ignored = {key: np.ascontiguousarray(self.source.read(key)) for key in small}
        return {
            "table": self.kind.name,
            "keys": {key: list(shape) for key, shape in self.source.shapes.items() if key not in self.ignored},
            "carried": {
                key: {
                    "dtype": safetensors_io.NAMES[array.dtype],
                    "shape": list(self.source.shapes[key]),
                    "data": base64.b64encode(array.tobytes()).decode(),
                }
                for key, array in ignored.items()
            },
        }

    def _is_small(self, key: str) -> bool:
        size = np.prod(self.source.shapes[key], dtype=np.int64) * self.source.dtypes[key].itemsize
        return size <= MAX_BYTES_CARRIED

    def report(self) -> dict[str, Any]:
        """What --report says of it."""
        sizes = [int(np.prod(move.target_shape, dtype=np.int64)) for move in self.moves]
        used = {key for move in self.moves for key in move.sources}
        return {
            "source": self.source.name,
            "files": [str(path) for path in self.source.files],
            "variant": self.variant,
            "fields": self.section(),
            "source_dtypes": sorted({self.source.dtypes[key].name for key in used}),
            "source_tensors": len(self.source.shapes),
            "parameters": sum(sizes),
            "converted": [move.target for move in self.moves],
            "ignored": list(self.ignored),
            **({"tied_names": list(self.tied)} if self.kind.tied else {}),
        }


def licences(parts: Iterable[Part]) -> list[str]:
    """What the licences of published weights say, each once."""
    return list(dict.fromkeys(part.kind.licence for part in parts if part.kind.licence))


def plan_part(kind: CheckpointType, source: Source, variant: str | None, dtype: np.dtype | None) -> Part:
    """Plans a conversion from the headers alone.

    Args:
      variant: as the user gives it; None = by the shapes.
      dtype: that all will be cast to; None = every byte stays.

    Raises:
      UserError: it is no such checkpoint, or of another variant.
    """
    source = kind.view(source)
    name, fields = variants.infer(kind, source, variant)
    shapes, problems = dict(source.shapes), []
    tied = [key for key in kind.tied if key in shapes]
    try:
        shapes = kind.untie(shapes)
    except ConversionError as error:
        problems.append(f"! {error}")
        del shapes[kind.tied[1]]
    unused, target = (*kind.ignored, *kind.dropped), kind.shapes(fields)
    if kind.added and _lacks_all(kind, shapes):
        target = {path: shape for path, shape in target.items() if not re.fullmatch(kind.added, path)}
    moves, mismatches = mapping.match(kind.table, shapes, target, unused)
    problems += mismatches + stream.dtype_problems(source, moves, dtype)
    ignored = [key for key in shapes if _fits(unused, key)]
    return Part(kind, source, name, fields, moves, problems, ignored, tied)


def _lacks_all(kind: CheckpointType, shapes: Shapes) -> bool:
    """Is this a plain base, without any of the parameters that `kind.added` tells?"""
    rules = [mapping.pattern(rule.source) for rule in kind.table if re.fullmatch(kind.added, rule.target)]
    return not any(rule.fullmatch(key) for rule in rules for key in shapes)


def _fits(patterns: Sequence[str], key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)
