"""Batches: broken lines, kills, names, shapes."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from tora_jax.configs import common

from tora_jax import sharding
from tora_jax.backbones import assembly
from tora_jax.errors import UserError
from tora_jax.io.video import read_video
from tora_jax.sampling import batch_file, segments
from tora_jax.sampling.generate import generate_batch

ROOT = Path(__file__).parent.parent.parent
SECTION = {"height": 32, "width": 32, "num_frames": 2, "fps": 8.0, "steps": 1, "guidance": 1.0}
BROKEN = ('{"prompt": "a star."', '{"trajectories": [[1, 2]]}', '{"conditions": ["0=absent.png"]}')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("out")


def write(*lines):
    Path("jobs.jsonl").write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def run(models, folder, **options):
    return batch_file.run(models, batch_file.read("jobs.jsonl", folder, SECTION, {}), folder, quiet=True, **options)


def report(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_lines_become_videos(tiny_models, folder):
    lines = [
        {"prompt": "a star.", "trajectories": "circle", "seed": 1},
        {"prompt": "a star.", "trajectories": [[10, 10], [200, 200]], "seed": 2, "name": "two"},
        {"prompt": "a star.", "trajectories": None, "num_frames": 1, "motion_score": 5},
    ]
    write(lines[0], "", *lines[1:])
    assert run(tiny_models, folder) == (3, 0, 0)
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}{part}" for name in ("00001", "two") for part in (".mp4", "_trajectory.mp4", "_flow.mp4", ".json")),
        *("00004.mp4", "00004.json"),
    }
    assert read_video(folder / "two.mp4")[0].shape == (2, 32, 32, 3)
    found = report(folder, "two")
    assert (found["line"], found["settings"]["seed"]) == (3, 2)
    assert found["seconds"]["sample"]["run"] > 0
    assert report(folder, "00004")["settings"]["motion_score"] == 5


def test_lines_end_where_json_lines_do(tiny_models, folder):
    """Other marks of a line's end may stand in a text."""
    Path("jobs.jsonl").write_text('{"prompt": "a\u2028star\x85."}\r\n{}\r\n', "utf-8", newline="")
    first, second = batch_file.read("jobs.jsonl", folder, SECTION, {})
    assert (first.wanted.settings.prompt, second.line) == ("a\u2028star\x85.", 2)


@pytest.mark.parametrize("file", ["/dev/zero", "a\0b.png", "."])
def test_what_is_no_file_is_one_failure(tiny_models, folder, file):
    write({"conditions": [f"0={file}"]})
    assert run(tiny_models, folder) == (0, 0, 1)
    assert "\n" not in report(folder, "00001")["error"]


def test_failures_are_recorded_and_nothing_is_made_twice(tiny_models, folder, monkeypatch):
    write({"seed": 1}, *BROKEN, {"seed": 2})
    assert run(tiny_models, folder) == (2, 0, 3)
    errors = [report(folder, f"0000{i}")["error"] for i in (2, 3, 4)]
    for error, part in zip(errors, ("JSON", "single point", "absent.png"), strict=True):
        assert part in error
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(segments, "generate_batch", None)  # nothing is to be made
    assert run(tiny_models, folder) == (0, 2, 3)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_failures_are_tried_again(tiny_models, folder, monkeypatch):
    write(BROKEN[2], {"seed": 2})

    def refuse(*args, **options):
        raise MemoryError

    monkeypatch.setattr(segments, "generate_batch", refuse)
    assert run(tiny_models, folder) == (0, 0, 2)
    monkeypatch.setattr(segments, "generate_batch", generate_batch)
    Image.new("RGB", (32, 32)).save("absent.png")
    assert run(tiny_models, folder) == (2, 0, 0)
    assert "error" not in report(folder, "00001") | report(folder, "00002")


def test_what_does_not_fit_into_memory_is_made_one_by_one(tiny_models, folder, monkeypatch):
    sizes = []

    def narrow(models, inputs, settings, **options):
        sizes.append(len(inputs))
        if len(inputs) > 1:
            raise MemoryError
        return generate_batch(models, inputs, settings, **options)

    monkeypatch.setattr(segments, "generate_batch", narrow)
    write({"seed": 1}, {"seed": 2}, {"seed": 3})
    assert run(tiny_models, folder, per_device=2) == (3, 0, 0)
    assert sizes == [2, 1, 1, 2, 1]


def test_a_changed_line_is_made_again(tiny_models, folder):
    write({"seed": 1}, BROKEN[0])
    assert run(tiny_models, folder) == (1, 0, 1)
    old = (folder / "00001.mp4").read_bytes()
    write({"seed": 3}, {"seed": 4})
    assert run(tiny_models, folder) == (2, 0, 0)
    assert (folder / "00001.mp4").read_bytes() != old
    write({"seed": 3}, BROKEN[0])
    assert run(tiny_models, folder) == (0, 1, 1)
    assert {path.name for path in folder.iterdir() if path.stem.startswith("00002")} == {"00002.json"}


