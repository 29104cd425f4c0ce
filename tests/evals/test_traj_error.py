"""TrajError against truth: the numbers of known tracks, and the trackers on clips whose tracks are known."""

import sys
import types

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax.data import sprites
from tora_jax.errors import UserError
from tora_jax.evals import traj_error
from tora_jax.models.raft import RAFT

SIZE = (128, 128)


# ---------------------------------------------------------------- the error


def tracks_of(shape, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.6, (*shape, 2)).astype(np.float32)


def test_known_offsets():
    given = tracks_of((3, 5))
    off = np.zeros_like(given)
    off[0] = [3 / 200, -4 / 100]  # 3 and 4 pixels, 5 apart
    off[1, -1] = [0, 10 / 100]
    visible = np.ones((3, 5), bool)
    visible[1, -1] = False
    got = traj_error.traj_error(given, given + off, visible, (200, 100))
    want = {
        "l1": (5 * 7 + 10) / 15,
        "l1_visible": 5 * 7 / 14,
        "l2": (5 * 5 + 10) / 15,
        "endpoint": (5 + 10 + 0) / 3,
        "within_1": 9 / 15,
        "within_2": 9 / 15,
        "within_4": 9 / 15,
        "within_8": 14 / 15,
        "visible": 14 / 15,
    }
    assert got == pytest.approx(want, abs=1e-3)


def test_nothing_visible_and_nothing_off():
    given = tracks_of((2, 4))
    got = traj_error.traj_error(given, given, np.zeros((2, 4), bool), SIZE)
    assert np.isnan(got.pop("l1_visible"))
    assert got == {"l1": 0, "l2": 0, "endpoint": 0, **{f"within_{k}": 1 for k in (1, 2, 4, 8)}, "visible": 0}


# ---------------------------------------------------------------- Lucas-Kanade


@pytest.fixture(scope="module")
def tracked():
    """100 clips of 128 pixels, half of them with one object, with the tracker's word on them."""
    clips = [sprites.make_clip(i, split) for split in ("benchmark_one", "benchmark_two") for i in range(50)]
    return [(clip, *traj_error.track_lk(clip.video, clip.tracks[:, 0])) for clip in clips]


def test_truth_is_under_a_pixel(tracked):
    errors = [traj_error.traj_error(clip.tracks, found, seen, SIZE) for clip, found, seen in tracked]
    assert np.mean([e["l1_visible"] for e in errors]) < 0.3
    assert np.mean([e["l1_visible"] < 1 for e in errors]) >= 0.98
    assert np.mean([e["visible"] for e in errors]) > 0.98
    assert all(found.dtype == np.float32 and seen.dtype == bool for _, found, seen in tracked)


@pytest.mark.parametrize("shift", [2, 5, 12])
def test_a_known_shift_of_the_path_is_read(tracked, shift):
    """The tracks start where the objects are; the path that was given lies `shift` pixels beside theirs."""
    offset = np.float32([0, shift / 128])
    read = [traj_error.traj_error(clip.tracks + offset, found, seen, SIZE)["l1"] for clip, found, seen in tracked]
    assert np.mean(read) == pytest.approx(shift, abs=0.3)


def test_a_known_shift_of_the_video_is_read(tracked):
    """All frames but the first moved by 6 pixels, picture and all (so what is seen in a ring's middle moves, too)."""
    read = []
    for clip, _, _ in tracked[:20]:
        if clip.tracks[0, :, 0].max() < 0.8 and clip.sprites[0].shape not in ("ring", "zero"):
            video = np.concatenate([clip.video[:1], np.roll(clip.video[1:], 6, axis=2)])
            found, seen = traj_error.track_lk(video, clip.tracks[:, 0])
            read.append(traj_error.traj_error(clip.tracks, found, seen, SIZE)["l1"])
    assert len(read) > 5
    np.testing.assert_allclose(read, 6 * 16 / 17, atol=0.3)


