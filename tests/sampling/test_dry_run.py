"""--dry_run: what was read is said, written and drawn, and no model is loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tora_jax.backbones import assembly
from tora_jax.conditioning import trajectory
from tora_jax.sampling import __main__ as sampling


@pytest.fixture
def dry_run(tiny_release, tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder with a photo: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assembly, "load", lambda *_: pytest.fail("the model was loaded"))
    photo = np.zeros((90, 60, 3), np.uint8)
    photo[48:56, 17:25] = 255
    Image.fromarray(photo).save("photo.png")
    Path("path.json").write_text('{"canvas": [60, 90], "trajectories": [[[21, 52], [40, 60]]]}')

    def run(*arguments):
        code = 0
        try:
            sampling.sample(["sample.py", f"--weights={tiny_release}", "--dry_run", *arguments])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def files():
    return {str(path) for path in Path().rglob("*") if path.is_file()} - {"photo.png", "path.json"}


def test_a_request(dry_run):
    code, said, wrong = dry_run("--image=photo.png", "--trajectory=path.json", "--trajectory=circle")
    assert (code, wrong) == (0, "")
    assert files() == {"outputs/tora.json", "outputs/tora_trajectory.png"}
    assert said.splitlines() == [
        "path.json: 1 path of 2 points on 60x90 of photo.png, 5 frames; from JSON",
        "circle: a preset",
        "photo.png: 60x90, for frame 0; scaled to 48x32, 56% of it cropped away",
    ]
    report = json.loads(Path("outputs/tora.json").read_text())
    assert report["dry_run"] is True
    assert report["read"] == said.splitlines()
    tracks = np.array(report["tracks"])
    assert tracks.shape == (2, 5, 2)
    circle = trajectory.tracks(trajectory.read("circle"), 5)
    np.testing.assert_allclose(tracks[1], circle[0], atol=1e-6)
    height, width = 72, 48  # of the photo that covers 48x32; 20 rows above are cropped away
    np.testing.assert_allclose(tracks[0, 0], [21 / 60 * width / 48, (52 / 90 * height - 20) / 32], atol=1e-6)
    drawn = np.asarray(Image.open("outputs/tora_trajectory.png"))
    assert drawn.shape == (32, 48, 3)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 2  # the paths have colours, the photo none


def test_without_a_picture_or_a_path(dry_run):
    assert dry_run("--no_trajectory", "--out=deep/er/x.gif", "--quiet") == (0, "", "")
    assert files() == {"deep/er/x.json", "deep/er/x_trajectory.png"}
    assert "tracks" not in json.loads(Path("deep/er/x.json").read_text())


@pytest.mark.filterwarnings("default")
def test_lost_words_are_said(dry_run):
    code, _, wrong = dry_run("--no_trajectory", "--prompt=红色的星星", "--prompt=a boat " + "by the sea " * 9)
    assert code == 0
    report = json.loads(Path("outputs/tora.json").read_text())
    assert wrong.splitlines() == [f"sample.py: warning: {each}" for each in report["lost"]]
    empty, cut = report["lost"]
    assert empty.startswith("prompt 1 is empty after cleaning: '红色的星星' is lost")
    assert cut.startswith("prompt 2 is too long for the text encoder: 'by the sea")
    Path("all.jsonl").write_text('{"trajectories": null, "negative_prompt": "模糊"}', "utf-8")
    code, _, wrong = dry_run("--batch=all.jsonl", "--out=made")
    assert (code, wrong.count("\n")) == (0, 1)
    assert "line 1: the negative prompt is empty after cleaning" in wrong
    (told,) = json.loads(Path("made/00001.json").read_text())["lost"]
    assert wrong.strip().endswith(told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--trajectory=absent.txt", "absent.txt"),
        ("--condition=0=absent.png --trajectory=circle", "absent.png"),
        ("--height=8 --width=8", "8x8 is too small"),
        ("--image=outputs/tora_trajectory.png", "overwrite"),
        ("--config.tora.stdit.qk_nrm=False", "qk_norm"),
    ],
)
def test_mistakes(dry_run, arguments, message):
    Path("outputs").mkdir()
    Path("outputs/tora_trajectory.png").write_bytes(Path("photo.png").read_bytes())
    code, _, wrong = dry_run(*arguments.split())
    assert code == 2
    assert wrong.count("\n") == 1
    assert message in wrong
    assert files() == {"outputs/tora_trajectory.png"}


def test_a_batch(dry_run):
    lines = [
        {"trajectories": "path.json", "conditions": ["0=photo.png"], "name": "photo"},
        {"stepz": 3},
        {"trajectories": [[0.1, 0.2], [0.5, 0.75]], "trajectory_canvas": [1, 1]},
        {"conditions": ["0=absent.png"]},
        {"name": "made"},
    ]
    Path("videos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("many").mkdir()
    for name in ("made.mp4", "made.json"):
        Path("many", name).write_text("{}")
    code, said, wrong = dry_run("--batch=videos.jsonl", "--out=many")
    assert (code, wrong) == (0, "")
    for number, what in enumerate(["photo.png", "did you mean steps", "on 1x1", "absent.png", "is there"], 1):
        assert any(line.startswith(f"line {number}: ") and what in line for line in said.splitlines()), said
    assert files() - {"videos.jsonl"} == {
        *(f"many/{name}{end}" for name in ("photo", "00003") for end in (".json", "_trajectory.png")),
        *("many/00002.json", "many/00004.json", "many/made.json", "many/made.mp4"),
    }
    assert Path("many/made.json").read_text() == "{}"
    assert "did you mean" in json.loads(Path("many/00002.json").read_text())["error"]
    np.testing.assert_allclose(
        json.loads(Path("many/00003.json").read_text())["tracks"][0][::4], [[0.1, 0.2], [0.5, 0.75]], atol=1e-6
    )
