"""Curation: the whole pipeline, its counts, its shards, and that it goes on where it was stopped."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam")
pytest.importorskip("openai")

import apache_beam as beam
import tensorflow_datasets as tfds
from apache_beam.testing.util import assert_that, equal_to
from tora_jax.configs import curate

from tests import moving, odd_videos, training_runs
from tests import records as shared
from tests.data.curate.test_captions import Server
from tora_jax import command_line
from tora_jax.data import array_record, sources
from tora_jax.data.curate import __main__ as main
from tora_jax.data.curate import camera, filters, pipeline, report, shards, stages, work
from tora_jax.data.pipeline import batches
from tora_jax.errors import UserError
from tora_jax.io import video as video_io

ROOT = Path(__file__).parent.parent.parent.parent


def options(**changes):
    """The defaults, changed: `captions__server="..."`."""
    found = curate.get_config().to_dict()
    found["shards"] = {"clips": 3, "validation": 0.0}
    for path, value in changes.items():
        stage, name = path.split("__")
        found[stage][name] = value
    return found


def run(videos, output, **changes):
    return pipeline.run([f"{videos}/**/*.*"], str(output), options(**changes))


def records(stats, split="train"):
    """The records of a run by name, as plain TFDS reads them."""
    builder = tfds.builder_from_directory(stats["data"])
    assert set(builder.info.splits) >= {split}
    if not builder.info.splits[split].num_examples:
        return {}
    found = list(builder.as_data_source(split))
    named = {record["name"].decode(): record for record in found}
    assert len(named) == len(found)
    return named


def equal(some, others):
    assert some.keys() == others.keys()
    for name, record in some.items():
        assert record.keys() == others[name].keys()
        for field in record:
            np.testing.assert_equal(record[field], others[name][field], err_msg=f"{name} {field}")


def work_files(output):
    return {path: path.stat().st_mtime_ns for path in (Path(output) / "work").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Odd files, and clips that are dropped, each for another reason."""
    folder = tmp_path_factory.mktemp("videos")
    reasons = odd_videos.make_all(folder)
    inner = folder / "more" / "videos"
    inner.mkdir(parents=True)
    for name, kind in (("pan", "pan"), ("still", "still"), ("shake", "shake")):
        video_io.write_video(inner / f"{name}.mp4", odd_videos.good(kind), odd_videos.FPS)
    frames = odd_videos.good()
    fade = np.linspace(-0.03, 0.5, len(frames)).clip(0.05)[:, None, None, None]
    video_io.write_video(inner / "black.mp4", (frames * fade).astype(np.uint8), odd_videos.FPS)
    cut = np.concatenate([np.zeros_like(frames[:4]), odd_videos.good(seed=9)])
    video_io.write_video(inner / "cut.mp4", cut, odd_videos.FPS)
    frozen = np.concatenate([frames[:9], np.repeat(frames[8:9], 12, 0), frames[8:]])
    odd_videos.write(inner / "frozen.mkv", frozen, "ffv1", "bgr0")
    video_io.write_video(inner / "copy.mp4", (frames[:16] * 0.9).astype(np.uint8), odd_videos.FPS)
    video_io.write_video(inner / "small.mp4", odd_videos.good(seed=8, height=96, width=128), odd_videos.FPS)
    (folder / "good.txt").write_text("An ellipse moves.")
    (folder / "._good.mp4").write_bytes(b"left by macOS, and passed over")
    reasons["good.txt"] = "not a video"
    return folder, reasons


KEPT = ("good", "variable", "rotated", "deep", "odd", "name", "cut")


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """A run without interruption."""
    output = tmp_path_factory.mktemp("output")
    return output, run(videos[0], output)


def test_each_file_is_counted_under_its_reason(videos, whole):
    folder, reasons = videos
    found = whole[1]["files"]
    want = {reason: list(reasons.values()).count(reason) for reason in set(reasons.values()) if reason}
    assert found["dropped"] == want
    assert found["total"] == sum(path.is_file() and path.name[0] != "." for path in folder.rglob("*"))
    assert found["used"] == found["total"] - sum(want.values())
    # The text file beside good.mp4 is no video, by its content; the copies are found before they are decoded.
    traits = dict.fromkeys(("variable rate", "rotated", "10 bit", "odd size", "wrong name"), 1)
    assert found["traits"] == traits
    # A scene each, and in short.mp4; and in cut.mp4 black frames, and then a scene.
    assert (found["scenes"], found["short scenes"]) == (found["used"] + 2, 2)


