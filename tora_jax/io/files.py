"""Files of this machine and of buckets: found, read, and written whole or not at all; notes of what made a folder.

Whatever a person names goes through `path`; what a library opens by its name goes through `local`.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tora_jax.errors import UserError
from tora_jax.io import buckets
from tora_jax.io.buckets import BucketPath

CACHE_BYTES = 50 * 2**30  # of copies that `local` keeps; TORA_CACHE_BYTES names another bound
LAST = "config.json"  # of a folder in a bucket: what says that it is whole


def path(name: str | os.PathLike) -> Path:
    """The path that a person names: of this machine, or the address of something in a bucket (gs://, s3://).

    Raises:
      UserError: an address of another kind, without its bucket, or whose package is not installed.
    """
    return buckets.parse(os.fspath(name)) or Path(name)


def cache_folder() -> Path:
    """Where compiled programs and copies of files in buckets are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tora_jax"


def local(name: str | os.PathLike) -> Path:
    """A file of this machine with the content of a file: itself, or a copy of one in a bucket.

    Copies are kept as long as the file in the bucket stays as it is, CACHE_BYTES in all; what was used last stays.

    Raises:
      OSError: a file in a bucket is missing or cannot be read.
    """
    source = path(name)
    if not isinstance(source, BucketPath):
        return source
    version = source.version()
    return _copied(f"{source} {version}", source.suffix, source.stat().st_size, source.fetch)


def local_folder(name: str | os.PathLike) -> Path:
    """The same for a folder with all that is in it.

    Raises:
      OSError: as `local`.
      UserError: a folder in a bucket is larger than all copies may be.
    """
    source = path(name)
    if not isinstance(source, BucketPath):
        return source
    held = source.sizes()
    if (size := sum(held.values())) > _bound():
        raise UserError(f"{source}: is copied, and {size} bytes are too much; set TORA_CACHE_BYTES, or use gs://")

    def fetch(here: Path) -> None:
        for each in held:
            (here / each).parent.mkdir(parents=True, exist_ok=True)
            (source / each).fetch(here / each)

    return _copied(f"{source} {held}", "", size, fetch)


def _copied(content: str, suffix: str, size: int, fetch: Callable[[Path], None]) -> Path:
    """The copy of something in a bucket: an older one, or what `fetch` writes to the path that it is given."""
    here = cache_folder() / "files" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}{suffix}"
    if here.exists():
        os.utime(here)
        return here
    here.parent.mkdir(parents=True, exist_ok=True)
    _make_room(here.parent, size)
    with tempfile.TemporaryDirectory(dir=here.parent, prefix=".") as folder:
        aside = Path(folder) / here.name
        fetch(aside)
        if not here.exists():  # else another process was faster
            os.replace(aside, here)
    return here


def _bound() -> int:
    return int(os.environ.get("TORA_CACHE_BYTES") or CACHE_BYTES)


def _make_room(folder: Path, size: int) -> None:
    """Removes the copies that were used longest ago, until `size` bytes more fit."""
    copies = []
    for copy in folder.glob("[!.]*"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            held = sum(sizes(copy).values()) if copy.is_dir() else copy.stat().st_size
            copies.append((copy.stat().st_mtime, held, copy))
    room = _bound() - size - sum(held for _, held, _ in copies)
    for _, held, copy in sorted(copies):
        if room >= 0:
            break
        remove(copy) if copy.is_dir() else copy.unlink(missing_ok=True)
        room += held


def read_range(name: str | os.PathLike, start: int, size: int) -> bytes:
    """Up to `size` bytes of a file from `start` on; of a file in a bucket no others are fetched."""
    source = path(name)
    if isinstance(source, BucketPath):
        return source.read_range(start, size)
    with source.open("rb") as file:
        file.seek(start)
        return file.read(size)


def sizes(folder: str | os.PathLike) -> dict[str, int]:
    """Files in a folder and its folders, relative to it with "/" -> their bytes, in the order of names."""
    folder = path(folder)
    if isinstance(folder, BucketPath):
        return folder.sizes()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    if isinstance(folder, BucketPath):
        folder.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


class Outbox:
    """A folder of this machine for files that grow: the named one, or one whose files `send` copies to a bucket.

    Attributes:
      folder: where to write.
    """

    def __init__(self, target: Path):
        self._target, self._sent = target, {}
        self._aside = tempfile.TemporaryDirectory(prefix="tora_jax-") if isinstance(target, BucketPath) else None
        self.folder = target if self._aside is None else Path(self._aside.name)
        self.folder.mkdir(parents=True, exist_ok=True)

    def send(self) -> None:
        """Copies the files that have changed their size since.

        Raises:
          OSError: the bucket does not take them.
        """
        for name, size in sizes(self.folder).items() if self._aside else ():
            if self._sent.get(name) != size:
                (self._target / name).send(self.folder / name)
                self._sent[name] = size

    def close(self) -> None:
        """Sends a last time, and removes the files here that are sent.

        Raises:
          OSError: as `send`.
        """
        if self._aside is not None:
            with self._aside:
                self.send()


def check_writable(folder: Path, name: str) -> None:
    """Checks that files can be written to a folder, before the long work starts; a missing one may be made later.

    Args:
      name: what the message begins with, such as "--out x/y.mp4".

    Raises:
      UserError: no file can be written there.
    """
    try:
        if isinstance(folder, BucketPath):
            probe = folder / f".{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink(missing_ok=True)
            return
        exists = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(each))
        if not exists.is_dir():
            raise NotADirectoryError(None, f"{exists} is no folder")
        with tempfile.TemporaryFile(dir=exists):
            pass
    except FileNotFoundError as error:
        raise UserError(f"{name}: cannot write there (no such bucket: {error.filename})") from None
    except OSError as error:
        raise UserError(f"{name}: cannot write there ({error.strerror or error})") from None


