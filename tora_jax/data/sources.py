"""Where clips come from: TFDS folders in ArrayRecord (no TensorFlow), precomputed sets, files (`folders`).

SOURCES is the table of the kinds of sources. A new data format is a class with the methods of `Source`, and a line that
adds it to the table.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from tora_jax.data import folders
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath
from tora_jax.io.video import VideoInfo, probe

SCAN_THREADS = 8
SAMPLED, ENDS = 64, 1 << 16  # records, and bytes at both ends of a file, for `digest`
DONE = "dataset_info.json"  # of TFDS: what makes a folder a set
MADE = "precompute.json"  # lies in a precomputed set: what it was made with


@runtime_checkable
class Source(Protocol):
    """Records by number, for threads and, pickled, for other processes.

    A record is a dict. A clip's has `video` or `picture` (the bytes of a file, or its path), `caption`, and where
    they are known `fps`, `tracks`, `visible` and `labels`, see `sprites`; labels promise that objects only translate.
    A precomputed set has the records that `precompute` writes.

    Attributes:
      made: what a precomputed set was made with; None of clips.
      passed_over: files that are no clips, in words -> how many.
    """

    made: Mapping[str, Any] | None
    passed_over: Mapping[str, int]

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """A record.

        Raises:
          UserError: it is damaged.
        """

    def info(self, index: int) -> VideoInfo:
        """Length, size and rate of a clip.

        Raises:
          UserError: the record is damaged.
        """

    def caption(self, index: int) -> str:
        """The caption of a record.

        Raises:
          UserError: the record is damaged.
        """

    def name(self, index: int) -> str:
        """The name of a record, for people."""


class TFDSFolder:
    """One split of a TFDS folder: a set of clips, such as sprites and curated shards, or a precomputed set.

    Raises:
      UserError: the folder is broken, or has no such split.
    """

    def __init__(self, folder: Path, split: str):
        import tensorflow_datasets as tfds  # takes a second to import, and folders of videos do without

        self.folder, self.split, self.passed_over = folder, split, {}
        try:
            # ArrayRecord's reader reads gs:// itself, and no other bucket.
            of_s3 = isinstance(folder, BucketPath) and folder.scheme != "gs"
            builder = tfds.builder_from_directory(str(files.local_folder(folder) if of_s3 else folder))
            self.made = json.loads((folder / MADE).read_text()) if (folder / MADE).is_file() else None
        except Exception as error:  # TFDS and protobuf have many kinds for broken metadata
            reason = str(error).partition("\n")[0]
            raise UserError(f"{folder}: is no data set that can be read ({reason})") from error
        if split.split("[")[0] not in builder.info.splits:
            raise UserError(f"{folder}: has no split {split!r}; there are {', '.join(builder.info.splits)}")
        # TFDS cannot open a split without records.
        self._records = builder.as_data_source(split) if builder.info.splits[split].num_examples else ()
        self._infos = _infos(folder, builder.info.splits, split)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = dict(self._records[index])
            record["caption"] = record["caption"].decode()
        except Exception as error:  # damaged bytes raise nearly anything from the two decoders
            raise UserError(f"cannot be read ({error})") from error
        return record

    def info(self, index: int) -> VideoInfo:
        if self.made:
            return VideoInfo(*(self.made[name] for name in VideoInfo._fields))
        if self._infos is not None:
            *sizes, fps = self._infos[index]
            return VideoInfo(*map(int, sizes), float(fps))
        return probe(self[index]["video"])

    def caption(self, index: int) -> str:
        return self[index]["caption"]

    def name(self, index: int) -> str:
        return f"{self.folder} {self.split} record {index}"


def sizes_name(split: str) -> str:
    """The file of `VideoInfo` that curation writes beside the shards, so that no clip is opened to learn its size."""
    return f"sizes-{split}.npy"


def _infos(folder: Path, splits: Mapping[str, Any], split: str) -> Float[np.ndarray, "n 4"] | None:
    """The content of that file for the clips of a split, or of a part such as "train[:10%]"; None without the file."""
    name = split.split("[")[0]
    if not (folder / sizes_name(name)).is_file():
        return None
    every = np.load(io.BytesIO((folder / sizes_name(name)).read_bytes()))
    ends = np.cumsum(splits[name].shard_lengths)
    starts = dict(zip(sorted(splits[name].filenames), ends - splits[name].shard_lengths, strict=True))
    parts = [every[:0]]
    for part in splits[split].file_instructions:
        start = starts[Path(part.filename).name] + part.skip
        parts.append(every[start : start + part.take])
    return np.concatenate(parts)


def _open_tfds(folder: str, split: str) -> TFDSFolder | None:
    """None for a folder without TFDS's dataset_info.json, which may also lie one or two folders below."""
    found = [path.parent for inside in ("", "*/", "*/*/") for path in files.path(folder).glob(f"{inside}{DONE}")]
    if len(found) > 1:
        raise UserError(f"{folder}: holds several data sets; choose one of {', '.join(map(str, found))}")
    return TFDSFolder(found[0], split) if found else None