def test_each_clip_is_counted_under_its_reason(whole):
    output, stats = whole
    found = stats["clips"]
    want = {"camera motion": 2, "still": 1, "black": 1, "frozen": 1, "copy": 1, "small": 1}
    assert found["dropped"] == want
    assert (found["total"], found["kept"]) == (len(KEPT) + sum(want.values()), len(KEPT))
    assert found["copied"] + found["encoded"] == found["total"]
    assert found["seconds"] > found["kept seconds"] > 2 * len(KEPT)
    assert sum(stats["cameras"]["kept"].values()) == len(KEPT)
    for histogram in stats["histograms"].values():
        assert sum(histogram["kept"]) == len(KEPT)
    page = (output / "report.html").read_text()
    for reason in want:
        assert f"<h2>{reason}: {want[reason]} of {want[reason]}</h2>" in page
    assert page.count("<img src='data:image/jpeg;base64,") == found["total"]


def test_records(whole):
    stats = whole[1]
    found = records(stats)
    assert {Path(record["source"].decode()).stem for record in found.values()} == set(KEPT)
    for record in found.values():
        video, fps = video_io.read_video(record["video"], strict=True)
        stem = Path(record["source"].decode()).stem
        assert record["fps"] == fps == odd_videos.FPS
        assert record["tracks"].shape[1:] == (len(video), 2)
        assert record["visible"].shape == record["tracks"].shape[:2]
        assert record["visible"].any()
        assert ((record["tracks"] >= 0) & (record["tracks"] <= 1)).all()
        scores = record["scores"]
        assert np.isnan(scores["aesthetic"])
        assert scores["foreground"] > 0.005
        caption = "An ellipse moves." if stem == "good" else stem
        camera = scores["camera"].decode()
        flow = f"{scores['flow']:.1f}"
        assert record["caption"].decode() == f"{caption} motion score: {flow}. camera motion: {camera}."
    shapes = {Path(r["source"].decode()).stem: video_io.probe(r["video"])[1:3] for r in found.values()}
    assert shapes["rotated"] == (192, 144)
    assert shapes["odd"] == (144, 190)
    # Tracks move with the object, and the video holds it.
    truth = moving.make("still, object", 0, 17, 144, 192)
    (good,) = (record for record in found.values() if record["source"].endswith(b"good.mp4"))
    errors = []
    for path, seen in zip(good["tracks"], good["visible"], strict=True):
        at = np.flatnonzero(seen)
        off = (path[at] - path[at[0]] - truth.path[at] + truth.path[at[0]]) * (192, 144)
        errors.append(np.linalg.norm(off, axis=1).max())
    assert np.median(errors) < 2
    assert max(errors) < 10
    names = sorted(path.name for path in Path(stats["data"]).iterdir())
    told = ["dataset_info.json", "features.json", "sizes-train.npy"]
    assert names == [array_record.shard_name(shards.NAME, "train", i, 3) for i in range(3)] + told


@pytest.mark.parametrize("split", ["train", "train[2:5]"])
def test_sizes_lie_beside_the_shards(whole, split, monkeypatch):
    """So no clip is opened before it is needed."""
    source = sources.open_source(whole[0], split)
    want = [video_io.probe(source[i]["video"]) for i in range(len(source))]
    assert len(want) == (len(KEPT) if split == "train" else 3)
    monkeypatch.setattr(video_io, "probe", None)
    infos, damaged = sources.scan(source)
    np.testing.assert_array_equal(infos, want)
    assert not damaged


@pytest.mark.parametrize("motion", ["dense", "sparse"])
def test_the_loader_reads_them(whole, motion):
    config = {
        "sources": (whole[0],),
        "buckets": ({"frames": 9, "height": 96, "width": 128, "fps": 8.0, "batch": 2, "weight": 1.0},),
        "motion": motion,
        "tracks": "given",
        "max_tracks": 3,
        "crop": 0,
        "object_masks": False,
        "frame_masks": {},
        "workers": 0,
        "prefetch": 1,
        "damaged_share": 0.0,
    }
    iterator = batches(config, "train", seed=0, latent_frames=shared.latent_frames)
    moved = 0
    for _ in range(4):
        batch = next(iterator)
        assert batch["video"].shape == batch["maps"].shape == (2, 9, 96, 128, 3)
        moved += (batch["maps"] != 255).any((1, 2, 3, 4)).sum()
    iterator.close()
    assert moved == 8
    assert not iterator.damaged


