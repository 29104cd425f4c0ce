"""train.py: the same bits after whatever stops it, one clear line for each mistake, and nothing lost."""

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from ml_collections import ConfigDict
from tensorboardX.proto.event_pb2 import Event
from tora_jax.configs import model_sizes, motion_vae, tora, vae

from tests import records, training_runs
from tests.training_runs import ROOT, run, source, train
from tora_jax.checkpoints import release
from tora_jax.io.video import read_video
from tora_jax.sampling.__main__ import sample
from tora_jax.training import lora, optim

SPATIAL = "vae.py:phase=spatial,runlocal"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A data set; one of its twelve records to train on is damaged, and its test split is empty."""
    good = records.clips(12, "train", training_runs.SCALE)
    good[5]["video"] = b"no video"
    held_out = records.clips(4, "validation", training_runs.SCALE)
    folder = tmp_path_factory.mktemp("data") / "clips"
    return records.write(folder, {"train": good, "validation": held_out, "test": []})


@pytest.fixture(scope="module")
def spatial(clips, tmp_path_factory):
    """A whole run, for a few steps: its outcome and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "spatial"
    return run(SPATIAL, folder, source(clips), "--config.data.damaged_share=0.1"), folder


def test_what_a_run_leaves(spatial):
    outcome, folder = spatial
    assert outcome.code == 0, outcome.stderr
    assert outcome.stderr.count("damaged and passed over") == outcome.stderr.count("\n") == 1
    *steps, judged = outcome.metrics
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(line.keys() == {"step", "loss", "frame", "kl_spatial", "grad_norm"} for line in steps)
    assert judged.keys() == {"step", "psnr", "objective"}
    assert judged["objective"] == -judged["psnr"]
    scalars = tensorboard(folder)
    assert {name for name, _ in scalars} >= {"loss", "psnr", "steps_per_second", "tokens_per_second"}
    assert scalars["loss", 3] == pytest.approx(steps[2]["loss"])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4"]
    assert release.load(folder / "release").config["sampling"]["height"] == 32
    readme = (folder / "release/README.md").read_text()
    assert f"python train.py --config={ROOT}/configs/{SPATIAL}" in readme
    assert "Seed 0" in readme
    assert f'"psnr": {judged["psnr"]}' in readme


@pytest.mark.parametrize("module", [vae, motion_vae, tora])
def test_runlocal_is_of_the_least_size(module):
    """With `small` too: what trains is set by it, and no size."""
    shrunk, tiny = (
        ConfigDict(config).to_dict() for config in (module.get_config("small,runlocal"), model_sizes.tiny())
    )
    for part in ("tora", "vae", "motion_vae", "t5"):
        assert shrunk[part] == tiny[part]


def test_the_small_vae_learns_coarse_frames(clips, tmp_path):
    outcome = run("vae.py:phase=spatial,small,runlocal", tmp_path / "run", source(clips), FINE)
    assert outcome.code == 0, outcome.stderr
    *steps, _ = outcome.metrics
    assert all(line["coarse"] > 0 for line in steps)
    for line in steps:
        distances = line["frame"] + 0.25 * line["coarse"]
        assert line["loss"] == pytest.approx(distances + 1e-4 * line["kl_spatial"], rel=1e-5)


def test_the_decoder_alone(clips, spatial, tmp_path):
    """Its leaves change and no others, of the statistics of the latents neither."""
    before = release.load(spatial[1] / "release").params
    folder = tmp_path / "run"
    weights = f"--weights={spatial[1] / 'release'}"
    outcome = run("vae.py:phase=decoder,runlocal", folder, source(clips), FINE, weights)
    assert outcome.code == 0, outcome.stderr
    *_, judged = outcome.metrics
    assert judged.keys() == {"step", "psnr", "psnr_near_objects", "objective"}
    flat, after = (optim.flatten(params) for params in (before, release.load(folder / "release").params))
    changed = {path for path in flat if not np.array_equal(flat[path], after[path])}
    decoder = {path for path in flat if re.match("vae/spatial_vae/(decoder|post_quant_conv)/", path)}
    assert changed == decoder
    # What does not train comes from the weights that the run began with, named or not.
    frozen = (folder / "release/t5.safetensors").read_bytes()
    shutil.rmtree(folder / "release")
    again = ("vae.py:phase=decoder,runlocal", folder, source(clips), FINE, "--config.resume")
    other = another_t5(spatial[1] / "release", tmp_path / "other")
    mistake(run(*again, f"--weights={other}"), "otherwise: weights.t5: ")
    assert run(*again).code == 0
    assert (folder / "release/t5.safetensors").read_bytes() == frozen


def another_t5(folder, target):
    """The same weights but for one bit of the text encoder."""
    shutil.copytree(folder, target)
    content = bytearray((target / "t5.safetensors").read_bytes())
    content[-1] ^= 1
    (target / "t5.safetensors").write_bytes(content)
    return target


