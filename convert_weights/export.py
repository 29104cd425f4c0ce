"""Writes our parameters as a PyTorch-named, PyTorch-shaped safetensors file: the inverse of a conversion."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from convert_weights import mapping, stream, variants, writers
from convert_weights.mapping import Layout, Move, Rule, Shape
from convert_weights.typing import CheckpointType, Fields
from tora_jax.checkpoints import release, weights
from tora_jax.errors import UserError
from tora_jax.io import files, safetensors_io
from tora_jax.io.safetensors_io import Spec, Tensor

RECORD = "source.json"
TORA = "tora"  # the part of a whole release that holds the denoiser beside the trajectory extractor and the fusers


class Ours(NamedTuple):
    """Our parameters of one part, unread.

    Attributes:
      name: for messages.
      tensors: parameter path -> tensor.
      fields: of the model, as `CheckpointType.init` takes them.
      record: of `Part.record`, or empty.
      left: paths of the same file that belong to other models (extractor and fusers).
    """

    name: str
    tensors: Mapping[str, Tensor]
    fields: Fields
    record: Mapping[str, Any]
    left: tuple[str, ...]


@contextlib.contextmanager
def open_ours(name: str, kind: CheckpointType, scratch: Path | None) -> Iterator[Ours]:
    """Finds a checkpoint type's parameters in a release folder, in one file of it, or in an Orbax folder.

    Args:
      scratch: a folder for a temporary copy of an Orbax checkpoint's part; None = where the system has its own.

    Raises:
      UserError: when they are not there, or do not fit the folder's config.json.
    """
    path = files.path(name)
    folder = path.parent if path.is_file() else path
    config = release.read_config(folder)
    part = path.stem if path.is_file() else next((p for p in (kind.part, TORA) if p in config), kind.part)
    among_others = part == TORA != kind.part
    if part not in config or (among_others and not (kind.in_tora and kind.part in config[TORA])):
        raise UserError(f"{name}: holds {', '.join(config)}, but no {kind.part} to turn into a {kind.name} checkpoint")
    section, prefix = (config[TORA][kind.part], f"{kind.part}/") if among_others else (config[part], "")
    with contextlib.ExitStack() as stack:
        file = folder / f"{part}.safetensors"
        if (folder / "params").is_dir():
            if scratch is not None:
                scratch.mkdir(parents=True, exist_ok=True)
            meanwhile = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=scratch))
            file = Path(meanwhile) / file.name
            _from_orbax(folder / "params", part, file)
        if not file.is_file():
            raise UserError(f"{file}: missing; {folder} is no release folder with {part}")
        held = safetensors_io.read_header(file)
        left = [p for p in held if among_others and (not p.startswith(prefix) or "_fuser/" in p)]
        tensors = {p.removeprefix(prefix): tensor for p, tensor in held.items() if p not in left}
        fields = _fields(kind, section)
        _check(name, {p: t.shape for p, t in tensors.items()}, kind.shapes(fields))
        record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).is_file() else {}
        yield Ours(name, tensors, fields, record.get(part, {}), tuple(left))


def _from_orbax(folder: Path, part: str, file: Path) -> None:
    """Copies a part leaf by leaf into a safetensors file: layers can then be read one at a time."""
    tree = weights.shapes(folder)
    if part not in tree:
        raise UserError(f"{folder}: holds {', '.join(tree)}, but no {part}")
    flat = traverse_util.flatten_dict(tree[part], sep="/")
    specs = {path: Spec(np.dtype(leaf.dtype), leaf.shape) for path, leaf in flat.items()}
    leaves = (np.asarray(weights.restore(folder, only=f"{part}/{path}")) for path in specs)
    safetensors_io.write(file, specs, leaves)


def _fields(kind: CheckpointType, section: Fields) -> Fields:
    """A section of config.json as the type's fields; how to compute (dtype, remat) says nothing about shapes."""
    fields = {name: value for name, value in section.items() if name not in ("dtype", "remat")}
    if kind.notation is not None:
        return {**variants.read_variant(kind, fields.pop("variant")), **fields}
    return fields


def _check(name: str, got: Mapping[str, Shape], want: Mapping[str, Shape]) -> None:
    if got != want:
        path = min(p for p in got.keys() | want.keys() if got.get(p) != want.get(p))
        have, wanted = got.get(path, "missing"), want.get(path, "none")
        raise UserError(f"{name}: does not fit its config.json: {path} is {have}, wanted {wanted}")


# ----------------------------------------------------------------------------------------------------------
# The plan
# ----------------------------------------------------------------------------------------------------------


