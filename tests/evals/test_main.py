"""The evaluation's command: benchmarks, what it leaves, and that nothing is made twice, wherever it was stopped."""

import csv
import json
import re
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image
from tora_jax.configs import eval as eval_config
from tora_jax.configs import sampling

from tests import odd_videos
from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.data.sprites.clips import make_clip
from tora_jax.errors import UserError
from tora_jax.evals import __main__ as evals
from tora_jax.evals import fvd, metrics, report, tasks
from tora_jax.io.files import tuples
from tora_jax.io.video import read_video, write_video
from tora_jax.sampling.generate import Result

CELLS = ((5, 32, True), (9, 48, True), (9, 48, False))


@pytest.fixture
def config():
    config = eval_config.get_config("suite=demo").to_dict()
    config["cells"] = tuple(eval_config.cell(frames, side, side, 8.0, free) for frames, side, free in CELLS)
    config["benchmark"]["clips"], config["batch"] = 5, 2
    return tuples(config)


@pytest.fixture
def perfect(monkeypatch):
    """In the model's place: it gives the true clips, and tells what it was asked for."""
    asked = []

    def generate_batch(models, inputs, settings, *, seeds):
        size = settings.height, settings.num_frames, settings.fps
        clips = [make_clip(i, "benchmark_one", 0, *size) for i in seeds]
        assert [clip.caption for clip in clips] == [each.prompt for each in inputs]
        asked.extend((settings.num_frames, inputs[0].tracks is not None, i) for i in seeds)
        return [Result(clip.video, None, {}) for clip in clips]

    monkeypatch.setattr(evals, "generate_batch", generate_batch)
    monkeypatch.setattr(evals.assembly, "load", lambda weights: assembly.outline(release.read_config(weights), weights))
    return asked


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def test_what_it_leaves(config, perfect, tmp_path, capsys):
    results, records = evals.evaluate(config, release.DEMO, tmp_path)
    report.write(tmp_path, results, records)
    evals.write_page(tmp_path, tmp_path / "page", results, records, "python -m tora_jax.evals --out DIR")
    assert capsys.readouterr().err.count("is left out: needs the weights of") == 2
    names = ["5x32x32_8fps", "9x48x48_8fps", "9x48x48_8fps_free"]
    assert [cell["name"] for cell in results["cells"]] == names == list(records)
    for cell in results["cells"]:
        assert cell["clips"] == 5
        assert cell["path_error_percent"] < 3
        assert cell["found"] > 0.9
        assert "fvd" not in cell
        assert "clipsim" not in cell
    assert results["cells"][1]["traj_error"] < 20  # pixels of 512, from clips of 48

    assert json.loads((tmp_path / "results.json").read_text())["cells"][0]["name"] == names[0]
    rows = list(csv.DictReader((tmp_path / "clips.csv").read_text().splitlines()))
    assert [row["cell"] for row in rows] == sorted(names * 5)
    assert float(rows[7]["traj_error"]) == records[names[1]][2]["metrics"]["traj_error"]
    assert len(list(csv.DictReader((tmp_path / "cells.csv").read_text().splitlines()))) == 3

    text = (tmp_path / "table.md").read_text()
    assert "| 9 frames, 48x48, 8 fps, no trajectory | 5 |" in text
    assert "| Tora | 128 | 494 | 11.72 |" in text
    assert "FVD is left out: needs the weights of I3D" in text
    assert "CLIPSIM |" not in text

    page = (tmp_path / "index.html").read_text()
    videos = re.findall(r'video src="([^"]+)"', page)
    assert len(videos) == 15
    assert all((tmp_path / name).is_file() for name in videos)
    assert page.count("<polyline class=given") == page.count("<polyline class=tracked") == 15

    readme = (tmp_path / "page/README.md").read_text()
    for file in re.findall(r"!\[.*\]\((.+)\)", readme):
        assert (tmp_path / "page" / file).stat().st_size < 100_000
    assert "\npython -m tora_jax.evals --out DIR\n" in readme
    with Image.open(tmp_path / "page/9x48x48_8fps.webp") as sheet:
        assert sheet.size == (6 * 48, 4 * 48)


