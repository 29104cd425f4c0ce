"""Curation: tracks inside moving objects."""

import numpy as np
import pytest

from tests import moving
from tora_jax.data.curate import camera, tracks

DIS = camera.make_flow("dis")
SECONDS = 1 / moving.FPS
STATIC = 0.04


@pytest.mark.parametrize("kind", ["still, object", "pan, object", "zoom, object", "shake, object"])
def test_tracks_stay_on_their_objects(kind):
    errors = []
    for seed in range(3):
        clip = moving.make(kind, seed)
        forward, backward = DIS(clip.video), DIS(clip.video[::-1])[::-1]
        masks = camera.analyse(clip.video, forward, SECONDS, STATIC).masks
        paths, visible = tracks.inside_objects(np.random.default_rng(0), clip.video, forward, backward, masks, 8, 4)
        assert paths.shape == (8, 17, 2)  # four from the first frame, four from the ninth
        assert (visible.argmax(1) == np.repeat([0, 8], 4)).all()
        height, width = clip.video.shape[1:3]
        for path, seen in zip(paths, visible, strict=True):
            at = np.flatnonzero(seen)
            assert (np.diff(at) == 1).all()
            x, y = (path[at[0]] * (width, height)).astype(int)
            assert clip.masks[at[0], y, x]
            want = path[at[0]] + clip.path[at] - clip.path[at[0]]
            errors.append(np.linalg.norm((path[at] - want) * (width, height), axis=1).max())
            np.testing.assert_array_equal(path[: at[0]], np.repeat(path[at[0]][None], at[0], 0))
            np.testing.assert_array_equal(path[at[-1] :], np.repeat(path[at[-1]][None], 17 - at[-1], 0))
    assert np.median(errors) < 2  # pixels, of ways of 37 to 96
    assert np.max(errors) < 10


def test_a_covered_point_is_lost():
    """The disc that moves behind another one is lost there; the one in front is not."""
    video, labels = np.zeros((9, 64, 96, 3), np.uint8), np.zeros((9, 64, 96), int)
    rng = np.random.default_rng(0)
    video[:] = moving.scenery(rng, 64, 96)
    skins = moving.scenery(rng, 32, 32), moving.scenery(rng, 32, 32)
    y, x = np.mgrid[:32, :32] - 15.5
    disc = np.hypot(x, y) < 13
    for j in range(9):
        for i, left in enumerate((4 * j, 60 - 4 * j)):  # they meet at frames 4 and 5
            region = video[j, 16:48, left : left + 32]
            region[disc] = skins[i][disc]
            labels[j, 16:48, left : left + 32][disc] = i + 1
    forward, backward = DIS(video), DIS(video[::-1])[::-1]
    masks = labels[:-1] > 0
    paths, visible = tracks.inside_objects(np.random.default_rng(0), video, forward, backward, masks, 8, 40)
    behind = 0
    for path, seen in zip(paths, visible, strict=True):
        x, y = path[0] * (96, 64)
        if labels[0, int(y), int(x)] == 1:
            covered = [np.hypot(x + 4 * j - 76 + 4 * j, y - 32) < 8 for j in range(9)]  # well inside the other disc
            behind += any(covered)
            assert not seen[np.flatnonzero(covered)].any()
        elif labels[0, int(y), int(x)] == 2:
            assert seen[:8].all()
    assert behind >= 2


def test_nothing_moves_no_tracks():
    flow, masks = np.zeros((4, 32, 32, 2), np.float32), np.zeros((4, 32, 32), bool)
    video = np.zeros((5, 32, 32, 3), np.uint8)
    for mask in (masks, ~masks):
        paths, visible = tracks.inside_objects(np.random.default_rng(0), video, flow, flow, mask, 2, 4)
        assert (paths.shape, visible.shape) == ((0, 5, 2), (0, 5))


def test_to_all_frames():
    paths = np.array([[[0.0, 0.5], [0.4, 0.5], [0.4, 0.5]]], np.float32)
    visible = np.array([[True, True, False]])
    got, seen = tracks.to_all_frames(paths, visible, np.array([0, 2, 6]))
    np.testing.assert_allclose(got[0, :, 0], [0, 0.2, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert seen[0].tolist() == [True, True, True, False, False, False, False]
    same, shown = tracks.to_all_frames(paths, visible, np.arange(3))
    np.testing.assert_array_equal(same, paths)
    np.testing.assert_array_equal(shown, visible)
    one, _ = tracks.to_all_frames(paths[:, :1], visible[:, :1], np.array([0]))
    np.testing.assert_array_equal(one, paths[:, :1])
