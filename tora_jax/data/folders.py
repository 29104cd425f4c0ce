"""Clips that lie in files: folders of videos and pictures with captions, Open-Sora's CSV, video2dataset's tars.

A clip's caption is in a file of its name beside it: .txt, or .json with a caption in it, as video2dataset writes both.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tora_jax.conditioning.images import STILL_FPS
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath
from tora_jax.io.clip_files import ENDINGS, ClipError
from tora_jax.io.files import decode_text, is_hidden
from tora_jax.io.video import STILLS, VideoInfo, image_size, probe

HELD_OUT = ("validation", "val", "valid", "test")  # folders and tables of these names are no part of "train"
TABLES = (".csv", ".tsv")
PATHS = ("path", "video", "video_path", "file_name", "filename", "file")  # columns of tables, the likeliest first
TEXTS = ("text", "caption", "prompt")  # columns of tables, and names in .json
NO_CAPTION = "no caption"
HOLD_OUT = "hold out train[90%:] (data.validation) from train[:90%] (data.split)"


class Member(NamedTuple):
    """A file inside a tar that is not compressed: where its bytes lie."""

    tar: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    def read_bytes(self) -> bytes:
        return files.read_range(self.tar, self.start, self.size)


class Item(NamedTuple):
    """A clip: the file of its pixels, and that of its caption, the caption itself, or what to do to have one."""

    content: Path | Member
    caption: Path | Member | str | UserError


@dataclasses.dataclass(frozen=True)
class ClipFiles:
    """A `sources.Source` of videos, and of pictures as clips of one frame.

    Attributes:
      items: the clips.
      passed_over: what else was found, in words -> how often.
    """

    items: Sequence[Item]
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)
    made = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        content, _ = self.items[index]
        kind = "picture" if _is_still(content) else "video"
        return {kind: _source(content), "caption": self.caption(index)}

    def caption(self, index: int) -> str:
        _, caption = self.items[index]
        if isinstance(caption, UserError):
            raise caption
        if isinstance(caption, str):
            return caption.strip()
        try:
            text = decode_text(caption.read_bytes(), str(caption))
        except OSError as error:
            raise ClipError(f"{caption}: cannot be read ({error.strerror})", NO_CAPTION) from error
        except UserError as error:
            raise ClipError(str(error), "caption in another encoding") from None
        return (_of_json(text, str(caption)) if caption.suffix.lower() == ".json" else text).strip()

    def info(self, index: int) -> VideoInfo:
        content, _ = self.items[index]
        self.caption(index)  # a clip without one is none
        if _is_still(content):
            return VideoInfo(1, *image_size(_source(content)), STILL_FPS)
        return probe(_source(content))

    def name(self, index: int) -> str:
        return str(self.items[index].content)


def _is_still(content: Path | Member) -> bool:
    return content.suffix.lower() in STILLS


def _source(content: Path | Member) -> Path | bytes:
    return content.read_bytes() if isinstance(content, Member) else content


def _of_json(text: str, name: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:  # as without a caption, which is refused below
        found = None
    captions = [found[key] for key in TEXTS if isinstance(found.get(key), str)] if isinstance(found, dict) else []
    if not captions:
        raise ClipError(f"{name}: holds no caption; write one under {TEXTS[1]!r}, or into a .txt", NO_CAPTION)
    return captions[0]


# ----------------------------------------------------------------------------------------------------------
# What lies where
# ----------------------------------------------------------------------------------------------------------


def open_files(entry: str, split: str) -> ClipFiles:
    """Finds the clips of a folder, a table or a tar.

    Args:
      entry: a folder, with all folders in it; a table (.csv, .tsv) of Open-Sora's form; or a tar.
      split: of a folder, "validation" is what its folder of that name, or its validation.csv, holds; where it has no
        train, "train" is all but HELD_OUT. Tables and tars are "train". A part is "train[:90%]" or "train[100:]", in
        the order of names.

    Raises:
      UserError: there is no such file, folder or split, or a table or tar is broken.
    """
    name, part = _parse_split(split)
    path = files.path(entry)
    if path.is_dir():
        path, whole = _of_split(path, name)
    elif not path.is_file():
        raise UserError(f"{path}: no such folder; give one with a data set or with videos, a .csv, or a .tar")
    elif name != "train":
        raise UserError(f"{path}: has no split {name!r}; {HOLD_OUT}, or name a folder that has both")
    else:
        whole = False
    if path.is_dir():
        found = _in_folder(path, HELD_OUT if whole else ())
    elif path.suffix.lower() in TABLES:
        found = ClipFiles(list(_in_table(path)))
    elif path.suffix.lower() == ".tar":
        found = _paired(_in_tar(path))
    else:
        raise UserError(f"{path}: is no source of clips; give a folder, Open-Sora's .csv, or a .tar that is unpacked")
    return dataclasses.replace(found, items=found.items[part(len(found))])


def _parse_split(split: str) -> tuple[str, Any]:
    """ "train[:90%]" -> the name, and the function of the number of clips that gives the slice."""
    found = re.fullmatch(r"([^\[\]/]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not found:
        raise UserError(f"split {split!r}: write its name, or a part such as train[:90%] or train[100:]")
    name, *ends = found.groups()

    def number(end: str | None, count: int) -> int | None:
        return None if end is None else round(int(end[:-1]) * count / 100) if end.endswith("%") else int(end)

    return name, lambda count: slice(*(number(end, count) for end in ends))


def _of_split(folder: Path, name: str) -> tuple[Path, bool]:
    """The folder or table of a split; and whether it is the whole folder, for want of them."""
    places = [folder / name, *(folder / f"{name}{ending}" for ending in TABLES)]
    there = [place for place in places if place.exists()]
    if len(there) > 1:
        raise UserError(f"{folder}: has {' and '.join(place.name for place in there)}; keep one of them")
    if there:
        return there[0], False
    if name != "train":
        raise UserError(f"{folder}: has no split {name!r}; put its clips into {folder / name}, or {HOLD_OUT}")
    return folder, True


def _in_folder(folder: Path, without: Sequence[str]) -> ClipFiles:
    counted: collections.Counter[str] = collections.Counter()
    found = []
    for at, folders, names in _walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        counted["links to folders"] += sum((at / name).is_symlink() for name in folders)
        shown = [at / name for name in names if not is_hidden(name)]
        top = at.relative_to(folder).parts[:1]
        if top and top[0] in without:
            counted[f"in {top[0]}/, which is another split"] += sum(map(_is_clip, shown))
        else:
            found += shown
    found.sort()
    tars = [path for path in found if path.suffix.lower() == ".tar"]
    parts = [_paired(found), *(_paired(_in_tar(path)) for path in tars)]
    for part in parts:
        counted.update(part.passed_over)
    return ClipFiles([item for part in parts for item in part.items], dict(+counted))


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """As `os.walk`, top down; a bucket is asked once, and has no links."""
    if not isinstance(folder, BucketPath):
        yield from ((Path(at), folders, names) for at, folders, names in os.walk(folder))
        return
    groups = itertools.groupby(files.sizes(folder), key=lambda name: PurePosixPath(name).parent)
    for at, names in groups:
        if not any(map(is_hidden, at.parts)):
            yield folder / at, [], [PurePosixPath(name).name for name in names]


def _is_clip(path: Path | Member) -> bool:
    return path.suffix.lower() in (*ENDINGS, *STILLS)


def _paired(files: Iterable[Path | Member]) -> ClipFiles:
    """Clips of files, each with its caption."""
    by_name = {str(file): file for file in files}
    passed_over = collections.Counter()
    stems = {name[: -len(file.suffix)] for name, file in by_name.items() if file.suffix.lower() in ENDINGS}
    parents = {name.rpartition("/")[0] for name in by_name}
    table = next((name for name, file in by_name.items() if file.suffix.lower() in TABLES), None)
    captions = {
        f"{name[: -len(file.suffix)]}{file.suffix.lower()}": file for name, file in by_name.items() if file.suffix
    }
    items = []
    for name, file in by_name.items():
        suffix, stem = file.suffix.lower(), name[: -len(file.suffix)] if file.suffix else name
        if not _is_clip(file):
            if suffix not in (".txt", ".json", ".tar"):
                passed_over[f"{suffix or 'without an ending'}, no clips"] += 1
        elif suffix in STILLS and stem in stems:
            passed_over["pictures beside a video of their name"] += 1
        else:
            labels = _labels(stem, parents)
            places = [f"{place}{ending}" for place in (stem, labels) for ending in (".txt", ".json")]
            caption = next((captions[place] for place in places if place in captions), None)
            hint = f"write one into {labels}.txt" + (f", or name the table as the source: {table}" if table else "")
            items.append(Item(file, caption or ClipError(f"{name}: has no caption; {hint}", NO_CAPTION)))
    return ClipFiles(items, dict(passed_over))


def _labels(stem: str, parents: Collection[str]) -> str:
    """The place of a caption in `labels/` beside `videos/`, as in the released Tora's data; `stem` without one."""
    moved = re.sub(r"(.*/)videos/", r"\1labels/", stem)
    return moved if moved.rpartition("/")[0] in parents else stem


