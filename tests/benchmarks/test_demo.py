"""The demo's benchmark: its figures for perfect videos, and that it runs on tiny random weights."""

import json
from importlib import resources

import numpy as np
import pytest

from benchmarks import demo
from tora_jax import command_line
from tora_jax.checkpoints import release
from tora_jax.data.sprites.clips import make_clip
from tora_jax.errors import UserError
from tora_jax.io.video import read_video
from tora_jax.sampling.generate import Result


@pytest.fixture(scope="module")
def weights(tiny_config, tiny_models, tmp_path_factory):
    """Tiny random weights whose videos are square."""
    folder = tmp_path_factory.mktemp("demo") / "weights"
    sampling = {**tiny_config["sampling"], "height": 32, "width": 32, "steps": 2, "guidance": 2.0}
    tokenizer = resources.files("tora_jax").joinpath("assets/tokenizer.model")
    release.save(folder, {**tiny_config, "sampling": sampling}, tiny_models.params, tokenizer, "Random numbers.\n")
    return folder


def numbers(found):
    return [n for item in found.values() for n in (numbers(item) if isinstance(item, dict) else [item])]


def test_every_part_gives_numbers(weights, tmp_path):
    found = demo.run(weights, clips=3, batch=2, save=tmp_path / "videos", trajectory_guidance=2.0)
    assert found["settings"]["trajectory_guidance"] == 2.0
    assert found["settings"]["steps"] == 2
    for part in demo.PARTS:
        assert np.isfinite(numbers(found[part])).all()
        assert found["seconds"][part] >= 0
    assert found["path"] == found["no_trajectory"]  # untrained fusers change nothing
    saved = sorted(path.name for path in (tmp_path / "videos").iterdir())
    kinds = ("benchmark_one", "benchmark_one_free", "benchmark_one_image", "benchmark_two")
    assert saved == sorted(f"{kind}_{i:02}.mp4" for kind in kinds for i in range(3))
    assert read_video(tmp_path / "videos" / saved[0])[0].shape == (5, 32, 32, 3)


@pytest.fixture
def perfect(monkeypatch):
    """A generator that gives back the benchmark's own clips; returns what it was asked for."""
    asked = []

    def generate_batch(models, inputs, settings, *, seeds):
        split = "benchmark_two" if " and " in inputs[0].prompt else "benchmark_one"
        clips = [make_clip(seed, split) for seed in seeds]
        asked.append((split, list(seeds), inputs[0].tracks is not None, bool(inputs[0].images)))
        for each, clip in zip(inputs, clips, strict=True):
            assert each.prompt == clip.caption
            if each.tracks is not None:
                np.testing.assert_array_equal(each.tracks, clip.tracks)
            if each.images:
                np.testing.assert_array_equal(each.images[0], clip.video[0])
        still = [np.repeat(clip.video[:1], 17, 0) for clip in clips]
        return [
            Result(first if each.tracks is None else clip.video, None, {})
            for each, clip, first in zip(inputs, clips, still, strict=True)
        ]

    monkeypatch.setattr(demo, "generate_batch", generate_batch)
    return asked


def test_perfect_videos(weights, perfect):
    parts = ("path", "no_trajectory", "two", "text", "image")
    found = demo.run(weights, parts, clips=5, batch=3, height=128, width=128, num_frames=17)
    assert found.keys() == {"weights", "settings", "clips", "version", *parts, "seconds", "machine"}
    for part in ("path", "two", "image"):
        assert found[part]["error_percent"] < 0.2
        assert found[part]["found"] == 1
        assert found[part]["tracker"]["l1"] < 0.3
        assert found[part]["tracker"]["l1_percent"] == pytest.approx(found[part]["tracker"]["l1"] / 1.28)
    assert found["no_trajectory"]["error_percent"] > 10
    assert found["text"] == {"colour": 1, "shape": 1}
    assert found["image"]["psnr_db"] > 90
    assert found["image"]["psnr_of_vae_db"] < 30  # of random weights
    # Each clip once, with its own seed; the last batch is filled up, and `text` looks at the videos of `path`.
    rows = [[0, 1, 2], [3, 4, 0]]
    kinds = [("benchmark_one", True, False), ("benchmark_one", False, False)]
    kinds += [("benchmark_two", True, False), ("benchmark_one", True, True)]
    assert perfect == [(split, seeds, *given) for split, *given in kinds for seeds in rows]


class TestPooling:
    def test_what_is_linear_comes_back(self, tiny_models):
        """Away from the ends, where interpolation has nothing to go by."""
        y, x = np.mgrid[:48, :64]
        video = np.stack([2 * x + y + np.full_like(x, 3 * t) for t in range(9)])[..., None].repeat(3, -1)
        got = demo.pooled(video.astype(np.uint8), tiny_models.vae).astype(int)
        np.testing.assert_array_equal(got[:7, 4:-4, 4:-4], video[:7, 4:-4, 4:-4])

    def test_one_number_for_each_cell(self, tiny_models):
        noise = np.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), np.uint8)
        got = demo.pooled(noise, tiny_models.vae)
        assert got.shape == noise.shape
        assert np.abs(got[0].mean() - noise[0].mean()) < 3
        assert got[1:].std() < 0.3 * noise.std()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("path", "paths")}, "no part 'paths'"),
        ({"clips": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"width": 48}, "square"),
        ({"weights": "nowhere"}, "no such folder"),
    ],
)
def test_mistakes(weights, changes, message):
    with pytest.raises(UserError, match=message):
        demo.run(**{"weights": weights, "parts": ("measure",), "clips": 1, **changes})


def test_the_command(weights, capsys):
    options = [f"--weights={weights}", "--parts=measure", "--limit=2", "--steps=7"]
    command_line.run(demo.main, ["demo", *options])
    found = json.loads(capsys.readouterr().out)
    assert found["clips"] == 2
    assert found["settings"]["steps"] == 7
    assert found["measure"]["benchmark_one"]["found"] > 0
    with pytest.raises(SystemExit, match="2"):
        command_line.run(demo.main, ["demo", "--weights=nowhere"])
    assert "demo: error: nowhere" in capsys.readouterr().err


def test_json_has_no_nan():
    assert demo.rounded({"a": float("nan"), "b": {"c": 1.23456, "d": 3, "e": "x"}}) == {
        "a": None,
        "b": {"c": 1.2346, "d": 3, "e": "x"},
    }
