"""The command line: files in and out, and one clear line for each mistake."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tora_jax import command_line
from tora_jax.io.video import read_video
from tora_jax.sampling import __main__ as sampling

ROOT = Path(__file__).parent.parent.parent


class Outcome:
    def __init__(self, code, stderr, files):
        self.code, self.stderr, self.files = code, stderr, files


@pytest.fixture
def sample(tiny_release, tmp_path, monkeypatch):
    """Runs the command in an empty folder, with the tiny weights unless told otherwise."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights=tiny_release):
        stderr, code = io.StringIO(), 0
        argv = ["sample.py", "--quiet", *([f"--weights={weights}"] if weights else []), *map(str, arguments)]
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            try:
                sampling.sample(argv)
            except SystemExit as stop:
                code = stop.code
        files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
        return Outcome(code, stderr.getvalue(), files)

    return run


def write(path, text):
    Path(path).write_text(text)
    return path


def test_default_run(sample):
    outcome = sample()
    assert outcome.code == 0
    assert outcome.files == {f"outputs/tora{s}" for s in (".mp4", "_trajectory.mp4", "_flow.mp4", ".json")}
    for name in outcome.files - {"outputs/tora.json"}:
        video, fps = read_video(name)
        assert video.shape == (5, 32, 48, 3)
        assert fps == 8
    report = json.loads(Path("outputs/tora.json").read_text())
    assert report["settings"]["prompt"] == "a red star."
    assert report["settings"]["steps"] == 3
    assert report["versions"]["jax"]
    assert report["seconds"].keys() == {"load", "text", "motion", "sample", "decode"}
    assert all(s.keys() == {"run", "compile"} for s in report["seconds"].values())


