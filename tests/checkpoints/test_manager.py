"""The state of a training: saved whole or not at all, over meshes, under kills and full disks."""

import os
import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.converting import ROOT
from tora_jax import sharding
from tora_jax.checkpoints.manager import Manager
from tora_jax.errors import UserError
from tora_jax.io import files


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def training(seed=0):
    """A state as a training has it."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "tora/a/kernel": jax.random.normal(keys[0], (8, 64)),
        "tora/a/bias": jnp.full(6, seed, jnp.bfloat16),
    }
    return {
        "trained": params,
        "optimizer": optax.adam(1e-3).init(params),
        "ema": jax.tree.map(lambda x: x + 1, params),
        "rng": keys[1],
        "step": jnp.int32(seed),
    }


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class TestManager:
    def test_restores_every_bit(self, tmp_path):
        state, position = training(3), {"next": 7, "workers": [{"at": 1}, None]}
        with Manager(tmp_path, keep=1) as manager:
            assert manager.restore(state) is None
            manager.save(3, state, position)
        with Manager(tmp_path, keep=1) as manager:
            found = manager.restore(jax.eval_shape(lambda: training(0)))
        assert (found.step, found.data) == (3, position)
        assert_same(found.state, state)

    def test_keeps_the_latest_and_the_best(self, tmp_path):
        losses = [5.0, 1.0, 3.0, float("nan"), 4.0, None]
        with Manager(tmp_path, keep=2, best="loss") as manager:
            for step, loss in enumerate(losses):
                manager.save(step, training(step), None, None if loss is None else {"loss": loss, "other": -loss})
        with Manager(tmp_path, keep=2, best="loss") as manager:
            assert manager.steps() == [1, 4, 5]
            assert manager.best_step() == 1
            assert_same(manager.restore(training(), manager.best_step()).state, training(1))
            manager.save(6, training(6), None, {"loss": 0.5})  # the metrics of the others are read from disk
            assert manager.best_step() == 6
        assert names(tmp_path) == ["5", "6"]
        with Manager(tmp_path, keep=1) as manager:
            assert manager.best_step() is None
            manager.save(7, training(7), None)
        assert names(tmp_path) == ["7"]

    def test_arrays_may_be_donated_while_it_saves(self, tmp_path):
        step = jax.jit(lambda x: x + 1, donate_argnums=0)
        x = jnp.zeros(1_000_000)
        with Manager(tmp_path, keep=20) as manager:
            for i in range(4):
                manager.save(i, {"x": x}, None)
                for _ in range(10):
                    x = step(x)
            for i in range(4):
                found = manager.restore({"x": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)}, i)
                np.testing.assert_array_equal(found.state["x"], np.full(1_000_000, 10.0 * i))

    def test_the_same_step_twice(self, tmp_path):
        with Manager(tmp_path, keep=1) as manager:
            manager.save(1, training(1), None)
            manager.save(1, training(2), None)
            assert_same(manager.restore(training()).state, training(1))

    @pytest.mark.parametrize(("before", "after"), [("data=8", "fsdp=4,tensor=2"), ("fsdp=8", "data=2"), ("fsdp=2", "")])
    def test_onto_another_mesh(self, tmp_path, before, after):
        state = training(1)
        with Manager(tmp_path, keep=1) as manager:
            manager.save(1, jax.device_put(state, layout(before, state)), None)
        with Manager(tmp_path, keep=1) as manager:
            shardings = layout(after, state)
            target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
            found = manager.restore(target)
        assert_same(found.state, state)
        kernel = found.state["optimizer"][0].mu["tora/a/kernel"]
        assert kernel.sharding == shardings["optimizer"][0].mu["tora/a/kernel"]

    @pytest.mark.parametrize(
        "damage", ["state/ocdbt.process_0/d/*", "state/_METADATA", "data/metadata", "metrics/metrics"]
    )
    def test_a_truncated_newest_is_passed_over(self, tmp_path, damage):
        with Manager(tmp_path, keep=3) as manager:
            for step in (1, 2, 3):
                manager.save(step, training(step), step)
        victim = max(tmp_path.glob(f"3/{damage}"), key=lambda path: path.stat().st_size)
        os.truncate(victim, victim.stat().st_size // 2)
        with pytest.warns(
            UserWarning, match=f"{tmp_path}/3: broken, passed over .*{victim.name} is missing or truncated"
        ):
            manager = Manager(tmp_path, keep=3)
        found = manager.restore(training())
        assert (found.step, found.data) == (2, 2)
        assert_same(found.state, training(2))
        manager.save(3, training(4), 4)
        manager.close()
        assert names(tmp_path) == ["1", "2", "3", "3.broken"]
        with Manager(tmp_path, keep=3) as manager:
            assert_same(manager.restore(training()).state, training(4))

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves tasks behind
    def test_damage_that_keeps_the_size(self, tmp_path):
        with Manager(tmp_path, keep=3) as manager:
            for step in (1, 2):
                manager.save(step, training(step), step)
        for file in tmp_path.glob("2/state/manifest.ocdbt"):
            file.write_bytes(bytes(file.stat().st_size))
        with Manager(tmp_path, keep=3) as manager:
            with pytest.warns(UserWarning, match=f"{tmp_path}/2: broken, passed over"):
                found = manager.restore(training())
            assert found.step == 1
            assert manager.steps() == [1]

    def test_nothing_that_can_be_read(self, tmp_path):
        with Manager(tmp_path, keep=1) as manager:
            manager.save(1, training(1), None)
        os.remove(tmp_path / "1/state/_METADATA")
        for start in ("now", "later"):
            if start == "now":
                with pytest.warns(UserWarning, match="broken"):
                    manager = Manager(tmp_path, keep=1)
            else:
                manager = Manager(tmp_path, keep=1)
            with manager, pytest.raises(UserError, match=r"holds broken checkpoints alone \(1.broken\)"):
                manager.restore(training())

    def test_another_config(self, tmp_path):
        with Manager(tmp_path, keep=1) as manager:
            manager.save(1, training(1), None)
            for change, message in (
                ({"ema": {}}, "ema/tora/a/bias is .6,., this config wants none .2 leaves"),
                ({"lora": jnp.zeros(3)}, "lora is missing, this config wants .3,. .1 leaves"),
                ({"step": jnp.zeros(2)}, "step is .., this config wants .2,. .1 leaves"),
            ):
                with pytest.raises(UserError, match="step 1 is of another config: " + message):
                    manager.restore({**training(), **change})
            with pytest.raises(UserError, match=r"no checkpoint of step 5, but of \[1\]"):
                manager.restore(training(), 5)
        assert names(tmp_path) == ["1"]


def layout(mesh, state):
    mesh = sharding.make_mesh(mesh)

    def place(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        return sharding.sharding_by_size(mesh, x.shape)

    return jax.tree.map(place, state)


FULL = """
import sys
import jax
from tora_jax import command_line
from tora_jax.checkpoints.manager import Manager
from tora_jax.errors import UserError

