"""One checkpoint on its way into a release: what fits, what does not, and what is kept of the rest."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from convert_weights import i3d, kinds, mapping, safetensors_io, stream, t5
from convert_weights.kinds import Kind
from convert_weights.mapping import ConversionError, Move
from convert_weights.measure import Fields
from convert_weights.sources import Source

CARRIED = 1 << 16  # bytes up to which a tensor that our model computes itself is kept for the way back
SHOWN = 30  # problems in one message; --dry_run shows all


@dataclasses.dataclass(frozen=True)
class Part:
    """A checkpoint and its plan.

    Attributes:
      variant: the released name of its sizes, or "own sizes".
      fields: of its model.
      moves: what fits; all of it where `problems` is empty.
      ignored: source keys that no parameter needs.
      tied: the names under which T5's embedding is in the file.
    """

    kind: Kind
    source: Source
    variant: str
    fields: Fields
    moves: Sequence[Move]
    problems: Sequence[str]
    ignored: Sequence[str]
    tied: Sequence[str]

    def section(self) -> Fields:
        """The fields as config.json has them."""
        return kinds.stdit_fields(self.fields) if self.kind.name == "stdit3" else self.fields

    def check(self) -> None:
        """Raises what is wrong, as one list.

        Raises:
          ConversionError: when there is a problem, T5's two names hold two tensors, or I3D's norms have scales.
        """
        if self.problems:
            raise ConversionError(self.complaint(SHOWN))
        try:
            if len(self.tied) == 2:
                t5.untie({key: self.source.read(key) for key in self.tied})
            if self.kind.name == "i3d":
                i3d.check([key for key in self.ignored if re.fullmatch(i3d.SCALES, key)], self.source.read)
        except ConversionError as error:
            raise ConversionError(f"{self.source.name}: {error}") from None

    def complaint(self, shown: int | None = None) -> str:
        """The problems as one text; `shown` cuts the list."""
        count = len(self.problems)
        lines = list(self.problems[:shown])
        if len(lines) < count:
            lines.append(f"... and {count - len(lines)} more; --dry_run shows all")
        noun = "mismatch" if count == 1 else "mismatches"
        return "\n".join([f"{self.source.name}: does not fit {self.kind.name}: {count} {noun}:", *lines])

    def record(self) -> dict[str, Any]:
        """What the way back needs: the names and shapes of the source, and the tensors that only it has."""
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
        return size <= CARRIED

    def report(self) -> dict[str, Any]:
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
            **({"tied_names": list(self.tied)} if self.kind.name == "t5" else {}),
        }


def make(kind: Kind, source: Source, variant: str | None, dtype: np.dtype | None) -> Part:
    """Plans a conversion from the headers alone.

    Raises:
      UserError: when it is no such checkpoint, or of another variant.
    """
    name, fields = kinds.sizes(kind, source, variant)
    shapes, problems, tied = dict(source.shapes), [], []
    if kind.name == "t5":
        tied = [key for key in t5.TIED if key in shapes]
        try:
            shapes = t5.untie(shapes)
        except ConversionError as error:
            problems.append(f"! {error}")
            del shapes[t5.TIED[1]]
    moves, mismatches = mapping.match(kind.table, shapes, kind.shapes(fields), kind.ignored)
    problems += mismatches + stream.dtype_problems(source, moves, dtype)
    ignored = [key for key in shapes if any(re.fullmatch(p, key) for p in kind.ignored)]
    return Part(kind, source, name, fields, moves, problems, ignored, tied)
