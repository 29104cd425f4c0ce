"""What a person asks for: settings, scores, trajectories and visual conditions in all their forms."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tora_jax
from tora_jax.backbones import assembly
from tora_jax.conditioning import trajectory
from tora_jax.errors import UserError
from tora_jax.sampling import __main__ as command
from tora_jax.sampling import request, segments
from tora_jax.sampling.generate import Result

SECTION = {"height": 32, "width": 32, "num_frames": 5, "fps": 8.0, "steps": 1, "guidance": 1.0}


def make(**given):
    return request.make(SECTION, given)


def moving(count, value=0):
    return np.stack([np.full((8, 8, 3), value + 10 * i, np.uint8) for i in range(count)])


def test_defaults_are_the_sections():
    wanted = make()
    assert wanted.settings.num_frames == wanted.settings.segment == 5
    assert wanted.settings.trajectory == ("arc",)
    assert wanted.tracks.shape == (1, 5, 2)
    assert wanted.read() == {}


def test_scores_end_the_prompt():
    wanted = make(prompt=["a boat.", "a ship. motion score: 3.0."], motion_score=8, camera_motion="pan left")
    assert wanted.prompts == (
        "a boat. motion score: 8.0. camera motion: pan left.",
        "a ship. motion score: 3.0. camera motion: pan left.",
    )
    assert make(prompt="a boat.", aesthetic_score=6.5).prompts == ("a boat. aesthetic score: 6.5.",)


def test_trajectories_in_all_forms(tmp_path):
    path = tmp_path / "path.txt"
    path.write_text("0,0\n256,128\n")
    points = [[0, 0], [256, 128]]
    for sources in (str(path), path, [path], points, [points], {"canvas": [256, 256], "trajectories": [points]}):
        (found,) = make(trajectories=sources).trajectories
        np.testing.assert_allclose(found, [[0, 0], [1, 0.5]])
    assert len(make(trajectories=["circle", str(path)]).trajectories) == 2
    for none in (None, [], ()):
        wanted = make(trajectories=none)
        assert wanted.trajectories is None
        assert wanted.tracks is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stepz": 3}, "did you mean steps"),
        ({"steps": "many"}, "steps is 'many'"),
        ({"steps": True}, "steps is True"),
        ({"steps": 0}, "at least 1"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, "prompt is"),
        ({"prompt": ["a", 3]}, "prompt is"),
        ({"motion_score": "fast"}, "motion_score is 'fast'"),
        ({"prompt": "a" * 10_001}, "a prompt has 10001 letters"),
        ({"negative_prompt": "a" * 10**6}, "a prompt has 1000000 letters"),
        ({"aesthetic_score": float("nan")}, "aesthetic_score is nan"),
        ({"motion_score": 10**400}, "motion_score is 1000"),
        ({"fps": 10**400}, "fps is 1000"),
        ({"camera_motion": 3}, "camera_motion is 3"),
        ({"seed": -1}, "seed is -1"),
        ({"height": 32}, "belong together"),
        ({"trajectories": 3}, "list of points"),
        ({"trajectories": ["absent"]}, "absent: no such trajectory"),
        ({"trajectories": [[1, 2], "circle"]}, "point"),
        ({"conditions": "0=a.png"}, "should be a list"),
        ({"conditions": [3]}, "write frame="),
        ({"conditions": ["a.png"]}, "write frame="),
        ({"conditions": ["first=a.png"]}, "write frame="),
        ({"conditions": ["0="]}, "write frame="),
        ({"conditions": ["0=a.png:2"]}, "edit ratio is 2"),
        ({"conditions": ["5=a.png"]}, "frames 0 to 4"),
        ({"conditions": ["-6=a.png"]}, "frames 0 to 4"),
        ({"conditions": ["4=a.png", "-1=b.png"]}, "has a picture already"),
    ],
)
def test_mistakes(given, message):
    with pytest.raises(UserError, match=message) as error:
        make(**given)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def models(tiny_release):
    return tora_jax.load(tiny_release)


class TestApi:
    """`from tora_jax import load, generate`."""

    def test_three_lines(self, models):
        result = tora_jax.generate(models)
        assert result.video.shape == (5, 32, 48, 3)
        assert result.motion is None

    def test_everything(self, models, tmp_path):
        path = tmp_path / "still.png"
        Image.fromarray(moving(1)[0]).save(path)
        done = []
        result = tora_jax.generate(
            models,
            ["a star.", "a heart."],
            "circle",
            {0: (path, 0.5), -1: moving(2)},
            num_frames=7,
            segment=6,
            overlap=1,
            steps=1,
            seed=3,
            progress=lambda step, clean: done.append(step),
        )
        assert result.video.shape == result.motion.shape == (7, 32, 48, 3)
        assert done == [1, 2]
        assert result.seconds.keys() >= {"text", "motion", "images", "sample", "decode"}

    def test_mistakes(self, models):
        with pytest.raises(UserError, match="no setting 'frames'"):
            tora_jax.generate(models, frames=3)
        with pytest.raises(UserError, match="give uint8"):
            tora_jax.generate(models, conditions={0: np.zeros((8, 8, 3))})

    def test_without_arguments_it_is_the_small_model(self):
        models = tora_jax.load()
        assert Path(models.origin).name == "demo"
        assert models.sampling["num_frames"] == 17
        assert len(trajectory.load(trajectory.presets()["circle"])) == 1

    def test_the_import_is_cheap(self):
        code = "import sys, tora_jax; sys.exit(any(m in sys.modules for m in ('jax', 'numpy', 'flax')))"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def seen(monkeypatch, models):
    """In place of the model: the tracks of all that is to be made."""
    tracks = []

    def generate_pieces(_, inputs, settings, **options):
        tracks.extend(each.tracks for each in inputs)
        video = np.zeros((settings.num_frames, settings.height, settings.width, 3), np.uint8)
        yield [Result(video, video, {})] * len(inputs)

    monkeypatch.setattr(segments, "generate_pieces", generate_pieces)
    monkeypatch.setattr(assembly, "load", lambda *_: models)
    return tracks


def test_a_path_stays_on_the_picture_in_all_ways(models, seen, tiny_release, tmp_path, monkeypatch):
    """Flags, batches and Python: a photo of which a third is cropped away above and below."""
    monkeypatch.chdir(tmp_path)
    photo = np.zeros((96, 48, 3), np.uint8)
    Image.fromarray(photo).save("photo.png")
    Path("path.json").write_text("[[12, 40], [36, 56]]")
    want = np.stack([np.linspace(0.25, 0.75, 5), (np.linspace(40, 56, 5) - 32) / 32], -1)
    said = {"trajectory_canvas": "48x96"}
    tora_jax.generate(models, None, "path.json", {0: photo}, **said)
    tora_jax.generate(models, None, [[12, 40], [36, 56]], {-1: "photo.png"}, trajectory_canvas="image")
    flags = ["sample.py", f"--weights={tiny_release}", "--quiet", "--trajectory_canvas=48x96"]
    command.sample([*flags, "--trajectory=path.json", "--image=photo.png"])
    command.sample([*flags, "--trajectory=path.json", "--last_image=photo.png"])
    line = {"trajectories": ["path.json"], "conditions": ["2=photo.png"], "name": "line", **said}
    Path("videos.jsonl").write_text(json.dumps(line))
    command.sample([*flags, "--batch=videos.jsonl", "--out=many", "--mesh=data=1"])
    assert len(seen) == 5
    for tracks in seen:
        np.testing.assert_allclose(tracks, want[None], atol=1e-6)
    for name in ("outputs/tora.json", "many/line.json"):
        np.testing.assert_allclose(json.loads(Path(name).read_text())["tracks"], want[None], atol=1e-6)