def main(argv, check_interrupt):
    _, folder = argv
    state = {"x": jax.random.normal(jax.random.key(0), (100_000,))}
    manager = Manager(folder, keep=2)
    try:
        for step in range(4):
            manager.save(step, state, {"at": step})
        manager.close()
    except UserError as error:
        print(error)
    with Manager(folder, keep=2) as manager:
        found = manager.restore(state)
        assert (found.state["x"] == state["x"]).all()
        print(found.step, found.data, manager.steps())

command_line.run(main, ["full", *sys.argv[1:]])
"""


@pytest.mark.parametrize("kib", [600, 700, 1100])
def test_full_disk(tmp_path, kib):
    """On a file system that really is too small: one clear line, and what was saved before can be read.

    It runs as a command does: those keep to themselves what Orbax says of a closed event loop (from Python 3.13).
    """
    room = f"mount -t tmpfs -o size={kib}k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", room], capture_output=True).returncode:
        pytest.skip("this user may not mount a small file system")
    command = f"{room} && exec {sys.executable} -c '{FULL}' {tmp_path}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    message, found = done.stdout.splitlines()
    steps = [0] if kib < 800 else [0, 1]
    assert message == f"{tmp_path}: no space left; whole are the checkpoints of steps {', '.join(map(str, steps))}"
    assert found == f"{steps[-1]} {{'at': {steps[-1]}}} {steps}"
    assert done.stderr == ""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("RESOURCE_EXHAUSTED: ENOSPC")])
def test_full_disk_anywhere(tmp_path, monkeypatch, error):
    with Manager(tmp_path, keep=2) as manager:
        manager.save(1, training(1), None)

        def fail(*args, **kwargs):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(manager._orbax, "save", fail)
            with pytest.raises(UserError, match=r"no space left; whole are the checkpoints of steps 1$"):
                manager.save(2, training(2), None)
        assert_same(manager.restore(training()).state, training(1))
        manager.save(2, training(2), None)
        assert_same(manager.restore(training()).state, training(2))


def test_a_bucket_that_takes_nothing(tmp_path, monkeypatch):
    """However often it was tried: one clear line, too."""
    with Manager(tmp_path, keep=2) as manager:
        manager.save(1, training(1), None)

        def fail(*args, **kwargs):
            raise ValueError("UNAVAILABLE: HTTP response code: 503\n[source locations]")

        with monkeypatch.context() as patch:
            patch.setattr(manager, "folder", files.path("memory://bucket/run"))
            patch.setattr(manager._orbax, "save", fail)
            said = r"cannot be written \(UNAVAILABLE: HTTP response code: 503\); whole are the checkpoints of steps 1$"
            with pytest.raises(UserError, match=said):
                manager.save(2, training(2), None)
        manager.save(2, training(2), None)
        assert_same(manager.restore(training()).state, training(2))


ENDLESS = """
import sys
import jax.numpy as jnp
from tora_jax.checkpoints.manager import Manager

