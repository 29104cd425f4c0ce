"""Meshes, and where the parts of an array lie on them."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tora_jax.errors import UserError

AXES = ("data", "fsdp", "seq", "tensor")


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