@pytest.mark.parametrize("moment", ["before the first", "between videos", "between video and record", "later"])
def test_stopped_and_gone_on_with(config, perfect, tmp_path, monkeypatch, moment):
    """No clip is made twice, and none is missing."""
    whole, _ = evals.evaluate(config, release.DEMO, tmp_path / "whole")
    perfect.clear()
    calls = {"write_video": 0, "measured": 0}
    stop = {"before the first": (1, 0), "between videos": (2, 0), "between video and record": (0, 1), "later": (0, 12)}
    video, measured = stop[moment]
    write, one = evals.write_video, metrics.Metrics.__call__

    def write_video(*args):
        calls["write_video"] += 1
        if calls["write_video"] == video:
            raise KeyboardInterrupt
        write(*args)

    def measure(*args, **named):
        calls["measured"] += 1
        if calls["measured"] == measured:
            raise KeyboardInterrupt
        return one(*args, **named)

    monkeypatch.setattr(evals, "write_video", write_video)
    monkeypatch.setattr(metrics.Metrics, "__call__", measure)
    with pytest.raises(KeyboardInterrupt):
        evals.evaluate(config, release.DEMO, tmp_path / "stopped")
    kept = {path.relative_to(tmp_path / "stopped") for path in (tmp_path / "stopped").rglob("*.mp4")}
    before = list(perfect)
    results, records = evals.evaluate(config, release.DEMO, tmp_path / "stopped")
    assert results["cells"] == whole["cells"]
    assert all((tmp_path / "stopped" / r["video"]).is_file() for found in records.values() for r in found)
    made = perfect[len(before) :]
    assert len(made) == len(set(made)) == 15 - len(kept)
    finished = len(perfect)
    again, _ = evals.evaluate(config, release.DEMO, tmp_path / "stopped")
    assert again["cells"] == whole["cells"]
    assert len(perfect) == finished


def test_more_clips_and_other_measures(config, perfect, tmp_path):
    """A run grows; other pixels of TrajError are measured anew on the same videos."""
    evals.evaluate({**config, "benchmark": {**config["benchmark"], "clips": 3}}, release.DEMO, tmp_path)
    first, _ = evals.evaluate(config, release.DEMO, tmp_path)
    assert len(perfect) == len(set(perfect)) == 15
    half = {**config["measures"], "size": (256, 256)}
    second, _ = evals.evaluate({**config, "measures": half}, release.DEMO, tmp_path)
    assert len(perfect) == 15
    for before, after in zip(first["cells"], second["cells"], strict=True):
        assert after["traj_error"] == pytest.approx(before["traj_error"] / 2, rel=1e-6)


def test_videos_that_are_there(config, perfect, tmp_path):
    config["videos"] = "truth"
    results, _ = evals.evaluate(config, "not read", tmp_path / "truth")
    assert not perfect
    for cell in results["cells"]:
        assert cell["psnr"] > 24  # what the mp4 costs, half the colour's pixels for one
        assert cell["ssim"] > 0.9
    config["videos"] = str(tmp_path / "truth")
    again, _ = evals.evaluate(config, "not read", tmp_path / "again")
    assert again["cells"] == results["cells"]
    (tmp_path / "truth/5x32x32_8fps/benchmark_one_0003.mp4").unlink()
    with pytest.raises(UserError, match=r"has neither 5x32x32_8fps/benchmark_one_0003\.mp4 nor benchmark"):
        evals.evaluate(config, "not read", tmp_path / "third")


def test_videos_that_are_stored_mirrored(config, tmp_path):
    """And say so: they are measured as players show them."""
    config |= {"videos": "truth", "cells": config["cells"][:1]}
    results, _ = evals.evaluate(config, "not read", tmp_path / "truth")
    for path in (tmp_path / "truth").glob("*/*.mp4"):
        write_video(path, read_video(path)[0][:, :, ::-1], 8.0)
        odd_videos.set_matrix(path, [-1, 0, 0, 1])
    config["videos"] = str(tmp_path / "truth")
    again, _ = evals.evaluate(config, "not read", tmp_path / "again")
    (cell,) = again["cells"]
    assert cell["psnr"] > results["cells"][0]["psnr"] - 2  # it is encoded twice


def test_first_frames(config, monkeypatch, tmp_path):
    """They are asked for, and what came of them is measured."""
    given = []

    def generate_batch(models, inputs, settings, *, seeds):
        given.extend(each.images for each in inputs)
        return [Result(np.repeat(each.images[0][None], settings.num_frames, 0), None, {}) for each in inputs]

    monkeypatch.setattr(evals, "generate_batch", generate_batch)
    monkeypatch.setattr(evals.assembly, "load", lambda weights: assembly.outline(release.read_config(weights), weights))
    config |= {"first_frame": True, "cells": config["cells"][1:2], "batch": 5}
    results, _ = evals.evaluate(config, release.DEMO, tmp_path)
    for i, images in enumerate(given):
        np.testing.assert_array_equal(images[0], make_clip(i, "benchmark_one", size=48, frames=9).video[0])
    assert results["cells"][0]["psnr_first"] > 30
    assert results["cells"][0]["motion"] < 0.5


