"""Batches on a mesh: the share of each process, and global arrays made of the shares."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from tora_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")


def shard_of(mesh: Mesh) -> tuple[int, int]:
    """(index, count) of this process among those whose devices hold different samples of a batch.

    Processes that share a batch's samples (along the axes "seq" and "tensor") get the same index.

    Raises:
      UserError: the mesh gives processes uneven parts.
    """
    owner = np.vectorize(lambda device: device.process_index)(mesh.devices)
    return _share(owner.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1), jax.process_index())


def _share(owner: Int[np.ndarray, "ways others"], process: int) -> tuple[int, int]:
    """`shard_of` from the process of each device; a row of `owner` is a part of the batch."""
    ways, mine = len(owner), np.flatnonzero((owner == process).any(1))
    if not len(mine) or ways % len(mine) or mine[0] % len(mine) or np.ptp(mine) != len(mine) - 1:
        raise UserError(f"process {process} of the mesh holds an uneven part of a batch; change data and fsdp")
    return int(mine[0]) // len(mine), ways // len(mine)


def place(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's part of a batch -> global arrays, split over the mesh's axes "data" and "fsdp".

    Raises:
      UserError: the axes do not divide the batch.
    """
    size, ways = len(next(iter(batch.values()))), mesh.shape["data"] * mesh.shape["fsdp"]
    if size * shard_of(mesh)[1] % ways:
        raise UserError(f"a batch of {size * shard_of(mesh)[1]} does not split over data x fsdp = {ways} devices")
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


class Placed(grain.DatasetIterator):
    """Applies `place` to an iterator, `ahead` batches early; the state is that of the batches handed out."""

    def __init__(self, iterator: grain.DatasetIterator, mesh: Mesh, ahead: int = 2):
        super().__init__(iterator)
        self._iterator, self._mesh, self._ahead = iterator, mesh, ahead
        self._waiting: deque[tuple[dict[str, jax.Array], dict[str, Any]]] = deque()
        self._state = iterator.get_state()

    def __next__(self) -> dict[str, jax.Array]:
        self._assert_not_closed()
        while len(self._waiting) <= self._ahead:
            try:
                batch = place(next(self._iterator), self._mesh)
            except StopIteration:
                break
            self._waiting.append((batch, self._iterator.get_state()))
        if not self._waiting:
            raise StopIteration
        batch, self._state = self._waiting.popleft()
        return batch

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._waiting.clear()
        self._iterator.set_state(state)
        self._state = self._iterator.get_state()
