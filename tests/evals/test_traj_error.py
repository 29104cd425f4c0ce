"""TrajError against the numbers of known tracks."""

import numpy as np
import pytest

from tora_jax.evals.traj_error import traj_error

SIZE = (128, 128)


def tracks_of(shape, seed=0):
    return np.random.default_rng(seed).uniform(0.2, 0.6, (*shape, 2)).astype(np.float32)


def test_known_offsets():
    given = tracks_of((3, 5))
    off = np.zeros_like(given)
    off[0] = [3 / 200, -4 / 100]  # 3 and 4 pixels, 5 apart
    off[1, -1] = [0, 10 / 100]
    visible = np.ones((3, 5), bool)
    visible[1, -1] = False
    got = traj_error(given, given + off, visible, (200, 100))
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
    got = traj_error(given, given, np.zeros((2, 4), bool), SIZE)
    assert np.isnan(got.pop("l1_visible"))
    assert got == {"l1": 0, "l2": 0, "endpoint": 0, **{f"within_{k}": 1 for k in (1, 2, 4, 8)}, "visible": 0}
