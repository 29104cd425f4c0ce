"""Sources: what a folder is taken for, captions, records that cannot be read."""

import codecs
import gzip
import io
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from tests import records
from tora_jax.data import sources
from tora_jax.errors import UserError
from tora_jax.io.video import read_image, read_video, write_video


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
        (tmp_path / name).with_suffix(".TXT" if name == "c.mov" else ".txt").write_text(name)
    (tmp_path / "._a.mp4").write_bytes(b"\0\5\x16\7")
    source = sources.open_source(tmp_path, "train")
    assert [source[i]["caption"] for i in range(len(source))] == ["a.mp4", "b.M4V", "c.mov", "d.webm"]
    infos, damaged = sources.scan(source)
    assert (len(infos), damaged) == (4, {})


def test_a_video_without_a_caption(tmp_path):
    fill(tmp_path / "videos", tmp_path / "labels")
    (tmp_path / "labels" / "b.txt").unlink()
    _, damaged = sources.scan(sources.open_source(tmp_path, "train"))
    assert damaged.keys() == {1}
    assert damaged[1].reason == "no caption"
    assert re.search(r"b\.mp4: has no caption; write one into .*labels/b\.txt$", str(damaged[1]))
    (tmp_path / "meta.csv").write_text("path,text\n")
    _, damaged = sources.scan(sources.open_source(tmp_path, "train"))
    assert str(damaged[1]).endswith(f"name the table as the source: {tmp_path / 'meta.csv'}")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The bytes of a clip of four frames."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, np.full((4, 16, 32, 3), 90, np.uint8), 8)
    return path.read_bytes()


def put(path, content, caption=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def captions(source):
    return [source.caption(i) for i in range(len(source))]


def test_nested_folders_and_their_splits(tmp_path, clip):
    """Without a folder train, it is all but what is held out."""
    for name in ("boats/day/a.mp4", "boats/b.mkv", "validation/d.mp4", ".trash/e.mp4"):
        put(tmp_path / name, clip, name[-5])
    put(tmp_path / "videos/kites/c.mp4", clip)
    put(tmp_path / "labels/kites/c.txt", b"c")
    put(tmp_path / "boats/b.jpg", b"the video's own thumbnail")
    put(tmp_path / "boats/notes.parquet", b"")
    (tmp_path / "linked").symlink_to(tmp_path / "boats")
    source = sources.open_source(tmp_path, "train")
    assert captions(source) == ["b", "a", "c"]
    assert source.passed_over == {
        "in validation/, which is another split": 1,
        "pictures beside a video of their name": 1,
        ".parquet, no clips": 1,
        "links to folders": 1,
    }
    assert captions(sources.open_source(tmp_path, "validation")) == ["d"]
    assert captions(sources.open_source(tmp_path, "train[:34%]")) == ["b"]
    assert captions(sources.open_source(tmp_path, "train[34%:]")) == ["a", "c"]
    assert captions(sources.open_source(tmp_path, "train[-2:-1]")) == ["a"]
    with pytest.raises(UserError, match=r"split 'train\[1': write its name, or a part such as"):
        sources.open_source(tmp_path, "train[1")


def picture(size, turned=1):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turned
    Image.new("RGB", size, (10, 200, 30)).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_pictures_are_clips_of_one_frame(tmp_path):
    put(tmp_path / "a.jpg", picture((48, 32)), "a hill")
    put(tmp_path / "b.JPEG", picture((48, 32), turned=6), "a tower")
    put(tmp_path / "c.png", b"no picture", "nothing")
    source = sources.open_source(tmp_path, "train")
    infos, damaged = sources.scan(source)
    assert infos[:2].tolist() == [[1, 32, 48, 120], [1, 48, 32, 120]]
    assert "c.png: is broken or not an image" in str(damaged[2])
    assert source[1].keys() == {"picture", "caption"}
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "x/0.jpg")
        tar.add(tmp_path / "a.txt", "x/0.txt")
    packed = sources.open_source(tmp_path / "all.tar", "train")
    assert packed.info(0) == source.info(0)
    np.testing.assert_array_equal(read_image(packed[0]["picture"]), read_image(source[0]["picture"]))


