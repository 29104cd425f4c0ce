"""The table before training: found, used, left out and why; captions that are lost."""

import math

import numpy as np
import pytest

from tests import records
from tests.data.test_pipeline import batches, bucket, config
from tora_jax.data import buckets
from tora_jax.errors import UserError
from tora_jax.io.video import write_video

SIZES = [(12, 96, 160), (30, 96, 160), (30, 64, 64), (8, 128, 128), (40, 90, 90)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of SIZES, and one that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for i, size in enumerate(SIZES):
        write_video(folder / f"c{i}.mp4", np.full((*size, 3), 90, np.uint8), 24)
        (folder / f"c{i}.txt").write_text("红色的球" if i == 1 else "a red ball")
    (folder / "c5.mp4").write_bytes(b"no video")
    (folder / "c5.txt").write_text("a red ball")
    (folder / "notes.md").write_text("")
    return folder


def table(*sources, tokenizer=None, **changes):
    iterator = batches(config(*sources, damaged_share=0.5, **changes), "train", seed=0, tokenizer=tokenizer)
    iterator.close()
    return [tuple(line.split(maxsplit=1)) for line in iterator.table().splitlines()]


@pytest.mark.filterwarnings("ignore:.*damaged and passed over")
def test_one_table(folder, tiny_models):
    found = table(folder, buckets=(bucket(17, 96, 96, batch=1),), tokenizer=tiny_models.tokenizer)
    lines = [" ".join(line).split() for line in found]
    starts = [" ".join(line) for line in lines]
    want = [
        f"found 6 {folder}",
        "used 1",
        f"left out 2 too short (under 17 frames), such as {folder}/c0.mp4",
        f"left out 2 too small (under 96x96), such as {folder}/c2.mp4",
        f"left out 1 not a video, such as {folder}/c5.mp4",
        "passed over 1 .md, no clips",
        f"captions 1 empty after cleaning, such as {folder}/c1.mp4: is empty after cleaning: '红色的球' is lost;",
    ]
    assert len(starts) == len(want)
    assert all(line.startswith(begins) for line, begins in zip(starts, want, strict=True)), starts
    both = (bucket(17, 96, 96, batch=1), bucket(30, 64, 64, batch=1))
    found = [" ".join(" ".join(line).split()) for line in table(folder, buckets=both)]
    assert found[1:4] == ["used 3", "1 in bucket 17x96x96", "3 in bucket 30x64x64"]
    assert f"left out 2 too short (under 17 frames), such as {folder}/c0.mp4" in found


def test_captions_of_many_clips_are_looked_at_in_part(folder, tiny_models, monkeypatch):
    monkeypatch.setattr("tora_jax.data.inventory.CAPTIONS", 2)
    written = [{**record, "caption": "红色的球"} for record in records.clips(4)]
    source = records.write(folder / "made", {"train": written})
    *_, last = table(source, tokenizer=tiny_models.tokenizer)
    assert " ".join(last).split()[:7] == ["captions", "2", "empty", "after", "cleaning,", "of", "2"]


GOOD = bucket(17, 96, 96, batch=2)
OF_TABLE = {"frames": 51, "batch": 2, "fps": 24.0, "resolution": "144p", "share": (1.0, 0.5)}


def without(name, whole=GOOD):
    return {key: value for key, value in whole.items() if key != name}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**GOOD, "batch": "2"}, "batch is '2'; give a whole number"),
        ({**GOOD, "batch": True}, "batch is True; give a whole number"),
        ({**GOOD, "frames": 17.0}, "frames is 17.0; give a whole number"),
        ({**GOOD, "fps": True}, "fps is True; give a number"),
        ({**GOOD, "fps": math.nan}, "fps is nan; give a number"),
        ({**GOOD, "fps": -1}, "fps is -1; give at least 0"),
        ({**GOOD, "height": 0}, "height is 0; give more than 0"),
        ({**GOOD, "weight": 0}, "weight is 0; give more than 0"),
        ({**GOOD, "wieght": 2.0}, "has an unknown 'wieght'; did you mean weight?"),
        (without("weight"), "has no weight; a bucket has frames, height, width, batch, fps, weight"),
        ({**GOOD, "resolution": "144p"}, "has no share"),
        ({**OF_TABLE, "share": "1"}, "share is '1'; give a probability"),
        ({**OF_TABLE, "resolution": 144}, "resolution is 144; give a name"),
        (without("batch", OF_TABLE), "has no batch"),
        (3, "is 3; give a dict"),
    ],
)
def test_buckets_that_cannot_be(bad, message):
    good = GOOD if "resolution" not in (bad if isinstance(bad, dict) else {}) else OF_TABLE
    with pytest.raises(UserError) as error:
        buckets.check((good, bad))
    assert str(error.value).startswith(f"data.buckets[1]{':' if f': {message}' in str(error.value) else ''} {message}")


def test_buckets_of_both_kinds():
    buckets.check((GOOD, {**GOOD, "weight": 0.5, "fps": 24}))
    buckets.check((OF_TABLE, {**OF_TABLE, "height": 0, "width": 0, "weight": 1.0, "share": 1}))
    with pytest.raises(UserError, match="buckets of one kind"):
        buckets.check((GOOD, OF_TABLE))
    with pytest.raises(UserError, match=r"give a tuple of buckets, each with its comma: \(bucket,\)"):
        buckets.check(GOOD)
