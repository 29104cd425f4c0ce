"""Where clips come from: TFDS folders in ArrayRecord (no TensorFlow), plain folders of videos, precomputed sets.

A source gives records by number, to threads and, pickled, to other processes. A record is a dict. Of a clip: `video`
(bytes or a path), `caption`, and where they are known `fps`, `tracks`, `visible`, `labels`, see `sprites`; labels
promise that the objects only translate. Of a precomputed set: what `precompute` writes.

All sources have
  made: what a precomputed set was made with; None of clips.
  source[index]: a record.
  info(index): length, size and rate of a clip.
  name(index): of a record, for people.
The second and the third raise UserError where a record is damaged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tora_jax.errors import UserError
from tora_jax.io.video import VideoInfo, probe

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
SCAN_THREADS = 8
MADE = "precompute.json"  # lies in a precomputed set: what it was made with


class Records:
    """One split of a TFDS folder.

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
    """The file beside the shards in which curation writes `video_io.VideoInfo` of all clips, so that none is opened."""
    return f"sizes-{split}.npy"


def _infos(folder: Path, splits: Mapping[str, Any], split: str) -> Float[np.ndarray, "n 4"] | None:
    """What such a file says of the clips of a split, or of a part such as "train[:10%]"."""
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

    The second form is that of the released Tora's training data. A split is a folder of that name inside; where
    there is none, all of the folder is the split "train".

    Raises:
      UserError: a video has no caption (the message names the file), or the split is not there.
    """

    made = None

    def __init__(self, folder: Path, split: str):
        if (folder / split).is_dir():
            folder = folder / split
        elif split != "train":
            raise UserError(f"{folder}: has no split {split!r}; put its clips into {folder / split}")
        videos, captions = folder, folder
        if (folder / "videos").is_dir():
            videos, captions = folder / "videos", folder / "labels"
        self.folder = folder
        self.files = sorted(path for path in videos.iterdir() if path.suffix.lower() in VIDEOS)
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


class Joined:
    """Several sources, one after the other.

    Raises:
      UserError: some are precomputed and some are not, or they were made in different ways.
    """

    def __init__(self, sources: Sequence[Records | VideoFolder]):
        self.sources = tuple(sources)
        self.made = sources[0].made
        for source in sources[1:]:
            if (source.made is None) != (self.made is None):
                raise UserError(f"{source.folder}: precomputed sets and clips do not mix; give sources of one kind")
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _place(self, index: int) -> tuple[Records | VideoFolder, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[which], index - int(self._ends[which]) + len(self.sources[which])

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, place = self._place(index)
        return source[place]

    def info(self, index: int) -> VideoInfo:
        source, place = self._place(index)
        return source.info(place)

    def name(self, index: int) -> str:
        source, place = self._place(index)
        return source.name(place)


def open_folder(folder: str | Path, split: str) -> Records | VideoFolder:
    """A folder as a source, by what lies in it.

    Args:
      folder: one with TFDS's dataset_info.json (or with one folder of a version that has it), or a `VideoFolder`.
      split: "train", "validation" ...; of TFDS folders also parts, such as "train[:10%]".

    Raises:
      UserError: it is neither, or has no such split.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with a data set or with videos")
    found = [path.parent for pattern in ("", "*/", "*/*/") for path in folder.glob(f"{pattern}dataset_info.json")]
    if len(found) > 1:
        raise UserError(f"{folder}: holds several data sets; choose one of {', '.join(map(str, found))}")
    if found:
        return Records(found[0], split)
    return VideoFolder(folder, split)


def scan(source: Records | VideoFolder | Joined) -> tuple[Float[np.ndarray, "n 4"], dict[int, str]]:
    """`video_io.VideoInfo` of each clip, zeros where it cannot be read; and of those, why."""

    def one(index: int) -> VideoInfo | UserError:
        try:
            return source.info(index)
        except UserError as error:
            return error

    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        found = list(pool.map(one, range(len(source))))
    damaged = {index: str(info) for index, info in enumerate(found) if isinstance(info, UserError)}
    return np.array([(0,) * 4 if index in damaged else info for index, info in enumerate(found)], float), damaged