def test_a_second_run_does_nothing(videos, whole, monkeypatch):
    output, stats = whole
    arrays = set(Path(stats["data"]).glob("*array_record*"))

    def times():
        return {**work_files(output), **{path: path.stat().st_mtime_ns for path in arrays}}

    before = times()
    monkeypatch.setattr(stages.probe, "probe", None)  # would be called for a file that is not there
    monkeypatch.setattr(stages.cuts, "cut", None)
    monkeypatch.setattr(stages.camera, "analyse", None)
    assert run(videos[0], output) == stats
    assert times() == before
    assert set(Path(stats["data"]).glob("*array_record*")) == arrays


def test_other_rules_and_more_videos_use_what_is_there(videos, whole, tmp_path):
    folder = tmp_path / "videos"
    output = tmp_path / "output"
    folder.mkdir()
    for name in ("good.mp4", "deep.mp4"):
        (folder / name).write_bytes((videos[0] / name).read_bytes())
    first = run(folder, output)
    before = work_files(output)
    assert len(records(first)) == 2
    strict = run(folder, output, rules__min_foreground=0.9)
    assert strict["clips"]["dropped"] == {"still": 2}
    assert records(strict) == {}
    assert work_files(output) == before
    assert first["data"] != strict["data"]
    assert not Path(first["data"]).exists()  # one set of shards at a time
    (folder / "name.mp4").write_bytes((videos[0] / "name.mp4").read_bytes())
    third = run(folder, output)
    assert len(records(third)) == 3
    after = work_files(output)
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 5  # of the new video: content, probe, clips, motion, looks
    assert sources.open_source(output, "train").folder == Path(third["data"])


def test_splits_by_source(videos, whole, tmp_path):
    """Clips of a source go into one split; the shares are about as told."""
    keys = [work.digest(str(i)) for i in range(2000)]
    share = np.mean([work.chance("split " + key) < 0.1 for key in keys])
    assert share == pytest.approx(0.1, abs=0.02)
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("good.mp4", "deep.mp4", "name.mp4"):
        (folder / name).write_bytes((videos[0] / name).read_bytes())
    stats = run(folder, tmp_path / "output", shards__validation=0.5)
    train, validation = records(stats, "train"), records(stats, "validation")
    chances = [work.chance("split " + work.content_key(str(path))) for path in folder.iterdir()]
    assert len(train) == sum(chance >= 0.5 for chance in chances)
    assert len(validation) == sum(chance < 0.5 for chance in chances)


def test_an_empty_split_is_one(videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "page.mp4").write_text("nothing")
    stats = run(folder, tmp_path / "output", shards__validation=0.5)
    for split in ("train", "validation"):
        assert len(sources.open_source(tmp_path / "output", split)) == 0
    assert stats["clips"]["total"] == 0


# ---------------------------------------------------------------- interruptions


class StopError(Exception):
    pass


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_it_goes_on_where_it_failed(videos, whole, tmp_path, monkeypatch, seed):
    """Fails three times while it writes some file, then runs through: the records of an undisturbed run."""
    rng, write = random.Random(seed), work.write
    total = len(work_files(whole[0])) + 6
    for _ in range(3):
        left = rng.randrange(total)

        def failing(path, fill):
            nonlocal left
            left -= 1
            if left < 0:
                raise StopError("StopError")
            write(path, fill)

        monkeypatch.setattr(work, "write", failing)
        before = work_files(tmp_path)
        with pytest.raises((StopError, RuntimeError), match="StopError"):
            run(videos[0], tmp_path)
        after = work_files(tmp_path)
        assert {path: after[path] for path in before} == before
        total -= len(after) - len(before)
    monkeypatch.setattr(work, "write", write)
    before = work_files(tmp_path)
    stats = run(videos[0], tmp_path)
    after = work_files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {**stats, "data": ""} == {**whole[1], "data": ""}
    equal(records(stats), records(whole[1]))


@pytest.mark.slow
def test_killed_ten_times(videos, whole, tmp_path):
    """The real command with two processes, killed at random moments."""
    command = [sys.executable, "-m", "tora_jax.data.curate", f"--config={ROOT}/configs/curate.py"]
    command += [f"--input={videos[0]}/**/*.*", f"--output={tmp_path}", "--workers=2"]
    command += ["--config.shards.validation=0.0", "--config.shards.clips=3"]
    rng, kills, longest = random.Random(0), 0, 20.0
    while kills < 10:
        before = work_files(tmp_path)
        started = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        try:
            process.communicate(timeout=rng.uniform(2.0, longest))
            assert process.returncode == 0
            longest = time.monotonic() - started
            (Path(tmp_path) / "stats.json").unlink()  # it was done before its time: the next moments are earlier ones
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
        after = work_files(tmp_path)
        assert {path: after[path] for path in before} == before
    subprocess.run(command, check=True)
    stats = work.read_json(str(tmp_path / "stats.json"))
    assert {**stats, "data": ""} == {**whole[1], "data": ""}
    equal(records(stats), records(whole[1]))


