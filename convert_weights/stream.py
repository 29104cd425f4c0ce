"""Reads, checks, casts and transposes tensors, one layer of one leaf at a time."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from convert_weights.mapping import Layout, Move
from convert_weights.views import Source
from tora_jax.errors import UserError

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(jnp.bfloat16), "float16": np.dtype(np.float16)}
FLOATS = (*DTYPES.values(), np.dtype(np.float64))

# Bits of an infinity, the sign shifted out: every NaN is larger.
_INFINITY = {"float64": 0xFFE << 52, "float32": 0xFF << 24, "float16": 0xF8 << 8, "bfloat16": 0xFF << 8}
_ROWS_TURNED_TOGETHER = 16  # few enough for the cache
_ALIGNMENT = 64  # bytes
_TENSORS_AHEAD = 2
_ELEMENTS_CHECKED_TOGETHER = 1 << 19


class Leaf(NamedTuple):
    """One parameter to write. Calling `parts` reads it; a stacked one has a part for each layer."""

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[Callable[[], np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass
class Cast:
    """What is done to the numbers of a tensor.

    Attributes:
      dtype: of the result; None = every byte stays.
      allow_nonfinite: accept tensors with NaN or Inf.
      nonfinite: names of the tensors with NaN or Inf so far.
    """

    dtype: np.dtype | None = None
    allow_nonfinite: bool = False
    nonfinite: list[str] = dataclasses.field(default_factory=list)

    def apply(self, where: str, key: str, array: np.ndarray) -> np.ndarray:
        """Checks and casts a tensor.

        Args:
          where, key: the checkpoint and the tensor, for messages.

        Raises:
          UserError: for NaN or Inf, before the cast or from it.
        """
        finite = _is_finite(array)
        if not finite:
            if not self.allow_nonfinite:
                raise UserError(f"{where}: {key} holds NaN or Inf; --allow_nonfinite converts it all the same")
            self.nonfinite.append(key)
        if self.dtype is None or self.dtype == array.dtype:
            return array
        with np.errstate(over="ignore"):
            narrow = array.astype(self.dtype)
        if finite and not self.allow_nonfinite and not _is_finite(narrow):
            raise UserError(
                f"{where}: {key} overflows in {self.dtype.name}; choose another --dtype, or --allow_nonfinite"
            )
        return narrow


def _is_finite(array: np.ndarray) -> bool:
    limit = _INFINITY[array.dtype.name]
    bits = array.reshape(-1).view(f"u{array.dtype.itemsize}")
    scratch = np.empty(min(len(bits), _ELEMENTS_CHECKED_TOGETHER), bits.dtype)
    for start in range(0, len(bits), _ELEMENTS_CHECKED_TOGETHER):
        chunk = bits[start : start + _ELEMENTS_CHECKED_TOGETHER]
        if np.left_shift(chunk, 1, out=scratch[: len(chunk)]).max() >= limit:
            return False
    return True


def turn(array: np.ndarray) -> np.ndarray:
    """The transpose of a matrix, contiguous. NumPy's own copy is ten times slower on wide 16-bit matrices."""
    bits = np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for start in range(0, len(bits), _ROWS_TURNED_TOGETHER):
        out[:, start : start + _ROWS_TURNED_TOGETHER] = bits[start : start + _ROWS_TURNED_TOGETHER].T
    return out.view(array.dtype)


def forward(layout: Layout, array: np.ndarray) -> np.ndarray:
    """`Layout.forward` by `turn`: every layout with axes puts the source's first axis last."""
    if not layout.axes:
        return layout.forward(array)
    count, *rest = array.shape
    turned = turn(array.reshape(count, -1)).reshape(*rest, count)
    order = (*(axis - 1 for axis in layout.axes[:-1]), len(rest))
    return turned.transpose(order).reshape(layout.shape(array.shape))


def backward(layout: Layout, array: np.ndarray, source_shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `forward`."""
    if not layout.axes:
        return layout.backward(array, source_shape)
    count, *rest = source_shape
    order = (*(axis - 1 for axis in layout.axes[:-1]), len(rest))
    turned = array.reshape([source_shape[axis] for axis in layout.axes]).transpose(np.argsort(order))
    return turn(turned.reshape(-1, count)).reshape(source_shape)


def dtype_problems(source: Source, moves: Sequence[Move], dtype: np.dtype | None) -> list[str]:
    """A line for each tensor that is not floating point, and for each leaf of several dtypes."""
    problems = []
    for move in moves:
        found = {key: source.dtypes[key] for key in move.sources}
        problems += [f"! {key}: {d.name}, not floating point" for key, d in found.items() if d not in FLOATS]
        if dtype is None and len(set(found.values())) > 1:
            names = ", ".join(sorted({d.name for d in found.values()}))
            problems.append(f"! {move.target}: its layers are {names}; give --dtype")
    return problems


def leaves(source: Source, moves: Sequence[Move], cast: Cast, prefix: str = "") -> list[Leaf]:
    """The parameters of a plan, unread."""

    def leaf(move: Move) -> Leaf:
        def part(key: str) -> np.ndarray:
            return forward(move.layout, cast.apply(source.name, key, source.read(key)))

        dtype = cast.dtype or source.dtypes[move.sources[0]]
        return Leaf(
            prefix + move.target, dtype, move.target_shape, tuple(functools.partial(part, key) for key in move.sources)
        )

    return [leaf(move) for move in moves]


def whole(leaf: Leaf) -> np.ndarray:
    """The leaf as one array, aligned: JAX on the CPU then needs no copy."""
    memory = np.empty(leaf.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    out = memory[start : start + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
    at = 0
    for part in leaf.parts:
        flat = np.ascontiguousarray(part()).reshape(-1)
        out.reshape(-1)[at : at + len(flat)] = flat
        at += len(flat)
    return out


def ahead(calls: Iterable[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """The calls' results in order. Some are made while one is used: reading, turning and writing overlap."""
    with ThreadPoolExecutor(_TENSORS_AHEAD) as pool:
        pending: collections.deque = collections.deque()
        try:
            for call in calls:
                pending.append(pool.submit(call))
                if len(pending) > _TENSORS_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
