"""Who goes on with a run goes on as it began, or says that the change is meant."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import training_runs
from tora_jax import sharding
from tora_jax.data import sources
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.training import record

CONFIG = {
    "seed": 0,
    "mesh": "",
    "steps": 4,
    "resume": False,
    "resume_anyway": False,
    "optim": {"lr": 1e-4, "weight_decay": ()},
    "data": {"sources": ("clips",), "workers": 0, "buckets": ({"frames": 5, "weight": 1.0},)},
}
FROZEN = {"t5/kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "vae/scale": np.float32(2)}
DATA = {"clips": 4, "digest": "ab", "made": None}


@pytest.fixture
def weights(tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"tokens")
    return folder


def hold(workdir, weights, data=DATA, frozen=FROZEN, **changes):
    optim, more = changes.pop("optim", {}), changes.pop("more", {})
    config = {**CONFIG, **changes, "optim": CONFIG["optim"] | optim, "data": CONFIG["data"] | more}
    goes_on = config.get("resume", False)
    began_with = record.fingerprints(weights and str(weights), frozen, record.read(workdir) if goes_on else None)
    record.hold(workdir, config, began_with, data, sharding.make_mesh(""), goes_on=goes_on, first=True)


@pytest.fixture
def begun(tmp_path, weights):
    hold(tmp_path / "run", weights)
    return tmp_path / "run"


def test_what_a_record_holds(begun, weights):
    found = record.read(begun)
    assert found["weights"]["folder"] == str(weights)
    assert found["config"]["optim"] == {"lr": 1e-4, "weight_decay": []}
    assert found["data"] == DATA
    assert found["versions"].keys() >= {"jax", "tora_jax"}
    assert found["mesh"]["data"] == found["processes"] == 1
    assert found["changes"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh": "data=2"},
        {"steps": 8},
        {"save_every": 1},
        {"more": {"workers": 2}},
        {"more": {"sources": ("/moved/clips",)}},
    ],
)
def test_what_may_differ(begun, weights, changes):
    before = (begun / record.NAME).read_bytes()
    hold(begun, weights, resume=True, **changes)
    assert (begun / record.NAME).read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "config.seed: 0 -> 1"),
        ({"optim": {"lr": 1e-3}}, "config.optim.lr: 0.0001 -> 0.001"),
        ({"ema": 0.9}, "config.ema: none -> 0.9"),
        ({"more": {"buckets": ({"frames": 9, "weight": 1.0},)}}, "config.data.buckets: "),
        ({"data": DATA | {"digest": "cd"}}, "data.digest: ab -> cd"),
        ({"data": DATA | {"clips": 5}}, "data.clips: 4 -> 5"),
        ({"frozen": FROZEN | {"t5/kernel": FROZEN["t5/kernel"].reshape(3, 2)}}, "weights.t5: "),
        ({"frozen": FROZEN | {"vae/scale": np.float32(3)}}, "weights.vae: "),
    ],
)
def test_what_changes_the_losses(begun, weights, changes, said):
    """One line names it; `resume_anyway` takes it, says so and notes it."""
    before = (begun / record.NAME).read_bytes()
    with pytest.raises(UserError, match="the run began otherwise") as refused:
        hold(begun, weights, resume=True, **changes)
    assert said in refused.value.message
    assert (begun / record.NAME).read_bytes() == before
    with pytest.warns(UserWarning, match="goes on otherwise than it began"):
        hold(begun, weights, resume=True, resume_anyway=True, **changes)
    assert said in record.read(begun)["changes"][0][0]
    hold(begun, weights, resume=True, **changes)  # it is the run's own now


def test_weights_are_found_and_checked(begun, weights, tmp_path):
    assert record.weights_of(begun, None, False) is None
    assert record.weights_of(begun, None, True) == str(weights)
    moved = weights.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="weights; name their folder by --weights"):
        record.weights_of(begun, None, True)
    assert record.weights_of(begun, str(moved), True) == str(moved)
    hold(begun, moved, resume=True)  # the same weights elsewhere
    (moved / "tokenizer.model").write_bytes(b"others")
    with pytest.raises(UserError, match=r"began otherwise: weights\.tokenizer: \w+ -> \w+; go on"):
        hold(begun, moved, resume=True)
    with pytest.raises(UserError, match=r"weights\.t5: \w+ -> none; .*weights\.vae: \w+ -> none"):
        hold(begun, None, resume=True)


def test_a_record_that_is_broken(begun):
    (begun / record.NAME).write_text("{")
    with pytest.raises(UserError, match=r"run\.json: cannot be read"):
        record.read(begun)


class TestFingerprints:
    def of(self, weights, leaves, before=None):
        return record.fingerprints(str(weights), leaves, before)["tora"]

    @pytest.mark.parametrize("small", [0, record.SMALL])
    def test_the_same_on_every_mesh(self, weights, small, monkeypatch):
        monkeypatch.setattr(record, "SMALL", small)
        rng = np.random.default_rng(0)
        drawn = {"kernel": (4, 16, 8), "bias": (16,), "number": ()}
        leaves = {f"tora/x/{name}": rng.normal(size=shape).astype(np.float32) for name, shape in drawn.items()}
        leaves |= {"tora/x/half": rng.normal(size=(8, 8)).astype(jnp.bfloat16), "tora/x/mask": np.arange(9) > 4}
        found = {self.of(weights, leaves), self.of(weights, jax.device_put(leaves))}
        for mesh in ("fsdp=8", "data=2,fsdp=2,tensor=2"):
            shardings = sharding.param_shardings(
                leaves, sharding.make_mesh(mesh), (("embed", "fsdp"), ("hidden", "tensor"))
            )
            found.add(self.of(weights, jax.device_put(leaves, shardings)))
        assert len(found) == 1
        monkeypatch.undo()
        assert found == {self.of(weights, leaves)}

    def test_what_differs(self, weights):
        """A bit, the order, the sign of a zero, the name, the dtype."""
        kernel = np.arange(12, dtype=np.float32).reshape(3, 4)
        changed = [kernel.copy() for _ in range(4)]
        changed[0].view(np.uint32)[1, 2] ^= 1
        changed[1][[0, 1]] = kernel[[1, 0]]
        changed[2][:, [0, 1]] = kernel[:, [1, 0]]
        changed[3][0, 0] = -0.0
        others = [{"tora/kernel": array} for array in (kernel, *changed, kernel.T, kernel.astype(np.int32))]
        found = [self.of(weights, leaves) for leaves in (*others, {"tora/other": kernel})]
        assert len(set(found)) == len(found)

    def test_records_of_before(self, begun, weights):
        """Their digests are of the bytes; a run that has them keeps them."""
        digests = {"t5": "016eaeccda9cdca4ef56e4691eb3a5e7", "vae": "dc11ab138858a3f3344e4868496208ad"}
        note = record.read(begun)
        files.write_text(begun / record.NAME, json.dumps(note | {"weights": note["weights"] | digests}))
        hold(begun, weights, resume=True)
        with pytest.raises(UserError, match=r"weights\.vae: dc11ab\w+ -> [0-9a-f]{32}; go on"):
            hold(begun, weights, resume=True, frozen=FROZEN | {"vae/scale": np.float32(3)})


class TestDigest:
    """Of sources of any kind."""

    @pytest.fixture
    def folder(self, tmp_path):
        return training_runs.write_folder(tmp_path / "clips", train=3)

    def digest(self, folder: Path) -> str:
        return sources.digest(sources.open_source(folder, "train"))

    def test_a_moved_folder_is_the_same(self, folder, tmp_path):
        before = self.digest(folder)
        assert self.digest(folder.rename(tmp_path / "moved")) == before

    def test_other_clips(self, folder):
        before = self.digest(folder)
        caption, video = folder / "train/1.txt", folder / "train/2.mp4"
        caption.write_text("another caption\n")
        other = self.digest(folder)
        data = bytearray(video.read_bytes())
        data[len(data) // 2] ^= 1
        video.write_bytes(data)
        assert len({before, other, self.digest(folder)}) == 3

    def test_arrays(self):
        class Arrays(list):
            made, passed_over = None, {}
            info = name = caption = list.__getitem__

        one, other = Arrays([{"x": np.zeros(3)}] * 99), Arrays([{"x": np.zeros(3, np.float32)}] * 99)
        assert sources.digest(one) == sources.digest(Arrays(one))
        assert len({sources.digest(one), sources.digest(other), sources.digest(Arrays(one[1:]))}) == 3


def test_a_run_without_a_checkpoint_binds_nobody(begun):
    hold(begun, None, seed=1, resume=False)
    assert record.read(begun)["config"]["seed"] == 1
