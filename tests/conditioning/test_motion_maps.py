"""Displacement maps, the colour wheel, and following dense flow."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tora_jax.conditioning import motion_maps

QUICK = settings(max_examples=20, deadline=None, derandomize=True)
SIZE = (48, 64)  # height, width
RADIUS = motion_maps.blur_kernel(*SIZE)[1]


@st.composite
def tracks(draw, least=1, margin=RADIUS + 9):
    """`least` to 4 tracks whose points stay `margin` pixels inside the frame."""
    n, frames, seed = draw(st.integers(least, 4)), draw(st.integers(2, 5)), draw(st.integers(0, 2**32 - 1))
    height, width = SIZE
    low, high = np.array([margin, margin]), np.array([width - 1 - margin, height - 1 - margin])
    pixels = np.random.default_rng(seed).uniform(low, high, (n, frames, 2))
    return ((pixels + 0.5) / (width, height)).astype(np.float32)


# ---------------------------------------------------------------- maps


@QUICK
@given(tracks(), st.integers(-8, 8), st.integers(-8, 8))
def test_a_shift_by_whole_pixels_shifts_the_map(tracks, dx, dy):
    height, width = SIZE
    maps = motion_maps.displacement_maps(tracks, height, width)
    shifted = motion_maps.displacement_maps(tracks + np.float32([dx / width, dy / height]), height, width)
    np.testing.assert_allclose(shifted, np.roll(maps, (dy, dx), axis=(1, 2)), atol=1e-4 * np.abs(maps).max())


@QUICK
@given(tracks(least=2), st.randoms(use_true_random=False))
def test_the_order_of_trajectories_does_not_matter(tracks, random):
    order = list(range(len(tracks)))
    random.shuffle(order)
    visible = np.random.default_rng(0).random(tracks.shape[:2]) < 0.8
    np.testing.assert_array_equal(
        motion_maps.displacement_maps(tracks, *SIZE, visible),
        motion_maps.displacement_maps(tracks[order], *SIZE, visible[order]),
    )


@QUICK
@given(tracks(margin=0))
def test_trajectories_add_and_frame_0_is_zero(tracks):
    maps = motion_maps.displacement_maps(tracks, *SIZE)
    assert maps.shape == (tracks.shape[1], *SIZE, 2)
    assert maps.dtype == np.float32
    assert not maps[0].any()
    alone = sum(motion_maps.displacement_maps(t[None], *SIZE) for t in tracks)
    np.testing.assert_allclose(maps, alone, atol=1e-5 * np.abs(maps).max())


def test_a_still_trajectory_is_white():
    still = np.full((2, 5, 2), 0.4, np.float32)
    maps = motion_maps.displacement_maps(still, *SIZE)
    assert not maps.any()
    assert (motion_maps.flow_to_rgb(maps) == 255).all()
    assert (motion_maps.flow_to_color(maps) == 1).all()


def test_a_pause_has_no_motion_in_its_frames_only():
    x = np.array([0.3, 0.4, 0.4, 0.4, 0.5], np.float32)
    maps = motion_maps.displacement_maps(np.stack([x, np.full(5, 0.5, np.float32)], -1)[None], *SIZE)
    assert maps.any((1, 2, 3)).tolist() == [False, True, False, False, True]


def test_the_displacement_stands_at_the_earlier_point_with_peak_one():
    height, width = 480, 482
    pixels = np.array([[100, 200], [103, 195], [110, 195]])
    maps = motion_maps.displacement_maps(((pixels + 0.5) / (width, height))[None].astype(np.float64), height, width)
    np.testing.assert_allclose(maps[1, 200, 100], [3, -5], atol=1e-4)
    np.testing.assert_allclose(maps[2, 195, 103], [7, 0], atol=1e-4)
    # 480 is the size that the released blur was made for: sigma 10, 99 taps.
    np.testing.assert_allclose(maps[1, 200, 110] / maps[1, 200, 100], np.exp(-0.5), rtol=1e-4)
    assert maps[1, 200, 149].any()
    assert not maps[1, 200, 150].any()


def test_the_blur_follows_the_shorter_side():
    assert motion_maps.blur_kernel(480, 854) == (10, 49)
    assert motion_maps.blur_kernel(854, 480) == (10, 49)
    assert motion_maps.blur_kernel(960, 960) == (20, 98)
    sigma, radius = motion_maps.blur_kernel(96, 128)
    assert sigma == 2
    assert radius == 9


def test_the_two_paths_agree_where_they_must():
    """At 480 pixels, on whole pixels, with nothing shared, the float path is the released one."""
    points = np.array([[[60, 400], [70, 400], [70, 390]], [[2, 479], [0, 470], [9, 460]]])
    tracks = (points + 0.5) / (481, 480)
    got, want = motion_maps.displacement_maps(tracks, 480, 481), motion_maps.released_maps(points, 480, 481)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_border_reflects():
    """Against a blur of the padded map, tap by tap."""
    size, (sigma, radius) = (24, 20), motion_maps.blur_kernel(24, 20)
    track = np.array([[[0.5, 1], [3.5, 2.5]]]) / (20, 24)
    maps = motion_maps.displacement_maps(track, *size)
    dots = np.zeros(size)
    dots[0, 0] = dots[1, 0] = 0.5  # the point (0, 0.5) lies between two pixels
    padded = np.pad(dots, radius, mode="reflect")
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    for axis in (0, 1):
        padded = np.apply_along_axis(np.convolve, axis, padded, taps, mode="valid")
    np.testing.assert_allclose(maps[1], padded[..., None] * [3, 1.5], atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (2, 300), (300, 3)])
def test_tiny_frames_stay_finite(size):
    track = np.array([[[0, 0], [1, 1], [0.5, 0.2]]], np.float32)
    assert np.isfinite(motion_maps.displacement_maps(track, *size)).all()


def test_no_trajectory_is_blank():
    maps = motion_maps.displacement_maps(np.zeros((0, 4, 2), np.float32), *SIZE)
    assert maps.shape == (4, *SIZE, 2)
    assert not maps.any()


def test_hidden_points_do_not_move_anything():
    track = np.linspace([[0.3, 0.3]], [[0.7, 0.7]], 5, axis=1).astype(np.float32)
    visible = np.array([[True, True, False, True, True]])
    maps = motion_maps.displacement_maps(track, *SIZE, visible)
    assert maps.any((1, 2, 3)).tolist() == [False, True, False, False, True]


def test_released_maps_let_the_later_trajectory_win():
    moving, still = [[30, 20], [35, 20]], [[30, 20], [30, 20]]
    assert motion_maps.released_maps(np.array([still, moving]), *SIZE).any()
    assert not motion_maps.released_maps(np.array([moving, still]), *SIZE).any()
    with pytest.raises(IndexError, match="outside"):
        motion_maps.released_maps(np.array([[[64, 0], [1, 1]]]), *SIZE)


# ---------------------------------------------------------------- colours


def field(seed=0, frames=3):
    return np.random.default_rng(seed).normal(size=(frames, 8, 9, 2)).astype(np.float32)


def test_segments_that_share_the_norm_join_to_the_whole():
    whole = field() * np.array([1, 5, 2]).reshape(3, 1, 1, 1)
    norm = motion_maps.largest_norm(whole)
    assert norm == pytest.approx(np.linalg.norm(whole, axis=-1).max())
    parts = [motion_maps.flow_to_color(part, norm) for part in (whole[:1], whole[1:])]
    np.testing.assert_array_equal(np.concatenate(parts), motion_maps.flow_to_color(whole))
    assert not np.array_equal(motion_maps.flow_to_color(whole[:1]), parts[0])


def test_colours_depend_on_the_share_of_the_norm_alone():
    np.testing.assert_allclose(motion_maps.flow_to_color(field()), motion_maps.flow_to_color(field() * 1000), atol=1e-4)


def test_levels_and_range():
    color, rgb = motion_maps.flow_to_color(field()), motion_maps.flow_to_rgb(field())
    assert color.dtype == np.float32
    assert rgb.dtype == np.uint8
    assert color.min() >= -1
    assert color.max() <= 1
    assert (np.abs((color + 1) * 127.5 - rgb) <= 1 + 1e-4).all()


def test_directions_have_the_wheels_colours():
    """Right is red, left cyan-ish, down yellow, up blue-violet (Baker et al. 2007, image coordinates)."""
    moves = np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32).reshape(1, 2, 2, 2)
    right, left, down, up = motion_maps.flow_to_rgb(moves).reshape(4, 3)
    assert right.tolist() == [255, 0, 0]
    assert left[0] == 0
    assert left.min() < left[1:].min()
    assert down[2] == 0
    assert down[:2].min() > 200
    assert up[1] == 0
    assert up[2] == 255


def test_longer_moves_than_the_norm_keep_full_colour():
    one = motion_maps.flow_to_rgb(field(), max_norm=0.1)
    assert (one.min(-1) == 0).mean() > 0.9  # full colours touch 0 in a channel
    assert (motion_maps.flow_to_rgb(np.zeros((1, 2, 2, 2), np.float32), max_norm=0) == 255).all()


# ---------------------------------------------------------------- dense flow -> tracks


def test_points_follow_a_steady_flow_and_leave():
    dense = np.broadcast_to(np.float32([8, -1.5]), (4, 32, 64, 2))
    points = np.array([[0.25, 0.5], [0.9, 0.5]])
    tracks, visible = motion_maps.follow(dense, points)
    assert tracks.dtype == np.float32
    want = 0.25 + np.arange(5) * 8 / 64, 0.5 - np.arange(5) * 1.5 / 32
    np.testing.assert_allclose(tracks[0], np.stack(want, -1), atol=1e-6)
    assert visible.tolist() == [[True] * 5, [True, False, False, False, False]]
    assert tracks[1, -1, 0] == 1


def test_follow_samples_between_pixels():
    """On a flow that is linear in x, bilinear sampling is exact: x doubles its distance from 2 each frame."""
    x = np.arange(64, dtype=np.float32)
    dense = np.zeros((3, 8, 64, 2), np.float32)
    dense[..., 0] = x - 2
    tracks, visible = motion_maps.follow(dense, np.array([[(4.25 + 0.5) / 64, 0.5]]))
    np.testing.assert_allclose(tracks[0, :, 0] * 64 - 0.5, 2 + 2.25 * 2.0 ** np.arange(4), rtol=1e-5)
    assert visible.all()


def test_following_a_tracks_own_motion_gives_the_track_back():
    track = np.array([[[10.5, 10.5], [14.5, 12.5], [20.5, 11.5]]]) / (64, 48)
    dense = np.stack([np.broadcast_to(m * (64, 48), (48, 64, 2)) for m in np.diff(track[0], axis=0)])
    got, _ = motion_maps.follow(dense, track[:, 0])
    np.testing.assert_allclose(got, track, atol=1e-6)
