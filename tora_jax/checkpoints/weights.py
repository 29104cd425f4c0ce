"""Parameters in Orbax's format: written leaf by leaf, read by each process where its own shards lie."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from orbax.checkpoint import v1 as orbax

from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath
from tora_jax.sharding import Place, sharding_by_size

BATCH_BYTES = 1 << 29  # leaves that Orbax gets together: a call for each small leaf is slow, all at once is large
CHUNK_BYTES = 1 << 28  # of a file's chunk, several of which the writer copies at a time


def orbax_path(folder: str | Path) -> str:
    """The path of a folder as Orbax takes it.

    Raises:
      UserError: it lies in a bucket that Orbax does not write to.
    """
    folder = files.path(folder).absolute()
    if isinstance(folder, BucketPath) and folder.scheme != "gs":
        raise UserError(f"{folder}: checkpoints are in gs:// or on a disk (Orbax knows no other); mount the bucket")
    return str(folder)


def save(folder: str | Path, leaves: Iterable[tuple[str, np.ndarray]], mesh: Mesh | None = None) -> None:
    """Writes a checkpoint, holding about BATCH_BYTES or the largest leaf of it.

    Args:
      folder: must not exist; it appears when all is written.
      leaves: (path joined by "/", array), one by one.
      mesh: write each leaf in the shards of `sharding_by_size`; None = in one piece.

    Raises:
      FileExistsError: the folder exists.
    """
    folder = orbax_path(folder)
    options = orbax.Context()
    options.array.saving.use_compression = False  # random mantissas do not get smaller, only slower
    options.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    batch: dict[str, jax.Array] = {}
    with options, _waiting_on_failure():
        for path, array in leaves:
            batch[path] = _place(array, mesh)
            del array  # before the next one is made
            if sum(placed.nbytes for placed in batch.values()) >= BATCH_BYTES:
                orbax.partial.save(folder, traverse_util.unflatten_dict(batch, sep="/"))
                batch = {}
                gc.collect()  # Orbax leaves cycles that hold the arrays
        if batch:
            orbax.partial.save(folder, traverse_util.unflatten_dict(batch, sep="/"))
        orbax.partial.finalize(folder)


@contextlib.contextmanager
def _waiting_on_failure() -> Iterator[None]:
    """Lets Orbax's other threads end when one fails, so that they write nothing after the caller has cleaned up."""
    before = set(threading.enumerate())
    try:
        yield
    except BaseException:
        for thread in set(threading.enumerate()) - before:
            if not thread.name.startswith(("ThreadPoolExecutor", "asyncio")):  # these wait for more work
                thread.join(timeout=10)
        raise


def _place(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(array, jax.local_devices(backend="cpu")[0])
    return jax.make_array_from_callback(array.shape, sharding_by_size(mesh, array.shape), lambda index: array[index])


def shapes(folder: str | Path) -> dict[str, Any]:
    """The tree of a checkpoint, of `jax.ShapeDtypeStruct`, from its metadata.

    Raises:
      UserError: the folder holds no checkpoint.
    """
    folder = orbax_path(folder)
    try:
        tree = orbax.metadata(folder).metadata
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no Orbax checkpoint, or a broken one ({str(error).splitlines()[0]})") from None
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def restore(folder: str | Path, place: Place | None = None, only: str | None = None) -> Any:
    """Reads a checkpoint.

    Args:
      place: where the leaves lie; each process reads the shards of its own devices and no others. None = everything on
        this process's first device.
      only: read what stands at this path of the tree (names joined by "/"): a branch or a leaf.

    Raises:
      UserError: the folder holds no checkpoint, or nothing at that path.
    """
    folder, tree = orbax_path(folder), shapes(folder)
    flat = traverse_util.flatten_dict(tree, sep="/")
    names = {path for path in flat if only is None or f"{path}/".startswith(f"{only}/")}
    if not names:
        raise UserError(f"{folder}: holds {', '.join(tree)}, but no {only}")
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = dict.fromkeys(flat, single) if place is None else traverse_util.flatten_dict(place(tree), sep="/")
    wanted = {
        path: leaf.update(sharding=shardings[path]) if path in names else orbax.PLACEHOLDER
        for path, leaf in flat.items()
    }
    params = orbax.load(folder, traverse_util.unflatten_dict(wanted, sep="/"))
    for name in only.split("/") if only else ():
        params = params[name]
    return params
