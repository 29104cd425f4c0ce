"""Pickled arrays without pickle's powers: NumPy's arrays, PyTorch's tensors, lists, dicts, texts and numbers.

The stream may name nothing else; each name that it may name stands for a function here, and none of them runs what the
stream says.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tora_jax.errors import UserError

# A short stream may name one list a thousand times in another.
MAX_VALUES, MAX_DEPTH = 500_000, 8
MAX_ELEMENTS = 2**28  # of a tensor whose elements share their places
MAX_BYTES = 256 * 2**20  # of a stream or a storage inside of an archive
TEXT = re.compile(r"[biuf]\d{1,2}|O8?")
STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}
ADVICE = "convert it where it was made: numpy.savez(FILE, tracks=tracks, visibility=visibility)"


class _DType:
    """In the place of numpy.dtype: its text; the byte order follows as a state."""

    def __init__(self, text: Any = "", *_: Any):
        self.text, self.order = text, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"

    def find(self) -> np.dtype:
        if not (isinstance(self.text, str) and TEXT.fullmatch(self.text)):
            raise pickle.UnpicklingError(f"an array of {self.text!r}")
        return np.dtype(self.text).newbyteorder(self.order)


class _Array:
    """In the place of an array: its parts follow as a state."""

    def __init__(self, shape: Any = (0,), dtype: Any = None, data: Any = b"", fortran: bool = False):
        self.__setstate__((1, shape, dtype or _DType("u1"), fortran, data))

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def find(self) -> Any:
        """NumPy's array; of objects a list, or the only one."""
        dtype, shape = self.dtype.find(), tuple(map(int, self.shape))
        if dtype.hasobject:
            return self.data[0] if shape == () else list(self.data)
        return np.frombuffer(self.data, dtype).reshape(shape, order="F" if self.fortran else "C")


class _Known:
    """A function that the stream may call, and nothing more: not even attributes can be set."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state of a function")


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
    ends = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
    if min((offset, *size, *stride)) < 0 or (0 not in size and ends >= storage.size) or math.prod(size) > MAX_ELEMENTS:
        raise pickle.UnpicklingError("a tensor that does not fit its storage")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[min(offset, storage.size) :], size, steps, writeable=False)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "ascii")


ARRAYS = {
    "multiarray._reconstruct": _Known(lambda *_: _Array()),
    "multiarray.scalar": _Known(lambda dtype, data=b"": _Array((), dtype, data)),
    "numeric._frombuffer": _Known(lambda data, dtype, shape, order, *_: _Array(shape, dtype, data, order == "F")),
}
KNOWN = {
    **{f"{package}.{name}": known for package in ("numpy.core", "numpy._core") for name, known in ARRAYS.items()},
    "numpy.ndarray": _Known(_Array),
    "numpy.dtype": _Known(_DType),
    "_codecs.encode": _Known(_encode),
    "collections.OrderedDict": _Known(dict),
    "torch._utils._rebuild_tensor_v2": _Known(_tensor),
    "torch._utils._rebuild_parameter": _Known(lambda data, *_: data),
    **{f"torch.{name}": name for name in STORAGES},
}


class _Reader(pickle.Unpickler):
    def __init__(self, stream: bytes, storages: Callable[[str], bytes] | None = None):
        super().__init__(io.BytesIO(stream))
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if (found := KNOWN.get(f"{module}.{name}")) is None:
            raise pickle.UnpicklingError(f"{module}.{name}"[:80])
        return found

    def persistent_load(self, key: Any) -> np.ndarray:
        kind, storage, number, *_ = key
        if kind != "storage" or self.storages is None or not str(number).isalnum():
            raise pickle.UnpicklingError("a reference")
        return np.frombuffer(self.storages(str(number)), STORAGES[storage])


def loads(stream: bytes, name: str, storages: Callable[[str], bytes] | None = None) -> Any:
    """A pickle -> arrays in lists and dicts.

    Args:
      name: of the file, for messages.
      storages: number of a PyTorch storage -> its bytes.

    Raises:
      UserError: the stream names anything else, or is broken.
    """
    try:
        for code, number, _ in pickletools.genops(stream):
            if code.name in ("PUT", "LONG_BINPUT") and number > len(stream):  # room is made for that many at once
                raise pickle.UnpicklingError("a number of its own that is too large")
        return _plain(_Reader(stream, storages).load(), [MAX_VALUES])
    except Exception as error:  # broken streams raise nearly anything
        what = str(error) if isinstance(error, pickle.UnpicklingError) else type(error).__name__
        more = f"is a pickle of more than arrays ({what}), which could run anything"
        raise UserError(f"{name}: {more}; {ADVICE}") from None


def _plain(value: Any, left: list[int], depth: int = 0) -> Any:
    left[0] -= 1
    if left[0] < 0 or depth > MAX_DEPTH:
        raise pickle.UnpicklingError("too many values")
    if isinstance(value, _Array):
        value = value.find()
    if isinstance(value, list | tuple):
        return [_plain(each, left, depth + 1) for each in value]
    if isinstance(value, dict):
        named = {key if isinstance(key, str) else repr(key): each for key, each in value.items()}
        return {key: _plain(each, left, depth + 1) for key, each in named.items()}
    if value is None or isinstance(value, str | bytes | bool | int | float | np.ndarray):
        return value
    raise pickle.UnpicklingError(type(value).__name__)


def is_torch(path: Path) -> bool:
    """Whether torch.save wrote an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(member.endswith("data.pkl") for member in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # no archive, or a broken one: not torch's
        return False


def load_torch(path: Path, name: str) -> Any:
    """A file of torch.save -> arrays in lists and dicts.

    Raises:
      UserError: as `loads`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (stream,) = [member for member in archive.namelist() if member.endswith("data.pkl")]
            folder = stream.removesuffix("data.pkl")

            def content(part: str) -> bytes:
                if archive.getinfo(folder + part).file_size > MAX_BYTES:
                    raise pickle.UnpicklingError(f"over {MAX_BYTES >> 20} MB")
                return archive.read(folder + part)

            if f"{folder}byteorder" in archive.namelist() and content("byteorder") != b"little":
                raise UserError(f"{name}: was saved on a machine of another byte order; {ADVICE}")
            return loads(content("data.pkl"), name, lambda number: content(f"data/{number}"))
    except UserError:
        raise
    except Exception as error:  # as of broken streams
        raise UserError(f"{name}: is not a readable file of torch.save; save it again") from error
