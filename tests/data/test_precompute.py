"""Precomputed sets: equal to encoding by hand, readable by the pipeline, and whole after an interruption."""

import dataclasses
import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import records
from tora_jax import command_line
from tora_jax.conditioning import motion_maps, text
from tora_jax.data import array_record, pipeline, sources
from tora_jax.data.precompute import __main__ as command
from tora_jax.data.precompute import cache
from tora_jax.data.precompute.cache import Options, precompute
from tora_jax.errors import UserError
from tora_jax.io.video import read_video, resize_crop

OPTIONS = Options(frames=5, height=32, width=48, motion="sparse", variants=3, max_tracks=2)


@pytest.fixture(scope="module")
def written():
    return records.clips(7)


@pytest.fixture(scope="module")
def folder(written, tmp_path_factory):
    return records.write(tmp_path_factory.mktemp("data") / "tiny", {"train": written})


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 3)


def run(models, folder, out, options=OPTIONS, **changes):
    return precompute(models, folder, out, options, **{"batch": 2, "progress": False, **changes})


def read(folder, split="train"):
    source = sources.open_source(folder, split)
    return [source[i] for i in range(len(source))]


def config(folder, batch=2, motion="sparse"):
    return {
        "sources": (folder,),
        "buckets": ({"frames": 5, "height": 32, "width": 48, "fps": 0.0, "batch": batch, "weight": 1.0},),
        "motion": motion,
        "tracks": "given",
        "max_tracks": 2,
        "crop": 0,
        "object_masks": False,
        "frame_masks": {"image_head": 0.5},
        "workers": 0,
        "prefetch": 1,
        "damaged_share": 0.0,
    }


def batches(config, **options):
    return pipeline.batches(config, "train", seed=0, latent_frames=records.latent_frames, **options)


def by_hand(vae, params):
    """Clip and key -> mean and deviation of what `VideoVAE.encode` draws, from its parts."""

    @jax.jit
    def posterior(clip, key):
        video = clip[None].astype(jnp.float32) / 127.5 - 1
        latent = vae.apply({"params": params}, video, key, method="moments").latent
        shift, scale = params["shift"], params["scale"]
        return ((latent.mean - shift) / scale)[0], (jnp.exp(0.5 * latent.logvar) / scale)[0]

    return posterior


