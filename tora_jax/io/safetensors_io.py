"""Reads and writes safetensors files tensor by tensor, or layer by layer: memory holds one part at a time.

Of a file in a bucket only the bytes that are asked for are fetched.

A file is eight bytes with the header's length, the header (JSON: name -> dtype, shape, offsets), and the tensors
one after the other. Every byte of the header is checked here, because the files come from other people.

The library's `safe_open` would read the same bytes, but it maps the file: when the file gets shorter or its disk fails
meanwhile, a SIGBUS ends the process in place of a message. It also takes twice as long for a tensor, and cannot slice
one without elements (safetensors 0.8). So the reads here are plain ones.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath

# In the order in which the format's own library sorts them, so that equal contents give equal files.
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": jnp.float8_e5m2,
        "F8_E4M3": jnp.float8_e4m3fn,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": jnp.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the format's own limit
BYTES_AT_ONCE = 1 << 26  # bytes in one system call; larger ones are cut short by the kernel at 2 GiB
BYTES_OF_REQUEST = 1 << 25  # of `read_boxes`
AT_ONCE = 8  # requests
GAP = 1 << 20  # bytes between two parts that are read with them: a request takes longer

Box = tuple[tuple[int, int], ...]  # of an array: first index and end on each axis


class Tensor(NamedTuple):
    """The place of a tensor; `begin` counts bytes from the start of the file."""

    file: Path
    begin: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, from its header alone.

    Raises:
      UserError: the file is no safetensors file, truncated, or its header is broken in any way.
    """
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The same with the strings that the header holds beside."""
    size = path.stat().st_size
    start = files.read_range(path, 0, 9)
    length = int.from_bytes(start[:8], "little")
    if size > 8 and start[8:] != b"{":
        raise UserError(f"{path}: not a safetensors file (wrong magic); is it the file you meant?")
    if 8 + length > size or length < 2 or length > MAX_HEADER:
        raise UserError(f"{path}: truncated or broken: the header should have {length} bytes, the file has {size}")
    header = files.read_range(path, 8, length)
    try:
        entries = json.loads(header, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken header ({error}); get the file again") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{path}: broken header (__metadata__ is no mapping of strings); get the file again")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_places(path, tensors, 8 + length, size)
    return {name: tensor for name, (tensor, _) in tensors.items()}, metadata


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name stands there twice")
    return entries


def _tensor(path: Path, name: str, entry: object, data: int) -> tuple[Tensor, int]:
    """The tensor of one header entry, and the byte after it."""
    try:
        fields = {key: entry[key] for key in ("dtype", "shape", "data_offsets")}
        whole = all(type(n) is int and n >= 0 for n in (*fields["shape"], *fields["data_offsets"]))
        begin, end = fields["data_offsets"]
        dtype = DTYPES.get(fields["dtype"])
        if len(entry) != 3 or not whole or not isinstance(fields["shape"], list):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        raise UserError(f"{path}: broken header (entry {name!r}); get the file again") from None
    if dtype is None:
        raise UserError(f"{path}: {name!r} has the unknown dtype {fields['dtype']!r}; known are {', '.join(DTYPES)}")
    return Tensor(path, data + begin, dtype, tuple(fields["shape"])), data + end


def _check_places(path: Path, tensors: dict[str, tuple[Tensor, int]], data: int, size: int) -> None:
    """Tensors must lie one after the other, from the header's end to the file's."""
    at = data
    for name, (tensor, end) in sorted(tensors.items(), key=lambda item: (item[1][0].begin, item[1][1])):
        if tensor.begin != at or end - at != tensor.nbytes:
            raise UserError(f"{path}: broken header (shape, dtype and place of {name!r} disagree); get the file again")
        at = end
    if at > size:
        raise UserError(f"{path}: truncated: {at - size} of {at} bytes are missing; get the file again")
    if at < size:
        raise UserError(f"{path}: broken: {size - at} bytes too many at the end; get the file again")


def read(tensor: Tensor, layer: int | None = None) -> np.ndarray:
    """Reads a tensor, or one layer of its leading axis.

    Raises:
      UserError: the file ends early.
    """
    shape = tensor.shape if layer is None else tensor.shape[1:]
    array = np.empty(shape, tensor.dtype)
    begin = tensor.begin + (layer or 0) * array.nbytes
    view = memoryview(array.reshape(-1).view(np.uint8))
    if isinstance(tensor.file, BucketPath):
        content = tensor.file.read_range(begin, array.nbytes)
        if len(content) != array.nbytes:
            raise UserError(f"{tensor.file}: truncated while it was read")
        view[:] = content
        return array
    with open(tensor.file, "rb", buffering=0) as file:
        file.seek(begin)
        at = 0
        while at < array.nbytes:
            count = file.readinto(view[at : at + BYTES_AT_ONCE])
            if not count:
                raise UserError(f"{tensor.file}: truncated while it was read")
            at += count
    return array


def read_all(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a file, in the order in which they lie.

    Raises:
      UserError: as `read_header` and `read`.
    """
    tensors = read_header(path)
    boxes = {name: [tuple((0, length) for length in tensor.shape)] for name, tensor in tensors.items()}
    for name, (array,) in read_boxes(tensors, boxes):
        yield name, array


class _Slab(NamedTuple):
    """A part of a tensor that lies in one piece: at indices of the first axes, some rows of the next, and all below.

    Attributes:
      begin, end: bytes of the file.
    """

    at: tuple[int, ...]
    first: int
    begin: int
    end: int


