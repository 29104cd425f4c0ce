"""The overlay shows the path where the tracks put it."""

import numpy as np
import pytest

from tora_jax.io.overlay import draw_tracks


@pytest.mark.parametrize(("height", "width"), [(128, 128), (720, 1280)])
def test_the_dot_is_centred_on_the_point_and_the_path_stays(height, width):
    video = np.full((4, height, width, 3), 120, np.uint8)
    track = np.linspace([0.2, 0.3], [0.8, 0.6], 4)[None]
    drawn = draw_tracks(video, track)
    assert (video == 120).all()
    changed = (drawn != video).any(-1)
    # Frame 0 holds the dot alone: its centre of mass is the point, to a fraction of a pixel.
    center = np.argwhere(changed[0]).mean(0)[::-1]
    np.testing.assert_allclose(center, track[0, 0] * (width, height) - 0.5, atol=0.3)
    for t in range(1, 4):
        assert changed[t].sum() > changed[t - 1].sum()
        for x, y in track[0, : t + 1]:
            assert changed[t, round(y * height - 0.5), round(x * width - 0.5)]
    assert changed[-1].mean() < 0.05


def test_each_track_has_its_own_colour():
    tracks = np.array([[[0.25, 0.5]], [[0.5, 0.5]], [[0.75, 0.5]]])
    drawn = draw_tracks(np.zeros((1, 64, 64, 3), np.uint8), tracks)
    assert len({tuple(drawn[0, 32, x]) for x in (16, 32, 48)}) == 3


def test_points_on_the_edge_and_no_tracks():
    video = np.zeros((2, 16, 16, 3), np.uint8)
    assert draw_tracks(video, np.array([[[0.0, 0.0], [1.0, 1.0]]])).any()
    assert not draw_tracks(video, np.zeros((0, 2, 2))).any()
