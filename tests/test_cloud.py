"""gs:// and s3:// as a person meets them: python -m pytest -m slow tests/test_cloud.py

pip install 'tora_jax[cloud]' gcp-storage-emulator 'moto[server]'
"""

import contextlib
import importlib
import io
import shutil
import subprocess
import sys
import uuid
import warnings

import numpy as np
import pytest
from PIL import Image

from convert_weights import __main__ as convert_weights
from tests import odd_videos, training_runs
from tests.training_runs import ROOT
from tora_jax import command_line
from tora_jax.data import sources
from tora_jax.data.precompute import __main__ as precompute
from tora_jax.io import files, safetensors_io
from tora_jax.io.video import read_video, write_video
from tora_jax.sampling import __main__ as sampling
from tora_jax.training import status

# The tests upload weights themselves; gcsfs sends them in one piece, of which aiohttp warns.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")]
SMALL = ("--steps=1", "--num_frames=5", "--height=32", "--width=32", "--quiet")
BUCKETS = "({'frames':5,'height':32,'width':32,'fps':0.0,'batch':4,'weight':1.0},)"


@pytest.fixture(scope="module", autouse=True)
def services(tmp_path_factory):
    """Both services on this machine, each with an empty bucket of that name."""
    gcs = importlib.import_module("benchmarks.gcs")
    moto = importlib.import_module("moto.server")
    with pytest.MonkeyPatch.context() as patch, gcs.serve() as port:
        server = moto.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        host, at = server.get_host_and_port()
        for name, value in {**gcs.environment(port), **keys, "AWS_ENDPOINT_URL": f"http://{host}:{at}"}.items():
            patch.setenv(name, value)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        files.path("s3://bucket/x").fs.mkdir("bucket")
        yield
        server.stop()


@pytest.fixture(params=["gs", "s3"])
def bucket(request):
    return files.path(f"{request.param}://bucket/{uuid.uuid4().hex}")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return training_runs.write_records(tmp_path_factory.mktemp("data") / "clips", train=8, validation=4)


def send(here, folder):
    for name in files.sizes(here):
        (folder / name).send(here / name)
    return folder


@pytest.fixture
def weights(bucket, tiny_release):
    return send(tiny_release, bucket / "weights")


