"""Motion inputs: exact flow, estimated flow, tracks given and drawn."""

import cv2
import numpy as np
import pytest

from tora_jax.conditioning import motion_maps
from tora_jax.data import motion
from tora_jax.data.sprites.clips import make_clip


@pytest.fixture(scope="module")
def clip():
    """A clip with two objects that never cover each other."""
    return make_clip(0, "benchmark_two", size=64, frames=9)


def textured(shifts, size=96):
    """A patch that moves by `shifts` (x, y) from frame to frame over a still background."""
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 255, (size, size, 3)).astype(np.uint8), (0, 0), 2)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    video, at = [], np.array([12, 16])
    for shift in [(0, 0), *shifts]:
        at = at + shift
        frame = 255 - texture
        frame[at[1] : at[1] + 48, at[0] : at[0] + 48] = texture[:48, :48]
        video.append(frame)
    return np.stack(video)


def test_exact_flow_moves_with_the_tracks(clip):
    maps = motion.dense_flow(clip.video, clip.labels, clip.tracks)
    assert not maps[0].any()
    for i, track in enumerate(clip.tracks):
        moves = np.diff(track, axis=0) * 64
        for j, move in enumerate(moves):
            on = clip.labels[j] == i + 1
            assert on.any()
            np.testing.assert_array_equal(maps[j + 1][on], np.broadcast_to(move, (on.sum(), 2)))
    assert not maps[1:][clip.labels[:-1] == 0].any()


def test_estimated_flow_finds_the_shift():
    maps = motion.dense_flow(textured([(3, -1), (2, 2)]))
    assert not maps[0].any()
    np.testing.assert_allclose(maps[1, 28:52, 24:48].mean((0, 1)), (3, -1), atol=0.25)
    np.testing.assert_allclose(maps[2, 27:51, 27:51].mean((0, 1)), (2, 2), atol=0.25)
    assert np.abs(maps[1:, 80:, 80:]).max() < 0.5


def test_chosen_tracks_are_seen_moving():
    rng = np.random.default_rng(0)
    tracks = np.repeat(rng.random((6, 1, 2)), 5, 1).astype(np.float32)
    tracks[[0, 2, 3], 2:] += 0.1
    visible = np.ones((6, 5), bool)
    visible[3, 1:] = False  # moves where nobody sees it
    counts, chosen = set(), set()
    for _ in range(100):
        some, seen = motion.choose_tracks(rng, tracks, visible, 4)
        assert len(some) == len(seen)
        found = [next(i for i in range(6) if (track == tracks[i]).all()) for track in some]
        assert found == sorted(set(found))
        counts.add(len(found))
        chosen |= set(found)
    assert chosen == {0, 2}
    assert counts == {1, 2}
    assert not len(motion.choose_tracks(rng, tracks[[1, 4]], visible[[1, 4]], 4)[0])


def test_drawn_tracks_start_inside_objects_and_follow_them(clip):
    rng = np.random.default_rng(0)
    maps = motion.dense_flow(clip.video, clip.labels, clip.tracks)
    counts, objects = set(), set()
    for _ in range(30):
        tracks, visible = motion.draw_tracks(rng, maps, 3, clip.labels)
        assert visible[:, 0].all()
        counts.add(len(tracks))
        x, y = np.round(tracks[:, 0] * 64 - 0.5).astype(int).T
        which = clip.labels[0][y, x]
        assert (which > 0).all()
        objects |= set(which)
        # Bilinear sampling mixes in the still background near an edge; in the middle the track is exact.
        away = np.abs(tracks - tracks[:, :1] - (clip.tracks[which - 1] - clip.tracks[which - 1][:, :1])).max((1, 2))
        assert np.median(away) < 0.5
    assert objects == {1, 2}
    assert counts == {1, 2, 3}


def test_tracks_are_drawn_where_the_flow_is_strong():
    rng = np.random.default_rng(0)
    maps = np.zeros((4, 64, 64, 2), np.float32)
    maps[1:, :, :32] = (0.5, 0)
    maps[1:, :, 32:] = (0, 1.5)
    starts = np.concatenate([motion.draw_tracks(rng, maps, 1)[0][:, 0] for _ in range(400)])
    assert abs((starts[:, 0] > 0.5).mean() - 0.75) < 0.06
    grid = np.unique(np.round(starts * 64 - 0.5, 4))
    assert (np.diff(grid) >= 3.99).all()  # 32 pixels at 480, about 4 at 64


def test_where_nothing_moves_the_maps_are_white():
    rng = np.random.default_rng(0)
    still = np.repeat(textured([])[:1], 5, 0)
    for kind in ("dense", "sparse"):
        assert (motion.motion_maps(rng, kind, "flow", 4, still) == 255).all()
    track = np.full((1, 5, 2), 0.5, np.float32)
    assert (motion.motion_maps(rng, "sparse", "given", 4, still, tracks=track) == 255).all()


def test_maps_of_given_tracks(clip):
    """One track at most: each draw is one of the two."""
    rng = np.random.default_rng(0)
    maps = motion.motion_maps(rng, "sparse", "given", 1, clip.video, tracks=clip.tracks, visible=clip.visible, draws=12)
    want = [
        motion_maps.flow_to_rgb(motion_maps.displacement_maps(clip.tracks[i : i + 1], 64, 64, clip.visible[i : i + 1]))
        for i in range(2)
    ]
    found = [[(one == other).all() for other in want] for one in maps]
    assert np.sum(found, 1).tolist() == [1] * 12
    assert np.any(found, 0).all()


def test_mixed_is_half_and_half(clip):
    rng = np.random.default_rng(0)
    truth = {"labels": clip.labels, "tracks": clip.tracks, "visible": clip.visible}
    maps = motion.motion_maps(rng, "mixed", "given", 3, clip.video, **truth, draws=60)
    dense = motion.motion_maps(rng, "dense", "given", 3, clip.video, **truth)[0]
    assert 0.3 < np.mean([(one == dense).all() for one in maps]) < 0.7
