"""Paths in buckets, over fsspec's own file system in memory; tests/test_cloud.py has gs:// and s3:// (slow)."""

import errno
import pickle
import uuid
from pathlib import Path

import numpy as np
import pytest

from tora_jax.errors import UserError
from tora_jax.io import buckets, files, safetensors_io, video


@pytest.fixture
def bucket():
    folder = files.path(f"memory://{uuid.uuid4().hex}")
    yield folder
    folder.rmtree()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/tora_jax/files"


class TestParse:
    @pytest.mark.parametrize("name", ["video.mp4", "/a/b", "a/b:c", "frame=0", "C:/x", "-", "a:/b"])
    def test_of_this_machine(self, name):
        assert buckets.parse(name) is None
        assert files.path(name) == Path(name)

    @pytest.mark.parametrize(("name", "problem"), [("ftp://a/b", "ftp:// is not known"), ("gs://", "names no bucket")])
    def test_no_address(self, name, problem, monkeypatch):
        monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda package: package)
        with pytest.raises(UserError, match=problem):
            files.path(name)

    @pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("s3", "s3fs")])
    def test_without_its_package(self, scheme, package, monkeypatch):
        monkeypatch.setattr(buckets.importlib.util, "find_spec", lambda package: None)
        with pytest.raises(UserError, match=rf"needs {package}; pip install 'tora_jax\[cloud\]'"):
            files.path(f"{scheme}://bucket/name")

    def test_once_more(self, bucket):
        path = bucket / "a" / "b.txt"
        for again in (files.path(path), files.path(str(path)), pickle.loads(pickle.dumps(path)), path.resolve()):
            assert again == path
            assert str(again) == f"{bucket}/a/b.txt"
        assert str(path).startswith("memory://")
        assert str(path.with_stem("c").parent) == f"{bucket}/a"
        assert isinstance(path, Path)


class TestBucketPath:
    def test_files(self, bucket):
        path = bucket / "a/b.txt"
        assert not path.exists()
        assert not bucket.is_dir()
        path.write_text("Übung\n")
        assert path.read_text() == "Übung\n"
        assert path.read_bytes() == "Übung\n".encode()
        assert path.stat().st_size == 7
        assert (path.is_file(), path.is_dir()) == (True, False)
        assert (path.parent.is_file(), path.parent.is_dir()) == (False, True)
        with path.open("rb") as file:
            file.seek(2)
            assert file.read(3) == b"bun"
        path.unlink()
        path.unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError, match=r"b\.txt"):
            path.unlink()

    def test_what_is_not_there(self, bucket):
        for look in (Path.stat, Path.read_bytes, Path.open):
            with pytest.raises(FileNotFoundError) as error:
                getattr(bucket / "none", look.__name__)()
            assert error.value.filename == f"{bucket}/none"
        assert list(bucket.iterdir()) == list(bucket.glob("*")) == []

    def test_folders(self, bucket):
        for name in ("b/2.txt", "a.txt", "b/c/3.json", "b/1.txt"):
            (bucket / name).write_bytes(name.encode())
        assert files.sizes(bucket) == {"a.txt": 5, "b/1.txt": 7, "b/2.txt": 7, "b/c/3.json": 10}
        assert sorted(path.name for path in bucket.iterdir()) == ["a.txt", "b"]
        assert list(bucket.rglob("*.txt")) == [bucket / "a.txt", bucket / "b/1.txt", bucket / "b/2.txt"]
        assert sorted(bucket.glob("*/*.txt")) == [bucket / "b/1.txt", bucket / "b/2.txt"]
        assert [str(path.relative_to(bucket)) for path, _ in (bucket / "**/*.json").matching()] == ["b/c/3.json"]
        (bucket / "b").rename(bucket / "d")
        assert list(files.sizes(bucket)) == ["a.txt", "d/1.txt", "d/2.txt", "d/c/3.json"]
        files.remove(bucket / "d")
        files.remove(bucket / "none")
        assert list(files.sizes(bucket)) == ["a.txt"]

    @pytest.mark.parametrize(
        ("raised", "kind", "said"),
        [
            (RuntimeError("Anonymous caller has no access, 401"), PermissionError, "no right to it: Anonymous caller"),
            (PermissionError("Access Denied"), PermissionError, "no right to it: Access Denied"),
            (ValueError("Unable to locate credentials"), PermissionError, "no right to it: Unable to locate"),
            (FileNotFoundError("b/x"), FileNotFoundError, "No such file"),
            (TimeoutError(), OSError, "TimeoutError"),
        ],
    )
    def test_what_libraries_raise(self, bucket, raised, kind, said, monkeypatch):
        def fail(*_, **__):
            raise raised

        monkeypatch.setattr(type(bucket.fs), "cat_file", fail)
        with pytest.raises(kind, match=said) as error:
            bucket.read_bytes()
        assert error.value.filename == str(bucket)


