"""Parameters in Orbax's format: written leaf by leaf, read by each process where its own shards lie."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as orbax

from tora_jax.errors import UserError

AXES = ("data", "fsdp", "seq", "tensor")
BATCH_BYTES = 1 << 30  # leaves that Orbax gets together: a call for each small leaf is slow, all at once is large


def parse_mesh(spec: str) -> dict[str, int]:
    """ "data=8,fsdp=4" -> the size of each axis of AXES; those left out are 1.

    Raises:
      UserError: for another axis, or a size that is no whole number above 0.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, spec.split(",")):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdecimal() or int(size) < 1:
            raise UserError(f"--mesh {spec}: {part!r} should be one of {', '.join(AXES)} with a size, such as fsdp=4")
        sizes[name] = int(size)
    return sizes


def make_mesh(spec: str) -> Mesh:
    """The mesh of `parse_mesh` over all processes' devices.

    Raises:
      UserError: when there are fewer devices.
    """
    sizes = parse_mesh(spec)
    count, devices = math.prod(sizes.values()), jax.devices()
    if count > len(devices):
        raise UserError(f"--mesh {spec}: wants {count} devices, there are {len(devices)}")
    return Mesh(np.array(devices[:count]).reshape(tuple(sizes.values())), AXES)


def sharding_by_size(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """fsdp on the longest axis that it divides, tensor on the longest of the others; the rest is replicated."""
    axes: list[str | None] = [None] * len(shape)
    for name in ("fsdp", "tensor"):
        size = mesh.shape[name]
        free = [i for i, length in enumerate(shape) if axes[i] is None and length % size == 0]
        if size > 1 and free:
            axes[max(free, key=lambda i: shape[i])] = name
    return NamedSharding(mesh, PartitionSpec(*axes))


def save(folder: str | Path, leaves: Iterable[tuple[str, np.ndarray]], mesh: Mesh | None = None) -> None:
    """Writes a checkpoint, holding about BATCH_BYTES or the largest leaf of it.

    Args:
      folder: not there yet; it appears when all is written.
      leaves: (path joined by "/", array), one by one.
      mesh: write each leaf in the shards of `sharding_by_size`; None = in one piece.

    Raises:
      FileExistsError: when the folder is there.
    """
    folder = Path(folder).absolute()
    batch: dict[str, jax.Array | np.ndarray] = {}
    for path, array in leaves:
        if batch and sum(a.nbytes for a in batch.values()) + array.nbytes > BATCH_BYTES:
            orbax.partial.save(folder, traverse_util.unflatten_dict(batch, sep="/"))
            batch = {}
        batch[path] = _place(array, mesh)
    orbax.partial.save(folder, traverse_util.unflatten_dict(batch, sep="/"))
    orbax.partial.finalize(folder)


def _place(array: np.ndarray, mesh: Mesh | None) -> jax.Array:
    if mesh is None:
        return jax.device_put(array, jax.local_devices(backend="cpu")[0])
    return jax.make_array_from_callback(array.shape, sharding_by_size(mesh, array.shape), lambda index: array[index])


def shapes(folder: str | Path) -> dict[str, Any]:
    """The tree of a checkpoint, of `jax.ShapeDtypeStruct`, from its metadata.

    Raises:
      UserError: when the folder holds no checkpoint.
    """
    folder = Path(folder).absolute()
    try:
        tree = orbax.metadata(folder).metadata
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: no Orbax checkpoint, or a broken one ({str(error).splitlines()[0]})") from None
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def restore(folder: str | Path, mesh: Mesh | None = None, only: str | None = None) -> dict[str, Any]:
    """Reads a checkpoint.

    Args:
      mesh: place each leaf by `sharding_by_size`; each process reads the shards of its own devices and no others.
        None = everything on this process's first device.
      only: read what stands at this path of the tree (names joined by "/"): a branch or a leaf.

    Raises:
      UserError: when the folder holds no checkpoint, or nothing at that path.
    """
    folder, tree = Path(folder).absolute(), shapes(folder)
    flat = traverse_util.flatten_dict(tree, sep="/")
    names = {path for path in flat if only is None or f"{path}/".startswith(f"{only}/")}
    if not names:
        raise UserError(f"{folder}: holds {', '.join(tree)}, but no {only}")
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        if path not in names:
            return orbax.PLACEHOLDER
        return leaf.update(sharding=single if mesh is None else sharding_by_size(mesh, leaf.shape))

    wanted = {path: target(path, leaf) for path, leaf in flat.items()}
    params = orbax.load(folder, traverse_util.unflatten_dict(wanted, sep="/"))
    for name in only.split("/") if only else ():
        params = params[name]
    return params