@contextlib.contextmanager
def write_atomic(name: str | os.PathLike) -> Iterator[Path]:
    """Yields a path of this machine, and puts its file in place of the named one when the block ends well.

    A fault inside the block, Ctrl-C too, leaves neither a half-written file nor the temporary one; an older file of
    that name stays as it was.

    Raises:
      UserError: the folder is missing or not writable, the disk is full, or there is a folder of that name.
    """
    target = path(name)
    if isinstance(target, BucketPath):
        with sent(target) as aside:
            yield aside
        return
    aside = target.with_name(f".{uuid.uuid4().hex}{target.suffix}")
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if not target.parent.is_dir():
            raise FileNotFoundError(None, f"there is no folder {target.parent}")
        aside.touch(exist_ok=False)
        yield aside
        os.replace(aside, target)
    except OSError as e:
        reason = e.strerror or e
        raise UserError(f"{target}: cannot be written ({reason}); choose another output path") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


@contextlib.contextmanager
def sent(target: BucketPath) -> Iterator[Path]:
    """Yields a path of this machine whose file, or whose folder's files, are sent to a bucket when the block ends well.

    Of a folder LAST is sent last. What a fault leaves of it is removed.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="tora_jax-") as folder:
            aside = Path(folder) / target.name
            yield aside
            if aside.is_file():
                target.send(aside)
                return
            try:
                for name in sorted(sizes(aside), key=lambda name: name == LAST):
                    (target / name).send(aside / name)
            except BaseException:
                with contextlib.suppress(OSError):  # as the first fault, which is told
                    target.rmtree()
                raise
    except OSError as e:
        raise UserError(f"{target}: cannot be written ({e.strerror or e}); choose another output path") from e


@contextlib.contextmanager
def write_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yields an empty folder that becomes `folder` when the block ends well; a fault inside leaves nothing.

    Raises:
      UserError: the folder exists already, or cannot be written.
    """
    target = path(folder).absolute()
    if target.exists():
        raise UserError(f"{target}: exists already; choose another folder or remove it")
    if isinstance(target, BucketPath):
        with sent(target) as aside:
            aside.mkdir()
            yield aside
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        aside.chmod(0o755)
        yield aside
        os.rename(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def is_hidden(name: str | os.PathLike) -> bool:
    """Whether a file's name begins with a dot: what systems and editors leave beside files, such as macOS's ._NAME."""
    return os.path.basename(name).startswith(".")


# By their marks; UTF-32's begins as UTF-16's does.
ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


def decode_text(content: bytes, name: str) -> str:
    """Text of a file: UTF-8, or what its byte-order mark says; the mark is no part of it.

    Args:
      name: of the file, for messages.

    Raises:
      UserError: it is in another encoding. Which one, nothing in such a file tells.
    """
    encoding = next((encoding for mark, encoding in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:  # refused below, as is UTF-16 without its mark
        text = "\0"
    if "\0" in text:
        likely = "utf-16be" if content[:1] == b"\0" else "utf-16le" if b"\0" in content else "cp1252"
        way_out = f"convert it (iconv -f ENCODING -t utf-8; its ENCODING may be {likely})"
        raise UserError(f"{name}: is no UTF-8 text; {way_out}")
    return text


def write_text(name: str | os.PathLike, text: str) -> None:
    """Writes a text file in UTF-8, as `write_atomic` does.

    Raises:
      UserError: as `write_atomic`.
    """
    with write_atomic(name) as aside:
        aside.write_text(text, encoding="utf-8")


def note_made(name: str | os.PathLike, made: Mapping[str, Any]) -> None:
    """Notes the settings behind the content of a folder, in a file of that folder; makes the folder.

    Args:
      made: name -> value, of JSON's types.

    Raises:
      UserError: as `write_atomic`.
    """
    path(name).parent.mkdir(parents=True, exist_ok=True)
    write_text(name, json.dumps(made, indent=2) + "\n")


def made_otherwise(name: str | os.PathLike, made: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Compares settings with those of a `note_made`.

    Args:
      made: with tuples in place of lists, as `tuples` gives them.

    Returns:
      (name, value in the note) of the first setting that differs, the value None if the note has none; None if all are
      equal. Settings that the note alone has do not count.

    Raises:
      FileNotFoundError: the note is missing.
      ValueError: the note is not valid JSON.
    """
    before = tuples(json.loads(path(name).read_text(encoding="utf-8")))
    return next(((each, before.get(each)) for each in made if made[each] != before.get(each)), None)


def tuples(value: Any) -> Any:
    """Turns JSON's lists into tuples: fields of Linen modules must be hashable."""
    if isinstance(value, Mapping):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