def read_boxes(
    tensors: Mapping[str, Tensor], boxes: Mapping[str, Sequence[Box]]
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """Parts of tensors of one file: in the order in which they lie, the arrays of the boxes of each.

    No byte is read twice, however many boxes hold it, and none that is in no box, but for gaps of up to GAP. What is
    read ahead takes AT_ONCE x BYTES_OF_REQUEST.

    Args:
      boxes: name -> what of the tensor is wanted.

    Raises:
      UserError: the file ends early.
    """
    order = sorted(boxes, key=lambda name: (tensors[name].begin, tensors[name].nbytes))
    slabs = {name: list(_slabs(tensors[name], _filled(boxes[name]))) for name in order}
    contents = _fetch_all(tensors[order[0]].file, [slab for name in order for slab in slabs[name]]) if order else ()
    for name in order:
        tensor = tensors[name]
        arrays = [np.empty([stop - start for start, stop in box], tensor.dtype) for box in boxes[name]]
        for slab, content in zip(slabs[name], contents, strict=False):
            rows = np.frombuffer(content, tensor.dtype).reshape(-1, *tensor.shape[len(slab.at) + 1 :])
            for box, array in zip(boxes[name], arrays, strict=True):
                _copy(slab, rows, box or ((0, 1),), array if array.ndim else array.reshape(1))
        yield name, arrays


def _filled(boxes: Sequence[Box]) -> list[Box]:
    """Those that are not empty; a number is a row of one."""
    return [box or ((0, 1),) for box in boxes if all(start < stop for start, stop in box)]


def _slabs(tensor: Tensor, boxes: Sequence[Box], at: tuple[int, ...] = ()) -> Iterator[_Slab]:
    """What to read of a tensor, upwards, for boxes that hold the indices `at` of the first axes."""
    shape, axis = tensor.shape or (1,), len(at)
    strides = [math.prod(shape[i + 1 :]) * tensor.dtype.itemsize for i in range(len(shape))]
    row, begin = strides[axis], tensor.begin + sum(map(operator.mul, at, strides))
    cut = any(box[axis + 1 :] != tuple((0, length) for length in shape[axis + 1 :]) for box in boxes)
    for start, stop in _union((box[axis] for box in boxes), GAP // row):
        if row > BYTES_OF_REQUEST or (cut and row > GAP):
            for i in range(start, stop):
                yield from _slabs(tensor, [box for box in boxes if box[axis][0] <= i < box[axis][1]], (*at, i))
        else:
            step = max(BYTES_OF_REQUEST // row, 1)
            for first in range(start, stop, step):
                yield _Slab(at, first, begin + first * row, begin + min(first + step, stop) * row)


def _union(spans: Iterable[tuple[int, int]], gap: int) -> list[tuple[int, int]]:
    """Spans upwards, joined where no more than `gap` lies between them."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


def _fetch_all(file: Path, slabs: Sequence[_Slab]) -> Iterator[memoryview]:
    """The bytes of each; neighbours are read together, and some requests ahead."""
    groups: list[list[_Slab]] = []
    for slab in slabs:
        near = groups and slab.begin - groups[-1][-1].end <= GAP
        if near and slab.end - groups[-1][0].begin <= BYTES_OF_REQUEST:
            groups[-1].append(slab)
        else:
            groups.append([slab])

    def fetch(group: list[_Slab]) -> list[memoryview]:
        begin, end = group[0].begin, group[-1].end
        content = memoryview(files.read_range(file, begin, end - begin))
        if len(content) != end - begin:
            raise UserError(f"{file}: truncated while it was read")
        return [content[slab.begin - begin : slab.end - begin] for slab in group]

    with ThreadPoolExecutor(AT_ONCE) as threads:
        ahead = deque(threads.submit(fetch, group) for group in groups[:AT_ONCE])
        for group in groups[AT_ONCE:]:
            found = ahead.popleft().result()
            ahead.append(threads.submit(fetch, group))
            yield from found
        for last in ahead:
            yield from last.result()


def _copy(slab: _Slab, rows: np.ndarray, box: Box, array: np.ndarray) -> None:
    """Copies what of a slab lies in a box to the array of the box."""
    outer, (start, stop), inner = box[: len(slab.at)], box[len(slab.at)], box[len(slab.at) + 1 :]
    low, high = max(slab.first, start), min(slab.first + len(rows), stop)
    if low < high and all(i in range(*span) for i, span in zip(slab.at, outer, strict=True)):
        to = [i - first for i, (first, _) in zip(slab.at, outer, strict=True)]
        taken = rows[(slice(low - slab.first, high - slab.first), *(slice(*span) for span in inner))]
        array[(*to, slice(low - start, high - start))] = taken


class Spec(NamedTuple):
    """The header entry of a tensor to write."""

    dtype: np.dtype
    shape: tuple[int, ...]


def file_order(specs: Mapping[str, Spec]) -> list[str]:
    """Names in the order of the format's own library: wide dtypes first, then by name."""
    ranks = {dtype: i for i, dtype in enumerate(DTYPES.values())}
    return sorted(specs, key=lambda name: (-ranks[specs[name].dtype], name))


def write(path: Path, specs: Mapping[str, Spec], parts: Iterable[np.ndarray], metadata: dict | None = None) -> None:
    """Writes a file: the header, then the parts as they come.

    Args:
      specs: name -> dtype and shape, in the order in which the tensors come.
      parts: the tensors' contents in that order; a tensor may come in several parts.
      metadata: strings for the header.

    Raises:
      OSError: as the system says.
    """
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, spec in specs.items():
        end = at + math.prod(spec.shape) * spec.dtype.itemsize
        header[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        for part in parts:
            _write_all(file, np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        written = os.fstat(file.fileno()).st_size
    if written != 8 + len(text) + at:
        raise ValueError(f"{path}: {written} bytes written, the header says {8 + len(text) + at}")


def _write_all(file, data) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view[:BYTES_AT_ONCE]) :]
