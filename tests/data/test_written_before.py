"""Sets that the code before the redesign (commit 65ee8fe) wrote: read as ever, and written as ever.

`tests/golden/written_before` holds three sprites, the precomputed set of these, and a curated video with the files of
its stages. Pixels and latents are compared within a tolerance: encoders and processors round in their own ways.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tora_jax.configs import curate

from tora_jax.data import pipeline, sources
from tora_jax.data.precompute import cache
from tora_jax.data.precompute.cache import Options, precompute
from tora_jax.data.sprites.dataset import SpritesConfig, build_sprites
from tora_jax.io.video import read_video

BEFORE = Path(__file__).parent.parent / "golden" / "written_before"
SPRITES = SpritesConfig(name="least", side=32, frames=5, clips={"train": 3})
OPTIONS = Options(frames=5, height=32, width=32, motion="sparse", variants=2, max_tracks=2)


def records(folder):
    source = sources.open_source(folder, "train")
    return [source[i] for i in range(len(source))]


def info(folder):
    """What TFDS says of a set, without the number of bytes, which depends on the video encoder."""
    found = json.loads((folder / "dataset_info.json").read_text())
    for split in found["splits"]:
        split.pop("numBytes", None)
    return found, json.loads((folder / "features.json").read_text())


def batch_of(folder, motion, models):
    config = {
        "sources": (folder,),
        "buckets": ({"frames": 5, "height": 32, "width": 32, "fps": 0.0, "batch": 3, "weight": 1.0},),
        "motion": motion,
        "tracks": "given",
        "max_tracks": 2,
        "crop": 0,
        "object_masks": False,
        "frame_masks": {},
        "workers": 0,
        "prefetch": 1,
        "damaged_share": 0.0,
    }
    options = {"latent_frames": models.vae.latent_frames, "tokenizer": models.tokenizer, "training": False}
    batches = pipeline.batches(config, "train", seed=0, **options)
    try:
        return next(batches)
    finally:
        batches.close()


def test_sprites(tiny_models, tmp_path):
    folder = build_sprites(tmp_path, SPRITES)
    assert info(folder) == info(BEFORE / "sprites")
    for got, want in zip(records(folder), records(BEFORE / "sprites"), strict=True):
        assert got.keys() == want.keys()
        pixels, before = (read_video(record.pop("video"))[0].astype(float) for record in (got, want))
        np.testing.assert_allclose(pixels, before, atol=12)
        for name in got:
            np.testing.assert_equal(got[name], want[name], err_msg=name)
    batch = batch_of(BEFORE / "sprites", "dense", tiny_models)
    assert batch["video"].shape == batch["maps"].shape == (3, 5, 32, 32, 3)


def test_precomputed_set(tiny_models, tmp_path):
    folder = precompute(tiny_models, BEFORE / "sprites", tmp_path / "set", OPTIONS, progress=False)
    assert info(folder) == info(BEFORE / "precomputed")
    made, before = (json.loads((f / sources.MADE).read_text()) for f in (folder, BEFORE / "precomputed"))
    of_this_machine = ("source", "checksum")
    assert [(name, made[name]) for name in made if name not in of_this_machine] == [
        (name, before[name]) for name in before if name not in of_this_machine
    ]
    for got, want in zip(records(folder), records(BEFORE / "precomputed"), strict=True):
        assert got.keys() == want.keys()
        for name in got:
            if isinstance(want[name], np.ndarray):
                np.testing.assert_allclose(got[name], want[name], atol=2e-3, rtol=2e-3, err_msg=name)
            else:
                assert got[name] == want[name]
    batch = batch_of(BEFORE / "precomputed", "sparse", tiny_models)
    assert batch["latent_mean"].shape == batch["motion_mean"].shape == (3, 2, 4, 4, 4)


def test_a_precomputed_set_is_not_made_again(tiny_models, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(BEFORE / "precomputed", folder)
    made = json.loads((folder / sources.MADE).read_text())
    source = BEFORE / "sprites"
    made |= {"source": str(source.absolute()), "checksum": cache.checksum(tiny_models, OPTIONS)}
    (folder / sources.MADE).write_text(json.dumps(made))
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert precompute(tiny_models, source, folder, OPTIONS, progress=False) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    with pytest.raises(ValueError, match="was made with seed 0, not 1"):
        precompute(tiny_models, source, folder, dataclasses.replace(OPTIONS, seed=1), progress=False)


def test_curated_shards():
    (record,) = records(BEFORE / "curated")
    assert record["caption"] == "An ellipse moves. motion score: 2.5. camera motion: static."
    assert read_video(record["video"])[0].shape == (17, 144, 160, 3)
    assert sources.open_source(BEFORE / "curated", "train").info(0) == (17, 144, 160, 8.0)


@pytest.mark.parametrize("begun", [True, False])
def test_curation(tmp_path, monkeypatch, begun):
    """It writes the same set. The stages' files of then stay, and are made anew: their code has changed since."""
    pytest.importorskip("apache_beam")
    from tora_jax.data.curate import pipeline as curation

    monkeypatch.chdir(tmp_path)  # the records name the video as it was given
    shutil.copytree(BEFORE / "videos", "videos")
    output = Path("curated")
    if begun:
        shutil.copytree(BEFORE / "curated" / "work", output / "work")
    options = curate.get_config().to_dict()
    options["shards"]["validation"] = 0.0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    stats = curation.run(["videos/*.mp4"], str(output), options)
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert stats == json.loads((BEFORE / "curated" / "stats.json").read_text())
    made = [path for path in (BEFORE / "curated").rglob("*") if path.is_file()]
    files = {path.relative_to(BEFORE / "curated") for path in made}
    ours = {path.relative_to(output) for path in after}
    files, ours = ({path for path in found if path.parts[0] != "work"} for found in (files, ours))
    assert ours - files == {Path("report.html")}  # its pictures are not compared
    for path in files:
        if path.suffix in (".json", ".npy"):
            assert (output / path).read_bytes() == (BEFORE / "curated" / path).read_bytes(), path
    assert tfds.builder_from_directory(stats["data"]).info.splits["train"].num_examples == 1
    (got,), (want,) = records(output), records(BEFORE / "curated")
    for name in want:
        np.testing.assert_equal(got[name], want[name], err_msg=name)