# ----------------------------------------------------------------------------------------------------------
# Tables and tars
# ----------------------------------------------------------------------------------------------------------


def _in_table(path: Path) -> Iterator[Item]:
    """Rows of a table with a header. Files are looked for beside the table, then from the working folder."""
    text = decode_text(path.read_bytes(), str(path))
    header = text.partition("\n")[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if "\t" in header else ",", strict=True)
    names = [name.strip().lower() for name in next(rows, [])]
    columns = [next((name for name in known if name in names), None) for known in (PATHS, TEXTS)]
    if None in columns:
        raise UserError(f"{path}: has columns {', '.join(names) or 'none'}; Open-Sora's table has path and text")
    file_at, text_at = map(names.index, columns)
    try:
        for row in rows:
            if not row:
                continue
            if len(row) != len(names):
                raise UserError(f"{path}: line {rows.line_num} has {len(row)} fields, its header {len(names)}; mend it")
            file = files.path(row[file_at].strip())
            beside = file if isinstance(file, BucketPath) else path.parent / file
            missing = ClipError(f"{file}: has no caption in {path}, line {rows.line_num}; write one", NO_CAPTION)
            there = isinstance(beside, BucketPath) or beside.exists() or not file.exists()  # not a question a row
            yield Item(beside if there else file, row[text_at].strip() or missing)
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as a table ({error}, line {rows.line_num}); mend it") from None


def _in_tar(path: Path) -> Iterator[Member]:
    """The files of a tar, by its headers alone."""
    whole = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # it keeps them all
                if not member.isreg() or is_hidden(member.name):
                    continue
                if member.offset_data + member.size > whole:
                    raise tarfile.ReadError("the file ends early")
                yield Member(path, member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as a tar ({reason}); is it complete, and not compressed?") from None
