"""Which files of a folder are the weights, by their names alone; and its JSON files.

By names alone, so that a folder of the hub is asked in the same way before anything of it is fetched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from tora_jax.errors import UserError

MSGPACK = (".flax", ".msgpack")  # trees that flax.serialization wrote
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
ENDINGS = (".safetensors", *PICKLES, *MSGPACK)
# Hub folders may hold the same weights several times (fp16, EMA ...); these names are the plain ones.
PLAIN_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
TOKENIZERS = ("tokenizer.model", "spiece.model")


def choose(folder: str, names: Iterable[str]) -> tuple[list[str], str | None]:
    """The file of the weights, or none and the index that names their shards.

    Args:
      folder: for messages.
      names: of the files in the folder.

    Raises:
      UserError: none holds weights, or several do.
    """
    names = sorted(names)
    for endings in ((".safetensors",), PICKLES, MSGPACK):
        indices = [name for name in names if name.endswith(tuple(ending + ".index.json" for ending in endings))]
        weights = [name for name in names if PurePosixPath(name).suffix in endings]
        plain = [name for name in weights if name in PLAIN_NAMES]
        if len(indices) == 1 and not plain:
            return [], indices[0]
        if len(weights) == 1 or len(plain) == 1:
            return [(plain or weights)[0]], None
        if weights or indices:
            several = ", ".join((*indices, *weights))
            raise UserError(f"{folder}: which weights? it has no index, or several: {several}; name one file")
    raise UserError(f"{folder}: no weights inside (.safetensors, or {', '.join(PICKLES)})")


def weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weights in a folder and, where they are sharded, the index: tensor name -> file name.

    Raises:
      UserError: as `choose` and `read_index`, or a shard is missing.
    """
    files, index = choose(str(folder), (path.name for path in folder.iterdir() if path.is_file()))
    if index is None:
        return tuple(folder / name for name in files), None
    path = folder / index
    by_tensor = read_index(path)
    names = sorted(set(by_tensor.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{path}: shard missing: the index names {', '.join(missing)}, absent from {folder}; download it again"
        )
    return tuple(folder / name for name in names), by_tensor


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of its shard.

    Raises:
      UserError: it is broken.
    """
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise UserError(f"{path}: broken index (no weight_map of names to files); get the file again")
    if odd := [name for name in sorted(set(index.values())) if Path(name).name != name]:
        raise UserError(f"{path}: the index names {odd[0]!r}, which is not a file beside it")
    return index


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: it holds something else.
    """
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
