"""The sprites set: the same everywhere, true to its labels, and the benchmark as it was promised."""

import hashlib
import sys

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from tora_jax import command_line
from tora_jax.conditioning import text
from tora_jax.data import sources
from tora_jax.data.sprites.__main__ import main
from tora_jax.data.sprites.clips import SPLITS, WORLDS, exact_flow, make_clip
from tora_jax.data.sprites.dataset import SpritesConfig, build_sprites
from tora_jax.data.sprites.shapes import BACKGROUNDS, COLOURS, DIGITS, TEXTURES, outline
from tora_jax.errors import UserError
from tora_jax.io.video import read_video

BENCHMARKS = ("benchmark_one", "benchmark_two")


@pytest.fixture(scope="module")
def clips():
    """Some of each split."""
    counts = {"train": 40, "validation": 10, "test": 10, "benchmark_one": 64, "benchmark_two": 64}
    return {split: [make_clip(i, split) for i in range(count)] for split, count in counts.items()}


def every(clips, *splits):
    return [clip for split in splits or clips for clip in clips[split]]


def test_a_clip_is_a_function_of_its_number(clips):
    for split in SPLITS:
        again = make_clip(3, split)
        for name in ("video", "tracks", "visible", "labels"):
            np.testing.assert_array_equal(getattr(again, name), getattr(clips[split][3], name))
        assert again.caption == clips[split][3].caption
    assert not np.array_equal(make_clip(3, seed=1).video, clips["train"][3].video)


def test_version_1_keeps_every_byte(clips):
    """Weights, caches and benchmarks were made with these clips."""
    digest = hashlib.sha256()
    for clip in every(clips):
        digest.update(clip.caption.encode())
        for array in (clip.video, clip.tracks, clip.visible, clip.labels):
            digest.update(array.tobytes())
    assert digest.hexdigest() == "8b3c3e4d08018eadba62b06162f61001caba114c22c7aa77415c281855550d5f"


def test_version_2_is_a_set_of_its_own(clips):
    found = {split: [make_clip(i, split, version=2) for i in range(8)] for split in WORLDS[2].splits}
    assert [*found] == [*SPLITS, "digits"]
    for split, drawn in found.items():
        for clip in drawn:
            assert {sprite.shape in DIGITS for sprite in clip.sprites} == {split == "digits"}
            assert all(0.14 <= sprite.size <= 0.30 for sprite in clip.sprites)
    assert {clip.video.tobytes() for clip in every(found)}.isdisjoint(clip.video.tobytes() for clip in every(clips))
    assert len({clip.video.tobytes() for clip in every(found)}) == 8 * len(found)


def test_no_clip_is_in_two_splits(clips):
    found = every(clips)
    assert len({clip.video.tobytes() for clip in found}) == len({clip.tracks.tobytes() for clip in found}) == len(found)


def test_another_size_shows_the_same_scene(clips):
    large = clips["train"][0]
    small = make_clip(0, size=64)
    np.testing.assert_array_equal(small.tracks, large.tracks)
    assert small.caption == large.caption
    halved = large.video.reshape(17, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - small.video).mean() < 4


def test_forms_and_ranges(clips):
    for clip in every(clips):
        n = len(clip.sprites)
        assert clip.video.shape == (17, 128, 128, 3)
        assert clip.labels.shape == (17, 128, 128)
        assert clip.tracks.shape == (n, 17, 2)
        assert clip.visible.shape == (n, 17)
        assert clip.video.dtype == clip.labels.dtype == np.uint8
        assert clip.tracks.dtype == np.float32
        assert clip.labels.max() <= n <= 3
        assert 0 <= clip.tracks.min() <= clip.tracks.max() <= 1
    assert {len(clip.sprites) for clip in clips["train"]} == {1, 2, 3}
    assert any(not clip.visible.all() for clip in clips["train"])  # some are occluded