# Kind -> the function (an entry of a config's `sources`, split) that opens it, or returns None where the entry is of
# another kind. The kind that was added last is asked first; what nothing else takes is one of files.
SOURCES: dict[str, Callable[[str, str], Source | None]] = {"files": folders.open_files, "tfds": _open_tfds}


def open_source(entry: str | Path, split: str) -> Source:
    """Opens a source as the kind that its content tells.

    Args:
      entry: a `TFDSFolder` (with dataset_info.json, or with one folder of a version that has it), what
        `folders.open_files` takes, or what another kind in SOURCES does.
      split: "train", "validation" ..., or a part, such as "train[:10%]".

    Raises:
      UserError: no kind takes the entry, or it has no such split.
    """
    opened = (kind(str(entry), split) for kind in reversed(SOURCES.values()))
    return next(source for source in opened if source is not None)


class Joined:
    """Several sources, one after the other; a `Source` itself.

    Raises:
      UserError: one of them cannot be opened, or some are precomputed and some are not.
    """

    def __init__(self, entries: Sequence[str | Path], split: str):
        self.sources = tuple(open_source(entry, split) for entry in entries)
        self.made = self.sources[0].made
        for entry, source in zip(entries, self.sources, strict=True):
            if (source.made is None) != (self.made is None):
                raise UserError(f"{entry}: precomputed sets and clips do not mix; give sources of one kind")
        self.passed_over = dict(sum((Counter(source.passed_over) for source in self.sources), Counter()))
        self._ends = np.cumsum([len(source) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Source, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], index - int(self._ends[which]) + len(self.sources[which])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        source, number = self._find(index)
        return source[number]

    def info(self, index: int) -> VideoInfo:
        source, number = self._find(index)
        return source.info(number)

    def caption(self, index: int) -> str:
        source, number = self._find(index)
        return source.caption(number)

    def name(self, index: int) -> str:
        source, number = self._find(index)
        return source.name(number)


def digest(source: Source) -> str:
    """Tells sets of records apart by SAMPLED of them, spread evenly; a damaged one counts as that.

    Of a file it takes the size and, at the start and the end, some bytes; so that neither long videos nor sets far away
    hold a training up.
    """
    found = hashlib.sha256(str(len(source)).encode())

    def add(name: str, value: Any) -> None:
        if isinstance(value, Path) and value.is_file():  # a table may name one that is not there
            size = value.stat().st_size
            start, end = (files.read_range(value, at, ENDS) for at in (0, max(size - ENDS, 0)))
            value = f"{size}".encode() + start + end
        elif isinstance(value, np.ndarray):
            value = f"{value.dtype}{value.shape}".encode() + value.tobytes()
        found.update(f"{name} ".encode() + (value if isinstance(value, bytes) else str(value).encode()))

    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        try:
            record = source[int(index)]
        except UserError:  # the loader names it; here it is told apart from a whole one
            record = {"damaged": True}
        for name in sorted(record):
            add(name, record[name])
    return found.hexdigest()


def scan(source: Source) -> tuple[Float[np.ndarray, "n 4"], dict[int, UserError]]:
    """`VideoInfo` of each clip, zeros where it cannot be read; and number of each of the latter -> the reason."""

    def one(index: int) -> VideoInfo | UserError:
        try:
            return source.info(index)
        except UserError as error:
            return error

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = list(pool.map(one, range(len(source))))
    damaged = {index: info for index, info in enumerate(found) if isinstance(info, UserError)}
    return np.array([(0,) * 4 if index in damaged else info for index, info in enumerate(found)], float), damaged
