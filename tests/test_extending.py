"""What a fork adds by one line to a table works through the public functions, without any other change."""

import math
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from safetensors.numpy import load_file, save_file

from convert_weights.checkpoint_types import CHECKPOINT_TYPES
from convert_weights.infer_fields import count, known, size
from convert_weights.mapping import Layout, affine
from convert_weights.typing import CheckpointType
from tests import training_runs
from tests.converting import main
from tora_jax.checkpoints import release
from tora_jax.data.sources import SOURCES
from tora_jax.io.video import probe

# ---------------------------------------------------------------- a type of checkpoint


class Tower(nn.Module):
    """A stack of linear layers."""

    depth: int
    width: int

    @nn.compact
    def __call__(self, x):
        for i in range(self.depth):
            x = nn.Dense(self.width, name=f"layer_{i}")(x)
        return x


TOWER = CheckpointType(
    name="tower",
    part="tower",
    table=affine("layers.{i}", "layer_{i}", Layout.LINEAR),
    infer=lambda shapes: known(depth=count(shapes, r"layers\.(\d+)"), width=size(shapes, r"layers\.\d+\.bias")),
    init=lambda key, fields: Tower(**fields).init(key, jnp.zeros((1, fields["width"])))["params"],
    released={"S": {"depth": 2, "width": 3}},
)


def test_a_checkpoint_type(tmp_path, monkeypatch):
    """Converted weights compute what PyTorch's would, and the way back gives the same file."""
    monkeypatch.setitem(CHECKPOINT_TYPES, TOWER.name, TOWER)
    rng = np.random.default_rng(0)
    shapes = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in (("weight", (3, 3)), ("bias", (3,)))}
    source, ours, back = tmp_path / "source.safetensors", tmp_path / "ours", tmp_path / "back.safetensors"
    save_file({key: rng.normal(size=s).astype("f4") for key, s in shapes.items()}, source, metadata={"format": "pt"})
    assert main(["tower", str(source), str(ours), "--variant", "S"]) == 0
    module = Tower(**release.part_config(ours, "tower"))
    x = rng.normal(size=(2, 3)).astype("f4")
    got = module.apply({"params": release.load_part(ours, "tower")}, x)
    state = load_file(source)
    for i in range(2):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    np.testing.assert_allclose(got, x, rtol=1e-5)
    assert main(["tower", str(ours), str(back), "--reverse"]) == 0
    assert back.read_bytes() == source.read_bytes()
    (ours / "source.json").unlink()
    assert main(["tower", str(ours), str(tmp_path / "again"), "--reverse"]) == 0
    assert (tmp_path / "again").read_bytes() == source.read_bytes()


# ---------------------------------------------------------------- a source of clips


class ZippedVideos:
    """A folder with a zip file for each split: videos, each with its caption in a .txt of the same name."""

    made = None

    def __init__(self, path):
        self.path = path
        with zipfile.ZipFile(path) as archive:
            self.videos = sorted(name for name in archive.namelist() if name.endswith(".mp4"))

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        video = self.videos[index]
        with zipfile.ZipFile(self.path) as archive:
            return {"video": archive.read(video), "caption": archive.read(video.replace(".mp4", ".txt")).decode()}

    def info(self, index):
        return probe(self[index]["video"])

    def name(self, index):
        return f"{self.path}: {self.videos[index]}"


def open_zip(folder, split):
    path = Path(folder) / f"{split}.zip"
    return ZippedVideos(path) if path.is_file() else None


def test_a_source(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "zip", open_zip)
    plain, zipped = training_runs.write_folder(tmp_path / "plain", train=4, validation=2), tmp_path / "zipped"
    zipped.mkdir()
    for split in ("train", "validation"):
        with zipfile.ZipFile(zipped / f"{split}.zip", "w") as archive:
            for path in sorted((plain / split).iterdir()):
                archive.write(path, path.name)
    outcomes = []
    for folder in (plain, zipped):
        workdir, source = tmp_path / f"from_{folder.name}", training_runs.source(folder)
        outcomes.append(training_runs.run("vae.py:phase=spatial,runlocal", workdir, source))
    assert [(outcome.code, outcome.stderr) for outcome in outcomes] == [(0, "")] * 2
    assert outcomes[0].metrics == outcomes[1].metrics
    assert math.isfinite(outcomes[1].metrics[0]["loss"])
