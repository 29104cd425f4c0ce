"""Plans the conversion of one checkpoint: what fits, what does not, and what is kept of the rest."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from convert_weights import mapping, safetensors_io, stream, variants
from convert_weights.mapping import ConversionError, Move
from convert_weights.sources import Source
from convert_weights.typing import CheckpointType, Fields

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
        ignored = {key: np.ascontiguousarray(self.source.read(key)) for key in self.ignored if self._is_small(key)}
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


def plan_part(kind: CheckpointType, source: Source, variant: str | None, dtype: np.dtype | None) -> Part:
    """Plans a conversion from the headers alone.

    Args:
      variant: as the user gives it; None = by the shapes.
      dtype: that all will be cast to; None = every byte stays.

    Raises:
      UserError: it is no such checkpoint, or of another variant.
    """
    name, fields = variants.infer(kind, source, variant)
    shapes, problems = dict(source.shapes), []
    tied = [key for key in kind.tied if key in shapes]
    try:
        shapes = kind.untie(shapes)
    except ConversionError as error:
        problems.append(f"! {error}")
        del shapes[kind.tied[1]]
    moves, mismatches = mapping.match(kind.table, shapes, kind.shapes(fields), kind.ignored)
    problems += mismatches + stream.dtype_problems(source, moves, dtype)
    ignored = [key for key in shapes if any(re.fullmatch(p, key) for p in kind.ignored)]
    return Part(kind, source, name, fields, moves, problems, ignored, tied)