def test_unrelated_tracks_read_ten_times_more(tracked):
    true = np.mean([traj_error.traj_error(clip.tracks, found, seen, SIZE)["l1"] for clip, found, seen in tracked])
    others = [
        traj_error.traj_error(clip.tracks, np.resize(other, found.shape), seen, SIZE)["l1"]
        for (clip, found, seen), (_, other, _) in zip(tracked, [*tracked[1:], tracked[0]], strict=True)
    ]
    assert np.mean(others) > 10 * true


def test_behind_each_other():
    """Clips of the test split: objects cover each other, and are found again."""
    off, seen_again = [], []
    for i in range(20):
        clip = sprites.make_clip(i, "test")
        found, seen = traj_error.track_lk(clip.video, clip.tracks[:, 0])
        both = seen & clip.visible & clip.visible[:, :1]
        off.append((np.abs(found - clip.tracks).sum(-1) * 128)[both])
        seen_again.append(seen[clip.visible])
    assert np.concatenate(off).mean() < 1
    assert np.concatenate(seen_again).mean() > 0.95


def test_an_object_that_vanishes_is_lost_where_it_was():
    clip = sprites.make_clip(0, "benchmark_one")
    still = np.median(clip.video, axis=0).astype(np.uint8)
    video = clip.video.copy()
    video[9:] = still
    found, seen = traj_error.track_lk(video, clip.tracks[:, 0])
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
    found, seen = traj_error.track_lk(video, points)
    want = points[:, None] + move / side
    assert seen.all()
    assert np.abs(found - want).max() * 112 < 0.5


def test_edges_of_the_signature():
    video = sprites.make_clip(0, "benchmark_one").video
    found, seen = traj_error.track_lk(video, np.zeros((0, 2), np.float32))
    assert found.shape == (0, 17, 2)
    assert seen.shape == (0, 17)
    found, seen = traj_error.track_lk(video[:1], np.array([[0.5, 0.5], [0.0, 1.0]]))
    np.testing.assert_allclose(found, [[[0.5, 0.5]], [[0, 1]]], atol=1e-6)
    assert seen.all()
    found, seen = traj_error.track_lk(video, np.array([[1.2, 0.5]]))
    np.testing.assert_allclose(found, np.full((1, 17, 2), [1.2, 0.5]), atol=1e-6)
    assert not seen.any()


# ---------------------------------------------------------------- networks


def test_raft_chained(monkeypatch):
    """Flow of (8, 4) resized pixels a step: points go along; where the way back differs, they are lost for good."""
    bad = 3

    class Flow:
        def apply(self, variables, first, second):
            assert first.shape == second.shape == (2, 256, 512, 3)
            flow = jnp.broadcast_to(jnp.array([8.0, 4.0]), (256, 512, 2))
            return jnp.stack([flow, jnp.where(first[0, 0, 0, 0] == 1, flow, -flow)])

    monkeypatch.setattr(traj_error, "RAFT", lambda **fields: Flow())
    video = np.zeros((6, 32, 64, 3), np.uint8)
    video[bad - 1] = 255
    points = np.array([[0.5, 0.5], [0.96, 0.5]], np.float32)
    found, seen = traj_error.raft_tracker({})(video, points)
    np.testing.assert_allclose(found[0], points[0] + np.outer(np.arange(6), [8 / 512, 4 / 256]), atol=1e-5)
    np.testing.assert_array_equal(seen[0], np.arange(6) < bad)
    assert not seen[1, 3:].any()  # outside by then