def test_the_same_seed_gives_the_same_bytes(sample):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert sample(f"--out={name}.mp4", f"--seed={seed}").code == 0
    a, b, c = (Path(f"{name}.mp4").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_photo_and_trajectory_of_the_peers(sample):
    """A photo of another size and a text file with both spellings of a line."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)).save("photo.jpg")
    write("path.txt", "40,200\n60, 180\n\n200, 60\n")
    write("path.json", '{"canvas": [100, 50], "trajectories": [[[10, 10], [90, 40]], [[50, 25, 0], [60, 25, 1]]]}')
    outcome = sample("--image=photo.jpg", "--last_image=photo.jpg", "--trajectory=path.txt", "--trajectory=path.json")
    assert outcome.code == 0, outcome.stderr
    report = json.loads(Path("outputs/tora.json").read_text())
    assert report["settings"]["trajectory"] == ["path.txt", "path.json"]
    assert "images" in report["seconds"]


def test_flags_reach_the_video(sample):
    outcome = sample(
        "--out=deep/er/x.gif",
        "--prompt=green waves",
        "--negative_prompt=a star",
        "--height=40",
        "--width=32",
        "--num_frames=2",
        "--fps=5",
        "--steps=2",
        "--guidance=3",
        "--trajectory_guidance=2",
        "--trajectory=circle",
    )
    assert outcome.code == 0, outcome.stderr
    assert outcome.files == {f"deep/er/x{s}" for s in (".gif", "_trajectory.gif", "_flow.gif", ".json")}
    assert read_video("deep/er/x.gif")[0].shape == (2, 40, 32, 3)


def test_no_trajectory(sample):
    assert sample("--no_trajectory").files == {"outputs/tora.mp4", "outputs/tora.json"}


def test_named_resolution_is_width_to_height(sample):
    assert sample("--resolution=144p", "--aspect_ratio=16:9", "--num_frames=1", "--steps=1").code == 0
    assert read_video("outputs/tora.mp4")[0].shape == (1, 144, 256, 3)


def test_a_long_video_with_prompts_and_conditions(sample):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save("photo.png")
    outcome = sample(
        *("--num_frames=7", "--steps=1", "--prompt=a star.", "--prompt=a heart.", "--motion_score=5"),
        *("--condition=-1=photo.png:0.5", "--solver=ab2", "--cache_every=2", "--out=long.mp4"),
    )
    assert outcome.code == 0, outcome.stderr
    for name in ("long", "long_trajectory", "long_flow"):
        assert len(read_video(f"{name}.mp4")[0]) == 7
    report = json.loads(Path("long.json").read_text())
    assert report["settings"]["prompt"] == ["a star.", "a heart."]
    assert report["settings"]["segment"] == 5


def test_batch(sample):
    write("videos.jsonl", '{"seed": 1, "steps": 1}\n{"stepz": 1}\n')
    outcome = sample("--batch=videos.jsonl", "--out=many", "--no_trajectory", "--num_frames=1", "--mesh=data=2")
    assert outcome.code == 0, outcome.stderr
    assert outcome.files == {"many/00001.mp4", "many/00001.json", "many/00002.json", "videos.jsonl"}
    assert "did you mean steps" in json.loads(Path("many/00002.json").read_text())["error"]


def test_config_overrides_apply_to_the_config_of_the_weights(sample):
    assert sample("--config.sampling.num_frames=3", "--no_trajectory").code == 0
    assert len(read_video("outputs/tora.mp4")[0]) == 3


BAD = {
    "empty file": ("--trajectory=bad.txt", "", "bad.txt: is empty"),
    "one point": ("--trajectory=bad.txt", "3,4\n", "bad.txt"),
    "letters": ("--trajectory=bad.txt", "1,2\nx,y\n", "bad.txt"),
    "NaN": ("--trajectory=bad.txt", "1,2\nnan,4\n", "bad.txt"),
    "a million points": ("--trajectory=bad.txt", "1,2\n" * 10**6, "bad.txt"),
    "wrong JSON": ("--trajectory=bad.json", '{"points": [[1, 2], [3, 4]]}', "bad.json"),
    "truncated JSON": ("--trajectory=bad.json", "[[1, 2], [3", "bad.json"),
    "missing trajectory": ("--trajectory=absent.txt", None, "absent.txt"),
    "zero frames": ("--num_frames=0", None, "num_frames is 0"),
    "negative frames": ("--num_frames=-3", None, "num_frames is -3"),
    "frames in words": ("--num_frames=many", None, "many"),
    "zero steps": ("--steps=0", None, "steps is 0"),
    "NaN guidance": ("--guidance=nan", None, "guidance is nan"),
    "small size": ("--height=8 --width=8", None, "8x8 is too small"),
    "half a size": ("--height=64", None, "--width"),
    "two sizes": ("--height=64 --width=64 --resolution=144p", None, "not both"),
    "unknown resolution": ("--resolution=145p", None, "144p"),
    "unknown aspect ratio": ("--resolution=144p --aspect_ratio=5:1", None, "16:9"),
    "missing image": ("--image=absent.png", None, "absent.png"),
    "broken image": ("--image=bad.png", "<svg>", "bad.png"),
    "output is a folder": ("--out=.", None, "--out"),
    "output without an ending": ("--out=video", None, ".mp4"),
    "output under a file": ("--out=bad.txt/x.mp4", "text", "--out bad.txt/x.mp4"),
    "output somewhere else": ("--out=ftp://bucket/o/v.mp4", None, "ftp:// is not known"),
    "no number": ("--steps=some", None, "steps"),
    "unknown flag": ("--stepz=3", None, "steps"),
    "unknown config field": ("--config.sampling.stepz=3", None, "Did you mean"),
    "unknown config": ("--config=absent.py", None, "absent.py"),
    "unknown argument of a config": (f"--config={ROOT}/configs/tora.py:buckt=1", None, "buckt"),
    "broken config": ("--config=bad.py", "def get_config(:", "bad.py"),
    "config that raises": ("--config=bad.py", "def get_config():\n    return 1 / 0", "bad.py"),
    "missing image for one frame": ("--image=absent.png --num_frames=1", None, "absent.png"),
    "report over the trajectory": ("--trajectory=bad.json --out=bad.mp4", "[[1, 2], [3, 4]]", "overwrite bad.json"),
    "output under a broken link": ("--out=link/x.mp4", None, "link is no folder"),
    "unknown field in a section": ("--config.tora.stdit.qk_nrm=False", None, 'Did you mean "qk_norm"'),
    "line break in a name": ("--trajectory=a\x0bb\x1b", None, "no such trajectory"),
    "slow clock": ("--fps=0.0001", None, "fps"),
    "endless steps": (f"--steps={10**9}", None, "million"),
    "huge guidance": ("--guidance=1e308", None, "guidance"),
    "huge size": (f"--height={10**15} --width=64", None, "at most"),
    "name too long": (f"--weights={'a' * 300}", None, "too long"),
    "config without a ConfigDict": ("--config=bad.py", "def get_config():\n    return {}", "ConfigDict"),
    "unknown fuser": ("--config.tora.fuser=foo", None, "foo"),
    "stray word": ("extra", None, "extra"),
    "condition without a frame": ("--condition=photo.png", None, "write frame="),
    "condition beyond the end": ("--condition=9=photo.png", None, "frames 0 to 4"),
    "condition without a file": ("--condition=0=absent.png", None, "absent.png"),
    "edit ratio": ("--condition=0=photo.png:3", None, "edit ratio is 3"),
    "two pictures for a frame": ("--image=a.png --condition=0=b.png", None, "has a picture already"),
    "segment without room": ("--num_frames=9 --segment=1", None, "leaves nothing"),
    "unknown solver": ("--solver=rk4", None, "euler or ab2"),
    "guidance that ends before it starts": ("--guidance_from=0.9 --guidance_to=0.1", None, "rise"),
    "missing batch": ("--batch=absent.jsonl", None, "absent.jsonl"),
    "empty batch": ("--batch=bad.jsonl", "\n", "bad.jsonl: is empty"),
    "mesh": ("--mesh=data=1000", None, "wants 1000 devices"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line(sample, tmp_path, case):
    arguments, content, message = BAD[case]
    if content is not None:
        name = arguments.split(" ")[0].split("=")[1].split("/")[0]
        write(name, content)
    (tmp_path / "link").symlink_to("nowhere")
    outcome = sample(*arguments.split(" "))
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1, outcome.stderr
    assert outcome.stderr.startswith("sample.py: error: ")
    assert message in outcome.stderr
    assert not any(name.endswith((".mp4", ".json")) and "bad" not in name for name in outcome.files)


def test_config_with_an_argument(sample):
    config = f"--config={ROOT}/configs/tora.py:runlocal"
    assert "steps is 0" in sample(config, "--steps=0", weights=None).stderr
    assert "steps is 0" in sample(config.replace("runlocal", "variant=2x16x2/2"), "--steps=0", weights=None).stderr


@pytest.mark.parametrize("section", [{}, {"extra": 1}, {"steps": "many"}, 3])
def test_sampling_section_of_a_release(sample, tiny_release, tmp_path, section):
    folder = tmp_path / "edited"
    shutil.copytree(tiny_release, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sampling": section}))
    outcome = sample("--steps=1", "--num_frames=1", "--height=32", "--width=32", weights=folder)
    if section == {} or section == {"steps": "many"}:  # a flag wins over what the section says
        assert outcome.code == 0, outcome.stderr
    else:
        assert outcome.code == 2
        assert "sampling should hold" in outcome.stderr


@pytest.mark.filterwarnings("default")
def test_points_off_the_canvas_are_refused_or_clipped_with_a_warning(sample):
    write("path.txt", "-5,100\n300,100\n")
    outcome = sample("--trajectory=path.txt")
    assert outcome.code == 2
    assert "path.txt: 2 of 2 points lie off" in outcome.stderr
    outcome = sample("--trajectory=path.txt", "--trajectory_canvas=256x256:clip")
    assert outcome.code == 0
    assert "path.txt: 2 of 2 points" in outcome.stderr
    assert outcome.stderr.count("warning") == 1


@pytest.mark.parametrize("text", ["[" * 5000, '{"a.b": 1}', "[1]"])
def test_broken_config_of_a_release(sample, tiny_release, tmp_path, text):
    folder = tmp_path / "edited"
    shutil.copytree(tiny_release, folder)
    (folder / "config.json").write_text(text)
    outcome = sample(weights=folder)
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1
    assert "edited" in outcome.stderr


@pytest.mark.parametrize("weights", ["absent", "."])
def test_folder_without_weights(sample, weights):
    outcome = sample(weights=weights)
    assert outcome.code == 2
    assert weights in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_weights_of_another_size(sample):
    outcome = sample("--config.tora.motion_features=16")
    assert outcome.code == 2
    assert "another size" in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_ctrl_c_stops_and_leaves_nothing(tmp_path, tiny_release):
    command = [sys.executable, str(ROOT / "sample.py"), f"--weights={tiny_release}", "--steps=100000", "--out=x.mp4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    seen = b""
    while b"step/s" not in seen or b"| 0/" in seen.rsplit(b"\r", 1)[-1]:
        piece = process.stderr.read1()
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - start < 10
    assert b"stopped" in rest
    assert b"Traceback" not in rest
    assert not list(tmp_path.iterdir())


def test_ctrl_c_inside_garbage_collection_is_neither_lost_nor_shown():
    """JAX has a callback there, out of which Python lets no exception."""
    script = """
import gc, os, signal
from tora_jax import command_line

def body(argv, check_interrupt):
    def press(phase, info):
        gc.callbacks.remove(press)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
    gc.callbacks.append(press)
    gc.collect()
    check_interrupt()

command_line.run(body, ["work.py"], "go on")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (130, "\nwork.py: stopped; go on\n")


def test_the_package_is_a_command():
    command = [sys.executable, "-m", "tora_jax.sampling", "--steps=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (2, "tora_jax.sampling: error: steps is 0; it must be at least 1\n")


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."), True),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA error: CUDA_ERROR_ILLEGAL_INSTRUCTION"), False),
    ],
)
def test_a_failed_device_is_told_with_what_helps(error, memory, capsys):
    def body(argv, check_interrupt):
        raise error

    with pytest.raises(SystemExit) as stop:
        command_line.run(body, ["train.py"], "go on with --config.resume")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert ("need less memory" in line) == memory
    assert ("start again; go on with --config.resume" in line) != memory


def test_help_names_every_flag(sample):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        sampling.sample(["sample.py", "--help"])
    assert stop.value.code == 0
    for flag in ("prompt", "negative_prompt", "trajectory", "image", "last_image", "weights", "trajectory_guidance"):
        assert f"--{flag}" in out.getvalue()