def test_tables(tmp_path, clip):
    """Open-Sora's, with other columns and orders; files beside the table, or by their whole path."""
    put(tmp_path / "clips/a.mp4", clip)
    put(tmp_path / "b.mp4", clip)
    rows = {
        "meta.csv": f'path,text,num_frames,fps\nclips/a.mp4,"a grey, even wall",4,8\n{tmp_path}/b.mp4,b,4,8\n',
        "others.csv": '\ufeffcaption,id,video\r\n"a grey, even wall",0,clips/a.mp4\r\n\r\nb,1,b.mp4\r\n',
        "tabs.tsv": "file_name\ttext\nclips/a.mp4\ta grey, even wall\nb.mp4\tb\n",
    }
    for name, text in rows.items():
        (tmp_path / name).write_text(text, newline="")
        source = sources.open_source(tmp_path / name, "train")
        assert captions(source) == ["a grey, even wall", "b"]
        infos, damaged = sources.scan(source)
        assert (infos[:, 0].tolist(), damaged) == ([4, 4], {})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/validation.csv").write_text("path,text\n../b.mp4,held out\nabsent.mp4,x\n../b.mp4,\n")
    held_out = sources.open_source(tmp_path / "set", "validation")
    _, damaged = sources.scan(held_out)
    assert held_out.caption(0) == "held out"
    assert "absent.mp4: no such video file" in str(damaged[1])
    assert "has no caption in" in str(damaged[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has columns none; Open-Sora's table has path and text"),
        ("path,words\na.mp4,x\n", "has columns path, words; Open-Sora's table has path and text"),
        ("path,text\na.mp4,x, y\n", "line 2 has 3 fields, its header 2"),
        ('path,text\na.mp4,"no end\nb.mp4,x\n', "cannot be read as a table"),
    ],
)
def test_tables_that_cannot_be(tmp_path, text, message):
    (tmp_path / "meta.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        sources.open_source(tmp_path / "meta.csv", "train")


def test_tars(tmp_path, clip):
    """Of video2dataset's form: captions in .txt, or in .json alone; one tar, or a folder of them."""
    for number in (0, 1):
        with tarfile.open(
            tmp_path / f"0000{number}.tar", "w", format=(tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)[number]
        ) as tar:
            for at, (ending, caption) in enumerate(
                [(".txt", b"grey 0"), (".json", b'{"caption": "grey 1", "key": "1"}')]
            ):
                name = f"{'deep/' * 30 * number}{number}{at:08}"
                for each, content in ((".mp4", clip), (ending, caption), (".jpg", b"a thumbnail")):
                    member = tarfile.TarInfo(name + each)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    source = sources.open_source(tmp_path, "train")
    assert captions(source) == ["grey 0", "grey 1"] * 2
    assert source.passed_over == {"pictures beside a video of their name": 4}
    infos, damaged = sources.scan(source)
    assert (infos.tolist(), damaged) == ([[4, 16, 32, 8]] * 4, {})
    assert source[3]["video"] == clip
    assert len(sources.open_source(tmp_path / "00000.tar", "train[50%:]")) == 1
    with pytest.raises(UserError, match=r"00000\.tar: has no split 'validation'; hold out train\[90%:\]"):
        sources.open_source(tmp_path / "00000.tar", "validation")
    whole = (tmp_path / "00001.tar").read_bytes()
    for content in (whole[: len(whole) // 2], gzip.compress(whole), b"", b"no tar" * 200):
        (tmp_path / "00001.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"00001\.tar: cannot be read as a tar"):
            sources.open_source(tmp_path, "train")


def test_captions_in_other_encodings(tmp_path, clip):
    texts = {
        "a": "a red boat".encode("utf-16"),
        "b": "a red boat".encode("utf-8-sig"),
        "c": codecs.BOM_UTF32_BE + "a red boat".encode("utf-32-be"),
        "d": "a café terrace, 20°C".encode("latin-1"),
        "e": "a red boat".encode("utf-16-le"),  # without a mark
    }
    for name, content in texts.items():
        put(tmp_path / f"{name}.mp4", clip)
        put(tmp_path / f"{name}.txt", content)
    source = sources.open_source(tmp_path, "train")
    _, damaged = sources.scan(source)
    assert [source.caption(i) for i in range(3)] == ["a red boat"] * 3
    assert damaged.keys() == {3, 4}
    assert re.search(r"d\.txt: is no UTF-8 text; convert it \(iconv", str(damaged[3]))
    assert damaged[3].reason == "caption in another encoding"


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
    assert "b.mp4: cannot be decoded as a video" in str(damaged[1])
