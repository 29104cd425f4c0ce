"""Curation: limits of scores, the lot of strong motion, copies."""

import collections

import numpy as np
import pytest

pytest.importorskip("apache_beam")

from tora_jax.configs import curate

from tora_jax.data.curate import appearance, filters, work

LIMITS = curate.get_config()["rules"].to_dict()
GOOD = {
    "name": "a",
    "height": 480,
    "width": 854,
    "seconds": 4.0,
    "black": 0.0,
    "frozen": 0.0,
    "flow": 5.0,
    "foreground": 0.1,
    "camera": "static",
    "aesthetic": None,
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"height": 100}, "small"),
        ({"black": 0.2}, "black"),
        ({"frozen": 1.5}, "frozen"),
        ({"foreground": 0.001}, "still"),
        ({"flow": 0.05}, "still"),
        ({"camera": "pan left"}, ""),
        ({"camera": "pan left", "foreground": 0.001}, "camera motion"),
        ({"camera": "zoom in", "foreground": 0.0}, "camera motion"),
        ({"camera": "shake", "foreground": 0.0}, "camera motion"),
        ({"flow": 101.0}, "strong motion"),
        ({"aesthetic": 3.9}, "not aesthetic"),
        ({"aesthetic": 4.1}, ""),
        ({"black": 0.5, "foreground": 0.0}, "black"),  # the first reason counts
    ],
)
def test_reasons(changes, reason):
    assert filters.reason({**GOOD, **changes}, LIMITS) == reason
    assert reason in ("", *filters.REASONS)


def test_cameras_that_are_kept():
    row = {**GOOD, "camera": "zoom in"}
    assert filters.reason(row, LIMITS) == ""
    assert filters.reason(row, {**LIMITS, "cameras": ("pan left",)}) == "camera motion"
    assert filters.reason(GOOD, {**LIMITS, "cameras": ()}) == ""  # a static camera always


def test_strong_motion_is_thinned_out_alike_in_each_run():
    rows = [{**GOOD, "name": f"clip {i}", "flow": 40.0} for i in range(2000)]
    fates = [filters.reason(row, LIMITS) for row in rows]
    assert collections.Counter(fates)[""] / 2000 == pytest.approx(0.6, abs=0.04)  # 1 - 40 / 100
    assert fates == [filters.reason(row, LIMITS) for row in rows]
    assert not any(filters.reason({**row, "flow": 20.0}, LIMITS) for row in rows)
    # Whoever stays with more motion stays with less.
    assert all(
        not filters.reason({**row, "flow": 30.0}, LIMITS) for row, fate in zip(rows, fates, strict=True) if not fate
    )
    assert work.chance("a") == work.chance("a") != work.chance("b")


def clip(name, code, height=480, seconds=4.0):
    return {"name": name, "hash": code.tobytes().hex(), "height": height, "width": 640, "seconds": seconds}


def flipped(code, count, seed=0):
    bits = np.unpackbits(code)
    bits[np.random.default_rng(seed).choice(len(bits), count, replace=False)] ^= 1
    return np.packbits(bits)


def test_copies_of_better_clips():
    rng = np.random.default_rng(0)
    code, other = rng.integers(0, 256, (2, appearance.BITS // 8), dtype=np.uint8)
    rows = [
        clip("small", code, height=240),
        clip("large", flipped(code, 16)),
        clip("short", flipped(code, 3), seconds=2.0),
        clip("other", other),
    ]
    want = {"small": "large", "short": "large"}
    assert dict(filters.copies(rows, 19)) == want
    assert dict(filters.copies(rows[::-1], 19)) == want
    assert dict(filters.copies(rows[:2], 15)) == {}
    assert dict(filters.copies([clip("b", code), clip("a", code)], 0)) == {"b": "a"}
    assert dict(filters.copies(rows[:1], 16)) == dict(filters.copies([], 16)) == {}


@pytest.mark.parametrize("count", [0, 1, 7, 16])
def test_clips_that_are_near_meet_in_a_band(count):
    """Pigeons: 17 parts, at most 16 bits that differ."""
    rng = np.random.default_rng(count)
    for seed in range(50):
        code = rng.integers(0, 256, appearance.BITS // 8, dtype=np.uint8)
        parts = set(filters.bands(code.tobytes(), 16))
        assert len(parts) == 17
        assert parts & set(filters.bands(flipped(code, count, seed).tobytes(), 16))