def run(main, *arguments):
    """A command in this process: its exit code, and what it says on stdout and stderr."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr), warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)  # the command's own lines
        try:
            command_line.run(main, ["command", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code
    return code, stdout.getvalue(), stderr.getvalue()


def sample(*arguments):
    return run(sampling._sample, *SMALL, *arguments)


def test_sampling(bucket, weights, tmp_path):
    """In a process of its own, as its services are told by the environment; then a batch."""
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "p.png")
    (bucket / "p.png").send(tmp_path / "p.png")
    (bucket / "t.txt").write_text("20,20\n200,120\n")
    (bucket / "b.jsonl").write_text(f'{{"name": "one", "trajectories": ["{bucket}/t.txt"]}}\n')
    given = (f"--image={bucket}/p.png", f"--condition=-1={bucket}/p.png:0.5", f"--trajectory={bucket}/t.txt")
    command = [sys.executable, "sample.py", f"--weights={weights}", *SMALL, *given, f"--out={bucket}/o/v.mp4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(files.sizes(bucket / "o")) == ["v.json", "v.mp4", "v_flow.mp4", "v_trajectory.mp4"]
    code, _, said = sample(f"--weights={weights}", f"--batch={bucket}/b.jsonl", f"--out={bucket}/m")
    assert code == 0, said
    assert "one.mp4" in files.sizes(bucket / "m")
    assert not (ROOT / f"{bucket.scheme}:").exists()


def test_onto_a_mesh(bucket, weights, tiny_release):
    """Two videos on two devices, as with the weights of a disk."""
    (bucket / "b.jsonl").write_text('{"name": "one"}\n{"name": "two"}\n')
    for name, place in (("here", tiny_release), ("there", weights)):
        code, _, said = sample(
            f"--weights={place}", f"--batch={bucket}/b.jsonl", f"--out={bucket}/{name}", "--mesh=data=2"
        )
        assert code == 0, said
    for name in ("one.mp4", "two.mp4"):
        assert (bucket / "here" / name).read_bytes() == (bucket / "there" / name).read_bytes()


def test_no_such_bucket(bucket):
    code, _, said = sample(f"--out={bucket.scheme}://none/v.mp4")
    assert code == 2
    assert said.startswith(f"command: error: --out {bucket.scheme}://none/v.mp4: cannot write there (no such bucket")
    assert said.count("\n") == 1


def test_sources(bucket, clips, tmp_path):
    folder = training_runs.write_folder(tmp_path / "videos", train=2)
    shutil.make_archive(str(tmp_path / "clips"), "tar", folder / "train")
    (bucket / "clips.tar").send(tmp_path / "clips.tar")
    for here, there in ((clips, send(clips, bucket / "records")), (folder, send(folder, bucket / "videos"))):
        ours, theirs = (sources.open_source(place, "train") for place in (here, there))
        assert sources.digest(ours) == sources.digest(theirs)
        assert ours.info(0) == theirs.info(0)
    assert len(sources.open_source(bucket / "clips.tar", "train")) == 2


def test_conversion(bucket, weights):
    command = (convert_weights._convert, "stdit3", weights, bucket / "out.safetensors", "--reverse")
    code, _, said = run(*command)
    assert code == 0, said
    assert "x_embedder.proj.weight" in safetensors_io.read_header(bucket / "out.safetensors")
    code, _, said = run(*command)
    assert code == 2
    assert "exists already" in said


def test_a_cache(bucket, weights, clips):
    """Precomputed from a bucket into it, and the same when it is there already."""
    data, out = send(clips, bucket / "clips"), bucket / "cached"
    command = [precompute.main, f"--source={data}", f"--weights={weights}", f"--out={out}"]
    command += ["--num_frames=5", "--height=32", "--width=32", "--motion=sparse", "--tracks=given"]
    code, _, said = run(*command)
    assert code == 0, said
    assert len(sources.open_source(out, "train")) == 8
    before = files.sizes(bucket)
    code, _, said = run(*command)
    assert code == 0, said
    assert files.sizes(bucket) == before


def test_curation(bucket, tmp_path):
    """From videos in a bucket to shards there, and nothing is done twice."""
    pytest.importorskip("apache_beam")
    from tora_jax.data.curate import __main__ as curate

    for name, seed in (("a", 1), ("more/b", 2)):
        write_video(tmp_path / "v.mp4", odd_videos.good(seed=seed), odd_videos.FPS)
        (bucket / f"raw/{name}.mp4").send(tmp_path / "v.mp4")
    command = [curate.main, f"--input={bucket}/raw/**/*.mp4", f"--output={bucket}/curated"]
    command += ["--config.shards.validation=0.0"]
    code, said, wrong = run(*command)
    assert code == 0, wrong
    assert said.startswith("2 of 2 files used, 2 of 2 clips kept")
    found = sources.open_source(bucket / "curated", "train")
    assert [len(read_video(found[i]["video"])[0]) for i in range(len(found))] == [17, 17]
    work = bucket / "curated/work"
    before = {name: (work / name).version() for name in files.sizes(work)}
    code, again, wrong = run(*command)
    assert (code, again) == (0, said), wrong
    assert before == {name: (work / name).version() for name in files.sizes(work)}


def train(workdir, data, *more):
    settings = ("evaluation.clips=0", "log_every=1", "save_every=2", "eval_every=1000", f"data.buckets={BUCKETS}")
    config = [f"--config.{setting}" for setting in (*settings, f"data.sources=('{data}',)", *more)]
    workdir = f"--workdir={workdir}"
    return run(
        training_runs.train.main, f"--config={ROOT}/configs/tora.py:stage=2,runlocal", workdir, "--quiet", *config
    )


def test_a_training_that_is_gone_on_with(clips, tmp_path):
    """In gs:// as on a disk, with the newest checkpoint half-written in between."""
    bucket = files.path(f"gs://bucket/{uuid.uuid4().hex}")
    data = send(clips, bucket / "clips")
    code, _, said = train(tmp_path / "run", clips, "steps=6")
    assert code == 0, said
    code, _, said = train(bucket / "run", data, "steps=4")
    assert code == 0, said
    files.remove(bucket / "run/release")
    for name in files.sizes(bucket / "run/checkpoints/4"):
        if name != "commit_success.txt":
            whole = bucket / "run/checkpoints/4" / name
            (bucket / "run/checkpoints/5" / name).write_bytes(whole.read_bytes())
    code, _, said = train(bucket / "run", data, "steps=6", "resume", "restartable")
    assert code == 0, said
    on_disk, in_bucket = (
        [line for line in training_runs.metrics(files.path(place)) if "loss" in line]
        for place in (tmp_path / "run", files.local_folder(bucket / "run"))
    )
    assert on_disk == in_bucket
    for part in ("tora", "vae", "motion_vae", "t5"):
        name = f"run/release/{part}.safetensors"
        assert (tmp_path / name).read_bytes() == (bucket / name).read_bytes()
    code, said, _ = run(status.main, bucket / "run")
    assert code == 0
    assert "step 6 of 6 (100.0 %), finished" in said


def test_checkpoints_in_other_buckets(clips):
    code, _, said = train("s3://bucket/run", clips, "steps=1")
    assert code == 2
    assert "checkpoints are in gs:// or on a disk" in said
