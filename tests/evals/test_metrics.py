"""Trackers, as a config names them."""

import pytest

from tora_jax.errors import UserError
from tora_jax.evals import metrics, track_lk, track_networks
from tora_jax.models.raft import RAFT


def test_trackers_by_name(tmp_path, monkeypatch):
    assert metrics.make_tracker("lk") is track_lk.track_lk
    for name, weights, message in (
        ("sift", "", "there are lk, raft, tapnext"),
        ("raft", "", "raft needs weights"),
        ("raft", tmp_path / "nowhere", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            metrics.make_tracker(name, weights)
    monkeypatch.setattr(metrics.release, "load_model", lambda *args: args)
    monkeypatch.setattr(track_networks, "raft_tracker", lambda *loaded: lambda: loaded)
    assert metrics.make_tracker("raft", "weights")() == ("weights", "raft", RAFT)
