"""Writes a release folder from one checkpoint, or from all checkpoints of a whole release."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert_weights import mapping, plan, stream, writers
from convert_weights.export import RECORD, TORA
from convert_weights.plan import Part
from convert_weights.releases import ReleaseType
from convert_weights.stream import Leaf
from tora_jax import sharding

README = """# {title}

Made by `python -m convert_weights {command}` from:

{sources}

The weights keep the licences of the checkpoints they come from.
{licences}{use}"""


@dataclasses.dataclass(frozen=True)
class ReleaseWriter:
    """Where and how a release folder is written.

    Attributes:
      target: the folder, which is not there yet.
      cast: what is done to the numbers.
      tokenizer: a file to copy beside the weights, or None.
      orbax: as an Orbax checkpoint, in place of safetensors.
      mesh: that an Orbax checkpoint is sharded over, such as "fsdp=4".
    """

    target: str
    cast: stream.Cast
    tokenizer: Path | None = None
    orbax: bool = False
    mesh: str | None = None

    def write_part(self, part: Part) -> dict[str, Any]:
        """Writes one converted model; its section of config.json has the fields of the module.

        Returns:
          A report.
        """
        part.check()
        name = part.kind.part
        leaves = stream.leaves(part.source, part.moves, self.cast)
        readme = _readme(part.kind.name, [part])
        nbytes = self._write({name: part.section()}, {name: part.record()}, {name: leaves}, readme)
        tokenizer = None if self.tokenizer is None else str(self.tokenizer)
        return {**part.report(), "new": [], "tokenizer": tokenizer, "bytes": nbytes}

    def write_whole(self, kind: ReleaseType, parts: Mapping[str, Part]) -> dict[str, Any]:
        """Writes a whole release: checkpoints converted, and the denoiser's parameters that they lack new.

        Args:
          parts: as the release type names its checkpoints.

        Returns:
          A report.
        """
        for part in parts.values():
            part.check()
        whole, config = kind.whole(parts), kind.make_config(parts)
        leaves = {
            name: stream.leaves(part.source, part.moves, self.cast, kind.prefix if name == TORA else "")
            for name, part in whole.items()
        }
        fresh = []
        if kind.lacks(parts):
            fresh = _fresh(lambda key: kind.init(key, config), {leaf.path for leaf in leaves[TORA]}, self.cast.dtype)
        leaves[TORA] += fresh
        record = {name: part.record() for name, part in whole.items()}
        note = "\nTrajectory extractor and motion fusers are untrained.\n" if fresh else ""
        readme = _readme(kind.name, list(parts.values()), f"{note}\n    python sample.py --weights THIS_FOLDER\n")
        nbytes = self._write(config, record, leaves, readme)
        return {
            "parts": {name: part.report() for name, part in parts.items()},
            **kind.notes(parts),
            "new": [f"{TORA}/{leaf.path}" for leaf in fresh],
            "new_parameters": sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in fresh),
            "tokenizer": str(self.tokenizer),
            "bytes": nbytes,
        }

    def _write(
        self, config: dict[str, Any], record: dict[str, Any], leaves: Mapping[str, Sequence[Leaf]], readme: str
    ) -> int:
        nbytes = sum(leaf.nbytes for part in leaves.values() for leaf in part)
        if self.mesh is not None:
            sharding.make_mesh(self.mesh)  # a wrong mesh fails before the work
        with writers.aside(self.target, nbytes) as folder:
            folder.mkdir()
            if self.orbax:
                writers.write_orbax(folder / "params", leaves, self.mesh)
            else:
                for name, part in leaves.items():
                    writers.write_safetensors(folder / f"{name}.safetensors", part)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (folder / RECORD).write_text(json.dumps(record) + "\n")
            (folder / "README.md").write_text(readme)
            if self.tokenizer is not None:
                suffix = ".json" if self.tokenizer.suffix == ".json" else ".model"  # CLIP's, or a sentencepiece model
                (folder / f"tokenizer{suffix}").write_bytes(self.tokenizer.read_bytes())
        return nbytes


def _fresh(init: Callable[[jax.Array], Any], have: Set[str], dtype: np.dtype | None) -> list[Leaf]:
    """Initial values (seed 0) of the parameters that no checkpoint gives."""

    def missing(key: jax.Array) -> dict[str, jax.Array]:
        # The compiler drops all that is not returned: the base weights are never made.
        return {path: leaf for path, leaf in mapping.flatten(init(key)).items() if path not in have}

    quick = {"xla_backend_optimization_level": 0}  # runs once: fast to compile beats fast to run
    values = jax.jit(missing, compiler_options=quick)(jax.random.key(0))

    def leaf(path: str, value: jax.Array) -> Leaf:
        array = np.asarray(value).astype(dtype or np.float32)
        return Leaf(path, array.dtype, array.shape, (lambda: array,))

    return [leaf(path, value) for path, value in values.items()]


def _readme(command: str, parts: Sequence[Part], use: str = "") -> str:
    sources = "\n".join(f"- {part.kind.name}: {part.source.name}" for part in parts)
    licences = "".join(f"\n{text[0].upper()}{text[1:]}\n" for text in plan.licences(parts))
    return README.format(title=f"{command}, for tora_jax", command=command, sources=sources, licences=licences, use=use)
