"""Where clips come from: TFDS folders in ArrayRecord (no TensorFlow), precomputed sets, plain folders of videos.

SOURCES is the table of the kinds of sources. A new data format is a class with the methods of `Source`, and a line that
adds it to the table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from tora_jax.errors import UserError
from tora_jax.io.clip_files import ENDINGS
from tora_jax.io.files import is_hidden
from tora_jax.io.video import VideoInfo, probe

SCAN_THREADS = 8
SAMPLED, ENDS = 64, 1 << 16  # records, and bytes at both ends of a file, for `digest`
MADE = "precompute.json"  # lies in a precomputed set: what it was made with


@runtime_checkable
class Source(Protocol):
    """Records by number, for threads and, pickled, for other processes.

    A record is a dict. A clip's record has `video` (the bytes of a file, or its path), `caption`, and where they are
    known `fps`, `tracks`, `visible` and `labels`, see `sprites`; labels promise that the objects only translate. A
    precomputed set has the records that `precompute` writes.

    Attributes:
      made: what a precomputed set was made with; None of clips.
    """

    made: Mapping[str, Any] | None

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

    def name(self, index: int) -> str:
        """The name of a record, for people."""


class TFDSFolder:
    """One split of a TFDS folder: a set of clips, such as sprites and curated shards, or a precomputed set.

    Raises:
      UserError: the folder is broken, or has no such split.
    """

    def __init__(self, folder: Path, split: str):
        import tensorflow_datasets as tfds  # takes a second to import, and folders of videos do without

        self.folder, self.split = folder, split
        try:
            builder = tfds.builder_from_directory(folder)
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
    every = np.load(folder / sizes_name(name))
    ends = np.cumsum(splits[name].shard_lengths)
    starts = dict(zip(sorted(splits[name].filenames), ends - splits[name].shard_lengths, strict=True))
    parts = [every[:0]]
    for part in splits[split].file_instructions:
        start = starts[Path(part.filename).name] + part.skip
        parts.append(every[start : start + part.take])
    return np.concatenate(parts)


class VideoFolder:
    """Videos, each with its caption in a .txt of the same name beside it, or in `labels/` beside `videos/`.

    The second form is that of the released Tora's training data. Hidden files are passed over. A split is a folder of
    that name inside; where there is none, all of the folder is the split "train".

    Raises:
      UserError: a video has no caption (the message names the file), or the folder or the split is not there.
    """

    made = None

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give one with a data set or with videos")
        if (folder / split).is_dir():
            folder = folder / split
        elif split != "train":
            raise UserError(f"{folder}: has no split {split!r}; put its clips into {folder / split}")
        videos, captions = folder, folder
        if (folder / "videos").is_dir():
            videos, captions = folder / "videos", folder / "labels"
        self.folder = folder
        found = (path for path in videos.iterdir() if path.suffix.lower() in ENDINGS and not is_hidden(path))
        self.files = sorted(found)
        self.captions = [captions / f"{path.stem}.txt" for path in self.files]
        for video, caption in zip(self.files, self.captions, strict=True):
            if not caption.is_file():
                raise UserError(f"{video}: has no caption; write one into {caption}")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption = self.captions[index].read_text(encoding="utf-8", errors="replace").strip()
        return {"video": self.files[index], "caption": caption}

    def info(self, index: int) -> VideoInfo:
        return probe(self.files[index])

    def name(self, index: int) -> str:
        return str(self.files[index])


def _open_tfds(folder: str, split: str) -> TFDSFolder | None:
    """None for a folder without TFDS's dataset_info.json, which may also lie one or two folders below."""
    found = [path.parent for inside in ("", "*/", "*/*/") for path in Path(folder).glob(f"{inside}dataset_info.json")]
    if len(found) > 1:
        raise UserError(f"{folder}: holds several data sets; choose one of {', '.join(map(str, found))}")
    return TFDSFolder(found[0], split) if found else None


# Kind -> the function (an entry of a config's `sources`, split) that opens it, or returns None where the entry is of
# another kind. The kind that was added last is asked first; a folder that nothing else takes is one of videos.
SOURCES: dict[str, Callable[[str, str], Source | None]] = {"videos": VideoFolder, "tfds": _open_tfds}


def open_source(folder: str | Path, split: str) -> Source:
    """Opens a source as the kind that its content tells.

    Args:
      folder: a `TFDSFolder` (with dataset_info.json, or with one folder of a version that has it), a `VideoFolder`, or
        what another kind in SOURCES takes.
      split: "train", "validation" ...; of TFDS folders also parts, such as "train[:10%]".

    Raises:
      UserError: no kind takes the folder, or it has no such split.
    """
    opened = (kind(str(folder), split) for kind in reversed(SOURCES.values()))
    return next(source for source in opened if source is not None)


class Joined:
    """Several sources, one after the other; a `Source` itself.

    Raises:
      UserError: one of them cannot be opened, or some are precomputed and some are not.
    """

    def __init__(self, folders: Sequence[str | Path], split: str):
        self.sources = tuple(open_source(folder, split) for folder in folders)
        self.made = self.sources[0].made
        for folder, source in zip(folders, self.sources, strict=True):
            if (source.made is None) != (self.made is None):
                raise UserError(f"{folder}: precomputed sets and clips do not mix; give sources of one kind")
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
        if isinstance(value, Path):
            size = value.stat().st_size
            with value.open("rb") as file:
                start = file.read(ENDS)
                file.seek(max(size - ENDS, 0))
                value = f"{size}".encode() + start + file.read(ENDS)
        elif isinstance(value, np.ndarray):
            value = f"{value.dtype}{value.shape}".encode() + value.tobytes()
        found.update(f"{name} ".encode() + (value if isinstance(value, bytes) else str(value).encode()))

    for index in np.unique(np.linspace(0, len(source) - 1, SAMPLED).astype(int)):
        try:
            record = source[int(index)]
        except UserError:
            record = {"damaged": True}
        for name in sorted(record):
            add(name, record[name])
    return found.hexdigest()


def scan(source: Source) -> tuple[Float[np.ndarray, "n 4"], dict[int, str]]:
    """`VideoInfo` of each clip, zeros where it cannot be read; and number of each of the latter -> the reason."""

    def one(index: int) -> VideoInfo | UserError:
        try:
            return source.info(index)
        except UserError as error:
            return error

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = list(pool.map(one, range(len(source))))
    damaged = {index: str(info) for index, info in enumerate(found) if isinstance(info, UserError)}
    return np.array([(0,) * 4 if index in damaged else info for index, info in enumerate(found)], float), damaged