def tensorboard(folder):
    """(name, step) -> number, or width of an image, in the event files: length, checksum, message, checksum."""
    found = {}
    for path in folder.glob("events.*"):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found[value.tag, event.step] = value.image.width or value.simple_value
            data = data[16 + length :]
    return found


def test_adapters_from_clips_to_a_video(clips, spatial, tmp_path, monkeypatch):
    """LoRA on Tora, stage 1, on clips: only the adapter changes, and what is released samples."""
    before, after = spatial[1] / "release", tmp_path / "run/release"
    options = ("--config.lora.rank=2", "--config.evaluation.clips=2", "--config.data.damaged_share=0.1")
    config = "tora.py:stage=1,runlocal"
    outcome = run(config, tmp_path / "run", source(clips), f"--weights={before}", *options, "--config.optim.lr=0.01")
    assert outcome.code == 0, outcome.stderr
    judged = outcome.metrics[-1]
    assert judged.keys() == {
        "step",
        "objective",
        "traj_error",
        "path_error",
        *(f"loss_at_{t}" for t in (100, 300, 500, 700, 900)),
    }
    videos = sorted((tmp_path / "run/samples").iterdir())
    assert [path.name for path in videos] == ["000004_0.mp4", "000004_1.mp4"]
    assert read_video(videos[0])[0].shape == (5, 32, 32, 3)
    assert tensorboard(tmp_path / "run")["clip1", 4] >= 8 * 32

    adapter, alpha = lora.load(tmp_path / "run/adapter.safetensors")
    assert all("/blocks/temporal/" in path for path in adapter)
    params, trained = (release.load(folder).params for folder in (before, after))
    merged = optim.flatten(lora.merge(adapter, params, alpha))
    trained, params = optim.flatten(trained), optim.flatten(params)
    changed = {path for path, leaf in trained.items() if np.any(leaf != params[path])}
    assert changed == {path.removesuffix("/a") for path in adapter if path.endswith("/a")}
    for path, leaf in trained.items():
        np.testing.assert_allclose(leaf, merged[path], rtol=1e-6, atol=1e-7)

    monkeypatch.chdir(tmp_path)
    sample(["sample.py", f"--weights={after}", "--quiet"])
    assert read_video("outputs/tora.mp4")[0].shape == (5, 32, 32, 3)


# ----------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------

LARGE = "({'frames': 6, 'height': 32, 'width': 32, 'fps': 0.0, 'batch': 2, 'weight': 1.0},)"
ODD = "({'frames': 5, 'height': 32, 'width': 32, 'fps': 0.0, 'batch': 3, 'weight': 1.0},)"
FINE = "--config.data.damaged_share=0.1"


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ("vae.py:phase=last", (), "phase=last: there are spatial, causal, joint, decoder"),
        ("tora.py:stage=3", (), "stage=3: there are 1 (dense flow) and 2 (sparse trajectories)"),
        ("motion_vae.py:arch=gan", (), "arch=gan: there are video, magvit"),
        ("motion_vae.py:phase=last", (), "phase=last: there are spatial, causal, joint, decoder"),
        ("motion_vae.py:arch=magvit,phase=causal", (), "arch=magvit is one net, trained in one phase, joint"),
        ("vae.py:fase=joint", (), "unknown argument 'fase'"),
        ("none.py", (), "none.py: no such file"),
        (SPATIAL, ("--config.stepz=3",), 'Did you mean "steps" instead of "stepz"?'),
        (SPATIAL, (FINE, "--config.job=flow"), "job 'flow': there are vae, motion_vae, tora"),
        (SPATIAL, (), "1 of 12 records are damaged"),
        (SPATIAL, (FINE, "--config.data.validation=test"), "split 'test' has no clips"),
        (SPATIAL, (FINE, "--config.data.validation=valid"), "has no split 'valid'; there are"),
        (SPATIAL, (FINE, f"--config.data.buckets={LARGE}"), "bucket 6x32x32 (frames x height x width): no clip fits"),
        (SPATIAL, (FINE, f"--config.data.buckets={ODD}", "--config.mesh=data=2"), "a batch of 3 does not split over"),
        (SPATIAL, (FINE, "--config.mesh=data=16"), "wants 16 devices, there are 8"),
        (SPATIAL, (FINE, "--config.train=('vae/spacial.*',)"), "'vae/spacial.*' fits no parameter"),
        (SPATIAL, (FINE, "--weights=nothing/there"), "nothing/there: no such folder"),
        (
            SPATIAL,
            (FINE, "--weights=RELEASE", "--config.vae.temporal.filters=8"),
            "weights of another size than the config",
        ),
        ("tora.py:runlocal", (FINE, "--config.evaluation.split=test"), "split 'test' has no clips"),
        ("tora.py:runlocal", (FINE, "--config.evaluation.source=gone"), "gone: no such folder"),
    ],
)
def test_mistakes(clips, spatial, tmp_path, config, arguments, message):
    arguments = [argument.replace("RELEASE", str(spatial[1] / "release")) for argument in arguments]
    outcome = run(config, tmp_path / "run", source(clips), *arguments)
    mistake(outcome, message)
    assert not list(tmp_path.glob("run/checkpoints/*"))
    assert not list(tmp_path.glob("run/release*"))


