"""Parameters in Orbax's format: written and read over meshes, each process its own shards."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from tests.checkpoints.test_manager import free_port
from tests.converting import ROOT, main, write_source
from tora_jax import sharding
from tora_jax.checkpoints import release, weights


def test_converted_over_a_mesh(tmp_path):
    """Written over a mesh, read without one, over another one, and back to PyTorch's names."""
    t5_source = write_source(tmp_path / "t5.safetensors", "t5_encoder")
    assert main([*t5_source, str(tmp_path / "plain")]) == 0
    assert main([*t5_source, str(tmp_path / "orbax"), "--mesh", "fsdp=4"]) == 0
    want = release.load_part(tmp_path / "plain", "t5")
    mesh = sharding.make_mesh("fsdp=2,tensor=2")
    sharded = weights.restore(tmp_path / "orbax" / "params", mesh, only="t5")
    for got in (release.load_part(tmp_path / "orbax", "t5"), sharded):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), got, want)
    kernel = sharded["blocks"]["mlp"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert main(["t5", str(tmp_path / "orbax"), str(tmp_path / "back"), "--reverse"]) == 0
    assert (tmp_path / "back").read_bytes() == Path(t5_source[1]).read_bytes()


READER = """
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, process, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
import tensorstore
from tora_jax import sharding
from tora_jax.checkpoints import weights

def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(m["values"][0]["value"] for m in metrics)

mesh = sharding.make_mesh("fsdp=4")
weights.shapes(folder)
before = bytes_read()
leaf = weights.restore(folder, mesh)["big"]["kernel"]
print(bytes_read() - before)
want = np.random.default_rng(0).standard_normal(leaf.shape, np.float32)
assert len(leaf.addressable_shards) == 2
assert all((shard.data == want[shard.index]).all() for shard in leaf.addressable_shards)
"""


def test_each_process_reads_its_own_shards(tmp_path):
    """Two processes with two devices each: each reads half of the bytes, counted by the store."""
    noise = np.random.default_rng(0).standard_normal((256, 4096), np.float32)  # does not compress
    weights.save(tmp_path / "checkpoint", [("big/kernel", noise)], sharding.make_mesh("fsdp=4"))
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", READER, address]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path / "checkpoint")],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    read = [int(out.split()[-1]) for out, _ in outputs]
    assert all(0.45 * noise.nbytes < count < 0.6 * noise.nbytes for count in read), (read, noise.nbytes)
