"""A checkpoint, unread, and the same checkpoint seen in another way: other names, pieces, several as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert_weights.notes import note
from tora_jax.errors import UserError
from tora_jax.io import files


class Source(NamedTuple):
    """A checkpoint, unread.

    Attributes:
      name: for messages.
      files: of the tensors.
      shapes, dtypes: tensor name -> shape, dtype.
      read: tensor name -> array.
      config: config.json of the folder; empty where there is none.
      tokenizer: the sentencepiece model of the folder, or None.
      chosen: whether it is one of a model and its moving average.
    """

    name: str
    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    read: Callable[[str], np.ndarray]
    config: Mapping[str, Any]
    tokenizer: Path | None
    chosen: bool = False


def merge(path: Path, parts: list[Mapping]) -> dict:
    """The tensors of several files.

    Raises:
      UserError: a name stands in two of them, or there is none.
    """
    merged: dict = {}
    for part in parts:
        if twice := sorted(merged.keys() & part.keys()):
            raise UserError(f"{path}: {twice[0]} stands in two files ({len(twice)} such)")
        merged.update(part)
    if not merged:
        raise UserError(f"{path}: no tensors inside")
    return merged


def joined(sources: Mapping[str, Source]) -> Source:
    """Several checkpoints as one; each has its prefix in front of its names. Config and tokenizer are the first's.

    Raises:
      UserError: a name stands in two of them.
    """
    first = next(iter(sources.values()))
    places = merge(
        files.path(first.name),
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


# What wrappers put in front of every name: DistributedDataParallel, torch.compile.
_PREFIXES = ("module.", "_orig_mod.")


def without_prefixes(source: Source) -> Source:
    """A checkpoint without what a wrapper puts in front of all of its names; a note says so."""
    names, found = {key: key for key in source.shapes}, ""
    while prefix := next((one for one in _PREFIXES if all(name.startswith(one) for name in names)), None):
        names, found = {name.removeprefix(prefix): key for name, key in names.items()}, found + prefix
    if not found:
        return source
    note(f"{source.name}: the names are taken without {found!r}")
    return cut(source, {name: Piece(key) for name, key in names.items()})


def under(source: Source, prefix: str) -> Source:
    """One of several models in a checkpoint: the tensors whose names have a prefix, without it; a note says so."""
    pieces = {key.removeprefix(prefix): Piece(key) for key in source.shapes if key.startswith(prefix)}
    others = len(source.shapes) - len(pieces)
    beside = f"; {others} tensors of other models are left" if others else ""
    note(f"{source.name}: the tensors under {prefix!r} are taken{beside}")
    return cut(source, pieces)
