"""The input pipeline: what batches hold, and that they depend on the seed and their number alone."""

import functools
import json
import warnings
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tora_jax.configs import common

from tests import records
from tora_jax.conditioning import motion_maps, resolutions, text
from tora_jax.data import buckets, pipeline
from tora_jax.data.clips import Clips
from tora_jax.data.sprites.clips import exact_flow
from tora_jax.data.sprites.dataset import SpritesConfig
from tora_jax.errors import UserError
from tora_jax.io.video import read_video, resize_crop, write_video

SIDE, FRAMES = records.SCALE.side, records.SCALE.frames


def bucket(frames=FRAMES, height=SIDE, width=SIDE, batch=4, fps=0.0, weight=1.0):
    return {"frames": frames, "height": height, "width": width, "fps": fps, "batch": batch, "weight": weight}


def config(*folders, **changes):
    return {
        "sources": folders,
        "buckets": (bucket(),),
        "motion": "none",
        "tracks": "given",
        "max_tracks": 3,
        "crop": 0,
        "object_masks": False,
        "frame_masks": {},
        "workers": 0,
        "prefetch": 2,
        "damaged_share": 0.0,
        **changes,
    }


batches = functools.partial(pipeline.batches, latent_frames=records.latent_frames)
RICH = {"motion": "mixed", "tracks": "flow", "crop": 32, "frame_masks": {"random": 0.5, "image_head": 0.3}}
MIXED = (bucket(5, 32, 48, batch=2, weight=2.0, fps=8.0), bucket(batch=4))


@pytest.fixture(scope="module")
def written():
    return records.clips(12)


@pytest.fixture(scope="module")
def folder(written, tmp_path_factory):
    splits = {"train": written, "validation": records.clips(7, "validation"), "test": []}
    return records.write(tmp_path_factory.mktemp("data") / "tiny", splits)


@pytest.fixture(scope="module")
def tokenizer():
    from importlib import resources

    return text.Tokenizer(resources.files("tora_jax").joinpath("assets/tokenizer.model").read_bytes(), 24)


def take(iterator, count):
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return found


