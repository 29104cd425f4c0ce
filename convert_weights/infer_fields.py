"""Sizes of a model, read off the shapes in its checkpoint: what the tables' `infer` functions are made of.

An `infer` gives what shapes can tell, under the names of the model's fields. Shapes do not tell the number of groups
of a norm, nor the number of heads where nothing is as wide as a head. Where a size shows in many tensors the most
frequent one counts, so that one damaged tensor is reported as such.
"""

from __future__ import annotations

import collections
import re
from typing import Any

from convert_weights.typing import Fields, Shapes


def count(shapes: Shapes, pattern: str) -> int | None:
    """One more than the largest index that the pattern's group matches."""
    return max((int(m[1]) + 1 for key in shapes if (m := re.match(pattern, key))), default=None)


def size(shapes: Shapes, pattern: str, axis: int = 0) -> int | None:
    """The most frequent size of an axis over all tensors whose name matches in full."""
    found = (s[axis] for key, s in shapes.items() if re.fullmatch(pattern, key) and len(s) > axis)
    return next((most for most, _ in collections.Counter(found).most_common(1)), None)


def known(**fields: Any) -> Fields:
    """The fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}