# ----------------------------------------------------------------------------------------------------------
# Truth
# ----------------------------------------------------------------------------------------------------------


def centroids(labels, number):
    y, x = np.mgrid[: labels.shape[1], : labels.shape[2]]
    mine = labels == number
    return np.stack([(x * mine).sum((1, 2)), (y * mine).sum((1, 2))], -1) / mine.sum((1, 2))[:, None]


def test_tracks_are_the_centres_of_the_labels(clips):
    """Of the object on top, which nothing covers; pixel = x * width - 0.5.

    Labels are whole pixels: a thin digit of 18 pixels gains or loses enough of them to shift by half a pixel.
    """
    errors = []
    for clip in every(clips):
        pixels = clip.tracks[-1] * 128 - 0.5
        errors.append(np.abs(centroids(clip.labels, len(clip.sprites)) - pixels).max())
    assert np.max(errors) < 0.75
    assert np.mean(errors) < 0.25


def test_the_flow_takes_each_object_to_its_next_place(clips):
    shares = []
    for clip in every(clips, "train", "benchmark_two"):
        flow = exact_flow(clip.labels, clip.tracks)
        assert not flow[0].any()
        for j in range(1, 17):
            assert not flow[j][clip.labels[j - 1] == 0].any()
            for i in range(len(clip.sprites)):
                y, x = np.nonzero(clip.labels[j - 1] == i + 1)
                if not len(y):
                    continue
                step = (clip.tracks[i, j] - clip.tracks[i, j - 1]) * 128
                np.testing.assert_allclose(flow[j][y[0], x[0]], step, atol=1e-4)
                x, y = np.round(np.stack([x, y]) + flow[j][y, x].T).astype(int).clip(0, 127)
                # What is not there any more is at the object's edge, or behind an object in front.
                shares.append((clip.labels[j][y, x] >= i + 1).mean())
    assert np.mean(shares) > 0.93
    assert np.min(shares) > 0.5  # where little of a small star shows


def test_captions_name_what_is_there(clips):
    for clip in every(clips):
        objects, _, background = clip.caption.removesuffix(".").partition(" over ")
        assert objects.replace(" and ", ", ").split(", ") == [
            f"a {clip.sprites[i].name}" for i in np.argsort(clip.tracks[:, 0, 0])
        ]
        assert background == clip.background
        tone, texture = clip.background.split()
        assert tone in BACKGROUNDS
        assert texture in TEXTURES
        colours = [sprite.colour for sprite in clip.sprites]
        assert len(set(colours)) == len(colours)
        assert tone not in colours
        assert text.clean(clip.caption) == clip.caption  # nothing is lost on the way to the tokens
        for i, sprite in enumerate(clip.sprites):
            inside = clip.video[clip.labels == i + 1].astype(float)
            assert np.abs(np.median(inside, 0) / np.array(COLOURS[sprite.colour]) - 1).max() < 0.45
    named = {sprite.shape for clip in every(clips) for sprite in clip.sprites}
    assert len(named) > 12


# ----------------------------------------------------------------------------------------------------------
# The benchmark set
# ----------------------------------------------------------------------------------------------------------


def test_benchmark_sizes_and_paths(clips):
    assert {len(clip.sprites) for clip in clips["benchmark_one"]} == {1}
    assert {len(clip.sprites) for clip in clips["benchmark_two"]} == {2}
    for clip in every(clips, *BENCHMARKS):
        for i, (sprite, track) in enumerate(zip(clip.sprites, clip.tracks, strict=True)):
            assert 0.10 <= sprite.size <= 0.25
            y, x = np.nonzero(clip.labels[0] == i + 1)
            assert max(np.ptp(x), np.ptp(y)) + 1 == pytest.approx(128 * sprite.size, abs=2.5)
            # Seen at 17 points, a path loses what it cuts at its corners.
            assert np.linalg.norm(np.diff(track, axis=0), axis=1).sum() >= 0.4 * 0.9
            assert clip.visible[i].all()


