"""Parameters in Orbax's format: written and read over meshes, each process its own shards."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

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
    place = functools.partial(sharding.param_shardings, mesh=sharding.make_mesh("fsdp=2,tensor=2"), rules=())
    sharded = weights.restore(tmp_path / "orbax" / "params", place, only="t5")
    for got in (release.load_part(tmp_path / "orbax", "t5"), sharded):
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), got, want)
    kernel = sharded["blocks"]["mlp"]["wo"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    assert main(["t5", str(tmp_path / "orbax"), str(tmp_path / "back"), "--reverse"]) == 0
    assert (tmp_path / "back").read_bytes() == Path(t5_source[1]).read_bytes()


READER = """
import functools
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, process, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
import tensorstore
from tora_jax import sharding
from tora_jax.checkpoints import release, weights
from tora_jax.io import files

def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(m["values"][0]["value"] for m in metrics)

def check(leaf):
    want = np.random.default_rng(0).standard_normal(leaf.shape, np.float32)
    assert len(leaf.addressable_shards) == 2
    assert all((shard.data == want[shard.index]).all() for shard in leaf.addressable_shards)

rules = (("embed", "fsdp"),)
place = functools.partial(sharding.param_shardings, mesh=sharding.make_mesh("fsdp=4"), rules=rules)
weights.shapes(f"{folder}/checkpoint")
before = bytes_read()
check(weights.restore(f"{folder}/checkpoint", place)["tora"]["kernel"])
by_orbax = bytes_read() - before
spans, read = [], files.read_range
files.read_range = lambda path, *span: spans.append(span) or read(path, *span)
check(release.load_part(f"{folder}/release", "tora", place)["x"]["kernel"])
ends = [start + size for start, size in sorted(spans)]
assert all(end <= start for end, (start, _) in zip(ends, sorted(spans)[1:]) if end > 9)  # the header begins there
print(by_orbax, sum(size for _, size in spans))
"""


def test_each_process_reads_its_own_shards(tmp_path):
    """Two processes with two devices each: each reads half of the bytes, and none twice."""
    noise = np.random.default_rng(0).standard_normal((2, 256, 4096), np.float32)  # does not compress
    weights.save(tmp_path / "checkpoint", [("tora/kernel", noise)], sharding.make_mesh("fsdp=4"))
    (tmp_path / "release").mkdir()
    save_file({"x/kernel": noise}, tmp_path / "release/tora.safetensors")
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", READER, address]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    processes = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)],
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
    read = [int(count) for out, _ in outputs for count in out.split()[-2:]]
    assert all(0.45 * noise.nbytes < count < 0.6 * noise.nbytes for count in read), (read, noise.nbytes)