@pytest.mark.filterwarnings("default:0000")
def test_on_real_weights(tiny_release, tiny_config, tmp_path, capsys):
    """The command itself, with a model as small as it gets."""
    argv = ["evals", "--config=" + eval_config.__file__ + ":suite=demo,runlocal", f"--out={tmp_path}", "--quiet"]
    argv += [f"--weights={tiny_release}", f"--page={tmp_path / 'page'}", "--config.sampling.trajectory_guidance=1.0"]
    items = [{"prompt": prompt, "trajectories": [[50, 50], [200, 200]]} for prompt in ("红色的星", "a red star.")]
    (tmp_path / "list.json").write_text(json.dumps(items))
    argv += ["--config.benchmark.kind=list", f"--config.benchmark.source={tmp_path / 'list.json'}"]
    command_line.run(evals.main, argv)
    said = capsys.readouterr()
    assert "| 5 frames, 32x32, 8 fps | 2 |" in said.out
    assert "warning: 0000: the prompt is empty after cleaning: '红色的星' is lost" in said.err
    assert "0001" not in said.err
    assert (tmp_path / "index.html").is_file()
    assert (tmp_path / "page/error_by_frames.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out is missing"),
        (["--out=x", "--config.batches=3"], 'Did you mean "batch"'),
        (["--out=x", "--config.measures.tracker=sift"], "there are lk, raft, tapnext"),
        (["--out=x", "--config.measures.tracker=raft"], "raft needs weights"),
        (["--out=x", "--config.measures.i3d=nowhere"], "nowhere: no such folder"),
        (["--out=x", "--config.benchmark.kind=films"], "choose sprites, segmentation or list"),
        (["--out=x", "--config.benchmark.kind=list"], "name the file"),
        (["--out=x", "--config.benchmark.split=tests"], "sprites have train"),
        (["--out=x", "--config.benchmark.split=tests", "--config.benchmark.clips=0"], "sprites have train"),
        (["--out=x", "--weights=nowhere"], "nowhere: no such folder"),
    ],
)
def test_mistakes(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command_line.run(evals.main, ["evals", *arguments, "--quiet"])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_of_another_run(config, perfect, tmp_path):
    evals.evaluate(config, release.DEMO, tmp_path)
    config["sampling"]["steps"] += 1
    with pytest.raises(UserError, match=r"was made with another sampling .* choose another --out"):
        evals.evaluate(config, release.DEMO, tmp_path)


def test_a_list_that_was_edited(config, tmp_path, monkeypatch):
    def generate_batch(models, inputs, settings, *, seeds):
        size = settings.num_frames, settings.height, settings.width, 3
        return [Result(np.zeros(size, np.uint8), None, {}) for _ in inputs]

    monkeypatch.setattr(evals, "generate_batch", generate_batch)
    monkeypatch.setattr(evals.assembly, "load", lambda weights: assembly.outline(release.read_config(weights), weights))
    path = tmp_path / "list.json"
    config["benchmark"] = {"kind": "list", "source": str(path), "split": "", "clips": 0}
    config["cells"] = config["cells"][:1]
    for prompt in ("x", "y"):
        path.write_text(json.dumps([{"prompt": prompt, "trajectories": [[0, 0], [99, 99]]}]))
        with pytest.raises(UserError, match="was made with another list") if prompt == "y" else nullcontext():
            for _ in range(2):
                evals.evaluate(config, release.DEMO, tmp_path / "out")


def test_fvd_of_equal_and_of_other_videos(config, perfect, tmp_path, monkeypatch):
    """With features in the network's place: 0 for the true clips, more for others."""

    def load(folder):
        assert folder == "i3d"
        return lambda video: video.reshape(len(video), -1, 3).mean((0, 1)).astype(np.float32)

    monkeypatch.setattr(fvd, "load", load)
    config["measures"]["i3d"], config["cells"] = "i3d", config["cells"][1:2]
    results, records = evals.evaluate(config, release.DEMO, tmp_path)
    assert results["cells"][0]["fvd"] == pytest.approx(0, abs=1e-6)  # both went through the same encoder
    assert "FVD" not in results["left_out"]
    shifted = [
        {**record, "features": [x + 20 for x in record["features"]]} for record in records[results["cells"][0]["name"]]
    ]
    assert report.summarise(shifted)["fvd"] == pytest.approx(3 * 20**2, rel=0.1)


@pytest.mark.parametrize("suite", eval_config.SUITES)
def test_suites(suite):
    config = eval_config.get_config(f"suite={suite}")
    for cell in config.cells:
        assert cell["height"] % 16 == cell["width"] % 16 == 0
    assert len(eval_config.get_config(f"suite={suite},runlocal").cells) == 1
    assert set(sampling.section()) >= set(config.sampling)


# ----------------------------------------------------------------------------------------------------------
# Benchmarks
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    """Three sequences in DAVIS's layout, 96x64: two objects; every second mask only; no object at the start."""
    folder = tmp_path_factory.mktemp("davis")
    for n, name in enumerate(("480p/two-balls", "480p/sparse", "480p/late")):
        pictures, masks = folder / "JPEGImages" / name, folder / "Annotations" / name
        pictures.mkdir(parents=True)
        masks.mkdir(parents=True)
        for j in range(9):
            labels = np.zeros((64, 96), np.uint8)
            if n < 2 or j > 3:
                labels[10:20, 5 + 8 * j : 15 + 8 * j] = 1
            if n == 0:
                labels[30 + j : 40 + j, 50:60] = 2
                labels[:4] = 255
            frame = np.repeat(labels[..., None] * 20 + 40, 3, -1).astype(np.uint8)
            Image.fromarray(frame).save(pictures / f"{j:05}.jpg")
            if n != 1 or j % 2 == 0:
                image = Image.fromarray(labels, "P") if n == 0 else Image.fromarray(labels * 200)
                if n == 0:
                    image.putpalette([c for c in range(256) for _ in range(3)])
                image.save(masks / f"{j:05}.png")
        for place in (pictures / "._00000.jpg", masks / "._00000.png"):
            place.write_bytes(b"left by macOS")
    (folder / "prompts.json").write_text('{"sparse": "a box slides right."}')
    return folder


def test_segmentation(davis):
    found = tasks.VideoSegmentationBenchmark(davis)
    assert found.names == ("480p_sparse", "480p_two-balls")
    sparse, two = (found.task(i, 9, 64, 96, 24.0) for i in range(2))
    assert sparse.prompt == "a box slides right."
    assert two.prompt == "two balls"
    assert two.tracks.shape == (2, 9, 2)
    assert two.video.shape == (9, 64, 96, 3)
    j = np.arange(9)
    right = np.stack([(10 + 8 * j) / 96, np.full(9, 15 / 64)], -1)
    np.testing.assert_allclose(sparse.tracks, right[None], atol=1e-6)  # also where no mask is
    np.testing.assert_allclose(two.tracks[0], right, atol=1e-6)
    np.testing.assert_allclose(two.tracks[1], np.stack([np.full(9, 55 / 96), (35 + j) / 64], -1), atol=1e-6)


def test_segmentation_at_another_size_and_length(davis):
    """Frames and centroids are read at the same times; the middle square is cut out, and what starts beside it goes."""
    task = tasks.VideoSegmentationBenchmark(davis).task(1, 17, 32, 32, 24.0)
    assert task.video.shape == (17, 32, 32, 3)
    assert task.tracks.shape == (1, 17, 2)
    times = np.linspace(0, 8, 17)
    want = np.stack([np.full(17, (55 - 16) / 64), (35 + times) / 64], -1)
    np.testing.assert_allclose(task.tracks[0], want, atol=1e-6)
    for frame, (x, y) in zip(task.video[::2], task.tracks[0][::2], strict=True):
        assert abs(int(frame[int(y * 32), int(x * 32), 0]) - 80) < 12  # label 2 is there


def test_clips_without_a_trajectory_inside_are_left_out(davis, config, tmp_path):
    """In the middle square, the object of "sparse" starts outside."""
    config["benchmark"] = {"kind": "segmentation", "source": str(davis), "split": "", "clips": 0}
    config |= {"videos": "truth", "cells": (eval_config.cell(9, 32, 32, 8.0),), "batch": 1}
    for _ in range(2):  # made, and gone on with
        results, records = evals.evaluate(config, "not read", tmp_path)
        assert [record["name"] for record in records["9x32x32_8fps"]] == ["480p_two-balls"]
        assert (results["cells"][0]["clips"], results["cells"][0]["left_out"]) == (1, 1)
    assert "8 fps: clips left out, without a trajectory inside: 1" in report.table(results)
    config["benchmark"]["clips"] = 1
    with pytest.raises(UserError, match="9x32x32_8fps: no clip has a trajectory inside"):
        evals.evaluate(config, "not read", tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: None, "has no folder JPEGImages"),
        (lambda folder: [(folder / d / "a").mkdir(parents=True) for d in ("JPEGImages", "Annotations")], "no sequence"),
    ],
)
def test_segmentation_mistakes(tmp_path, break_it, message):
    break_it(tmp_path)
    with pytest.raises(UserError, match=message):
        tasks.VideoSegmentationBenchmark(tmp_path)


