"""Lucas-Kanade on clips whose tracks are known."""

import cv2
import numpy as np
import pytest

from tora_jax.data.sprites.clips import make_clip
from tora_jax.evals.track_lk import track_lk
from tora_jax.evals.traj_error import traj_error

SIZE = (128, 128)


@pytest.fixture(scope="module")
def tracked():
    """100 clips of 128 pixels, half of them with one object, with the tracker's word on them."""
    clips = [make_clip(i, split) for split in ("benchmark_one", "benchmark_two") for i in range(50)]
    return [(clip, *track_lk(clip.video, clip.tracks[:, 0])) for clip in clips]


def test_truth_is_under_a_pixel(tracked):
    errors = [traj_error(clip.tracks, found, seen, SIZE) for clip, found, seen in tracked]
    assert np.mean([e["l1_visible"] for e in errors]) < 0.3
    assert np.mean([e["l1_visible"] < 1 for e in errors]) >= 0.98
    assert np.mean([e["visible"] for e in errors]) > 0.98
    assert all(found.dtype == np.float32 and seen.dtype == bool for _, found, seen in tracked)


@pytest.mark.parametrize("shift", [2, 5, 12])
def test_a_known_shift_of_the_path_is_read(tracked, shift):
    """The tracks start where the objects are; the path that was given lies `shift` pixels beside theirs."""
    offset = np.float32([0, shift / 128])
    read = [traj_error(clip.tracks + offset, found, seen, SIZE)["l1"] for clip, found, seen in tracked]
    assert np.mean(read) == pytest.approx(shift, abs=0.3)


def test_a_known_shift_of_the_video_is_read(tracked):
    """All frames but the first moved by 6 pixels, picture and all (so what is seen in a ring's middle moves, too)."""
    read = []
    for clip, _, _ in tracked[:20]:
        if clip.tracks[0, :, 0].max() < 0.8 and clip.sprites[0].shape not in ("ring", "zero"):
            video = np.concatenate([clip.video[:1], np.roll(clip.video[1:], 6, axis=2)])
            found, seen = track_lk(video, clip.tracks[:, 0])
            read.append(traj_error(clip.tracks, found, seen, SIZE)["l1"])
    assert len(read) > 5
    np.testing.assert_allclose(read, 6 * 16 / 17, atol=0.3)


def test_unrelated_tracks_read_ten_times_more(tracked):
    true = np.mean([traj_error(clip.tracks, found, seen, SIZE)["l1"] for clip, found, seen in tracked])
    others = [
        traj_error(clip.tracks, np.resize(other, found.shape), seen, SIZE)["l1"]
        for (clip, found, seen), (_, other, _) in zip(tracked, [*tracked[1:], tracked[0]], strict=True)
    ]
    assert np.mean(others) > 10 * true


def test_behind_each_other():
    """Clips of the test split: objects cover each other, and are found again."""
    off, seen_again = [], []
    for i in range(20):
        clip = make_clip(i, "test")
        found, seen = track_lk(clip.video, clip.tracks[:, 0])
        both = seen & clip.visible & clip.visible[:, :1]
        off.append((np.abs(found - clip.tracks).sum(-1) * 128)[both])
        seen_again.append(seen[clip.visible])
    assert np.concatenate(off).mean() < 1
    assert np.concatenate(seen_again).mean() > 0.95


def test_an_object_that_vanishes_is_lost_where_it_was():
    clip = make_clip(0, "benchmark_one")
    still = np.median(clip.video, axis=0).astype(np.uint8)
    video = clip.video.copy()
    video[9:] = still
    found, seen = track_lk(video, clip.tracks[:, 0])
    assert seen[:, :9].all()
    assert not seen[:, 9:].any()
    np.testing.assert_array_equal(found[:, 9:], np.repeat(found[:, 8:9], 8, axis=1))


@pytest.mark.parametrize("scale", [1, 5])
def test_a_moving_camera(scale):
    """A photograph-like texture slides by 2.5 and 1.5 pixels a frame, small and large."""
    world = np.random.default_rng(0).normal(size=(160, 160, 3))
    world = cv2.resize(cv2.GaussianBlur(world, (0, 0), 2), None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    world = np.clip(128 + 50 * world / world.std(), 0, 255).astype(np.float32)
    side, frames = 112 * scale, 8
    move = np.outer(np.arange(frames), [-2.5, -1.5]) * scale
    video = np.stack(
        [cv2.warpAffine(world, np.array([[1, 0, dx], [0, 1, dy]]), (side, side)) for dx, dy in move - 2 * scale]
    ).astype(np.uint8)
    points = np.array([[0.5, 0.5], [0.6, 0.4], [0.45, 0.7]])
    found, seen = track_lk(video, points)
    want = points[:, None] + move / side
    assert seen.all()
    assert np.abs(found - want).max() * 112 < 0.5


def test_edges_of_the_signature():
    video = make_clip(0, "benchmark_one").video
    found, seen = track_lk(video, np.zeros((0, 2), np.float32))
    assert found.shape == (0, 17, 2)
    assert seen.shape == (0, 17)
    found, seen = track_lk(video[:1], np.array([[0.5, 0.5], [0.0, 1.0]]))
    np.testing.assert_allclose(found, [[[0.5, 0.5]], [[0, 1]]], atol=1e-6)
    assert seen.all()
    found, seen = track_lk(video, np.array([[1.2, 0.5]]))
    np.testing.assert_allclose(found, np.full((1, 17, 2), [1.2, 0.5]), atol=1e-6)
    assert not seen.any()