def test_keys_go_by_the_weights_and_the_content_of_files(folder):
    def key(weights="a"):
        (job,) = batch_file.read("jobs.jsonl", folder, SECTION, {}, weights)
        return job.key

    write({"trajectories": "path.txt", "conditions": ["0=photo.png"]})
    Path("path.txt").write_text("0,0\n256,128\n")
    keys = [key(), key("b")]
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save("photo.png")
        keys.append(key())
    Path("path.txt").write_text("0,0\n128,256\n")
    assert len({*keys, key()}) == 5
    assert key() == key()


def test_batches_of_one_shape_are_filled_and_shared_out(tiny_config, folder, monkeypatch):
    """Ten videos of two shapes on four devices, two on each at once: two calls of eight."""
    sizes = []

    def count(models, inputs, settings, **options):
        sizes.append((len(inputs), settings.num_frames))
        return generate_batch(models, inputs, settings, **options)

    monkeypatch.setattr(segments, "generate_batch", count)
    write(*({"seed": i, "num_frames": 1 + i % 2, "trajectories": None} for i in range(10)))
    mesh = sharding.make_mesh("data=4")
    rules = tuple(common.training()["rules"].items())
    models = assembly.load(tiny_config, place=functools.partial(sharding.param_shardings, mesh=mesh, rules=rules))
    with sharding.use(mesh, rules):
        assert run(models, folder, per_device=2, mesh=mesh) == (10, 0, 0)
    assert sizes == [(8, 1), (8, 2)]


def test_one_that_fails_does_not_take_the_others_along(tiny_models, folder, monkeypatch):
    def refuse(models, inputs, settings, *, seeds, **options):
        if 2 in seeds:
            raise UserError("not finite")
        return generate_batch(models, inputs, settings, seeds=seeds, **options)

    monkeypatch.setattr(segments, "generate_batch", refuse)
    write(*({"seed": i} for i in range(4)))
    assert run(tiny_models, folder, per_device=4) == (3, 0, 1)
    assert report(folder, "00003")["error"] == "not finite"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["", " "], "is empty"),
        ([{"name": "a"}, {"name": "A"}], r"lines 1 and 2 would both write A\.mp4"),
        ([{"name": "a"}, {}, {"name": "a_flow"}], r"lines 1 and 3 would both write a_flow\.mp4"),
        ([{"name": "00002_trajectory"}, {}], r"lines 1 and 2 would both write 00002_trajectory\.mp4"),
    ],
)
def test_files_that_cannot_be(folder, lines, message):
    write(*lines)
    with pytest.raises(UserError, match=message):
        batch_file.read("jobs.jsonl", folder, SECTION, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"name": "../../etc/passwd"}', "no file name"),
        ('{"name": ""}', "no file name"),
        ("[1]", "no JSON object"),
        ("[" * 10000, "not valid JSON"),
        ('{"out": "x"}', "no setting 'out'"),
        ('{"steps": 1e99}', "steps is"),
        ('{"seed": 1.5}', "seed is"),
    ],
)
def test_lines_that_cannot_be(folder, line, message):
    write(line)
    (job,) = batch_file.read("jobs.jsonl", folder, SECTION, {})
    assert message in str(job.wanted)
    assert job.name == "00001"


def test_killed_twice(folder, tiny_release):
    """20 lines, 3 of them broken: whenever it is killed, in the end there are 17 videos and 3 records, none twice."""
    write(*BROKEN, *({"seed": i, "num_frames": 1, "trajectories": None} for i in range(17)))
    command = [sys.executable, str(ROOT / "sample.py"), "--quiet", f"--weights={tiny_release}", "--batch=jobs.jsonl"]
    command += ["--out=out", "--steps=1", "--height=32", "--width=32", "--mesh=data=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    stamps = {}
    for kill_at in (4, 11):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and len(list(folder.glob("[!.]*.mp4"))) < kill_at:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        made = {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.json")}
        assert len(made) < 20
        assert made | stamps == made  # what was done stayed as it was
        stamps = made
    subprocess.run(command, env=environment, check=True)
    reports = {path.name: json.loads(path.read_text()) for path in folder.glob("[!.]*.json")}
    assert {name: (folder / name).stat().st_mtime_ns for name in stamps} == stamps
    assert sum("error" in found for found in reports.values()) == 3
    assert sorted(found["line"] for found in reports.values()) == list(range(1, 21))
    assert len(list(folder.glob("*.mp4"))) == 17
    assert not list(folder.glob(".*"))
