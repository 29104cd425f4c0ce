"""What a fork adds by one line to a table works through the public functions, without any other change."""

import dataclasses
import math
import zipfile
from pathlib import Path
from typing import ClassVar

import einops
import jax
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
from tora_jax import generate, load
from tora_jax.checkpoints import release
from tora_jax.data.sources import SOURCES, open_source
from tora_jax.diffusion.rectified_flow import RectifiedFlow
from tora_jax.diffusion.solvers import SOLVERS
from tora_jax.io.video import probe
from tora_jax.models.motion_fuser import FUSERS

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
        self.path, self.passed_over = path, {}
        with zipfile.ZipFile(path) as archive:
            self.videos = sorted(name for name in archive.namelist() if name.endswith(".mp4"))

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, index):
        video = self.videos[index]
        with zipfile.ZipFile(self.path) as archive:
            caption = archive.read(video.replace(".mp4", ".txt")).decode().strip()
            return {"video": archive.read(video), "caption": caption}

    def info(self, index):
        return probe(self[index]["video"])

    def caption(self, index):
        return self[index]["caption"]

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
    want, found = (open_source(folder, "train") for folder in (plain, zipped))
    assert [found[i]["video"] for i in range(4)] == [Path(want[i]["video"]).read_bytes() for i in range(4)]
    assert [found[i]["caption"] for i in range(4)] == [want[i]["caption"] for i in range(4)]
    outcome = training_runs.run("vae.py:phase=spatial,runlocal", tmp_path / "run", training_runs.source(zipped))
    assert (outcome.code, outcome.stderr) == (0, "")
    assert math.isfinite(outcome.metrics[0]["loss"])


# ---------------------------------------------------------------- a solver, a fuser


@dataclasses.dataclass(frozen=True)
class Heavy:
    """Euler's steps with the velocity of the step before mixed in, and a little noise."""

    process: ClassVar[type] = RectifiedFlow
    noisy: ClassVar[bool] = True
    mass: float = 0.1

    def init(self, x):
        return jnp.zeros_like(x)

    def coefficients(self, process, times, step):
        return {"mass": np.float32(self.mass if step else 0), "spread": np.float32(0.01 * (times[step + 2] > 0))}

    def step(self, process, x, prediction, at, memory):
        velocity = prediction + at.coefficients["mass"] * (memory - prediction)
        end = x + velocity * (at.times[1] - at.times[2]) / 1000
        return end + at.coefficients["spread"] * at.noise, velocity

    def clean(self, process, x, end, at, memory):
        return process.clean(x, memory, jnp.broadcast_to(at.times[1], len(x)))


def test_a_solver(tiny_models, monkeypatch):
    """It samples, alone and with steps that leave something out, and shows where it goes."""
    monkeypatch.setitem(SOLVERS, "heavy", Heavy())
    settings = {"num_frames": 5, "height": 32, "width": 32, "steps": 3, "trajectories": "circle"}
    shown = []
    made = generate(tiny_models, solver="heavy", **settings, progress=lambda step, clean: shown.append(clean()))
    assert np.isfinite(made.latents).all()
    assert (made.latents != generate(tiny_models, **settings).latents).any()
    np.testing.assert_allclose(shown[-1][0], made.latents, atol=1e-5)
    faster = generate(tiny_models, solver="heavy", guidance_every=2, cache_every=2, **settings)
    assert np.isfinite(faster.latents).all()


class Gate(nn.Module):
    """h = h (1 + gate(f)), one number for each token."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, hidden, features):
        gate = nn.Dense(1, kernel_init=nn.initializers.zeros, dtype=self.dtype, name="gate")(features)
        repeats = hidden.shape[0] // features.shape[0]
        return hidden * (1 + einops.repeat(gate, "b t h w c -> (r b) t (h w) c", r=repeats))


def test_a_fuser(tiny_config, monkeypatch):
    """Untrained it changes nothing; with weights the trajectory changes the video."""
    monkeypatch.setitem(FUSERS, "gate", Gate)
    models = load(config={**tiny_config, "tora": {**tiny_config["tora"], "fuser": "gate"}})
    params = models.params["tora"]
    assert params["stdit"]["blocks"]["temporal_fuser"]["gate"]["kernel"].shape == (1, 8, 1)
    rng = np.random.default_rng(0)
    stirred = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params)
    models = dataclasses.replace(models, params={**models.params, "tora": stirred})
    settings = {"num_frames": 5, "height": 32, "width": 32, "steps": 2}
    moved, plain = (generate(models, trajectories=path, **settings).latents for path in ("circle", None))
    assert np.isfinite(moved).all()
    assert (moved != plain).any()
