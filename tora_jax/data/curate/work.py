"""Files of a run, on a disk or in a bucket: whole, or not there.

A stage writes one file for each source video, named by the video's content. The folder is named by the options of the
stage and of the stages before it. So a run that was killed, or gets more videos or other options, repeats nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from apache_beam.io.filesystems import FileSystems

from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath

VERSION = 3  # of the stages' code: raised when what they write changes
BEFORE = {"clips": "probe", "motion": "clips", "looks": "clips", "captions": "clips"}
ARCHIVES = ("clips", "motion")
META = "meta.json"


def digest(*parts: str | bytes) -> str:
    """32 hexadecimal digits of the content."""
    sha = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()[:32]


def chance(name: str) -> float:
    """A number in 0..1 that depends on the name alone, so that every run makes the same choice."""
    return int(digest("chance", name), 16) / 16**32


@dataclasses.dataclass(frozen=True)
class WorkFiles:
    """The files of the stages.

    Attributes:
      folder: of the run's output, with the files in its folder `work`.
      options: of each stage, by its name.
    """

    folder: str
    options: Mapping[str, Mapping[str, Any]]

    def path(self, stage: str, key: str) -> str:
        """The file of a stage for a source video (or, of captions, for a clip)."""
        ending = ".zip" if stage in ARCHIVES else ".json"
        return join(self.folder, "work", f"{stage}-{self._fingerprint(stage)}", f"{key}{ending}")

    def _fingerprint(self, stage: str) -> str:
        before = BEFORE.get(stage)
        options = json.dumps(self.options.get(stage, {}), sort_keys=True, default=list)
        return digest(str(VERSION), stage, options, self._fingerprint(before) if before else "")[:8]


class Found(NamedTuple):
    """A file that fits a pattern: its path, bytes, and the time of its last change in seconds since 1970."""

    path: str
    size: int
    changed: float


def match(pattern: str) -> Iterator[Found]:
    """The files that fit; `**` stands for any folders."""
    if isinstance(path := files.path(pattern), BucketPath):
        for file, found in path.matching():
            yield Found(str(file), found.st_size, found.st_mtime)
    else:
        for file in FileSystems.match([pattern])[0].metadata_list:
            yield Found(file.path, file.size_in_bytes, file.last_updated_in_seconds)


def join(folder: str, *names: str) -> str:
    return str(files.path(folder).joinpath(*names))


def exists(path: str) -> bool:
    return files.path(path).exists()


def _open(path: str) -> io.IOBase:
    return files.path(path).open("rb")


def write(path: str, fill: Callable[[Path], None]) -> None:
    """Writes a file: `fill` gets a local path, and the file appears when it is whole.

    Raises:
      UserError: it cannot be written.
    """
    try:
        files.path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.write_atomic(path) as aside:
            fill(aside)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); mend that and run again") from error


def write_json(path: str, value: Any) -> None:
    write(path, lambda aside: aside.write_text(json.dumps(value, indent=1) + "\n"))


def read_json(path: str) -> Any:
    with _open(path) as file:
        return json.loads(file.read())


def write_zip(path: str, members: Iterable[tuple[str, bytes]], meta: Callable[[], Any]) -> None:
    """Writes named bytes, one after the other, and then META, into one uncompressed file."""

    def fill(aside: Path) -> None:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content)  # without the time: the same content, the same file
            archive.writestr(zipfile.ZipInfo(META), json.dumps(meta()))

    write(path, fill)


@contextlib.contextmanager
def open_zip(path: str) -> Iterator[zipfile.ZipFile]:
    """Opens a file of `write_zip`; only the parts that are read are fetched, from a bucket, too."""
    with _open(path) as file, zipfile.ZipFile(file) as archive:
        yield archive


@contextlib.contextmanager
def local_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def content_key(path: str) -> str:
    """The digest of a file's content."""
    sha = hashlib.sha256()
    with _open(path) as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()[:32]


def read_clip(files: WorkFiles, key: str, index: int) -> bytes:
    """The mp4 of a clip."""
    with open_zip(files.path("clips", key)) as archive:
        return archive.read(f"{index:05d}.mp4")


def each_clip(files: WorkFiles, key: str) -> Iterator[tuple[int, bytes]]:
    """(number, mp4) of each clip of a source video."""
    with open_zip(files.path("clips", key)) as archive:
        for name in archive.namelist():
            if name != META:
                yield int(name.partition(".")[0]), archive.read(name)


def clip_name(key: str, index: int) -> str:
    """The name of a clip, for people and records."""
    return f"{key[:16]}-{index:05d}"