def test_no_sources(tmp_path):
    mistake(run(SPATIAL, tmp_path), "data.sources is empty")


def mistake(outcome, message):
    """Exit code 2, and a last line with the message; before it stand only warnings."""
    assert outcome.code == 2
    *warnings, error = outcome.stderr.splitlines()
    assert error.startswith("train.py: error: ")
    assert message in error
    assert all(line.startswith("train.py: warning: ") for line in warnings)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_holds_a_run(clips, spatial, tmp_path):
    """A finished one stays as it is; one without a release goes on, but only as itself."""
    _, finished = spatial
    before = contents(finished)
    for more in ((), ("--config.resume",)):
        mistake(run(SPATIAL, finished, source(clips), FINE, *more), "exists, so this run is finished")
    again = run(SPATIAL, finished, source(clips), FINE, "--config.resume", "--config.restartable")
    assert (again.code, again.stderr) == (0, "")  # whoever starts again what fails comes to an end
    assert contents(finished) == before

    folder = tmp_path / "unfinished"  # killed between its last checkpoint and its release
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("release"))
    mistake(run(SPATIAL, folder, source(clips), FINE), "holds a run already; go on with it by --config.resume")
    other = run("vae.py:phase=causal,runlocal", folder, source(clips), FINE, "--config.resume")
    mistake(other, "the checkpoint of step 4 is of another config")
    other = run(SPATIAL, folder, source(clips), FINE, "--config.resume", "--config.seed=1")
    mistake(other, "the run began otherwise: config.seed: 0 -> 1; go on as it began")
    outcome = run(SPATIAL, folder, source(clips), FINE, "--config.resume")
    assert outcome.code == 0, outcome.stderr
    assert outcome.metrics == spatial[0].metrics
    for name in (f"{part}.safetensors" for part in release.PARTS):
        assert (folder / "release" / name).read_bytes() == before[f"release/{name}"]


def test_losses_that_are_not_finite(clips, tmp_path, monkeypatch):
    """After so many in a row the run stops, its state saved."""

    def make(*_):
        def step(state, frozen, batch, key):
            loss = 1.0 if state.step < 2 else float("nan")
            return state.replace(step=state.step + 1), {"loss": loss, "grad_norm": loss, "skipped": loss != 1}

        return step

    monkeypatch.setattr(train, "jit_train_step", make)
    options = (source(clips), FINE, "--config.steps=8", "--config.skip_at_most=3", "--config.save_every=100")
    outcome = run(SPATIAL, tmp_path, *options, "--config.eval_every=100")
    mistake(outcome, "3 steps in a row to step 5 have a loss or a gradient that is not finite")
    assert [line.get("skipped", 0) for line in outcome.metrics] == [0, 0, 1, 1, 1]
    assert saved(tmp_path) == [5]


def test_nothing_to_go_on_with(clips, tmp_path):
    """One line, and no folder of a mistyped name. The other tests start with `restartable`."""
    mistake(
        run(SPATIAL, tmp_path / "run", source(clips), FINE, "--config.resume"), "nothing to go on with; start without"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "said"), [([], "--workdir is missing"), (["--workdir=ftp://bucket/run"], "ftp:// is not known")]
)
def test_no_folder_to_work_in(capsys, flags, said):
    with pytest.raises(SystemExit) as stop:
        training_runs.command_line.run(train.main, ["train.py", f"--config={ROOT}/configs/vae.py:runlocal", *flags])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Stopped and gone on with
# ----------------------------------------------------------------------------------------------------------


