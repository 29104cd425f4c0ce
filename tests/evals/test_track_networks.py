"""Trackers that are networks: on flow that is known, on random weights, and what is missing."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tora_jax.errors import UserError
from tora_jax.evals.track_networks import raft_tracker, tapnext_tracker
from tora_jax.models.raft import RAFT


def test_raft_chained(monkeypatch):
    """Flow of (8, 4) resized pixels a step: points go along; where the way back differs, they are lost for good."""
    bad = 3

    def apply(self, variables, first, second):
        assert first.shape == second.shape == (2, 256, 512, 3)
        flow = jnp.broadcast_to(jnp.array([8.0, 4.0]), (256, 512, 2))
        return jnp.stack([flow, jnp.where(first[0, 0, 0, 0] == 1, flow, -flow)])

    monkeypatch.setattr(RAFT, "apply", apply)
    video = np.zeros((6, 32, 64, 3), np.uint8)
    video[bad - 1] = 255
    points = np.array([[0.5, 0.5], [0.96, 0.5]], np.float32)
    found, seen = raft_tracker(RAFT(), {})(video, points)
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
    track = raft_tracker(RAFT(**fields), params)
    video = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    points = np.array([[0.3, 0.4], [0.5, 0.5]], np.float32)
    found, seen = track(video, points)
    assert found.shape == (2, 3, 2)
    assert seen.shape == (2, 3)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:, 0], points, atol=1e-6)
    assert track(video[:1], points)[1].all()


def test_tapnext_without_tapnet(monkeypatch):
    monkeypatch.setitem(sys.modules, "tapnet", None)
    with pytest.raises(UserError, match=r"pip install --no-deps git\+https://github.com/google-deepmind/tapnet"):
        tapnext_tracker("weights.npz")


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
    found, seen = tapnext_tracker(tmp_path / "weights.npz")(np.zeros((4, 32, 64, 3), np.uint8), points)
    np.testing.assert_allclose(found, points[:, None] + np.outer(np.arange(4), [-1 / 256, 2 / 256]), atol=1e-6)
    assert seen[0].all()
    assert not seen[1].any()
    assert not any(name.startswith(("gemma", "recurrentgemma._src")) for name in sys.modules)  # lent for the import


def test_tapnext_without_weights(tapnet, tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"no archive")
    for name in ("missing.npz", "broken.npz"):
        with pytest.raises(UserError, match=name):
            tapnext_tracker(tmp_path / name)