def equal(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def frames_of(record):
    return read_video(record["video"])[0]


def which(written, videos):
    """Numbers of the records whose videos these are."""
    known = {frames_of(record).tobytes(): i for i, record in enumerate(written)}
    return [known[video.tobytes()] for video in videos]


# ---------------------------------------------------------------- what batches hold


def test_entries(folder, tokenizer):
    batch, *_ = take(batches(config(folder, **RICH), "train", seed=0, tokenizer=tokenizer), 1)
    shapes = {name: (array.dtype.name, array.shape) for name, array in batch.items()}
    assert shapes == {
        "video": ("uint8", (4, FRAMES, 32, 32, 3)),
        "maps": ("uint8", (4, FRAMES, 32, 32, 3)),
        "ids": ("int32", (4, 24)),
        "text_mask": ("bool", (4, 24)),
        "fps": ("float32", (4,)),
        "height": ("float32", (4,)),
        "width": ("float32", (4,)),
        "frame_mask": ("bool", (4, 3)),
    }
    plain, *_ = take(batches(config(folder), "train", seed=0), 1)
    assert plain.keys() == {"video", "fps", "height", "width", "frame_mask"}
    assert plain["frame_mask"].all()


def test_evaluation_goes_once_through_the_split_in_order(folder, tokenizer):
    iterator = batches(
        config(folder, buckets=(bucket(batch=3),)), "validation", seed=0, tokenizer=tokenizer, training=False
    )
    found = list(iterator)
    iterator.close()
    assert len(found) == 2  # of 7 clips, one fills no batch
    want = records.clips(6, "validation")
    videos = [video for batch in found for video in batch["video"]]
    np.testing.assert_array_equal(videos, [frames_of(record) for record in want])
    ids, mask = tokenizer([text.clean(record["caption"]) for record in want])
    np.testing.assert_array_equal(np.concatenate([batch["ids"] for batch in found]), ids)
    np.testing.assert_array_equal(np.concatenate([batch["text_mask"] for batch in found]), mask)
    assert (found[0]["fps"] == 8).all()
    assert (found[0]["height"] == SIDE).all()


def test_training_sees_each_clip_once_in_an_epoch(folder, written):
    seen = [which(written, batch["video"]) for batch in take(batches(config(folder), "train", seed=0), 9)]
    epochs = [[i for batch in seen[start : start + 3] for i in batch] for start in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_seed_decides(folder):
    one, same, other = (take(batches(config(folder, **RICH), "train", seed=s), 4) for s in (1, 1, 2))
    equal(one, same)
    assert any((a["video"] != b["video"]).any() for a, b in zip(one, other, strict=True))


def test_clips_are_thinned_out_to_the_rate_of_the_bucket(folder, written):
    """9 frames at 8 per second: 4 at about 3 per second are every third; 6 fit at every frame alone."""
    pixels = list(map(frames_of, written))
    for frames, fps, step in ((3, 3.0, 3), (5, 4.0, 2), (6, 4.0, 1), (4, 100.0, 1), (1, 1.0, 1)):
        data = config(folder, buckets=(bucket(frames, fps=fps, batch=12),))
        batch, *_ = take(batches(data, "train", seed=0), 1)
        assert (batch["fps"] == np.float32(8 / step)).all()
        starts = set()
        for video in batch["video"]:
            reach = (frames - 1) * step + 1
            windows = [
                (i, start)
                for i, clip in enumerate(pixels)
                for start in range(FRAMES - reach + 1)
                if (clip[start : start + reach : step] == video).all()
            ]
            starts |= {start for _, start in windows}
        assert starts >= {0} if reach == FRAMES else len(starts) > 1


# ---------------------------------------------------------------- geometry


def test_motion_and_video_are_cut_alike(folder, written):
    """The dense flow of a scaled, cropped clip is that of its own labels: it moves the pixels on to the next frame."""
    data = config(folder, motion="dense", crop=32, buckets=(bucket(height=40, width=48, batch=12),))
    batch, *_ = take(batches(data, "train", seed=3), 1)
    places = set()
    for video, maps in zip(batch["video"], batch["maps"], strict=True):
        found = []
        for record in written:
            # 48x48 covers 40x48 as it is, and 4 rows are cut at either end.
            whole = frames_of(record)
            dense = exact_flow(record["labels"], record["tracks"])
            for y in range(4, 44 - 32 + 1):
                for x in range(48 - 32 + 1):
                    window = np.s_[:, y : y + 32, x : x + 32]
                    if (whole[window] == video).all():
                        found.append((y, x))
                        whole_map = motion_maps.flow_to_rgb(dense[:, 4:44])  # coloured before it is cut
                        np.testing.assert_array_equal(maps, whole_map[:, y - 4 : y + 28, x : x + 32])
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 6


def test_squares_around_objects(folder, written):
    """Of the first frame of each clip, with the objects where its labels have them."""
    iterator = batches(config(folder, crop=16, object_masks=True, buckets=(bucket(1),)), "train", seed=3)
    for batch in take(iterator, 6):
        assert batch["object_mask"].shape == (4, 1, 16, 16)
        assert batch["object_mask"].any((1, 2, 3)).all()
        for video, mask in zip(batch["video"], batch["object_mask"], strict=True):
            assert any(square_of(record, video[0], mask[0]) for record in written)


def square_of(record, frame, mask):
    """Whether some square of the record's video and labels is this one."""
    for whole, labels in zip(frames_of(record), record["labels"], strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(whole, frame.shape)[:, :, 0]
        for top, left in np.argwhere((windows == frame).all((2, 3, 4))):
            return np.array_equal(labels[top : top + 16, left : left + 16] > 0, mask)
    return False


def test_objects_of_clips_without_labels(written, tmp_path):
    bare = [{**record, "labels": None} for record in written]
    for i, record in enumerate(bare):
        (tmp_path / f"{i}.mp4").write_bytes(record["video"])
        (tmp_path / f"{i}.txt").write_text(record["caption"])
    data = config(tmp_path, object_masks=True, buckets=(bucket(2, batch=6, fps=4.0),))
    masks = np.concatenate([batch["object_mask"] for batch in take(batches(data, "train", seed=0), 2)])
    assert masks.shape == (12, 2, SIDE, SIDE)
    assert 0 < masks.mean() < 0.5
    with pytest.raises(UserError, match="one frame does not show what moves"):
        take(batches({**data, "buckets": (bucket(1),)}, "train", seed=0), 1)


def test_scaled_tracks(folder, written):
    """Half the size: tracks keep their place, sigma is halved with the frame."""
    data = config(folder, motion="sparse", max_tracks=1, buckets=(bucket(height=24, width=24, batch=12),))
    iterator = batches(data, "train", seed=0, training=False)
    batch, *_ = take(iterator, 1)
    for record, video, maps in zip(written, batch["video"], batch["maps"], strict=True):
        np.testing.assert_array_equal(video, resize_crop(frames_of(record), 24, 24))
        want = [
            motion_maps.flow_to_rgb(motion_maps.displacement_maps(track[None], 24, 24, seen[None]))
            for track, seen in zip(record["tracks"], record["visible"], strict=True)
        ]
        # The scaling is in float32.
        assert min(np.abs(one.astype(int) - maps).max() for one in want) <= 1


# ---------------------------------------------------------------- buckets


def test_buckets_by_weight(folder):
    found = take(batches(config(folder, buckets=MIXED), "train", seed=0), 9)
    sizes = [batch["video"].shape[:4] for batch in found]
    assert sizes.count((2, 5, 32, 48)) == 6
    assert sizes.count((4, FRAMES, SIDE, SIDE)) == 3


def test_a_clip_goes_to_buckets_that_it_fits(tmp_path):
    small = SpritesConfig(name="small", side=32, frames=5, fps=8.0)
    both = records.clips(3) + records.clips(3, scale=small)
    folder = records.write(tmp_path / "tiny", {"train": both})
    data = config(folder, buckets=(bucket(5, 32, 32, batch=6), bucket(batch=3)))
    iterator = batches(data, "train", seed=0, training=False)
    videos = {batch["video"].shape[2]: batch["video"] for batch in iterator}
    iterator.close()
    assert len(videos[32]) == 6
    np.testing.assert_array_equal(videos[48], [frames_of(record) for record in both[:3]])


def of_table(frames, resolution, share, batch):
    return {**bucket(frames, 0, 0, batch), "resolution": resolution, "share": share}


def test_buckets_of_a_table(tmp_path):
    """Each clip goes where `Buckets` puts it: by its length, its area and its own aspect ratio."""
    shapes = {"wide": (7, 144, 256), "high": (7, 256, 144), "square": (12, 208, 208), "tiny": (12, 64, 64)}
    rng = np.random.default_rng(0)
    for name, (frames, height, width) in shapes.items():
        for i in range(3):
            video = rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
            write_video(tmp_path / f"{name}{i}.mp4", video, 8)
            (tmp_path / f"{name}{i}.txt").write_text(name)
    table = (of_table(10, "144p", (1.0, 0.5), 1), of_table(5, "144p", 1.0, 2))
    data = config(tmp_path, buckets=table)
    clips = Clips(data, "train")
    want = buckets.Buckets({"144p": {10: ((1.0, 0.5), 1), 5: (1.0, 2)}})
    found = clips.fill_buckets(seed=3)
    placed = {index: bucket for bucket, indices in found for index in indices}
    for index in range(len(clips.source)):
        name = Path(clips.source.name(index)).stem[:-1]
        frames, height, width = shapes[name]
        choice = want(frames, height, width, 3 + 2 * index)
        assert (choice is None) == (index not in placed) == (name == "tiny")
        if choice:
            size = [placed[index][key] for key in ("frames", "height", "width", "batch")]
            assert size == [choice.frames, choice.height, choice.width, choice.batch]
    assert {(b["frames"], b["height"], b["width"]) for b in placed.values()} >= {(5, 144, 256), (5, 256, 144)}
    iterator = batches(data, "train", seed=3)
    seen = {}
    for _ in range(12):
        batch = next(iterator)
        size = batch["video"].shape[:4]
        assert (batch["height"] == size[2]).all()
        seen[size] = seen.get(size, 0) + 1
    iterator.close()
    assert set(seen) == {(b["batch"], b["frames"], b["height"], b["width"]) for b, _ in found}
    assert abs(seen[2, 5, 144, 256] - seen[2, 5, 256, 144]) <= 1  # three clips each
    once = batches(data, "train", seed=3, training=False)
    assert sum(len(batch["video"]) for batch in once) == sum(len(i) // b["batch"] * b["batch"] for b, i in found)
    once.close()
    with pytest.raises(UserError, match="no clip fits any of the buckets"):
        batches(config(tmp_path, buckets=(of_table(51, "144p", 1.0, 1),)), "train", seed=0)


def test_open_soras_buckets():
    """The config's are those of the table that the reference's choices come from, but for the images."""
    table = json.loads((Path(__file__).parent.parent / "golden" / "buckets.json").read_text())["bucket_config"]
    found = {}
    for entry in common.opensora_buckets(1, part=1):
        found.setdefault(entry["resolution"], {})[entry["frames"]] = (entry["share"], entry["batch"])
        assert (entry["height"], entry["width"]) == resolutions.image_size(entry["resolution"], "16:9")
    want = {}
    for name, levels in table.items():
        for frames, (share, batch) in levels.items():
            if frames != "1":
                want.setdefault(name, {})[int(frames)] = (tuple(share) if isinstance(share, list) else share, batch)
    assert found == want
    assert [entry["batch"] for entry in common.opensora_buckets(4)] == [100, 52, 24, 40, 20, 8, 16, 8, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": (bucket(frames=10),)}, r"bucket 10x48x48 .*: no clip fits; .* make 9x48x48"),
        ({"buckets": (bucket(), bucket(width=49))}, r"bucket 9x48x49 .*: no clip fits"),
        ({"buckets": (bucket(batch=0),)}, r"data.buckets\[0\]: batch is 0; give more than 0"),
        ({"buckets": ()}, "data.buckets is empty"),
        ({"crop": 49}, "data.crop is 49, more than a side of the bucket 9x48x48"),
        ({"motion": "some"}, "data.motion is 'some'; choose one of none, dense, sparse, mixed"),
        ({"tracks": "some"}, "data.tracks is 'some'; choose one of given, flow"),
        ({"max_tracks": 0}, "data.max_tracks is 0"),
        ({"frame_masks": {"heads": 1.0}}, "unknown mask 'heads'"),
        ({"sources": ()}, "data.sources is empty"),
    ],
)
def test_configs_that_cannot_be(folder, changes, message):
    with pytest.raises(UserError, match=message):
        batches(config(folder, **changes), "train", seed=0)


def test_empty_splits(folder, tmp_path):
    with pytest.raises(UserError, match="split 'test' has no clips"):
        batches(config(folder), "test", seed=0)
    with pytest.raises(UserError, match="split 'train' has no clips"):
        batches(config(tmp_path), "train", seed=0)
    with pytest.raises(UserError, match="has too few clips for a batch"):
        batches(config(folder, buckets=(bucket(batch=8),)), "validation", seed=0, training=False)


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("buckets", [(bucket(),), MIXED])
def test_exact_resume(folder, tokenizer, buckets):
    def start():
        return batches(config(folder, **RICH, buckets=buckets), "train", seed=5, tokenizer=tokenizer)

    whole = take(start(), 10)
    for done in (0, 1, 4, 7):
        first = start()
        head = [next(first) for _ in range(done)]
        state = json.loads(json.dumps(first.get_state()))
        next(first)  # what comes after saving does not matter
        first.close()
        second = start()
        second.set_state(state)
        equal(head + take(second, 10 - done), whole)


def test_exact_resume_with_worker_processes(folder, tokenizer):
    """The number of workers changes nothing either, and may change from run to run."""

    def start(workers):
        data = config(folder, **RICH, buckets=MIXED, workers=workers)
        return batches(data, "train", seed=5, tokenizer=tokenizer)

    whole = take(start(0), 7)
    first = start(2)
    head = [next(first) for _ in range(3)]
    state = first.get_state()
    next(first)
    first.set_state(state)  # back again
    equal([*head, next(first)], whole[:4])
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    for workers in (1, 0):
        second = start(workers)
        second.set_state(state)
        equal(take(second, 3), whole[4:])


def test_state_in_a_checkpoint(folder, tmp_path):
    whole = take(batches(config(folder), "train", seed=0), 4)
    first = batches(config(folder), "train", seed=0)
    next(first), next(first)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        next(first)
    first.close()
    second = batches(config(folder), "train", seed=0)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.restore(2, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
    equal(take(second, 2), whole[2:])


def test_closed_iterators_give_nothing(folder):
    iterator = batches(config(folder), "train", seed=0)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_processes_share_the_batches_of_one(folder, tokenizer, count, training):
    """Whatever the number of processes: the parts, joined, are the batch of one process, so nothing is seen twice."""

    def start(shard):
        data = config(folder, **RICH, buckets=(bucket(),))
        return batches(data, "train", seed=1, tokenizer=tokenizer, training=training, shard=shard)

    whole = take(start((0, 1)), 3)
    parts = [take(start((i, count)), 3) for i in range(count)]
    assert {len(batch["video"]) for part in parts for batch in part} == {4 // count}
    joined = [
        {name: np.concatenate([part[name] for part in same]) for name in same[0]} for same in zip(*parts, strict=True)
    ]
    equal(joined, whole)


def test_processes_must_divide_the_batch(folder):
    with pytest.raises(UserError, match="3 processes do not divide a batch of 4"):
        batches(config(folder), "train", seed=0, shard=(0, 3))


# ---------------------------------------------------------------- damage


@pytest.fixture
def damaged(tmp_path):
    """Twenty clips, of which one is no video, one breaks off and one has tracks that are too short."""
    broken = records.clips(20)
    broken[3]["video"] = b"no video"
    broken[8]["video"] = broken[8]["video"][:-300]
    broken[13]["tracks"] = broken[13]["tracks"][:, :4]
    return records.write(tmp_path / "tiny", {"train": broken})


def test_damaged_records_are_passed_over(damaged):
    def start(**changes):
        data = config(damaged, motion="sparse", buckets=(bucket(batch=5),), damaged_share=0.2, **changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return batches(data, "train", seed=0)

    good = records.clips(20)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iterator = start()
        whole = [next(iterator) for _ in range(12)]
        reached = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    seen = {i for batch in whole for i in which(good, batch["video"])}
    assert seen == set(range(20)) - {3, 8, 13}
    assert {name.split()[-1] for name in iterator.damaged} == {"3", "8", "13"}
    messages = [str(warning.message) for warning in caught if "damaged" in str(warning.message)]
    # Once for a record, and those that the scan finds were hidden above.
    assert len(messages) == len({message.split(":")[0] for message in messages}) <= 2
    assert any("record 13: damaged and passed over (has 4 frames in tracks" in message for message in messages)

    second = start()
    second.set_state({**reached, "next": 5})
    equal(take(second, 7), whole[5:])
    assert second.damaged == iterator.damaged


def test_too_many_damaged_records(damaged):
    data = config(damaged, motion="sparse", buckets=(bucket(batch=5),), damaged_share=0.1)
    with pytest.warns(UserWarning, match="record 3: damaged and passed over"):
        iterator = batches(data, "train", seed=0)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(UserError, match="3 of 20 records are damaged, such as"),
    ):
        take(iterator, 9)
    iterator.close()
    with pytest.warns(UserWarning, match="record 3"), pytest.raises(UserError, match="of 20 records are damaged"):
        batches(config(damaged), "train", seed=0)


def test_damage_that_only_decoding_shows(tmp_path):
    """The header and the first frames are good: the clip is met, and another one stands in."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3)).astype(np.uint8)
    for name in ("bad", "good"):
        write_video(tmp_path / f"{name}.mp4", noise, 8)
        (tmp_path / f"{name}.txt").write_text("Noise.")
    content = bytearray((tmp_path / "bad.mp4").read_bytes())
    start = (content.index(b"mdat") + len(content)) // 2
    content[start : start + 5000] = bytes(5000)
    (tmp_path / "bad.mp4").write_bytes(content)
    data = config(tmp_path, buckets=(bucket(60, 32, 32, batch=2),), damaged_share=0.5)
    iterator = batches(data, "train", seed=0, training=False)
    assert not iterator.damaged
    with pytest.warns(UserWarning, match=r"bad\.mp4: damaged and passed over"):
        (batch,) = take(iterator, 1)
    assert list(iterator.damaged) == [str(tmp_path / "bad.mp4")]
    np.testing.assert_array_equal(batch["video"][0], batch["video"][1])


def test_a_damaged_file_of_records(tmp_path, written):
    folder = records.write(tmp_path / "tiny", {"train": written})
    (path,) = folder.glob("*.array_record-*")
    content = bytearray(path.read_bytes())
    content[20_000:20_064] = bytes(64)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"train record \d+: damaged and passed over \(cannot be read"):
        iterator = batches(config(folder, damaged_share=0.2), "train", seed=0)
    lost = {int(name.split()[-1]) for name in iterator.damaged}
    assert lost
    seen = {i for batch in take(iterator, 9) for i in which(written, batch["video"])}
    assert seen == set(range(12)) - lost
    path.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=r"train record 0: damaged .* and so are all others"):
        batches(config(folder, damaged_share=1.0), "train", seed=0)


def test_a_folder_of_videos(tmp_path, tokenizer):
    """What general clips go through: no tracks, other sizes, a still one, flow estimated."""
    for i, shape in enumerate([(9, 40, 64, 3), (12, 64, 48, 3), (9, 40, 40, 3)]):
        video = np.random.default_rng(i).integers(0, 255, shape[1:]).astype(np.uint8)
        write_video(tmp_path / f"{i}.mp4", np.stack([np.roll(video, 2 * t * (i < 2), 1) for t in range(shape[0])]), 8)
        (tmp_path / f"{i}.txt").write_text("Noise.")
    data = config(tmp_path, buckets=(bucket(9, 40, 40, batch=3),), motion="sparse")
    batch, *_ = take(batches(data, "train", seed=0, tokenizer=tokenizer, training=False), 1)
    assert batch["maps"].shape == (3, 9, 40, 40, 3)
    assert (batch["maps"][:2, 1:] < 255).any((1, 2, 3, 4)).all()
    assert (batch["ids"][0] == tokenizer(["noise."])[0][0]).all()