def start(config, folder, *arguments):
    """train.py in a process of its own."""
    argv = [sys.executable, "train.py", f"--config={ROOT}/configs/{config}", f"--workdir={folder}", "--quiet"]
    return subprocess.Popen([*argv, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def finish(process, code=0):
    """What it wrote to stderr, once it is through."""
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == code, stderr
    return stderr


def last_step(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal())


def when(process, ready, delay=0.0):
    """Waits until something is so, and a little longer."""
    while not ready():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(delay)


def same_run(folder, whole):
    """Loss curves and released weights, to the last bit."""
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for part in release.PARTS:
        name = f"release/{part}.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_the_same_bits_after_every_stop(clips, tmp_path):
    """Killed, its newest checkpoint truncated, told to stop: the run comes out as if nothing was."""
    options = (source(clips), FINE, "--config.steps=12", "--config.save_every=3", "--config.eval_every=6")
    options += ("--config.resume", "--config.restartable")  # first start or not
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    assert run(SPATIAL, whole, *options).code == 0

    process = start(SPATIAL, folder, *options)
    when(process, lambda: len(saved(folder)) > 1, delay=random.random() / 10)
    process.kill()
    process.communicate()
    newest = saved(folder)[-1]
    files = [path for path in (folder / f"checkpoints/{newest}/state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)

    process = start(SPATIAL, folder, *options)
    when(process, lambda: (folder / f"checkpoints/{newest}.broken").exists())
    when(process, lambda: last_step(folder) < newest)  # it goes back to the checkpoint before, and compiles
    when(process, lambda: last_step(folder) > newest)
    process.send_signal(signal.SIGTERM)
    said = finish(process, 128 + signal.SIGTERM)
    assert re.search(rf"train.py: warning: .*/{newest}: broken, passed over \(.* truncated\)\n", said)
    stopped = re.search(r"stopped by a signal at step (\d+); go on with --config.resume", said)
    assert saved(folder)[-1] == last_step(folder) == int(stopped[1]) < 12
    assert not (folder / "release").exists()

    assert run(SPATIAL, folder, *options).code == 0
    same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "kills", "workers"), [("tora.py:stage=2,runlocal", 10, 0), ("vae.py:phase=joint,runlocal", 3, 2)]
)
def test_the_same_bits_after_kills_at_random_moments(clips, tmp_path, config, kills, workers):
    options = [source(clips), FINE, "--config.steps=44", "--config.save_every=2", "--config.eval_every=20"]
    options += [f"--config.data.workers={workers}", "--config.resume", "--config.restartable"]
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    finish(start(config, whole, *options))
    moments = sorted(random.sample(range(1, 43), kills))
    for moment in moments:
        process = start(config, folder, *options)
        when(process, lambda moment=moment: last_step(folder) >= moment, delay=random.random() / 2)
        process.kill()
        process.wait()
    finish(start(config, folder, *options))
    same_run(folder, whole)


def test_full_disk(clips, tmp_path):
    """On a file system that is too small: one clear line; with more room the run goes on from what was whole."""
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=1800k none {small}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        # Only a file system of its own can be full; where nobody may mount one, test_checkpoint.py limits file sizes.
        pytest.skip("this user may not mount a small file system")
    training = f'{sys.executable} train.py --config={ROOT}/configs/{SPATIAL} --workdir={small}/run --quiet "$@"'
    script = f"{mount} && {training}; code=$?; cp -r {small}/run {tmp_path}/run && exit $code"
    options = [source(clips), FINE, "--config.resume", "--config.restartable"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *options], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if "passed over" not in line]
    assert len(errors) == 1, done.stderr
    assert re.match(r"train.py: error: .*: (no space left; whole are the checkpoints of|.*No space left)", errors[0])
    outcome = run(SPATIAL, tmp_path / "run", *options)
    assert outcome.code == 0, outcome.stderr
    assert [line["step"] for line in outcome.metrics] == [1, 2, 3, 4, 4]


def test_ctrl_c_says_how_to_go_on(clips, tmp_path):
    process = start(SPATIAL, tmp_path, source(clips), FINE, "--config.steps=1000")
    when(process, lambda: last_step(tmp_path) > 2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 130
    assert stderr.endswith("train.py: stopped; go on from the last checkpoint with --config.resume\n")
    assert "Traceback" not in stderr


def test_failures_that_follow_from_one_are_not_told_again():
    """In threads, at the exit and in callbacks; what has nothing to do with it is."""
    script = """
import atexit, errno, sys, threading
from tora_jax import command_line
from tora_jax.errors import UserError

def fail(error):
    raise error

def body(argv, check_interrupt):
    async def dropped():
        pass
    for error in (OSError(errno.ENOSPC, "full"), RuntimeError("Event loop is closed"), ValueError("another")):
        thread = threading.Thread(target=fail, args=[error])
        thread.start()
        thread.join()
    dropped()
    atexit.register(fail, OSError("handle is closed"))
    raise UserError("the disk is full")

command_line.run(body, ["x.py"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert [line for line in lines if "Traceback" not in line and not line.startswith("Exception in")] == [
        "ValueError: another",
        "x.py: error: the disk is full",
    ]


def test_the_small_jobs_take_over_each_others_weights():
    """A release folder holds all parts, so the parts that a job does not train must have one size, too."""
    jobs = (config.get_config("small") for config in (vae, motion_vae, tora))
    assert len({job.tora.stdit.variant for job in jobs}) == 1
