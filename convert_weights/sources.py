"""Finds and opens checkpoints: a file, a folder with shards and their index, or a hub id in the local cache.

Nothing here uses the network. Pickles are read only on request.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization, traverse_util

from convert_weights import safetensors_io
from tora_jax.errors import UserError

MSGPACK = (".flax", ".msgpack")  # trees that flax.serialization wrote
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PICKLE_MAGIC = (b"PK\x03\x04", b"\x80")  # torch's zip archive, and the form before it
# Hub folders may hold the same weights several times (fp16, EMA ...); these names are the plain ones.
PLAIN_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.model", "spiece.model")


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
    path = _locate(name)
    files, index = _of_folder(path) if path.is_dir() else ((path,), None)
    config, tokenizer = {}, None
    if path.is_dir():
        config = _json(path / "config.json") if (path / "config.json").is_file() else {}
        places = (path / folder / name for folder in (".", "tokenizer") for name in TOKENIZERS)
        tokenizer = next((place for place in places if place.is_file()), None)
    if files[0].suffix in MSGPACK:
        merged = _merge(path, [_unpack(file) for file in files])
        return _source(name, files, merged, lambda key: merged[key], config, tokenizer)
    if any(_is_pickle(file) for file in files):
        if not allow_pickle:
            raise UserError(
                f"{next(f for f in files if _is_pickle(f))}: a pickle, which can run code when it is read; convert a "
                f"safetensors file, or, if you trust this one: {allowing_command}"
            )
        tensors = [_unpickle(file) for file in files]
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


def beside(source: Source, name: str) -> Path | None:
    """A file in the folder of the weights, if it is there."""
    path = source.files[0].parent / name
    return path if path.is_file() else None


# ----------------------------------------------------------------------------------------------------------
# Finding files
# ----------------------------------------------------------------------------------------------------------


def _locate(name: str) -> Path:
    path = Path(name)
    if path.exists():
        return path
    if not (match := re.fullmatch(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)", name)) or ".." in name:
        raise UserError(f"{name}: no such file or folder, and no hub id such as hpcai-tech/OpenSora-STDiT-v3")
    repository, inside = match.groups()
    cache = _hub_cache() / f"models--{repository.replace('/', '--')}"
    snapshots = cache / "snapshots"
    main = cache / "refs" / "main"
    found = sorted(snapshots.iterdir(), key=lambda p: p.stat().st_mtime) if snapshots.is_dir() else []
    if main.is_file() and (snapshots / main.read_text().strip()).is_dir():
        found = [snapshots / main.read_text().strip()]
    if not found:
        raise UserError(
            f"{name}: no such file or folder, and not in the hub cache {_hub_cache()}; "
            f"download it first, for instance with: hf download {repository}"
        )
    if not (found[-1] / inside.strip("/")).exists():
        raise UserError(f"{name}: the cached copy of {repository} has no {inside.strip('/')}; download it whole")
    return found[-1] / inside.strip("/")


def _hub_cache() -> Path:
    """The hub client's folder, by the client's own environment variables."""
    if "HF_HUB_CACHE" in os.environ:
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    return Path(os.environ.get("HF_HOME", cache)).expanduser() / "hub"


def _of_folder(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weights in a folder and, where they are sharded, the index: tensor name -> file name."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for endings in ((".safetensors",), PICKLES, MSGPACK):
        indices = [p for p in files if p.name.endswith(tuple(e + ".index.json" for e in endings))]
        weights = [p for p in files if p.suffix in endings]
        plain = [p for p in weights if p.name in PLAIN_NAMES]
        if len(indices) == 1 and not plain:
            return _of_index(indices[0])
        if len(weights) == 1 or len(plain) == 1:
            return ((plain or weights)[0],), None
        if weights or indices:
            names = ", ".join(p.name for p in (*indices, *weights))
            raise UserError(f"{folder}: which weights? it has no index, or several: {names}; name one file")
    raise UserError(f"{folder}: no weights inside (.safetensors, or {', '.join(PICKLES)})")


def _of_index(path: Path) -> tuple[tuple[Path, ...], dict[str, str]]:
    index = _json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise UserError(f"{path}: broken index (no weight_map of names to files); get the file again")
    names = sorted(set(index.values()))
    if odd := [name for name in names if Path(name).name != name]:
        raise UserError(f"{path}: the index names {odd[0]!r}, which is not a file beside it")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise UserError(
            f"{path}: shard missing: the index names {', '.join(missing)}, absent from {path.parent}; download it again"
        )
    return tuple(path.parent / name for name in names), index


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


def _json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not valid JSON (no UTF-8)") from None


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parses a JSON object; `name` is its source in messages.

    Raises:
      UserError: it is something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{name}: should hold a JSON object")
    return value


# ----------------------------------------------------------------------------------------------------------
# Flax
# ----------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------
# Pickles
# ----------------------------------------------------------------------------------------------------------


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(9)
    # A safetensors header of 128 bytes starts with torch's old magic too; its ninth byte tells.
    return start.startswith(PICKLE_MAGIC) and start[8:] != b"{"


def _unpickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # only here, and only when pickles are allowed: the package does not need it
    except ImportError:
        raise UserError(f"{path}: reading a pickle needs PyTorch: pip install torch") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch raises whatever the damage happens to cause
        # Not in torch's words: they recommend to load it unsafely.
        unsafe = "weights_only" in str(error)
        why = "it holds more than tensors, which may be code" if unsafe else str(error).split(". ")[0].splitlines()[0]
        raise UserError(f"{path}: torch.load(weights_only=True) refuses it: {why}; get it as safetensors") from None
    if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
        raise UserError(f"{path}: not a state dict (a mapping of names to tensors)")
    bits = torch.bfloat16, torch.int16
    bfloat16 = safetensors_io.DTYPES["BF16"]
    return {
        key: t.view(bits[1]).numpy().view(bfloat16) if t.dtype == bits[0] else t.numpy() for key, t in state.items()
    }


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == PICKLE_MAGIC[0]