def plan(kind: CheckpointType, ours: Ours) -> list[Move]:
    """The moves back to the recorded checkpoint; what was not recorded gets the name of PyTorch's module."""
    shapes = {path: tensor.shape for path, tensor in ours.tensors.items()}
    recorded = kind.untie({key: tuple(shape) for key, shape in ours.record.get("keys", {}).items()})
    moves, _ = mapping.match(kind.table, recorded, shapes)
    rest = shapes.keys() - {move.target for move in moves} if recorded else shapes
    named = _names(kind, ours, {path: shapes[path] for path in rest})
    return mapping.plan(kind.table, recorded | kind.untie(named), shapes)


def _names(kind: CheckpointType, ours: Ours, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Source names and shapes by the table alone. Of several rules for one leaf the first one counts."""
    source: dict[str, Shape] = {}
    rules = [(rule, mapping.pattern(rule.target)) for rule in kind.table]
    for path, shape in shapes.items():
        rule, index = next((rule, m.groupdict()) for rule, regex in rules if (m := regex.fullmatch(path)))
        stacked = [n for n in re.findall(r"\{(\w+)\}", rule.source) if n not in index]
        inner = _source_shape(rule, shape[1:] if stacked else shape, ours.fields)
        for layer in range(shape[0]) if stacked else (0,):
            source[rule.source.format(**index, **dict.fromkeys(stacked, layer))] = inner
    return source


def _source_shape(rule: Rule, shape: Shape, fields: Fields) -> Shape:
    if rule.layout is Layout.FLAT:
        return (1, shape[0], 1, 1, 1)
    if rule.layout is Layout.PATCH:
        patch = fields["patch"]
        return (shape[1], shape[0] // patch**2, 1, patch, patch)
    axes = rule.layout.axes
    return tuple(shape[axes.index(i)] for i in range(len(shape))) if axes else shape


# ----------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """Tensors under PyTorch's names, unread.

    Attributes:
      specs: name -> dtype and shape, in the order of the file.
      read: name -> tensor.
    """

    specs: dict[str, Spec]
    read: Callable[[str], np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(int(np.prod(spec.shape, dtype=np.int64)) * spec.dtype.itemsize for spec in self.specs.values())

    def write(self, path: Path) -> None:
        """Streams it, with the metadata of PyTorch's own tools."""
        parts = (functools.partial(self.read, key) for key in self.specs)
        safetensors_io.write(path, self.specs, stream.ahead(parts), {"format": "pt"})

    def under(self, prefix: str) -> File:
        """The tensors whose names have a prefix, without it."""
        names = {name.removeprefix(prefix): name for name in self.specs if name.startswith(prefix)}
        return File({short: self.specs[name] for short, name in names.items()}, lambda short: self.read(names[short]))


def write(target: str, kind: CheckpointType, ours: Ours, cast: stream.Cast, split: bool = False) -> dict[str, Any]:
    """Writes a file, in the order and with the metadata of PyTorch's own tools.

    Args:
      split: write a folder with the files of `kind.split` instead.

    Returns:
      A report.
    """
    whole = _file(kind, ours, cast)
    files = {"": whole}
    if split:
        files = {name: whole.under(prefix) for name, prefix in kind.split(ours.fields).items()}
    nbytes = sum(file.nbytes for file in files.values())
    with writers.aside(target, nbytes) as path:
        for name, file in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            file.write(path / name)
    return {
        "source": ours.name,
        "tensors": [name for file in files.values() for name in file.specs],
        "constants": list(_constants(kind, ours)),
        "left_out": list(ours.left),
        "bytes": nbytes,
    }


def _file(kind: CheckpointType, ours: Ours, cast: stream.Cast) -> File:
    places = {
        key: (move, layer if move.stacked else None)
        for move in plan(kind, ours)
        for layer, key in enumerate(move.sources)
    }
    keys = ours.record.get("keys", {})
    if kind.tied and all(key in keys for key in kind.tied):
        kept, copy = kind.tied
        places[copy] = places[kept]
    constants = _constants(kind, ours)
    specs = {key: Spec(array.dtype, array.shape) for key, array in constants.items()}
    for key, (move, _) in places.items():
        specs[key] = Spec(cast.dtype or ours.tensors[move.target].dtype, tuple(keys.get(key, move.source_shape)))

    def tensor(key: str) -> np.ndarray:
        if key in constants:
            return constants[key]
        move, layer = places[key]
        array = cast.apply(ours.name, key, safetensors_io.read(ours.tensors[move.target], layer))
        return stream.backward(move.layout, array, specs[key].shape)

    return File({key: specs[key] for key in safetensors_io.file_order(specs)}, tensor)


def _constants(kind: CheckpointType, ours: Ours) -> dict[str, np.ndarray]:
    """Tensors of PyTorch's module that our model computes: recorded ones, or computed here."""
    if "carried" in ours.record:
        return {
            key: np.frombuffer(base64.b64decode(kept["data"]), safetensors_io.DTYPES[kept["dtype"]]).reshape(
                kept["shape"]
            )
            for key, kept in ours.record["carried"].items()
        }
    return {key: compute(ours.fields) for key, compute in kind.constants.items()}