manager = Manager(sys.argv[1], keep=2)
found = manager.restore({"x": jnp.zeros(300_000), "step": 0})
step = found.step if found else 0
if found:
    assert (found.state["x"] == step).all() and found.state["step"] == step and found.data == {"at": step}
print(step, flush=True)
while True:
    step += 1
    manager.save(step, {"x": jnp.full(300_000, float(step)), "step": step}, {"at": step})
    if manager.preempted(step):
        manager.close()
        print(step, flush=True)
        break
"""


def endless(folder):
    return subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_while_saving(tmp_path):
    """kill -9 while it saves without a pause; then SIGTERM, which loses nothing."""
    before = -1
    for wait in (0.05, 0.21, 0.13):
        process = endless(tmp_path)
        start = process.stdout.readline()
        assert start, process.stderr.read()
        assert int(start) > before
        before = int(start)
        while not any(int(name) > before for name in names(tmp_path) if name.isdecimal()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)  # however slow the machine, a kill in vain would show nothing
        time.sleep(wait)
        process.kill()
        process.communicate()
    process = endless(tmp_path)
    start = int(process.stdout.readline())
    assert start > before
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    last = int(out)
    assert {int(name) for name in names(tmp_path)} == {last - 1, last}  # as numbers: "10" sorts before "9"
    # Orbax says that the folder which a kill left half-written is no checkpoint; nothing else is wrong.
    assert all("_CHECKPOINT_METADATA" in line for line in error.splitlines()), error


PAIR = """
import os
import signal
import sys
import time
import warnings
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
address, process, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
from jax.sharding import NamedSharding, PartitionSpec
from tora_jax import sharding
from tora_jax.checkpoints.manager import Manager

mesh = sharding.make_mesh("fsdp=4")
over = NamedSharding(mesh, PartitionSpec("fsdp"))
target = {"x": jax.ShapeDtypeStruct((4096,), np.float32, sharding=over)}

def state(step):
    return {"x": jax.make_array_from_callback((4096,), over, lambda index: np.full(1024, step, np.float32))}

with Manager(folder, keep=2) as manager:
    for step in (1, 2):
        manager.save(step, state(step), {"process": int(process), "padding": "x" * int(process)})
if process == "1":
    os.truncate(f"{folder}/2/state/manifest.ocdbt", 9)
jax.experimental.multihost_utils.sync_global_devices("damaged")
warnings.simplefilter("ignore")
with Manager(folder, keep=2) as manager:
    found = manager.restore(target)
    assert found.step == 1 and found.data["process"] == int(process), found
    assert all((shard.data == 1).all() for shard in found.state["x"].addressable_shards)
    step = 1
    while not manager.preempted(step):
        step += 1
        if step == 4 and process == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
    manager.save(step, state(step), {"process": int(process)})
print("saved", step)
"""


def test_two_processes(tmp_path):
    """Both save and restore their shards and their data; SIGTERM to one stops both at the same step."""
    command = [sys.executable, "-c", PAIR, f"127.0.0.1:{free_port()}"]
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
    said = [out.splitlines()[-1] for out, _ in outputs]
    assert said[0] == said[1]
    assert said[0].startswith("saved ")
    with Manager(tmp_path, keep=2) as manager:
        found = manager.restore({"x": jnp.zeros(4096)})
    assert found.data == {"process": 0}
    np.testing.assert_array_equal(found.state["x"], np.full(4096, float(said[0].split()[1])))
