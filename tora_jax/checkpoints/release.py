"""Release folders: weights, their config and tokenizer in one place.

config.json            the config the weights were made with
tora.safetensors       one file a part; tensor names are parameter paths joined by "/"
vae.safetensors, motion_vae.safetensors, t5.safetensors
params/                in place of all of them: an Orbax checkpoint with the parts at the top of its tree
tokenizer.model        sentencepiece
README.md              where the weights come from
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from tora_jax.errors import UserError
from tora_jax.io import files, safetensors_io
from tora_jax.io.buckets import BucketPath
from tora_jax.io.files import tuples
from tora_jax.sharding import Place

PARTS = ("tora", "vae", "motion_vae", "t5")
DEMO = Path(__file__).parent.parent / "assets" / "demo"  # the small model's weights, docs/demo.md

SAMPLED = 1 << 16  # bytes at the start, the middle and the end of each file, for `checksum`


class Release(NamedTuple):
    """What a folder holds.

    Attributes:
      config: plain nested dict.
      params: part name -> parameter tree.
      tokenizer: path of the sentencepiece model.
    """

    config: dict[str, Any]
    params: dict[str, Any]
    tokenizer: Path


def save(folder: str | Path, config: dict, params: dict[str, Any], tokenizer: Path, readme: str) -> None:
    """Writes a release folder, aside first and then renamed.

    Raises:
      UserError: the folder exists already.
    """
    with files.write_folder(folder) as aside:
        for part, tree in params.items():
            save_file(traverse_util.flatten_dict(tree, sep="/"), aside / f"{part}.safetensors")
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (aside / "README.md").write_text(readme)
        (aside / "tokenizer.model").write_bytes(tokenizer.read_bytes())


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a release folder.

    Raises:
      UserError: the folder or its config.json is missing or broken.
    """
    folder = files.path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --weights takes a release folder")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json inside, so this is no release folder")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: should hold an object with the model's fields")
    return tuples(config)


def part_config(folder: str | Path, part: str) -> dict[str, Any]:
    """The fields of one part, by the config of a folder that may hold nothing else.

    Raises:
      UserError: as `read_config`, or the folder holds another part.
    """
    config = read_config(folder)
    if not isinstance(config.get(part), Mapping):
        raise UserError(f"{folder}: holds {', '.join(config)}, but no {part}")
    return dict(config[part])


def load(
    folder: str | Path,
    keep: Callable[[Any], Any] = lambda params: params,
    parts: Iterable[str] = PARTS,
    place: Place | None = None,
) -> Release:
    """Reads a release folder.

    Args:
      keep: is given the parameters of each part before the next is read, and returns what is kept of them.
      parts: of the backbone.
      place: as of `load_part`.

    Raises:
      UserError: something is missing or broken; the message names the file.
    """
    folder, config = files.path(folder), read_config(folder)
    params = {part: keep(load_part(folder, part, place)) for part in parts}
    tokenizer = folder / "tokenizer.model"
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer}: missing; copy the sentencepiece model of the text encoder there")
    return Release(config, params, tokenizer)


def load_part(folder: str | Path, part: str, place: Place | None = None) -> dict[str, Any]:
    """The parameters of one part, from its safetensors file or from an Orbax checkpoint in `params/`.

    float16 is a format of files: nothing computes in it, and it comes out as float32.

    Args:
      place: where they lie. A process reads what its own devices hold, once. None = on the default device.

    Raises:
      UserError: it is missing or broken.
    """
    folder = files.path(folder)
    path = folder / f"{part}.safetensors"
    if (folder / "params").is_dir():
        from tora_jax.checkpoints import weights

        return weights.restore(folder / "params", place, only=part)
    if not path.is_file():
        raise UserError(f"{path}: missing; a release folder holds {', '.join(PARTS)} (.safetensors)")
    try:
        if place is not None:
            return _in_shards(path, part, place)
        if isinstance(path, BucketPath):
            found = {name: _on_device(array) for name, array in safetensors_io.read_all(path)}
            return traverse_util.unflatten_dict(found, sep="/")
        with safe_open(path, framework="np") as file:
            names = file.keys()
            return traverse_util.unflatten_dict({name: _on_device(file.get_tensor(name)) for name in names}, sep="/")
    except UserError:
        raise
    except SafetensorError as error:
        raise UserError(f"{path}: broken or truncated ({error})") from None
    except (AttributeError, TypeError, KeyError, ValueError) as error:  # names or number formats that JAX has not
        raise UserError(f"{path}: holds tensors that cannot be read ({error})") from None


def _on_device(leaf: np.ndarray) -> jax.Array:
    return jax.device_put(_widened(leaf))


def _widened(leaf: np.ndarray) -> np.ndarray:
    """In NumPy: by JAX each shape would be a program to compile, which took most of a small model's load."""
    return leaf.astype(np.float32) if leaf.dtype == np.float16 else leaf


def _in_shards(path: Path, part: str, place: Place) -> dict[str, Any]:
    """The parameters in a file; of the host's memory it takes the shards of one at a time, and what is read ahead."""
    tensors = safetensors_io.read_header(path)
    shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    shardings = traverse_util.flatten_dict(place({part: traverse_util.unflatten_dict(shapes, sep="/")})[part], sep="/")

    def box(index: tuple[slice, ...], shape: tuple[int, ...]) -> safetensors_io.Box:
        return tuple(each.indices(length)[:2] for each, length in zip(index, shape, strict=True))

    boxes = {}
    for name, sharding in shardings.items():
        indices = sharding.addressable_devices_indices_map(tensors[name].shape).values()
        boxes[name] = list({box(index, tensors[name].shape): None for index in indices})
    found = {}
    for name, arrays in safetensors_io.read_boxes(tensors, boxes):
        shape, shards = tensors[name].shape, dict(zip(boxes[name], map(_widened, arrays), strict=True))
        shard = functools.partial(lambda index, shape, shards: shards[box(index, shape)], shape=shape, shards=shards)
        found[name] = jax.make_array_from_callback(shape, shardings[name], shard)
    return traverse_util.unflatten_dict(found, sep="/")


def load_model(folder: str | Path, part: str, build: Callable[..., nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    """A model and its parameters, from a folder that `python -m convert_weights` wrote.

    Args:
      part: such as "clip" or "raft".
      build: the fields of the folder's config -> the module.

    Raises:
      UserError: the folder is missing or broken, or holds another part.
    """
    return build(**part_config(folder, part)), load_part(folder, part)


def checksum(weights: str | Path) -> str:
    """Tells weights apart, also those that were trained further under the same name; quick for large ones."""
    folder, digest = files.path(weights), hashlib.sha256()
    found = {Path(name): size for name, size in files.sizes(folder).items() if not name.endswith(".md")}
    for name, size in sorted(found.items()):
        digest.update(f"{name} {size}".encode())
        for start in sorted({0, size // 2, max(size - SAMPLED, 0)}):
            digest.update(files.read_range(folder / name, start, SAMPLED))
    return digest.hexdigest()


def halve(source: str | Path, out: str | Path, readme: str) -> None:
    """Copies a release folder with its numbers in float16: half the size, for models small enough to ship.

    Raises:
      UserError: the source is missing or broken, or the other folder exists already.
    """
    config, params, tokenizer = load(source)
    half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
    save(out, config, half, tokenizer, readme)
