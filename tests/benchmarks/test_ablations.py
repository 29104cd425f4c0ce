"""The ablations: which cells there are, motion without a VAE, verdicts, and the command at the least size."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tora_jax.configs import model_sizes
from tora_jax.configs.ablations import base

from benchmarks import ablations
from tests import training_runs
from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.data.sprites.clips import exact_flow, make_clip
from tora_jax.io.files import tuples
from tora_jax.models.motion_fuser import FUSERS
from tora_jax.models.video_vae import VideoVAE


def test_cells():
    cells = ablations.cells()
    names = {cell.name for cell in cells.values()}
    assert len(names) == 9
    assert [cell.name for cell in cells.values()].count("default") == len(ablations.TABLES)
    for name in ablations.TABLES:
        rows = [cell for (of, _), cell in cells.items() if of == name]
        errors = list(ablations.table(name).PAPER.values())
        assert rows[-1].name == "default"
        assert errors == sorted(errors, reverse=True)  # the worst first: `verdict` reads them so
    assert {cell.config()["tora"]["fuser"] for cell in cells.values()} == set(FUSERS)


def test_all_cells_have_one_budget():
    """The same number of steps, the same data; what differs is what the table says."""
    for cell in ablations.cells().values():
        configs = [cell.config(stage) for stage in cell.config()["ablation"]["stages"]]
        assert sum(config["steps"] for config in configs) == base.STEPS
        default = base.make("sparse", False)
        for config in configs:
            assert config["optim"] == tuples(default.optim.to_dict())
            assert config["data"]["buckets"] == tuples(default.to_dict())["data"]["buckets"]


@pytest.mark.parametrize(
    ("table", "arg"), [("motion", "form=vae"), ("fuser", "stage=3"), ("stages", "stages=all"), ("fuser", "place=both")]
)
def test_odd_arguments(table, arg):
    with pytest.raises(ValueError, match=r"there are|it has"):
        ablations.table(table).get_config(arg)


def frames_of(values, side=16):
    """A video whose frame j has the value values[j]."""
    frames = np.reshape(values, (1, -1, 1, 1, 1)).astype(np.float32)
    return jnp.asarray(np.broadcast_to(frames, (1, len(values), side, side, 3)))


def whole(form):
    """Without principal components."""
    vae = model_sizes.small_model()["vae"]
    return ablations.Compression(vae["spatial"], vae["temporal"], form=form, channels=192)


def test_key_frames_and_means():
    """17 frames are 5 latents: the first alone, then fours, of which the third is the middle."""
    values = np.arange(17.0)
    params = {"centre": np.zeros(192, np.float32), "basis": np.eye(192, dtype=np.float32)}
    for form, want in (("key_frames", [0, 3, 7, 11, 15]), ("mean_pooling", [0, 2.5, 6.5, 10.5, 14.5])):
        latents = whole(form).apply({"params": params}, frames_of(values), method="encode")
        assert latents.shape == (1, 5, 2, 2, 192)
        np.testing.assert_allclose(latents, np.broadcast_to(np.reshape(want, (1, 5, 1, 1, 1)), latents.shape))


def test_pixels_of_a_cell_become_its_channels():
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 1, 16, 16, 3)).astype(np.float32)
    params = {"centre": np.zeros(192, np.float32), "basis": np.eye(192, dtype=np.float32)}
    latents = whole("key_frames").apply({"params": params}, jnp.asarray(picture), method="encode")
    np.testing.assert_array_equal(latents[0, 0, 1, 0].reshape(8, 8, 3), picture[0, 0, 8:, :8])


def test_the_vaes_are_those_that_ship():
    """So that the command works on the weights that it takes by default."""
    config = tuples(base.make("sparse", False).to_dict())
    shipped = release.read_config(release.DEMO)
    assert (config["vae"], config["motion_vae"]) == (shipped["vae"], shipped["motion_vae"])
    assert config["tora"]["stdit"]["in_channels"] == shipped["tora"]["stdit"]["in_channels"]


def test_principal_components():
    """Of variance 1, and a better code than any other eight directions."""
    like = VideoVAE(**model_sizes.small_model()["vae"])
    model, params = ablations.fit("mean_pooling", like, channels=8, side=32, frames=9)
    assert params["basis"].shape == (192, 8)
    clips = [make_clip(i, "train", size=32, frames=9) for i in range(ablations.FITTED)]
    maps = [ablations.motion_maps.flow_to_color(exact_flow(clip.labels, clip.tracks)) for clip in clips]
    maps += [
        ablations.motion_maps.flow_to_color(ablations.motion_maps.displacement_maps(c.tracks, 32, 32, c.visible))
        for c in clips
    ]
    found = model.apply({"params": params}, jnp.asarray(np.stack(maps)), method="moments").latent
    np.testing.assert_allclose(np.std(found.mean, (0, 1, 2, 3)), 1, atol=0.02)
    assert np.exp(0.5 * np.asarray(found.logvar)).max() == 0


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([[5, 6], [3, 4], [1, 2]], "holds"),
        ([[5, 6], [3, 5.5], [1, 2]], "not decided"),
        ([[5, 6], [7, 8], [1, 2]], "does not hold"),
        ([[5, 6], [5, 7], [8, 9]], "does not hold"),
        ([[2], [1]], "holds"),
    ],
)
def test_verdicts(rows, want):
    assert ablations.verdict(rows) == want


def test_markdown():
    def figures(error):
        return {"traj_error": error, "path_error_percent": error / 5, "held_out_loss": 0.4, "seconds": {"train": 100.0}}

    errors = {cell.name: 20 + 5 * i for i, cell in enumerate(ablations.cells().values())} | {"default": 10}
    results = {name: {seed: figures(error + seed) for seed in range(3)} for name, error in errors.items()}
    text = ablations.markdown(results, range(3))
    assert "| adaptive norm | 3 of 3 | 11.00 (10.00 to 12.00) |" in text
    assert "27 runs, 100 s each" in text
    orderings = ablations.summary(results)
    # Later rows of a table got larger errors, but for its last.
    assert orderings["placement"] == {"traj_error": "holds", "path_error_percent": "holds"}
    assert orderings["fuser"]["traj_error"] == "does not hold"
    del results["stages.stages=dense"]
    assert ablations.summary(results)["stages"]["traj_error"] is None
    assert "not all trained by TrajError" in ablations.markdown(results, range(3))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights of the least size."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    models = assembly.load(model_sizes.tiny())
    release.save(folder, model_sizes.tiny(), models.params, assembly.tokenizer_path(None), "Random numbers.\n")
    return folder


@pytest.mark.slow
def test_the_command(weights, tmp_path, monkeypatch, capsys):
    """Two cells and a stop between them: what is done is not trained again."""
    trained = []

    def train(*flags):
        trained.append(flags)
        argv = dict(flag.split("=", 1) for flag in flags if "=" in flag)
        config = argv.pop("--config").split("/configs/")[1]
        others = [f"{key}={value}" for key, value in argv.items() if key != "--workdir"]
        booleans = [flag for flag in flags if "=" not in flag]
        outcome = training_runs.run(config, argv["--workdir"], *booleans, *others)
        assert outcome.code == 0, outcome.stderr

    monkeypatch.setattr(ablations, "train", train)
    argv = [
        "ablations",
        f"--out={tmp_path}",
        f"--weights={weights}",
        "--runlocal",
        "--train=6",
        "--clips=2",
        "--seeds=1",
    ]
    command_line.run(ablations.main, [*argv, "--cells=default"])
    assert len(trained) == 3  # the base, dense, sparse
    cells = "--cells=default,motion.form=key_frames,trajectory.motion=none"
    monkeypatch.setattr(ablations.base, "STAGES", {**base.STAGES, "both": ("sparse",)})
    command_line.run(ablations.main, [*argv, cells])
    assert len(trained) == 5
    results = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert results.keys() == {"default", "motion.form=key_frames", "trajectory.motion=none"}
    for cell in results.values():
        assert np.isfinite([cell["0"][name] for name in (*ablations.METRICS, "held_out_loss")]).all()
    table = (tmp_path / "table.md").read_text()
    assert "| key frames | 1 of 1 |" in table
    assert "| cross attention | 0 of 1 |" in table
    assert not (tmp_path / "cells/default/0/sparse").exists()
    assert {path.name for path in (tmp_path / "caches").iterdir()} == {
        "motion_vae_dense",
        "motion_vae_sparse",
        "key_frames_sparse",
    }
    with pytest.raises(SystemExit, match="2"):
        command_line.run(ablations.main, [*argv, "--cells=all"])
    assert "no cell 'all'; there are" in capsys.readouterr().err


def test_a_run_that_stops(weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablations, "ROOT", tmp_path)  # where there is no train.py
    monkeypatch.setattr(ablations.Run, "cache", lambda self, motion, stage: tmp_path)
    argv = ["ablations", f"--out={tmp_path}", f"--weights={weights}", "--runlocal", "--seeds=1", "--cells=default"]
    with pytest.raises(SystemExit, match="2"):
        command_line.run(ablations.main, argv)
    assert "train.py stopped with exit code 2; start again to go on" in capsys.readouterr().err
    for other, name in (("--clips=2", "--clips (32)"), ("--steps=3", "--steps (None)")):
        with pytest.raises(SystemExit, match="2"):
            command_line.run(ablations.main, [*argv, other])
        assert f"was made with another {name}; choose another --out" in capsys.readouterr().err