def test_benchmark_backgrounds(clips):
    for clip in every(clips, *BENCHMARKS):
        uncovered = np.ma.array(clip.video.mean(-1), mask=clip.labels > 0).mean(0)
        assert uncovered.std() / 255 >= 0.12


def test_benchmark_pairs_never_meet(clips):
    for clip in clips["benchmark_two"]:
        for labels in clip.labels:  # not even side by side
            first, second = ((labels == i).astype(np.uint8) for i in (1, 2))
            assert not (cv2.dilate(first, np.ones((3, 3))) & second).any()


def test_a_third_of_the_benchmark_pauses_or_turns_sharply(clips):
    odd = []
    for track in (track for clip in every(clips, *BENCHMARKS) for track in clip.tracks):
        steps = np.diff(track, axis=0)
        speed = np.linalg.norm(steps, axis=1)
        angle = np.degrees(np.abs(np.angle(np.exp(1j * np.diff(np.arctan2(steps[:, 1], steps[:, 0]))))))
        moving = (speed[1:] > 1e-3) & (speed[:-1] > 1e-3)
        odd.append((speed < 1e-4).sum() >= 2 or (angle[moving] > 60).any())
    assert 0.25 < np.mean(odd) < 0.5


# ----------------------------------------------------------------------------------------------------------
# The data set
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    scale = SpritesConfig(name="tiny", side=48, frames=9, seed=5, clips={"train": 3, "benchmark_two": 2})
    folder = tmp_path_factory.mktemp("sprites")
    return scale, folder, build_sprites(folder, scale)


def test_records_hold_the_clips(built):
    _, _, folder = built
    builder = tfds.builder_from_directory(folder)
    assert builder.info.full_name == "sprites/tiny/1.1.0"
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {"train": 3, "benchmark_two": 2}
    for split, info in builder.info.splits.items():
        records = {record["tracks"].tobytes(): record for record in builder.as_data_source(split)}
        for i in range(info.num_examples):
            clip = make_clip(i, split, seed=5, size=48, frames=9)
            record = records[clip.tracks.tobytes()]
            video, fps = read_video(record["video"])
            assert np.abs(video.astype(float) - clip.video).mean() < 6
            assert fps == record["fps"] == clip.fps
            assert record["caption"].decode() == clip.caption
            np.testing.assert_array_equal(record["visible"], clip.visible)
            np.testing.assert_array_equal(record["labels"], clip.labels)
            assert [name.decode() for name in record["objects"]["colour"]] == [s.colour for s in clip.sprites]
            np.testing.assert_allclose(record["objects"]["size"], [s.size for s in clip.sprites])
    assert "tensorflow" not in sys.modules


def test_it_is_built_once_and_is_a_source(built):
    scale, folder, version = built
    before = {path: path.stat().st_mtime_ns for path in version.iterdir()}
    assert build_sprites(folder, scale) == version
    assert {path: path.stat().st_mtime_ns for path in version.iterdir()} == before
    assert len(sources.open_source(version, "train")) == 3


def test_mistakes(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        build_sprites(tmp_path / "file" / "deeper")
    for arguments, message in (
        (["--out", str(tmp_path / "file" / "deeper")], "cannot be written"),
        (["--out", str(tmp_path), "--side", "0"], "--side is 0; it must be at least 1"),
        (["--out", str(tmp_path), "--sides", "9"], "unrecognized arguments: --sides 9"),
        (["--out", str(tmp_path), "--version", "3"], "argument --version: invalid choice: 3"),
    ):
        with pytest.raises(SystemExit) as stop:
            command_line.run(main, ["sprites", *arguments])
        told = capsys.readouterr().err
        assert (stop.value.code, told.count("\n")) == (2, 1)
        assert told.startswith("sprites: error: ")
        assert message in told
    with pytest.raises(ValueError, match="no shape 'blob'"):
        outline("blob")