def test_raft_itself():
    """A RAFT as small as it gets, with random weights: the signature, the size that it wants, one frame."""
    fields = {
        "feature_layers": (4, 4, 4, 4, 8),
        "context_layers": (4, 4, 4, 4, 8),
        "corr_levels": 2,
        "corr_radius": 1,
        "motion_corr_layers": (4, 4),
        "motion_flow_layers": (4, 4),
        "motion_features": 6,
        "hidden": 4,
        "flow_hidden": 4,
        "mask_hidden": 4,
    }
    frame = jnp.zeros((1, 32, 32, 3))
    params = jax.jit(RAFT(**fields).init)(jax.random.key(0), frame, frame)["params"]
    track = traj_error.raft_tracker(params, **fields)
    video = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    points = np.array([[0.3, 0.4], [0.5, 0.5]], np.float32)
    found, seen = track(video, points)
    assert found.shape == (2, 3, 2)
    assert seen.shape == (2, 3)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 0], points, atol=1e-6)
    assert track(video[:1], points)[1].all()


def test_trackers_by_name(tmp_path, monkeypatch):
    assert traj_error.make_tracker("lk") is traj_error.track_lk
    for name, weights, message in (
        ("sift", "", "there are lk, raft, tapnext"),
        ("raft", "", "raft needs weights"),
        ("raft", tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            traj_error.make_tracker(name, weights)
    for name in ("part_config", "load_part"):
        monkeypatch.setattr(traj_error.release, name, lambda folder, part, name=name: {"from": (name, folder, part)})
    monkeypatch.setattr(traj_error, "raft_tracker", lambda params, **fields: lambda: (params, fields))
    params, fields = traj_error.make_tracker("raft", "weights")()
    assert params["from"] == ("load_part", "weights", "raft")
    assert fields["from"] == ("part_config", "weights", "raft")


def test_tapnext_without_tapnet(monkeypatch):
    monkeypatch.setitem(sys.modules, "tapnet", None)
    with pytest.raises(UserError, match=r"pip install --no-deps git\+https://github.com/google-deepmind/tapnet"):
        traj_error.tapnext_tracker("weights.npz")


@pytest.fixture
def tapnet(monkeypatch):
    """In tapnet's place: a tracker of its form, (t, y, x) in 256ths, whose points go 1 left and 2 down a frame."""

    class Tracker:
        def __init__(self, backbone):
            pass

        def apply(self, variables, frames, *, query_points=None, query_padding=None, state=None, method):
            assert method == "forward_step"
            assert frames.shape == (1, 1, 256, 256, 3)
            if state is None:
                assert query_points.shape == (1, 2, 1, 3)
                assert query_padding.shape == (1, 2, 1)
                state = query_points[..., 1:]
            else:
                state = state + variables["params"]["head"]["step"]
            return types.SimpleNamespace(tracks=state, visible_logits=128 - state[..., 1:], state=state)

    names = ["tapnet", "tapnet.models", "tapnet.models.ssm_vit", "tapnet.models.video_ssm_tracker"]
    inside = ("", ".common", ".jax", ".jax.array_typing", ".jax.modules", ".jax.scan")
    fakes = {name: types.ModuleType(name) for name in [*names, *(f"recurrentgemma{name}" for name in inside)]}
    fakes["tapnet.models.ssm_vit"].Model = lambda **fields: fields
    fakes["tapnet.models.video_ssm_tracker"].TAPNextTracker = Tracker
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_tapnext(tapnet, tmp_path):
    np.savez(tmp_path / "weights.npz", **{"head/step": np.float32([2, -1])})
    points = np.array([[0.25, 0.5], [0.75, 0.5]])
    found, seen = traj_error.tapnext_tracker(tmp_path / "weights.npz")(np.zeros((4, 32, 64, 3), np.uint8), points)
    np.testing.assert_allclose(found, points[:, None] + np.outer(np.arange(4), [-1 / 256, 2 / 256]), atol=1e-6)
    assert seen[0].all()
    assert not seen[1].any()
    assert not any(name.startswith(("gemma", "recurrentgemma._src")) for name in sys.modules)  # lent for the import


def test_tapnext_without_weights(tapnet, tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    for name in ("missing.npz", "broken.npz"):
        with pytest.raises(UserError, match=name):
            traj_error.tapnext_tracker(tmp_path / name)
