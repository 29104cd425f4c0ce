"""Meshes, and where the parts of an array lie on them.

Axes have logical names. Models name those of their activations (`flax.linen.with_logical_constraint`), PARAMS those of
the parameters, and only here do the rules of a config turn names into axes of the mesh.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tora_jax.errors import UserError

AXES = ("data", "fsdp", "seq", "tensor")

# Logical name -> axes of the mesh: the table that configs have.
Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# A tree of arrays or shapes, part -> parameters -> the tree of where they lie, such as `param_shardings` of a mesh.
Place = Callable[[Any], Any]

# Path of a parameter -> logical names of its last axes, the first that fits; None = `sharding_by_size`. What none fits
# (biases, norms, tables) is small, and whole on every device. The axes before are stacked blocks and taps of kernels.
PARAMS = (
    (r"tora/cogvideox/.*/(proj|fc2|linear)/kernel", ("hidden", "wide_embed")),
    (r"tora/cogvideox/.*/kernel", ("wide_embed", "hidden")),
    (r"tora/.*/(proj|fc2|linear)/kernel", ("hidden", "embed")),
    (r"tora/.*/kernel", ("embed", "hidden")),
    (r".*/(kernel|embedding)", None),
)


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


def make_mesh(spec: str, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `parse_mesh`.

    Neighbours along the last axes, which talk most, are devices of one process.

    Args:
      devices: None = all processes' devices.

    Raises:
      UserError: when there are fewer devices.
    """
    sizes = parse_mesh(spec)
    count, devices = math.prod(sizes.values()), jax.devices() if devices is None else devices
    if count > len(devices):
        raise UserError(f"--mesh {spec}: wants {count} devices, there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices[:count]).reshape(tuple(sizes.values())), AXES, axis_types=auto)


def sharding_by_size(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """fsdp and seq on the longest axis that they divide, tensor on the longest other one; the rest is replicated."""
    axes: list[str | tuple[str, str] | None] = [None] * len(shape)
    for name in (("fsdp", "seq"), "tensor"):
        size = _size(mesh, name)
        free = [i for i, length in enumerate(shape) if axes[i] is None and length % size == 0]
        if size > 1 and free:
            axes[max(free, key=lambda i: shape[i])] = name
    return NamedSharding(mesh, PartitionSpec(*axes))


def param_shardings(tree: Any, mesh: Mesh, rules: Rules) -> Any:
    """Shardings of parameters, and of whatever has leaves by the same paths: optimizer's state, moving averages.

    An axis that its part of the mesh does not divide is not sharded.

    Args:
      tree: of arrays or shapes; nested dicts and flat ones of paths joined by "/", in any other containers.
      rules: of the names "embed" (width of the model), "wide_embed" (the same of a model that no single device holds,
        so that one sample alone must be spread, too) and "hidden" (heads, width of MLPs).
    """

    def place(keys: tuple, leaf: Any) -> NamedSharding:
        path = "/".join(key.key for key in keys if isinstance(key, jax.tree_util.DictKey))
        for pattern, names in PARAMS:
            if re.search(f"(^|/){pattern}$", path):
                if names is None:
                    return sharding_by_size(mesh, leaf.shape)
                spec = nn.logical_to_mesh_axes((None,) * (len(leaf.shape) - len(names)) + names, rules)
                pairs = zip(spec, leaf.shape, strict=True)
                return NamedSharding(
                    mesh, PartitionSpec(*(None if n % _size(mesh, axes) else axes for axes, n in pairs))
                )
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def only_parts(parts: Collection[str], place: Place) -> Place:
    """As `place`, but that other parts lie in the memory of each host."""
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def some(tree: Mapping[str, Any]) -> dict[str, Any]:
        shardings = place(tree)
        return {part: shardings[part] if part in parts else jax.tree.map(lambda _: host, tree[part]) for part in tree}

    return some


def _size(mesh: Mesh | jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in ([axes] if isinstance(axes, str) else axes or ()))


def batch_sharding(mesh: Mesh, rules: Rules, size: int) -> NamedSharding:
    """Of arrays whose first axis is a batch of `size` samples over all processes.

    Raises:
      UserError: when the mesh does not divide the batch.
    """
    spec = nn.logical_to_mesh_axes(("batch",), rules)
    if size % (parts := _size(mesh, spec[0])):
        raise UserError(
            f"a batch of {size} does not divide over {parts} parts of the mesh ({spec[0]}); "
            f"make it a multiple of {parts}, or those axes of the mesh smaller (seq and tensor need no larger batch)"
        )
    return NamedSharding(mesh, spec)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
    """Inside, the logical names of activations mean axes of the mesh; outside they mean nothing.

    To be held around calls of compiled functions: JAX keeps apart what it has traced for different meshes.

    Args:
      rules: of the names "batch", "time" (where devices hold whole frames), "space" (where they hold whole tracks, or
        rows of all frames), "heads" (where they hold whole sequences) and "frames" (of VAEs, in which each is alone).
    """
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def in_use() -> bool:
    """Is there a mesh, of `use`?"""
    return not jax.sharding.get_abstract_mesh().empty


def platform() -> str:
    """Of the mesh's devices, or of JAX's own where there is no mesh: "cpu", "gpu" or "tpu"."""
    return jax.sharding.get_abstract_mesh().abstract_device.platform if in_use() else jax.default_backend()


def shards(name: str | None) -> int:
    """Parts that the mesh in use cuts an axis of this logical name into; without a mesh, 1."""
    if name is None or not in_use():
        return 1
    (axes,) = nn.logical_to_mesh_axes((name,), nn.get_logical_axis_rules())
    return _size(jax.sharding.get_abstract_mesh(), axes)


def spec(shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec:
    """For `jax.shard_map` on the mesh in use: where the axes of these logical names lie, if it divides them."""
    divided = [None if length % shards(name) else name for length, name in zip(shape, names, strict=True)]
    return nn.logical_to_mesh_axes(divided, nn.get_logical_axis_rules())


def constrain(x: jax.Array, names: Sequence[str | None], uneven: bool = False) -> jax.Array:
    """`flax.linen.with_logical_constraint`, but that axes which the mesh does not divide are not sharded.

    Args:
      uneven: axes that are longer than their part of the mesh are sharded all the same, and filled up by XLA.
    """
    if not in_use():
        return x
    if uneven:
        names = [None if length < shards(name) else name for length, name in zip(x.shape, names, strict=True)]
        return jax.lax.with_sharding_constraint(x, nn.logical_to_mesh_axes(names, nn.get_logical_axis_rules()))
    return jax.lax.with_sharding_constraint(x, spec(x.shape, names))


def to_host(tree: Any) -> Any:
    """NumPy arrays of what lies on any devices; all processes call it, and all get everything."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
