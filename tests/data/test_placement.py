"""Batches on a mesh: which part a process reads, and where it lies."""

import functools
import json

import jax
import numpy as np
import pytest

from tests import records
from tora_jax.data import pipeline, placement
from tora_jax.errors import UserError
from tora_jax.sharding import make_mesh

CONFIG = {
    "buckets": ({"frames": 5, "height": 32, "width": 32, "fps": 0.0, "batch": 4, "weight": 1.0},),
    "motion": "mixed",
    "tracks": "given",
    "max_tracks": 3,
    "crop": 0,
    "object_masks": False,
    "frame_masks": {"random": 0.5},
    "workers": 0,
    "prefetch": 2,
    "damaged_share": 0.0,
}


def test_shares_of_meshes():
    """Rows are parts of the batch, columns the devices that hold the same part."""
    hosts = np.arange(8).repeat(4)  # 8 hosts with 4 devices each
    for ways, want in (
        (32, [(i, 8) for i in range(8)]),
        (8, [(i, 8) for i in range(8)]),
        (4, [(i // 2, 4) for i in range(8)]),
    ):
        assert [placement._share(hosts.reshape(ways, -1), i) for i in range(8)] == want
    assert placement._share(hosts.reshape(1, -1), 5) == (0, 1)
    with pytest.raises(UserError, match="uneven part"):
        placement._share(np.array([0, 1, 1, 0])[:, None], 0)
    assert placement.shard_of(make_mesh("data=4,tensor=2")) == (0, 1)


def test_batches_on_a_mesh(tmp_path):
    folder = records.write(tmp_path / "tiny", {"train": records.clips(8)})
    config = {**CONFIG, "sources": (folder,)}
    start = functools.partial(pipeline.batches, config, "train", seed=1, latent_frames=records.latent_frames)
    mesh, plain = make_mesh("data=2,fsdp=2,tensor=2"), start()
    whole = [next(plain) for _ in range(5)]
    plain.close()
    placed = placement.Placed(start(), mesh)
    found = [next(placed) for _ in range(2)]
    assert {len(shard.data) for shard in found[0]["video"].addressable_shards} == {1}
    assert found[0]["video"].sharding.spec == jax.sharding.PartitionSpec(("data", "fsdp"))
    state = json.loads(json.dumps(placed.get_state()))
    found += [next(placed) for _ in range(2)]
    placed.set_state(state)
    found += [next(placed) for _ in range(3)]
    placed.close()
    for got, want in zip(found, [*whole[:4], *whole[2:]], strict=True):
        assert got.keys() == want.keys()
        for name in got:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    with pytest.raises(UserError, match="a batch of 4 does not split over data x fsdp = 8"):
        placement.place(whole[0], make_mesh("data=8"))
