"""Paths in buckets (gs://, s3://) that behave as `pathlib.Path` does, over fsspec with gcsfs and s3fs.

A bucket has no folders: a "folder" is there while a file lies in it, and making one does nothing. A file appears there
when it is whole. gcsfs and s3fs try again, ever later, what the network or the service refuses for a while.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import logging
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from tora_jax.errors import UserError

# Scheme -> the package that fsspec needs for it; "memory" is one of fsspec's own, in the memory of this process.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs", "memory": "fsspec"}
LOG_IN = {"gs": "gcloud auth application-default login", "s3": "aws configure"}
ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # pathlib makes one slash of two
TIMES = ("mtime", "LastModified", "updated", "created")  # names of what fsspec tells of a file
BLOCK = 1 << 20  # bytes that are read ahead

logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs tracebacks of what it then raises
# Listings are asked for anew each time: other processes write there, too.
for _scheme in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_scheme, {}).setdefault("use_listings_cache", False)


class BucketPath(type(Path())):
    """The path of a file in a bucket, or of the files whose names begin so.

    Libraries that open names themselves take it for a file of this machine that is missing: see `files.local`.

    Raises (all that looks into the bucket):
      OSError: as with files of this machine; its `strerror` says what the service answered.
    """

    def __str__(self) -> str:
        return ADDRESS.sub(r"\1://", super().__str__(), count=1)

    def __fspath__(self) -> str:
        return str(self)

    @property
    def scheme(self) -> str:
        """Such as "gs"."""
        return self.parts[0][:-1]

    @property
    def bucket(self) -> str:
        return self.parts[1]

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem(self.scheme)

    def absolute(self) -> BucketPath:
        return self

    def resolve(self, strict: bool = False) -> BucketPath:
        return self

    def info(self) -> dict[str, Any] | None:
        """What fsspec tells of a file or folder; None where there is none."""
        with told(self):
            try:
                return self.fs.info(str(self))
            except FileNotFoundError:
                return None

    def exists(self, **_: Any) -> bool:
        return self.info() is not None

    def is_file(self, **_: Any) -> bool:
        found = self.info()
        return found is not None and found["type"] == "file"

    def is_dir(self, **_: Any) -> bool:
        found = self.info()
        return found is not None and found["type"] == "directory"

    def stat(self, **_: Any) -> os.stat_result:
        """With the size in bytes and the time of the last change alone."""
        found = self.info()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return _stat(found)

    def version(self) -> str:
        """Words that change with the content of the file.

        Raises:
          FileNotFoundError: there is no file.
        """
        found = self.info()
        if found is None or found["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return " ".join(str(found.get(name)) for name in ("size", "generation", "ETag", *TIMES))

    def sizes(self) -> dict[str, int]:
        """Names of the files in this folder and its folders, relative to it -> bytes, in one question."""
        with told(self):
            found = self.fs.find(str(self), detail=True)
        own = f"{'/'.join(self.parts[1:])}/"
        return {name.lstrip("/").removeprefix(own): info["size"] for name, info in sorted(found.items())}

    def iterdir(self) -> Iterator[BucketPath]:
        with told(self):
            try:
                names = self.fs.ls(str(self), detail=False)
            except FileNotFoundError:
                names = []
        found = (name.rstrip("/").rpartition("/")[2] for name in names)
        return (self / name for name in found if name and name != self.name)

    def rglob(self, pattern: str, **_: Any) -> Iterator[BucketPath]:
        """The files below whose names fit; folders are no files."""
        return (path for path in (self / name for name in self.sizes()) if path.match(pattern))

    def glob(self, pattern: str, **_: Any) -> Iterator[BucketPath]:
        with told(self):
            found = self.fs.glob(str(self / pattern))
        return (type(self)(f"{self.scheme}://{name.strip('/')}") for name in found)

    def matching(self) -> Iterator[tuple[BucketPath, os.stat_result]]:
        """The files that fit this path as a pattern, where `**` stands for any folders; in one question."""
        with told(self):
            found = self.fs.glob(str(self), detail=True)
        for name, info in found.items():
            if info["type"] == "file":
                yield type(self)(f"{self.scheme}://{name.strip('/')}"), _stat(info)

    def open(self, mode: str = "r", *_: Any, encoding: str | None = None, **__: Any) -> io.IOBase:
        """Files that are written appear when they are closed, whole; none can be appended to."""
        options: dict[str, Any] = {} if "b" in mode else {"encoding": encoding or "utf-8"}
        if "r" in mode:
            options["block_size"] = BLOCK
        with told(self):
            return self.fs.open(str(self), mode, **options)

    def read_bytes(self) -> bytes:
        return self.read_range(0, None)

    def read_range(self, start: int, size: int | None) -> bytes:
        """The bytes from `start` on; None = to the end. No others are fetched."""
        if size == 0:
            return b""
        with told(self):
            return self.fs.cat_file(str(self), start=start or None, end=None if size is None else start + size)

    def read_text(self, encoding: str | None = None, **_: Any) -> str:
        return self.read_bytes().decode(encoding or "utf-8")

    def write_bytes(self, data: bytes) -> int:
        with told(self):
            self.fs.pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, **_: Any) -> int:
        return self.write_bytes(data.encode(encoding or "utf-8"))

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        if not self.exists():
            self.write_bytes(b"")

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: buckets have no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        with told(self):
            try:
                self.fs.rm_file(str(self))
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def rename(self, target: str | os.PathLike) -> BucketPath:
        """Copies the file, or all files of the folder, and removes them here."""
        with told(self):  # not by `mv`, whose call not every service of gs:// knows
            self.fs.copy(str(self), str(target), recursive=True)
            self.fs.rm(str(self), recursive=True)
        return type(self)(target)

    def rmtree(self) -> None:
        """Removes all files of the folder."""
        with told(self), contextlib.suppress(FileNotFoundError):
            self.fs.rm(str(self), recursive=True)

    def fetch(self, here: Path) -> None:
        """Copies the file to one of this machine."""
        with told(self):
            self.fs.get_file(str(self), str(here))

    def send(self, here: Path) -> None:
        """Copies a file of this machine to this place, where it appears when it is whole."""
        with told(self):
            self.fs.put_file(str(here), str(self))


def parse(name: str) -> BucketPath | None:
    """The path of an address; None for a name without a scheme.

    Raises:
      UserError: the scheme is unknown, its package is not installed, or no bucket is named.
    """
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)", name, re.IGNORECASE)
    if not found or not (name[found.end(1) :].startswith("://") or found[1] in SCHEMES):
        return None
    scheme, rest = found[1].lower(), found[2]
    if scheme not in SCHEMES:
        raise UserError(f"{name}: {scheme}:// is not known; give a path of this machine, gs:// or s3://")
    if importlib.util.find_spec(SCHEMES[scheme]) is None:
        raise UserError(f"{name}: {scheme}:// needs {SCHEMES[scheme]}; pip install 'tora_jax[cloud]'")
    if not rest.strip("/"):
        raise UserError(f"{name}: names no bucket; write {scheme}://BUCKET/NAME")
    return BucketPath(f"{scheme}://{rest}")


@contextlib.contextmanager
def told(path: BucketPath) -> Iterator[None]:
    """Makes an OSError with a reason and the path of whatever the libraries of a bucket raise."""
    try:
        yield
    except Exception as error:  # of gcsfs, s3fs, google.auth, botocore and aiohttp: most are not OSErrors
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        reason, code = " ".join(str(error).split()) or type(error).__name__, getattr(error, "errno", None) or errno.EIO
        denied = isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403)
        if denied or "redential" in type(error).__name__ + reason or re.search(r"\b(401|403|Forbidden)\b", reason):
            code, log_in = errno.EACCES, LOG_IN.get(path.scheme)
            reason = f"no right to it: {reason}" + (f"; log in ({log_in})" if log_in else "")
        elif isinstance(error, FileNotFoundError):
            code, reason = errno.ENOENT, os.strerror(errno.ENOENT)
        raise OSError(code, reason[:300], str(path)) from error


def _stat(info: dict[str, Any]) -> os.stat_result:
    return os.stat_result((0, 0, 0, 0, 0, 0, info["size"] or 0, 0, int(_time(info)), 0))


def _time(info: dict[str, Any]) -> float:
    """When a file was changed last, in seconds since 1970; 0 where the service does not tell."""
    value = next((info[name] for name in TIMES if info.get(name)), 0)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)
