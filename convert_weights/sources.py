"""Opens checkpoints: a file, a folder with shards and their index, or a hub id (see hub.py)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization, traverse_util

from convert_weights import folders, hub, pickles, safetensors_io
from tora_jax.errors import UserError

MAX_DEPTH = 4  # of the folders that `listing` looks into


class Source(NamedTuple):
    """A checkpoint, unread.

    Attributes:
      name: for messages.
      files: of the tensors.
      shapes, dtypes: tensor name -> shape, dtype.
      read: tensor name -> array.
      config: config.json of the folder; empty where there is none.
      tokenizer: the sentencepiece model of the folder, or None.
    """

    name: str
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any]
    tokenizer: Path | None


def open_source(name: str, allow_pickle: bool = False, allowing_command: str = "") -> Source:
    """Finds a checkpoint and reads its headers.

    Args:
      name: path of a file or folder, or a hub id ("hpcai-tech/OpenSora-STDiT-v3"; folders inside follow it:
        "stabilityai/sdxl-vae/vae").
      allow_pickle: read pickles too, with `torch.load(weights_only=True)`.
      allowing_command: the command that allows pickles, for the message that refuses them.

    Raises:
      UserError: it is missing, broken, or not safe to read.
    """

    def check(file: str | Path, pickle: bool) -> None:
        if pickle and not allow_pickle:
            pickles.refuse(file, allowing_command)

    path = locate(name, lambda file: check(f"{name}: {file}", file.endswith(folders.PICKLES)))
    files, index = folders.weights(path) if path.is_dir() else ((path,), None)
    config, tokenizer = {}, None
    if path.is_dir():
        config = folders.read_json(path / "config.json") if (path / "config.json").is_file() else {}
        places = (path / folder / name for folder in (".", "tokenizer") for name in folders.TOKENIZERS)
        tokenizer = next((place for place in places if place.is_file()), None)
    if files[0].suffix in folders.MSGPACK:
        merged = _merge(path, [_unpack(file) for file in files])
        return _source(name, files, merged, lambda key: merged[key], config, tokenizer)
    for file in files:
        check(file, pickles.is_pickle(file))
    if any(pickles.is_pickle(file) for file in files):
        tensors, wrappers = zip(*(pickles.read(file) for file in files), strict=True)
        if wrappers[0]:
            print(f"convert_weights: note: {name}: the tensors under {wrappers[0]!r} are taken", file=sys.stderr)
        _check_index(index, {file.name: held for file, held in zip(files, tensors, strict=True)})
        merged = _merge(path, tensors)
        return _source(name, files, merged, lambda key: merged[key], config, tokenizer)
    headers = [safetensors_io.read_header(file) for file in files]
    _check_index(index, {file.name: held for file, held in zip(files, headers, strict=True)})
    merged = _merge(path, headers)
    return _source(name, files, merged, lambda key: safetensors_io.read(merged[key]), config, tokenizer)


def _source(name, files, tensors, read, config, tokenizer) -> Source:
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    return Source(name, tuple(files), shapes, {k: t.dtype for k, t in tensors.items()}, read, config, tokenizer)


def locate(name: str, check: Callable[[str], None] = lambda file: None) -> Path:
    """A path as it is, or that of a hub id; see `hub.locate`."""
    path = Path(name)
    return path if path.exists() else hub.locate(name, check)


def listing(name: str) -> list[str]:
    """Paths of the files in a folder or behind a hub id, relative to it, with "/"; of a file, none.

    Raises:
      UserError: see `hub.listing`.
    """
    path = Path(name)
    if not path.exists():
        return hub.listing(name)
    found: list[str] = []
    for folder, inner, files in os.walk(path):
        at = Path(folder).relative_to(path)
        if len(at.parts) == MAX_DEPTH:
            inner.clear()
        found += [(at / file).as_posix() for file in files]
    return sorted(found)


def beside(source: Source, name: str) -> Path | None:
    """A file in the folder of the weights, if it is there."""
    path = source.files[0].parent / name
    return path if path.is_file() else None


def joined(sources: Mapping[str, Source]) -> Source:
    """Several checkpoints as one; each has its prefix in front of its names. Config and tokenizer are the first's.

    Raises:
      UserError: a name stands in two of them.
    """
    first = next(iter(sources.values()))
    places = _merge(
        Path(first.name),
        [{prefix + key: (source, key) for key in source.shapes} for prefix, source in sources.items()],
    )

    def read(name: str) -> np.ndarray:
        source, key = places[name]
        return source.read(key)

    return first._replace(
        name=" + ".join(source.name for source in sources.values()),
        files=tuple(file for source in sources.values() for file in source.files),
        shapes={name: source.shapes[key] for name, (source, key) in places.items()},
        dtypes={name: source.dtypes[key] for name, (source, key) in places.items()},
        read=read,
    )


class Piece(NamedTuple):
    """A tensor that is part of another one.

    Attributes:
      key: of the other tensor.
      rows: the parts of it, along the first axis, that follow one another here.
      parts: equal parts that it has.
    """

    key: str
    rows: tuple[int, ...] = (0,)
    parts: int = 1

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this piece of a tensor of shape `whole`."""
        return whole if self.parts == 1 else (whole[0] // self.parts * len(self.rows), *whole[1:])

    def cut(self, whole: np.ndarray) -> np.ndarray:
        """This piece of the tensor."""
        if self.parts == 1:
            return whole
        cuts = whole.reshape(self.parts, -1, *whole.shape[1:])
        return np.concatenate([cuts[row] for row in self.rows])


def cut(source: Source, pieces: Mapping[str, Piece], **config: Any) -> Source:
    """A checkpoint under other names; `config`: what its form says, beside its config.json."""
    return source._replace(
        shapes={name: piece.shape(source.shapes[piece.key]) for name, piece in pieces.items()},
        dtypes={name: source.dtypes[piece.key] for name, piece in pieces.items()},
        read=lambda name: pieces[name].cut(source.read(pieces[name].key)),
        config={**source.config, **config},
    )


def _check_index(index: dict[str, str] | None, held: dict[str, Mapping]) -> None:
    """Each shard must hold what the index says, no more and no less."""
    if index is None:
        return
    for name, tensors in held.items():
        want = {key for key, file in index.items() if file == name}
        if odd := sorted(want ^ set(tensors)):
            verb = "lacks" if odd[0] in want else "also holds"
            raise UserError(f"{name}: does not fit its index: it {verb} {odd[0]} ({len(odd)} such); get both again")


def _merge(path: Path, parts: list[Mapping]) -> dict:
    merged: dict = {}
    for part in parts:
        if twice := sorted(merged.keys() & part.keys()):
            raise UserError(f"{path}: {twice[0]} stands in two files ({len(twice)} such)")
        merged.update(part)
    if not merged:
        raise UserError(f"{path}: no tensors inside")
    return merged


def _unpack(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a msgpack file; paths joined by "/", without "params" on top. Such a file cannot hold code."""
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        flat = traverse_util.flatten_dict(tree.get("params", tree), sep="/")
    except Exception as error:  # msgpack has many kinds for broken bytes
        raise UserError(f"{path}: is no file of Flax's serialization ({error})") from None
    if odd := [key for key, leaf in flat.items() if not isinstance(leaf, np.ndarray)]:
        raise UserError(f"{path}: not a tree of arrays ({odd[0]})")
    return flat