@pytest.mark.slow
def test_two_processes_make_the_same(videos, whole, tmp_path):
    stats = pipeline.run([f"{videos[0]}/**/*.*"], str(tmp_path), options(), workers=2)
    assert {**stats, "data": ""} == {**whole[1], "data": ""}
    equal(records(stats), records(whole[1]))


@pytest.mark.slow
def test_the_portable_job_service_makes_the_same(videos, whole, tmp_path):
    """Beam's interface to Flink and Spark, with the server that Beam brings along."""
    flags = ("--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK")
    stats = pipeline.run([f"{videos[0]}/**/*.*"], str(tmp_path), options(), beam_flags=flags)
    assert {**stats, "data": ""} == {**whole[1], "data": ""}
    equal(records(stats), records(whole[1]))


# ---------------------------------------------------------------- training


@pytest.mark.slow
def test_both_stages_train_from_these_shards(videos, whole, tmp_path):
    keys = [work.content_key(record["source"].decode()) for record in records(whole[1]).values()]
    half = float(np.median([work.chance("split " + key) for key in keys]))
    stats = run(videos[0], tmp_path / "clips", shards__validation=half)
    counts = [len(records(stats, split)) for split in ("train", "validation")]
    assert counts == [len(keys) - len(keys) // 2, len(keys) // 2]
    source = (training_runs.source(tmp_path / "clips"), "--config.steps=20")
    dense, sparse = (tmp_path / name for name in ("dense", "sparse"))
    first = training_runs.run("tora.py:stage=1,runlocal", dense, *source)
    given = (f"--weights={dense}/release", "--config.data.tracks=given")
    second = training_runs.run("tora.py:stage=2,runlocal", sparse, *source, *given)
    for outcome in (first, second):
        assert (outcome.code, outcome.stderr) == (0, "")
        losses = [line["loss"] for line in outcome.metrics if "loss" in line]
        assert len(losses) == 20
        assert np.isfinite(losses).all()


TABLE_CONFIG = """
from tora_jax.configs import common, tora

def get_config(arg=None):
    config = tora.get_config("stage=1,runlocal")
    with config.unlocked():
        bucket = {**common.bucket(5, 144, 256, batch=2), "resolution": "144p", "share": 1.0}
        config.data.buckets = (bucket,)
    return config
"""


@pytest.mark.slow
def test_training_on_clips_of_all_shapes(tmp_path):
    """Batches of several sizes, one after the other."""
    for split in ("train", "validation"):
        (tmp_path / "clips" / split).mkdir(parents=True)
        for i, (height, width) in enumerate([(160, 288), (288, 160), (208, 208)] * 2):
            path = tmp_path / "clips" / split / f"{i}.mp4"
            video_io.write_video(path, odd_videos.good(seed=i, frames=9, height=height, width=width), 8)
            path.with_suffix(".txt").write_text("An ellipse moves.")
    (tmp_path / "table.py").write_text(TABLE_CONFIG)
    config = os.path.relpath(tmp_path / "table.py", ROOT / "configs")
    outcome = training_runs.run(config, tmp_path / "run", training_runs.source(tmp_path / "clips"))
    assert (outcome.code, outcome.stderr) == (0, "")
    assert np.isfinite([line["loss"] for line in outcome.metrics if "loss" in line]).all()


# ---------------------------------------------------------------- captions


def test_captions_from_a_server_are_kept(videos, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("good.mp4", "deep.mp4"):
        (folder / name).write_bytes((videos[0] / name).read_bytes())
    with Server([(200, "A thing moves."), (400, "not this one")]) as server:
        changes = {"captions__server": server.address, "captions__model": "m", "captions__parallel": 1}
        stats = run(folder, tmp_path / "output", **changes)
        assert stats["clips"]["dropped"] == {"no caption": 1}
        (record,) = records(stats).values()
        assert record["caption"].decode().startswith("A thing moves. motion score: ")
        assert len(server.asked) == 2
        again = run(folder, tmp_path / "output", **changes, rules__max_frozen=2.0)
        equal(records(again), records(stats))
        assert len(server.asked) == 2  # the refusal is remembered, too
    other = run(folder, tmp_path / "output", **{**changes, "captions__scores": False, "captions__server": ""})
    assert sorted(record["caption"] for record in records(other).values()) == [b"deep", b"good"]
    with pytest.raises(UserError, match=r"captions: http://127\.0\.0\.1:1/v1 cannot be reached .*run again$"):
        run(folder, tmp_path / "output", captions__server="http://127.0.0.1:1/v1", captions__retries=0)


# ---------------------------------------------------------------- parts


def test_a_stage_alone(videos, tmp_path):
    files = work.WorkFiles(str(tmp_path), options())
    path = str(videos[0] / "good.mp4")
    source = stages.SourceVideo(work.content_key(path), path)
    with beam.Pipeline(pipeline._local_runner(1)) as pipe:
        _ = pipe | beam.Create([source]) | stages.Stage("probe", files) | stages.Stage("clips", files)
    assert {path.parent.name.partition("-")[0] for path in work_files(tmp_path)} == {"probe", "clips"}
    clip = work.read_clip(files, source.key, 0)
    assert video_io.read_video(clip, strict=True)[0].shape == (17, 144, 192, 3)
    scores, arrays = stages.measure(clip, camera.make_flow("dis"), options()["motion"], np.random.default_rng(0))
    assert (scores["frames"], scores["fps"], scores["camera"]) == (17, 8.0, "static")
    assert arrays["tracks"].shape[1:] == (17, 2)


def test_copies_as_a_transform():
    rng = np.random.default_rng(0)
    code, other = (bytes(rng.integers(0, 256, 32, dtype=np.uint8)) for _ in range(2))
    row = {"height": 480, "width": 640, "seconds": 4.0, "reason": ""}
    rows = [{**row, "name": name, "hash": h.hex()} for name, h in (("a", code), ("b", code), ("c", other), ("d", code))]
    want = [("a", ""), ("b", "copy"), ("c", ""), ("d", "copy")]
    with beam.Pipeline(pipeline._local_runner(1)) as pipe:
        marked = pipe | beam.Create(rows) | filters.Copies(4) | beam.Map(lambda row: (row["name"], row["reason"]))
        assert_that(marked, equal_to(want))


def test_report_of_nothing():
    stats = report.stats([], "folder")
    assert stats["clips"]["total"] == 0
    assert "<h1>Curation</h1>" in report.page(stats, [])


def test_names_on_the_page_are_harmless():
    row = {"name": "a", "path": "b/c.mp4", "seconds": 1.0, "camera": "static", "caption": "<script>", "reason": ""}
    page = report.page(report.stats([], "x"), [("kept", row, b"jpeg")])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_all_reasons_have_their_place_on_the_page():
    row = {"name": "a", "path": "b/c.mp4", "seconds": 1.0, "camera": "static"}
    page = report.page(report.stats([], "x"), [(reason, row, b"") for reason in filters.REASONS])
    assert all(f"<h2>{reason}: 1 of 0</h2>" in page for reason in filters.REASONS)


# ---------------------------------------------------------------- the command


def call(capsys, *arguments):
    code = 0
    try:
        command_line.run(main.main, ["curate", f"--config={ROOT}/configs/curate.py", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_command(videos, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((videos[0] / "good.mp4").read_bytes())
    output = tmp_path / "output"
    code, out, err = call(
        capsys, f"--input={folder}/*.mp4", f"--output={output}", "--config.shards.validation=0.0", "--", "--job_name=a"
    )
    assert (code, err) == (0, "")
    assert out.startswith("1 of 1 files used, 1 of 1 clips kept, 0.0 minutes: ")
    assert json.loads((output / "stats.json").read_text())["data"] == out.split(": ")[1].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input=a/*.mp4"], "give --input and --output"),
        (["--output=b"], "give --input and --output"),
        (["--input=a", "--output=b", "--workers=0"], "--workers is 0"),
        (["--input={}/none/*.mp4", "--output={}/out"], "no file matches .*none/.*; put quotes around the pattern"),
        (["--input={}/x/a.mp4", "--output={}/file/out"], "file/out/.*: cannot be written"),
        (["--input={}/x/a.mp4", "--output={}/out", "--config.motion.method=farneback"], "flow method 'farneback'"),
        (["--input={}/x/a.mp4", "--output={}/out", "--config.motion.metod=dis"], 'Did you mean "method"'),
        (["--input={}/x/a.mp4", "--output={}/out", "more"], "unexpected argument 'more'"),
    ],
)
def test_mistakes_are_told_in_one_line(videos, tmp_path, capsys, arguments, message):
    (tmp_path / "x").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "x" / "a.mp4").write_bytes((videos[0] / "good.mp4").read_bytes())
    code, out, err = call(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("curate: error: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
