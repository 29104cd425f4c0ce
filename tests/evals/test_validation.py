"""What a training is judged by, on clips whose truth is known."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tora_jax.configs import common

from tests import records, training_runs
from tora_jax import sharding
from tora_jax.data import pipeline
from tora_jax.data.precompute.cache import Options, precompute
from tora_jax.data.sprites.clips import make_clip
from tora_jax.data.sprites.dataset import SpritesConfig
from tora_jax.errors import UserError
from tora_jax.evals import validation
from tora_jax.evals.quality import psnr
from tora_jax.io.video import read_video, to_float
from tora_jax.sampling.generate import Result

SCALE = SpritesConfig(name="heldout", side=64, frames=9, fps=8.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    splits = {split: records.clips(count, split, SCALE) for split, count in {"train": 4, "benchmark_one": 6}.items()}
    return records.write(tmp_path_factory.mktemp("heldout") / "clips", splits)


@pytest.fixture
def config(folder, tiny_config):
    bucket = common.bucket(SCALE.frames, SCALE.side, SCALE.side, batch=2)
    data = {**common.training()["data"], "sources": (str(folder),), "buckets": (bucket,), "motion": "sparse"}
    data |= {"tracks": "given", "validation": "benchmark_one", "max_tracks": 3}
    evaluation = {"batches": 2, "clips": 4, "steps": 1, "source": "", "split": "benchmark_one"}
    shared = {"seed": 0, "job": "tora", "data": data, "evaluation": evaluation}
    return {**tiny_config, **shared, "loss": common.vae_loss("joint")}


@pytest.fixture
def open_split(config, tiny_models):
    options = {"seed": 0, "tokenizer": tiny_models.tokenizer, "training": False}
    options["latent_frames"] = tiny_models.vae.latent_frames
    return functools.partial(pipeline.batches, config["data"], "benchmark_one", **options)


MESH = functools.partial(sharding.make_mesh, "")


def test_tora_is_judged_by_its_losses(config, tiny_models, open_split, tmp_path):
    config["evaluation"]["clips"] = 0
    judge = validation.make(config, tiny_models, open_split, MESH(), tmp_path)
    found = judge(tiny_models.params, 1)
    losses = [found[f"loss_at_{t}"] for t in (100, 300, 500, 700, 900)]
    assert found == judge(tiny_models.params, 2)  # the same batches and the same noise, whenever it is asked
    assert found["objective"] == pytest.approx(np.mean(losses))
    # An untrained model gives 0: the loss is that of the velocity itself, x - noise, and so about 1 + E[x^2].
    assert all(loss > 1 for loss in losses)
    assert not list(tmp_path.iterdir())


def test_a_vae_is_judged_by_its_psnr(config, tiny_models, open_split, tmp_path):
    config["job"] = "vae"
    found = validation.make(config, tiny_models, open_split, MESH(), tmp_path)(tiny_models.params, 1)
    assert found.keys() == {"psnr", "psnr_frames", "objective"}
    batches = open_split()
    want = []
    for batch in (next(batches), next(batches)):
        video = to_float(jnp.asarray(batch["video"]))
        made = tiny_models.vae.apply({"params": tiny_models.params["vae"]}, video)
        want.append(psnr(jnp.clip(made, -1, 1), video, span=2).mean())
    assert found["psnr"] == pytest.approx(np.mean(want), rel=1e-4)


def test_latents_are_normalised(config, tiny_models, open_split):
    config["job"] = "vae"
    config["evaluation"]["batches"] = 3
    params = tiny_models.params["vae"]
    params = {**params, **validation.latent_statistics(config, tiny_models, open_split, MESH())(params)}
    encode = jax.jit(functools.partial(tiny_models.vae.apply, {"params": params}, method="encode"))
    videos = [to_float(jnp.asarray(batch["video"])) for batch in open_split()]
    # Draws of an untrained VAE are mostly noise: twenty of each clip average it away.
    latents = np.concatenate([encode(video, jax.random.key(i)) for video in videos for i in range(20)])
    np.testing.assert_allclose(latents.mean((0, 1, 2, 3)), 0, atol=0.05)
    # The width of its noise differs a lot between cells and draws, of which the statistics see one.
    np.testing.assert_allclose(latents.std((0, 1, 2, 3)), 1, atol=0.2)


@pytest.fixture
def perfect(monkeypatch):
    """A generator that gives the clips themselves; with `off`, each the next one's."""
    asked = {"off": 0}

    def generate_batch(models, inputs, settings, *, seeds):
        asked.update(vars(settings), params=dict(models.params))
        clips = [make_clip(i, "benchmark_one", size=64, frames=9) for i in range(6)]
        by_caption = {clip.caption: i for i, clip in enumerate(clips)}
        videos = [clips[(by_caption[each.prompt] + asked["off"]) % 6].video for each in inputs]
        return [Result(video, None, {}) for video in videos]

    monkeypatch.setattr(validation, "generate_batch", generate_batch)
    return asked


def test_sampled_clips(config, tiny_models, perfect, tmp_path):
    sample = validation.sampled(config, tiny_models, tmp_path / "samples")
    good = sample({"tora": "new parameters"}, 20)
    assert good["traj_error"] < 6  # pixels of 512
    assert good["path_error"] < 0.01  # of the width
    assert perfect["params"] == {"tora": "new parameters"}
    expected = {"height": 64, "width": 64, "num_frames": 9, "steps": 1, "fps": 8.0, "guidance": 7.0}
    assert {name: perfect[name] for name in expected} == expected
    names = [f"000020_{i}.mp4" for i in range(4)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == names
    assert read_video(tmp_path / "samples" / names[0])[0].shape == (9, 64, 64, 3)
    perfect["off"] = 1
    bad = sample({}, 40)
    assert bad["traj_error"] > 5 * good["traj_error"]
    assert bad["path_error"] > 5 * good["path_error"]


def test_tracks_of_clips_without_any_follow_the_flow(config, tmp_path):
    clips = training_runs.write_folder(tmp_path / "clips", train=2, validation=3)
    config["data"]["buckets"] = (common.bucket(5, 32, 32, batch=2),)
    config["evaluation"] |= {"source": str(clips), "split": "validation"}
    found = validation.held_out_clips(config)
    assert len(found) == 3  # as many as there are
    for clip in found:
        assert clip.tracks.shape == (1, 5, 2)
        assert np.ptp(clip.tracks, axis=1).max() > 0
        assert clip.colours == ()
        assert clip.caption.startswith("a ")


def test_where_held_out_clips_come_from(config, folder, tiny_models, tmp_path):
    """Precomputed sets hold no videos; what they were made from does."""
    moved = shutil.copytree(folder, tmp_path / "clips")
    options = Options(frames=9, height=64, width=64)
    cached = precompute(tiny_models, moved, tmp_path / "cached", options, progress=False)
    want = validation.held_out_clips(config)
    assert [len(clip.colours) for clip in want] == [1] * 4
    config["data"]["sources"] = (str(cached),)
    for clip, same in zip(validation.held_out_clips(config), want, strict=True):
        np.testing.assert_array_equal(clip.tracks, same.tracks)
    shutil.rmtree(moved)
    with pytest.raises(UserError, match=r"no such folder or file; evaluation.source names the clips"):
        validation.held_out_clips(config)