def test_masks_of_one_frame_say_nothing_of_a_path(davis, tmp_path):
    """As in the validation sets of MOSE and YouTube-VOS, where an object that comes later has its own mask."""
    for name in ("JPEGImages", "Annotations"):
        shutil.copytree(davis / name / "480p/two-balls", tmp_path / name / "single")
    masks = sorted((tmp_path / "Annotations/single").glob("0*.png"))
    for mask in masks[1:]:
        mask.unlink()
    with pytest.raises(UserError, match=r"1 of 1 sequences have a mask of one frame alone.*MOSE and YouTube-VOS"):
        tasks.VideoSegmentationBenchmark(tmp_path)
    Image.fromarray(np.full((64, 96), 7, np.uint8)).save(masks[4])
    with pytest.raises(UserError, match="no sequence there has an object with masks in its first and a later frame"):
        tasks.VideoSegmentationBenchmark(tmp_path)
    masks[4].unlink()
    for name in ("JPEGImages", "Annotations"):
        shutil.copytree(davis / name / "480p/sparse", tmp_path / name / "sparse")
    with pytest.warns(UserWarning, match="1 of 2 sequences have a mask of one frame alone.*left out"):
        assert tasks.VideoSegmentationBenchmark(tmp_path).names == ("sparse",)


def test_listed(tmp_path):
    Image.new("RGB", (64, 32), (10, 200, 30)).save(tmp_path / "first.png")
    (tmp_path / "path.txt").write_text("0,0\n128,128\n")
    items = [
        {"name": "a/b", "prompt": "x", "trajectories": [[0, 0], [256, 128]], "image": "first.png"},
        {"prompt": "y", "trajectories": "path.txt"},
        {"prompt": "z", "trajectories": [[[1, 1], [2, 1]], [[3, 3], [4, 4]]], "canvas": [4, 4]},
        {"prompt": "on the image", "trajectories": [[16, 16], [40, 24]], "canvas": [64, 32], "image": "first.png"},
        {"prompt": "of a tracker", "trajectories": "tracks.npy", "canvas": [64, 32], "trajectory_axes": "tn"},
    ]
    np.save(tmp_path / "tracks.npy", np.array([[[0, 0], [32, 8]], [[32, 0], [32, 16]], [[64, 0], [32, 24]]]))
    (tmp_path / "list.json").write_text(json.dumps(items))
    found = tasks.open_benchmark({"kind": "list", "source": str(tmp_path / "list.json"), "split": "", "clips": 0})
    assert found.names == ("a_b", "0001", "0002", "0003", "0004")
    a, b, c, d, e = (found.task(i, 3, 32, 32, 24.0) for i in range(5))
    np.testing.assert_allclose(a.tracks, [[[0, 0], [0.5, 0.25], [1, 0.5]]])
    assert a.video.shape == (1, 32, 32, 3)
    assert b.video is None
    np.testing.assert_allclose(b.tracks[0, -1], [0.5, 0.5])
    assert c.tracks.shape == (2, 3, 2)
    np.testing.assert_allclose(d.tracks[0, [0, -1]], [(0, 0.5), (0.75, 0.75)])
    np.testing.assert_allclose(e.tracks, [[(0, 0), (0.5, 0), (1, 0)], [(0.5, 0.25), (0.5, 0.5), (0.5, 0.75)]])
    for text, message in (
        ("[{}]", "item 0 has no prompt, trajectories"),
        ("{", "cannot be read as JSON"),
        ('[{"prompt": "x", "trajectories": "path.txt", "name": 7}]', "item 0 has a name that is no text"),
        ('[{"prompt": "x", "trajectories": 7}]', "0000: is not a list of points"),
        ('[{"prompt": "x", "trajectories": {"x": 1}}]', "0000: has the keys x"),
        ('[{"prompt": "x", "trajectories": ["path.txt", 7]}]', "0000: "),
        ('[{"prompt": "x", "trajectories": [[0, 0], [1, 1]], "canvas": 4}]', "0000: the canvas is not two"),
    ):
        (tmp_path / "list.json").write_text(text)
        with pytest.raises(UserError, match=message):
            tasks.Listed(tmp_path / "list.json").task(0, 3, 32, 32, 24.0)
