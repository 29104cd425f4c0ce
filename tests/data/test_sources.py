"""Sources: what a folder is taken for, captions, records that cannot be read."""

import numpy as np
import pytest

from tests import records
from tora_jax.data import sources
from tora_jax.errors import UserError
from tora_jax.io.video import read_video, write_video


def fill(videos, captions):
    """Three clips, of 4, 5 and 6 frames, at 8, 9 and 10 frames per second."""
    for i, name in enumerate("abc"):
        for folder in (videos, captions):
            folder.mkdir(parents=True, exist_ok=True)
        write_video(videos / f"{name}.mp4", np.full((4 + i, 16, 32, 3), 40 * i, np.uint8), 8 + i)
        (captions / f"{name}.txt").write_text(f"Clip {name}.\n")


@pytest.mark.parametrize(
    ("videos", "captions"),
    [(".", "."), ("videos", "labels"), ("train", "train"), ("train/videos", "train/labels")],
)
def test_folders_of_videos(tmp_path, videos, captions):
    fill(tmp_path / videos, tmp_path / captions)
    source = sources.open_source(tmp_path, "train")
    assert [source[i]["caption"] for i in range(len(source))] == ["Clip a.", "Clip b.", "Clip c."]
    assert source.name(0).endswith("a.mp4")
    assert read_video(source[2]["video"])[0].shape == (6, 16, 32, 3)
    infos, damaged = sources.scan(source)
    assert infos.tolist() == [[4, 16, 32, 8], [5, 16, 32, 9], [6, 16, 32, 10]]
    assert not damaged
    with pytest.raises(UserError, match="has no split 'validation'; put its clips into"):
        sources.open_source(tmp_path, "validation")


def test_every_container_and_no_hidden_file(tmp_path):
    """A file that macOS left beside the others has the ending of a video, too."""
    frames = np.full((4, 16, 32, 3), 90, np.uint8)
    for name in ("a.mp4", "b.M4V", "c.mov", "d.webm"):
        write_video(tmp_path / "made.mp4", frames, 8)
        (tmp_path / "made.mp4").rename(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    (tmp_path / "._a.mp4").write_bytes(b"\0\5\x16\7")
    source = sources.open_source(tmp_path, "train")
    assert [source[i]["caption"] for i in range(len(source))] == ["a.mp4", "b.M4V", "c.mov", "d.webm"]
    infos, damaged = sources.scan(source)
    assert (len(infos), damaged) == (4, {})


def test_a_video_without_a_caption(tmp_path):
    fill(tmp_path / "videos", tmp_path / "labels")
    (tmp_path / "labels" / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.mp4: has no caption; write one into .*labels/b\.txt"):
        sources.open_source(tmp_path, "train")


def test_tfds_folders(tmp_path):
    written = records.clips(4)
    folder = records.write(tmp_path / "tiny" / "1.0.0", {"train": written, "validation": written[:1]})
    for place in (folder, tmp_path / "tiny", tmp_path):
        source = sources.open_source(place, "train")
        assert len(source) == 4
        for i, want in enumerate(written):
            got = source[i]
            assert (got["video"], got["caption"]) == (want["video"], want["caption"])
            for name in ("tracks", "visible", "labels"):
                np.testing.assert_array_equal(got[name], want[name])
    assert len(sources.open_source(folder, "train[50%:]")) == 2
    assert sources.open_source(folder, "train[50%:]")[0]["caption"] == written[2]["caption"]
    assert sources.open_source(folder, "train").info(0) == (9, 48, 48, 8.0)
    with pytest.raises(UserError, match="has no split 'test'; there are train, validation"):
        sources.open_source(folder, "test")
    records.write(tmp_path / "tiny" / "1.0.1", {"train": written})
    with pytest.raises(UserError, match=r"holds several data sets; choose one of .*1\.0\.0, .*1\.0\.1"):
        sources.open_source(tmp_path / "tiny", "train")


def test_several_sources_are_one(tmp_path):
    written = records.clips(5)
    folders = [
        records.write(tmp_path / str(i), {"train": part})
        for i, part in enumerate((written[:2], written[2:3], written[3:]))
    ]
    joined = sources.Joined(folders, "train")
    assert len(joined) == 5
    assert [joined[i]["video"] for i in range(5)] == [record["video"] for record in written]
    assert joined.name(3) == f"{folders[2]} train record 0"


def test_folders_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        sources.open_source(tmp_path / "missing", "train")
    folder = records.write(tmp_path / "tiny", {"train": records.clips(1)})
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="is no data set that can be read"):
        sources.open_source(folder, "train")


def test_damaged_files_are_found_by_the_scan(tmp_path):
    fill(tmp_path, tmp_path)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    infos, damaged = sources.scan(sources.open_source(tmp_path, "train"))
    assert infos[:, 0].tolist() == [4, 0, 6]
    assert damaged.keys() == {1}
    assert "b.mp4: cannot be decoded as a video" in damaged[1]
