"""Opens checkpoints: a file, a folder with shards and their index, or a hub id (see hub.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flax import serialization, traverse_util

from convert_weights import folders, hub, pickles, quantised, views
from convert_weights.notes import note
from convert_weights.views import Source
from tora_jax.errors import UserError
from tora_jax.io import files, safetensors_io
from tora_jax.io.buckets import BucketPath

MAX_DEPTH = 4  # of the folders that `listing` looks into


def open_source(name: str, allow_pickle: bool = False, allowing_command: str = "", take: str = "ema") -> Source:
    """Finds a checkpoint and reads its headers.

    Args:
      name: path of a file or folder, or a hub id ("hpcai-tech/OpenSora-STDiT-v3"; folders inside follow it:
        "stabilityai/sdxl-vae/vae").
      allow_pickle: read pickles too, with `torch.load(weights_only=True)`.
      allowing_command: the command that allows pickles, for the message that refuses them.
      take: "ema" or "model", where a training keeps both; a note says which is taken.

    Raises:
      UserError: it is missing, broken, or not safe to read.
    """

    def check(file: str | Path, pickle: bool) -> None:
        if pickle and not allow_pickle:
            pickles.refuse(file, allowing_command)

    path = locate(name, lambda file: check(f"{name}: {file}", file.endswith(folders.PICKLES)))
    path, chosen = _of_training(name, path, take)
    files, index = folders.weights(path) if path.is_dir() else ((path,), None)
    config, tokenizer = {}, None
    if path.is_dir():
        config = folders.read_json(path / "config.json") if (path / "config.json").is_file() else {}
        places = (path / folder / name for folder in (".", "tokenizer") for name in folders.TOKENIZERS)
        tokenizer = next((place for place in places if place.is_file()), None)
    for file in files:
        check(file, pickles.is_pickle(file))
    held, read, metadata, more = _read(name, files, take)
    _check_index(index, dict(zip((file.name for file in files), held, strict=True)))
    tensors = views.merge(path, held)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    source = Source(
        name, tuple(files), shapes, dtypes, lambda key: read(tensors[key]), config, tokenizer, chosen or more
    )
    return quantised.as_bfloat16(views.without_prefixes(source), metadata)


def _read(name: str, files: Sequence[Path], take: str) -> tuple[Sequence[Mapping], Callable, dict[str, str], bool]:
    """What each file holds, by names; what makes an array of it; strings beside; whether there was another model."""
    if files[0].suffix in folders.MSGPACK:
        return [_unpack(file) for file in files], np.asarray, {}, False
    if any(pickles.is_pickle(file) for file in files):
        held = [pickles.read(file, take) for file in files]
        _, wrapper, other = held[0]
        if other:
            _tell(name, f"the state dict under {wrapper!r}", wrapper in pickles.AVERAGES)
        elif wrapper:
            note(f"{name}: the tensors under {wrapper!r} are taken")
        return [each.tensors for each in held], np.asarray, {}, bool(other)
    held, metadata = zip(*(safetensors_io.read_header_and_metadata(file) for file in files), strict=True)
    return held, safetensors_io.read, dict(item for strings in metadata for item in strings.items()), False


def _of_training(name: str, path: Path, take: str) -> tuple[Path, bool]:
    """A training of ColossalAI keeps the moving average in `ema.pt` and the model in a folder `model` beside it.

    Returns:
      where the wanted one is, and whether there was a choice.
    """
    average = next((file for file in path.glob("ema.*") if file.suffix in folders.ENDINGS), None)
    if average is None or not (path / "model").is_dir():
        return path, False
    taken = average if take == "ema" else path / "model"
    _tell(name, taken.name, take == "ema")
    return (path if take == "ema" else taken), True


def _tell(name: str, what: str, average: bool) -> None:
    if average:
        note(f"{name}: {what} is taken, the moving average; for the model as it was trained: --take model")
    else:
        note(f"{name}: {what} is taken, the model as it was trained; for its moving average: --take ema")


def locate(name: str, check: Callable[[str], None] = lambda file: None) -> Path:
    """A path as it is, or that of a hub id; see `hub.locate`."""
    path = files.path(name)
    if isinstance(path, BucketPath) and not path.exists():
        raise UserError(f"{name}: no such file or folder in the bucket")
    return path if path.exists() else hub.locate(name, check)


def listing(name: str) -> list[str]:
    """Paths of the files in a folder or behind a hub id, relative to it, with "/"; of a file, none.

    Raises:
      UserError: see `hub.listing`.
    """
    path = files.path(name)
    if isinstance(path, BucketPath):
        return [file for file in files.sizes(locate(name)) if file.count("/") <= MAX_DEPTH]
    if not path.exists():
        return hub.listing(name)
    found: list[str] = []
    for folder, inner, names in os.walk(path):
        at = Path(folder).relative_to(path)
        if len(at.parts) == MAX_DEPTH:
            inner.clear()
        found += [(at / file).as_posix() for file in names]
    return sorted(found)


def beside(source: Source, name: str) -> Path | None:
    """A file in the folder of the weights, if it is there."""
    path = source.files[0].parent / name
    return path if path.is_file() else None


def _check_index(index: dict[str, str] | None, held: dict[str, Mapping]) -> None:
    """Each shard must hold what the index says, no more and no less."""
    if index is None:
        return
    for name, tensors in held.items():
        want = {key for key, file in index.items() if file == name}
        if odd := sorted(want ^ set(tensors)):
            verb = "lacks" if odd[0] in want else "also holds"
            raise UserError(f"{name}: does not fit its index: it {verb} {odd[0]} ({len(odd)} such); get both again")


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