def test_equal_to_encoding_by_hand(tiny_models, written, folder, tmp_path):
    out = run(tiny_models, folder, tmp_path / "cached")
    found = read(out)
    assert len(found) == 7
    of_video = by_hand(tiny_models.vae, tiny_models.params["vae"])
    of_maps = by_hand(tiny_models.motion_vae, tiny_models.params["motion_vae"])
    for i, (got, record) in enumerate(zip(found, written, strict=True)):
        assert got["caption"] == record["caption"]
        assert (got["fps"], got["height"], got["width"]) == (8, 32, 48)
        clip = resize_crop(read_video(record["video"])[0][:5], 32, 48)
        key = jax.random.fold_in(jax.random.key(OPTIONS.seed), i)
        mean, std = of_video(clip, key)
        np.testing.assert_allclose(got["latent_mean"], mean, atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(got["latent_std"], std, atol=2e-3, rtol=2e-3)
        assert got["motion_mean"].shape == (3, *mean.shape)
        # The middle 32 of 48 rows are cut out, and tracks move with them.
        top = np.float32((48 - 32) / 2)
        tracks = np.stack([record["tracks"][..., 0], (record["tracks"][..., 1] * 48 - top) / 32], -1)[:, :5]
        maps = [
            motion_maps.flow_to_rgb(motion_maps.displacement_maps(chosen.astype(np.float32), 32, 48, seen))
            for chosen, seen in subsets(tracks, record["visible"][:, :5])
        ]
        for variant in range(3):
            key_of_variant = jax.random.fold_in(key, variant + 1)
            want = [of_maps(one, key_of_variant) for one in maps]
            errors = [np.abs(got["motion_mean"][variant] - mean).max() for mean, _ in want]
            best = int(np.argmin(errors))
            assert errors[best] < 5e-3
            np.testing.assert_allclose(got["motion_std"][variant], want[best][1], atol=5e-3, rtol=5e-3)
    made = json.loads((out / "precompute.json").read_text())
    assert made["weights"] == tiny_models.origin
    assert {name: made[name] for name in ("frames", "variants", "motion", "split")} == {
        "frames": 5,
        "variants": 3,
        "motion": "sparse",
        "split": "train",
    }


def subsets(tracks, visible):
    """All that one draw of at most two tracks can choose, and none."""
    inside = ((tracks >= 0) & (tracks <= 1)).all(-1) & visible
    single = [[i] for i in range(len(tracks))]
    pairs = [[i, j] for i in range(len(tracks)) for j in range(i + 1, len(tracks))]
    for chosen in ([], *single, *pairs):
        yield tracks[chosen].reshape(-1, 5, 2), inside[chosen].reshape(-1, 5)


def test_neither_batch_nor_workers_change_the_result(tiny_models, folder, tmp_path):
    one = read(run(tiny_models, folder, tmp_path / "one"))
    other = read(run(tiny_models, folder, tmp_path / "other", batch=3, workers=1))
    for a, b in zip(one, other, strict=True):
        for name in a:
            if name != "caption":
                np.testing.assert_allclose(a[name], b[name], atol=2e-3, rtol=2e-3)


def test_training_from_it(tiny_models, folder, tmp_path):
    out = run(tiny_models, folder, tmp_path / "cached")
    found = read(out)
    iterator = batches(config(out), tokenizer=tiny_models.tokenizer)
    seen, variants = [], set()
    for _ in range(21):
        batch = next(iterator)
        shapes = {name: (array.dtype.name, array.shape[1:]) for name, array in batch.items()}
        latent = ("float16", (2, 4, 6, 4))
        assert shapes == {
            "latent_mean": latent,
            "latent_std": latent,
            "motion_mean": latent,
            "motion_std": latent,
            "ids": ("int32", (12,)),
            "text_mask": ("bool", (12,)),
            "fps": ("float32", ()),
            "height": ("float32", ()),
            "width": ("float32", ()),
            "frame_mask": ("bool", (2,)),
        }
        for j, mean in enumerate(batch["latent_mean"]):
            (i,) = [i for i, record in enumerate(found) if (record["latent_mean"] == mean).all()]
            pairs = zip(found[i]["motion_mean"], found[i]["motion_std"], strict=True)
            drawn = [
                k
                for k, (m, s) in enumerate(pairs)
                if (m == batch["motion_mean"][j]).all() and (s == batch["motion_std"][j]).all()
            ]
            assert drawn
            variants |= set(drawn)
            ids, _ = tiny_models.tokenizer([text.clean(found[i]["caption"])])
            np.testing.assert_array_equal(batch["ids"][j], ids[0])
            seen.append(i)
    iterator.close()
    assert sorted(seen) == sorted(list(range(7)) * 6)
    assert variants == {0, 1, 2}
    batch = next(still := batches(config(out, motion="none")))
    still.close()
    assert not batch.keys() & {"motion_mean", "ids"}
    for changes, message in (
        ({"motion": "dense"}, "set data.motion to 'sparse'"),
        ({"crop": 16}, "data.crop to 0"),
        ({"sources": (out, folder)}, "precomputed sets and clips do not mix"),
        ({"buckets": ({**config(out)["buckets"][0], "height": 24},)}, "no clip fits"),
    ):
        with pytest.raises(UserError, match=message):
            batches({**config(out), **changes})
    with pytest.raises(UserError, match="is precomputed already"):
        run(tiny_models, out, tmp_path / "twice")


def test_caption_embeddings(tiny_models, written, folder, tmp_path):
    out = run(tiny_models, folder, tmp_path / "cached", dataclasses.replace(OPTIONS, motion="none", text="embedding"))
    iterator = batches(config(out, batch=7, motion="none"), training=False)
    batch = next(iterator)
    iterator.close()
    ids, mask = tiny_models.tokenizer([text.clean(record["caption"]) for record in written])
    want = tiny_models.encode_text(tiny_models.params["t5"], ids, mask)
    assert "ids" not in batch
    assert batch["text"].dtype == np.float16
    np.testing.assert_array_equal(batch["text_mask"], mask)
    np.testing.assert_allclose(batch["text"][mask], np.asarray(want)[mask], atol=2e-3, rtol=2e-3)
    assert not batch["text"][~mask].any()


def test_an_interrupted_run_goes_on(tiny_models, folder, tmp_path, monkeypatch):
    whole = read(run(tiny_models, folder, tmp_path / "whole"))
    encode, calls = cache.make_encoder, []

    def failing(models, seed):
        def call(*args):
            calls.append(len(args[2]))
            if len(calls) == 5:  # the first shard is closed when the second one's first clip is done
                raise KeyboardInterrupt
            return encode(models, seed)(*args)

        return call

    monkeypatch.setattr(cache, "make_encoder", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_models, folder, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(cache, "make_encoder", encode)
    partial = tmp_path / ".cut.partial"
    done = sorted(path.name for path in partial.glob("clips-*"))
    assert len(done) == 1
    stamp = (partial / done[0]).stat().st_mtime_ns
    with pytest.raises(UserError, match=r"\.cut\.partial: was made with variants 3, not 2; choose another folder"):
        run(tiny_models, folder, tmp_path / "cut", dataclasses.replace(OPTIONS, variants=2))
    out = run(tiny_models, folder, tmp_path / "cut", batch=1)
    assert (out / done[0]).stat().st_mtime_ns == stamp
    assert not partial.exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    for got, want in zip(read(out), whole, strict=True):
        np.testing.assert_allclose(got["latent_mean"], want["latent_mean"], atol=2e-3, rtol=2e-3)
    before = (out / "dataset_info.json").stat().st_mtime_ns
    assert run(tiny_models, folder, tmp_path / "cut") == out  # done: nothing happens
    assert (out / "dataset_info.json").stat().st_mtime_ns == before


SLOWLY = """
import sys, time
from tora_jax import command_line
from tora_jax.data.precompute import __main__ as command, cache

make, cache.SHARD = cache.make_encoder, 1

def make_slow(*args):
    encode = make(*args)
    return lambda *clips: (time.sleep(0.3), encode(*clips))[1]

cache.make_encoder = make_slow
command_line.run(command.main, ["precompute", *sys.argv[1:]])
"""


def test_the_command_survives_a_kill(tiny_release, tiny_models, folder, tmp_path):
    arguments = [
        *("--source", str(folder), "--weights", str(tiny_release), "--out", str(tmp_path / "cached")),
        *("--num_frames", "5", "--height", "32", "--width", "48", "--batch", "1"),
        *("--motion", "sparse", "--variants", "3", "--max_tracks", "2"),
    ]
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, *arguments], stderr=subprocess.PIPE)
    partial = tmp_path / ".cached.partial"
    while process.poll() is None and len(list(partial.glob("clips-*"))) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    quickly = SLOWLY.replace("0.3", "0")
    done = subprocess.run([sys.executable, "-c", quickly, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "cached")
    assert not partial.exists()
    for got, want in zip(read(tmp_path / "cached"), read(run(tiny_models, folder, tmp_path / "here")), strict=True):
        assert got["caption"] == want["caption"]
        np.testing.assert_allclose(got["latent_mean"], want["latent_mean"], atol=2e-3, rtol=2e-3)
        np.testing.assert_allclose(got["motion_mean"], want["motion_mean"], atol=2e-3, rtol=2e-3)


def test_damaged_clips_are_left_out(tiny_models, tmp_path):
    """Even where they fill a whole shard (of three)."""
    broken = records.clips(9)
    broken[1]["video"] = b"no video"
    for record in broken[4:7]:
        record["tracks"] = record["tracks"][:, :3]
    folder = records.write(tmp_path / "tiny", {"train": broken})
    for share in (0.1, 0.4):  # after one that is found by the scan; after some that decoding finds
        with pytest.warns(UserWarning, match="left out"), pytest.raises(UserError, match="of 9 clips are damaged"):
            run(tiny_models, folder, tmp_path / "cached", damaged_share=share)
    with pytest.warns(UserWarning, match=r"record 1: damaged and left out \(video: cannot be decoded"):
        out = run(tiny_models, folder, tmp_path / "cached", damaged_share=0.5)
    assert [record["caption"] for record in read(out)] == [broken[i]["caption"] for i in (0, 2, 3, 7, 8)]
    lengths = json.loads((out / "dataset_info.json").read_text())["splits"][0]["shardLengths"]
    assert lengths == ["3", "0", "2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "missing"}, "missing: no such folder"),
        ({"weights": "missing"}, "missing: no such folder; --weights takes a release folder"),
        ({"out": ""}, "is there, and is no precomputed set"),
        ({"num_frames": "10"}, "no clip fits"),
        ({"split": "test"}, "has no split 'test'"),
        ({"variants": "0"}, "at least 1 for batch and variants"),
    ],
)
def test_wrong_arguments(tiny_release, folder, tmp_path, capsys, changes, message):
    values = {
        "source": folder,
        "weights": tiny_release,
        "out": "cached",
        "num_frames": "5",
        "height": "32",
        "width": "48",
    }
    places = {name: tmp_path / value for name, value in changes.items() if name in ("source", "weights", "out")}
    arguments = [
        f"--{name}={value}" for name, value in {**values, "out": tmp_path / "cached", **changes, **places}.items()
    ]
    with pytest.raises(SystemExit) as stop:
        command_line.run(command.main, ["precompute", *arguments])
    told = capsys.readouterr().err
    assert (stop.value.code, told.count("\n")) == (2, 1)
    assert message in told


def test_weights_that_were_trained_further(tiny_models, folder, tmp_path):
    run(tiny_models, folder, tmp_path / "cached")
    params = {**tiny_models.params, "vae": jax.tree.map(lambda x: x + 1e-3, tiny_models.params["vae"])}
    with pytest.raises(UserError, match="was made with checksum"):
        run(dataclasses.replace(tiny_models, params=params), folder, tmp_path / "cached")


def test_a_full_disk(tiny_models, folder, tmp_path, monkeypatch):
    class Full:
        def __init__(self, path, options):
            self.path = path

        def write(self, record):
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(array_record, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"cannot be written .*No space left on device"):
        run(tiny_models, folder, tmp_path / "cached")
    monkeypatch.undo()
    assert len(read(run(tiny_models, folder, tmp_path / "cached"))) == 7


def test_latents_that_are_not_finite(tiny_models, folder, tmp_path):
    params = {**tiny_models.params, "vae": jax.tree.map(lambda x: x * np.nan, tiny_models.params["vae"])}
    with pytest.raises(UserError, match="not all is finite in float16"):
        run(dataclasses.replace(tiny_models, params=params), folder, tmp_path / "cached")
