"""The measures on sprites against truth, through compression and blur."""

import functools

import cv2
import numpy as np
import pytest

from tora_jax.data.sprites.clips import WORLDS, Sprite, make_clip
from tora_jax.data.sprites.shapes import COLOURS, SHAPES
from tora_jax.evals.sprite_metrics import centroid, name_colour, name_shape, path_error
from tora_jax.io.video import read_video, write_video

COUNT = 24


@functools.cache
def clips(split, count=COUNT):
    return [make_clip(i, split) for i in range(count)]


def still(clip):
    """The background of a clip, about."""
    return np.repeat(np.median(clip.video, axis=0, keepdims=True).astype(np.uint8), len(clip.video), axis=0)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """Clips of one object, blurred by 1 pixel and sent through a file."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"

    def send(clip):
        blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1) for frame in clip.video])
        write_video(path, blurred, clip.fps)
        return read_video(path)[0]

    return [(clip, send(clip)) for clip in clips("benchmark_one", 40)]


def error(video, clip):
    return path_error(video, [sprite.colour for sprite in clip.sprites], clip.tracks)


@pytest.mark.parametrize("split", ["benchmark_one", "benchmark_two"])
def test_truth_is_within_its_bound(split):
    found = [error(clip.video, clip) for clip in clips(split)]
    assert np.mean([f["error"] for f in found]) < 0.002
    assert max(f["error"] for f in found) < 0.004
    assert all(f["found"] == 1 for f in found)


def test_through_blur_and_compression(compressed):
    found = [error(video, clip) for clip, video in compressed]
    assert np.mean([f["error"] for f in found]) < 0.002
    assert max(f["error"] for f in found) < 0.005
    colours = [name_colour(video, clip.tracks[0]) == clip.sprites[0].colour for clip, video in compressed]
    assert np.mean(colours) >= 0.98
    shapes = [
        name_shape(video, clip.tracks[0], clip.sprites[0].colour) == clip.sprites[0].shape for clip, video in compressed
    ]
    assert np.mean(shapes) >= 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_known(shape, monkeypatch):
    """In the smallest and the largest sizes of both versions, next to nothing of another colour."""
    for index, size in enumerate(size for world in WORLDS.values() for size in world.sizes):
        drawn = functools.partial(Sprite, shape, fill="plain", size=size)
        monkeypatch.setattr(
            "tora_jax.data.sprites.clips._sprite", lambda _, colour, *world, drawn=drawn: drawn(colour=colour)
        )
        clip = make_clip(index, "benchmark_one")
        assert name_shape(clip.video, clip.tracks[0], clip.sprites[0].colour) == shape


def test_a_known_shift_is_read():
    for clip in clips("benchmark_one")[:5]:
        shifted = clip.tracks + np.float32([0.03, -0.04])
        got = path_error(clip.video, [clip.sprites[0].colour], shifted)["error"]
        assert got == pytest.approx(0.05, abs=0.004)


def test_distances_are_shares_of_the_width():
    clip = clips("benchmark_one")[0]
    wide = np.concatenate([clip.video, still(clip)], axis=2)
    tracks = clip.tracks * np.float32([0.5, 1])
    moved = tracks + np.float32([0, 0.2])  # of the height, so a tenth of the width
    got = [path_error(wide, [clip.sprites[0].colour], t)["error"] for t in (tracks, moved)]
    assert got == pytest.approx([0, 0.1], abs=0.004)


def test_two_objects_in_either_order():
    clip = clips("benchmark_two")[0]
    assert error(clip.video, clip) == path_error(
        clip.video, [sprite.colour for sprite in clip.sprites], clip.tracks[::-1]
    )


def test_paths_of_others_read_far_more():
    found = [
        path_error(clip.video, [clip.sprites[0].colour], other.tracks)["error"]
        for clip, other in zip(clips("benchmark_one"), clips("benchmark_one")[1:], strict=False)
    ]
    assert np.mean(found) > 0.2


def test_nothing_there():
    clip = clips("benchmark_one")[0]
    colour, empty = clip.sprites[0].colour, clip.video[:, :1, :1].repeat(128, axis=1).repeat(128, axis=2)
    places, found = centroid(empty, COLOURS[colour])
    assert not found.any()
    np.testing.assert_array_equal(places, 0.5)
    assert path_error(empty, [colour], clip.tracks)["found"] == 0
    assert name_colour(empty, clip.tracks[0]) is None
    assert name_shape(empty, clip.tracks[0], colour) is None


def test_an_object_that_is_gone_for_some_frames():
    clip = clips("benchmark_one")[0]
    colour = COLOURS[clip.sprites[0].colour]
    video = clip.video.copy()
    video[6:9], video[14:] = still(clip)[:3], still(clip)[:3]
    places, found = centroid(video, colour)
    np.testing.assert_array_equal(np.flatnonzero(~found), [6, 7, 8, 14, 15, 16])
    np.testing.assert_allclose(places[7], (places[5] + places[9]) / 2, atol=1e-6)
    np.testing.assert_array_equal(places[14:], np.repeat(places[13:14], 3, axis=0))


def test_near_chooses_between_objects_of_a_colour():
    """The clip beside itself, with a smaller object: without a hint the larger one, with it the one on the path."""
    clip = clips("benchmark_one")[0]
    small = np.stack([cv2.resize(frame, (96, 128), interpolation=cv2.INTER_AREA) for frame in clip.video])
    both = np.concatenate([clip.video, small], axis=2)
    width = both.shape[2]
    colour = COLOURS[clip.sprites[0].colour]
    left = clip.tracks[0] * np.float32([128 / width, 1])
    right = clip.tracks[0] * np.float32([96 / width, 1]) + np.float32([128 / width, 0])
    np.testing.assert_allclose(centroid(both, colour)[0], left, atol=0.006)
    np.testing.assert_allclose(centroid(both, colour, near=right)[0], right, atol=0.006)
