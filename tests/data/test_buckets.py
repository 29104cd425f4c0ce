"""Buckets: the table of sizes, and which clip goes where, against Open-Sora's own choices."""

import collections
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tora_jax.conditioning import resolutions
from tora_jax.data import buckets
from tora_jax.errors import UserError

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "buckets.json").read_text())
TABLE = GOLDEN["bucket_config"]


def test_the_choices_are_the_references():
    choose = buckets.Buckets(TABLE)
    assert len(GOLDEN["rows"]) == 400
    for frames, height, width, seed, name, size, batch in GOLDEN["rows"]:
        found = choose(frames, height, width, seed)
        if name is None:
            assert found is None
        else:
            assert found == (*name, *size[1:], batch)


def test_all_buckets():
    found = list(buckets.Buckets(TABLE))
    assert len(found) == len(set(found)) == 17 * sum(map(len, TABLE.values()))
    for bucket in found:
        sizes = resolutions.table()["sizes"][bucket.resolution]
        assert [bucket.height, bucket.width] == sizes["hw"][bucket.ratio]
        # The ratios are rounded to two digits, and the sides to pixels.
        assert bucket.height / bucket.width == pytest.approx(float(bucket.ratio), abs=0.02)
        assert bucket.height * bucket.width == pytest.approx(sizes["area"], rel=0.02)
        assert bucket.batch == TABLE[bucket.resolution][str(bucket.frames)][1]


@given(st.integers(1, 300), st.integers(1, 1200), st.integers(1, 2000), st.integers(0, 2**31), st.integers(1, 3))
def test_a_clip_fits_its_bucket(frames, height, width, seed, interval):
    found = buckets.Buckets(TABLE)(frames, height, width, seed, interval)
    if found is None:
        return
    area = resolutions.table()["sizes"][found.resolution]["area"]
    assert height * width >= 0.8 * area
    if frames == 1:
        assert found.frames == 1
    else:
        assert 1 < found.frames * interval < frames
    ratios = [float(bucket.ratio) for bucket in buckets.Buckets(TABLE) if bucket.resolution == found.resolution]
    assert min(ratios, key=lambda ratio: abs(ratio - height / width)) == float(found.ratio)


def test_shares():
    """Large long clips are dealt out as the table says: 0.15 x 0.1 stay at 360p and 204 frames, and so on."""
    choose = buckets.Buckets(TABLE)
    count = 4000
    found = [choose(300, 720, 1280, 7919 * seed) for seed in range(count)]
    assert None not in found
    shares = collections.Counter((bucket.resolution, bucket.frames) for bucket in found)
    for resolution, keep, left in (("360p", 0.15, 1.0), ("240p", 0.4, 0.85), ("144p", 1.0, 0.85 * 0.6)):
        for frames, reach, here in ((204, 0.1, 1.0), (102, 0.33, 0.9), (51, 1.0, 0.9 * 0.67)):
            want = left * keep * reach * here
            assert shares[resolution, frames] / count == pytest.approx(want, abs=4 * (want / count) ** 0.5)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"145p": {}}, "unknown resolution '145p'; choose from 144p"),
        ({"144p": {"2s": (1.0, 4)}}, "144p: length '2s' is no whole number"),
        ({"144p": {51: (1.5, 4)}}, "144p, 51 frames: 1.5 is no probability"),
        ({"144p": {51: ((0.5, -1), 4)}}, "is no probability"),
        ({"144p": {51: (1.0, 0)}}, "batch size 0 is no whole number above 0"),
    ],
)
def test_mistakes(table, message):
    with pytest.raises(UserError, match=message):
        buckets.Buckets(table)