class TestFiles:
    def test_a_fault_leaves_the_older_file(self, bucket):
        path = bucket / "x.txt"
        files.write_text(path, "before")

        def fail():
            with files.write_atomic(path) as aside:
                aside.write_text("after")
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert path.read_text() == "before"
        files.write_text(path, "after")
        assert path.read_text() == "after"

    def test_a_folder_is_whole_or_not_there(self, bucket, monkeypatch):
        sent = []
        send = buckets.BucketPath.send

        def lose(path, here):
            sent.append(path.name)
            if path.name == "c":
                raise OSError(errno.EIO, "the network is gone", str(path))
            send(path, here)

        monkeypatch.setattr(buckets.BucketPath, "send", lose)

        def write(*names):
            with files.write_folder(bucket / "r") as aside:
                for name in names:
                    (aside / name).write_text(name)

        with pytest.raises(UserError, match="the network is gone"):
            write("config.json", "a", "c")
        assert (sent, files.sizes(bucket)) == (["a", "c"], {})
        monkeypatch.undo()
        write("config.json", "a")
        with pytest.raises(UserError, match="exists already"):
            write()
        assert files.sizes(bucket) == {"r/a": 1, "r/config.json": 11}

    def test_no_right_to_write(self, bucket, monkeypatch):
        files.check_writable(bucket, "--out x")
        assert not bucket.exists()

        def fail(*_, **__):
            raise RuntimeError("Forbidden, 403")

        monkeypatch.setattr(type(bucket.fs), "pipe_file", fail)
        with pytest.raises(UserError, match=r"--out x: cannot write there .*no right to it: Forbidden"):
            files.check_writable(bucket, "--out x")

    def test_copies_are_kept_and_bounded(self, bucket, cache, monkeypatch):
        for name in "abc":
            (bucket / name).write_bytes(name.encode() * 40)
        monkeypatch.setenv("TORA_CACHE_BYTES", "100")
        first = files.local(bucket / "a")
        assert first.read_bytes() == b"a" * 40
        inode = first.stat().st_ino
        assert files.local(str(bucket / "a")) == first
        assert first.stat().st_ino == inode
        files.local(bucket / "b")
        assert len(list(cache.iterdir())) == 2
        files.local(bucket / "c")
        assert len(list(cache.iterdir())) == 2
        (bucket / "c").write_bytes(b"other")
        assert files.local(bucket / "c").read_bytes() == b"other"
        with pytest.raises(FileNotFoundError):
            files.local(bucket / "none")
        monkeypatch.setenv("TORA_CACHE_BYTES", "84")
        with pytest.raises(UserError, match="85 bytes are too much; set TORA_CACHE_BYTES"):
            files.local_folder(bucket)

    def test_a_folder_here(self, bucket):
        (bucket / "a/b").write_bytes(b"1")
        assert (files.local_folder(bucket) / "a/b").read_bytes() == b"1"
        assert files.local_folder(bucket) == files.local_folder(bucket)

    def test_what_grows(self, bucket, tmp_path):
        for target in (bucket / "log", tmp_path / "log"):
            outbox = files.Outbox(target)
            file = (outbox.folder / "lines").open("a")
            for line in ("1\n", "2\n"):
                file.write(line)
                file.flush()
                outbox.send()
            assert (target / "lines").read_text() == "1\n2\n"
            file.write("3\n")
            file.close()
            outbox.close()
            assert (target / "lines").read_text() == "1\n2\n3\n"
        assert outbox.folder == tmp_path / "log"


def test_safetensors_by_ranges(bucket, tmp_path, monkeypatch):
    arrays = {f"t{i}": np.arange(i * 3, dtype=np.float32).reshape(i, 3) for i in range(6)}
    specs = {name: safetensors_io.Spec(array.dtype, array.shape) for name, array in arrays.items()}
    safetensors_io.write(tmp_path / "x.safetensors", specs, arrays.values())
    path = bucket / "x.safetensors"
    path.send(tmp_path / "x.safetensors")
    fetched = []
    ranges = buckets.BucketPath.read_range
    monkeypatch.setattr(
        buckets.BucketPath, "read_range", lambda self, start, size: fetched.append(size) or ranges(self, start, size)
    )
    one = safetensors_io.read(safetensors_io.read_header(path)["t4"], layer=2)
    np.testing.assert_array_equal(one, arrays["t4"][2])
    assert fetched[-1] == one.nbytes
    monkeypatch.setattr(safetensors_io, "BYTES_OF_REQUEST", 60)
    fetched.clear()
    found = dict(safetensors_io.read_all(path))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    assert max(fetched[2:]) <= 60
    assert sum(fetched[2:]) == sum(array.nbytes for array in arrays.values())


def test_pictures_and_videos(bucket):
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    video.write_video(bucket / "v.mp4", frames, 8)
    assert video.probe(str(bucket / "v.mp4")) == (3, 16, 16, 8)
    assert len(video.read_video(bucket / "v.mp4")[0]) == 3
    with pytest.raises(UserError, match=r"none\.mp4: no such video file"):
        video.probe(bucket / "none.mp4")
    video.write_video(bucket / "v.gif", frames, 8)
    assert video.read_image(bucket / "v.gif").shape == (16, 16, 3)
    with pytest.raises(UserError, match=r"none\.png: no such image file"):
        video.read_image(bucket / "none.png")
