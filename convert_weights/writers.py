"""Writes the parameters of a release folder as safetensors or as an Orbax checkpoint; aside first, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import logging

from convert_weights import stream
from convert_weights.stream import Leaf
from tora_jax import sharding
from tora_jax.checkpoints import weights
from tora_jax.errors import UserError
from tora_jax.io import files, safetensors_io
from tora_jax.io.buckets import BucketPath

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def aside(target: str | Path, nbytes: int) -> Iterator[Path]:
    """Yields a path to write to. It becomes `target` when all went well, else it is removed.

    Args:
      target: a file or a folder that is not there yet.
      nbytes: size of what will be written, compared with the free space first.

    Raises:
      UserError: when the target exists, or cannot be written, or the disk is full.
    """
    target = files.path(target).absolute()
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name or remove it")
    if isinstance(target, BucketPath):
        files.check_writable(target.parent, str(target))
        with files.sent(target) as here:
            yield here
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if nbytes > free:
            raise UserError(f"{target}: needs {readable(nbytes)}, the disk has {readable(free)} free; make room")
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target}: cannot write there ({error.strerror})") from None
    try:
        yield folder / target.name
        os.rename(folder / target.name, target)
    except Exception as error:
        if (system := _system_error(error)) is None:
            raise
        message = f"{target}: cannot write {readable(nbytes)}: {system}; make room or choose another disk"
        raise UserError(message) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _system_error(error: BaseException | None) -> str | None:
    """The system's message on a full disk, or None. Orbax hides the errno in texts and in causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.strerror
        if (text := next((os.strerror(code) for code in _FULL if os.strerror(code) in str(error)), None)) is not None:
            return text
        error = error.__cause__ or error.__context__
    return None


def readable(nbytes: int) -> str:
    """A number of bytes with its unit."""
    unit, name = next(((u, n) for u, n in ((10**9, "GB"), (10**6, "MB")) if nbytes >= u), (10**3, "kB"))
    return f"{nbytes / unit:.1f} {name}"


def write_safetensors(path: Path, leaves: Sequence[Leaf]) -> None:
    """Streams leaves into one safetensors file of a release folder."""
    by_path = {leaf.path: leaf for leaf in leaves}
    specs = {path: safetensors_io.Spec(leaf.dtype, leaf.shape) for path, leaf in by_path.items()}
    specs = {path: specs[path] for path in safetensors_io.file_order(specs)}
    safetensors_io.write(path, specs, stream.ahead(part for path in specs for part in by_path[path].parts))


def write_orbax(folder: Path, parts: Mapping[str, Sequence[Leaf]], mesh: str | None) -> None:
    """Writes an Orbax checkpoint of all parts, leaf by leaf; `mesh`: to shard it over, such as "fsdp=4"."""
    arrays = ((f"{part}/{leaf.path}", stream.whole(leaf)) for part, leaves in parts.items() for leaf in leaves)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback for each thread that meets a full disk
    try:
        weights.save(folder, arrays, None if mesh is None else sharding.make_mesh(mesh))
    finally:
        logging.set_verbosity(verbosity)
