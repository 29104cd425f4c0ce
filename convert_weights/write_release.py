"""Writes a release folder from one checkpoint, or from all checkpoints that Tora starts from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tora_jax.configs import tora as tora_config

from convert_weights import mapping, stream, writers
from convert_weights.export import RECORD
from convert_weights.plan import Part
from convert_weights.stream import Leaf
from tora_jax import sharding
from tora_jax.backbones import opensora
from tora_jax.errors import UserError
from tora_jax.models.tora import Tora

README = """# {title}

Made by `python -m convert_weights {command}` from:

{sources}

The weights keep the licences of the checkpoints they come from.
{use}"""


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

    def write_tora(self, parts: Mapping[str, Part]) -> dict[str, Any]:
        """Writes a whole release: base weights converted, extractor and fusers fresh, motion VAE from the video VAE.

        Args:
          parts: "stdit", "vae", "t5", and "motion_vae" unless it starts as the video VAE.

        Returns:
          A report.
        """
        for part in parts.values():
            part.check()
        motion = parts.get("motion_vae", parts["vae"])
        config = _config(parts, motion)
        stdit = stream.leaves(parts["stdit"].source, parts["stdit"].moves, self.cast, prefix="stdit/")
        fresh = _fresh(Tora(**config["tora"]), {leaf.path for leaf in stdit}, self.cast.dtype)
        whole = {"tora": parts["stdit"], "vae": parts["vae"], "motion_vae": motion, "t5": parts["t5"]}
        leaves = {
            name: [*stdit, *fresh] if name == "tora" else stream.leaves(part.source, part.moves, self.cast)
            for name, part in whole.items()
        }
        record = {name: part.record() for name, part in whole.items()}
        note = "\nTrajectory extractor and motion fusers are untrained.\n"
        readme = _readme("tora", list(parts.values()), f"{note}\n    python sample.py --weights THIS_FOLDER\n")
        nbytes = self._write(config, record, leaves, readme)
        return {
            "parts": {name: part.report() for name, part in parts.items()},
            "motion_vae": "converted" if "motion_vae" in parts else "started from the video VAE",
            "new": [f"tora/{leaf.path}" for leaf in fresh],
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
                shutil.copyfile(self.tokenizer, folder / f"tokenizer{suffix}")
        return nbytes


def _config(parts: Mapping[str, Part], motion: Part) -> dict[str, Any]:
    """The config of configs/tora.py with the sizes of the checkpoints."""
    config = tora_config.get_config().to_dict()
    config["tora"]["stdit"] |= parts["stdit"].section()
    config["vae"] = parts["vae"].section()
    config["motion_vae"] = motion.section()
    config["t5"] |= parts["t5"].section()
    if config["t5"]["width"] != config["tora"]["stdit"]["caption_channels"]:
        raise UserError(
            f"{parts['t5'].source.name}: gives features of width {config['t5']['width']}, the denoiser wants "
            f"{config['tora']['stdit']['caption_channels']}; take the text encoder that it was trained with"
        )
    return config


def _fresh(model: Tora, have: Set[str], dtype: np.dtype | None) -> list[Leaf]:
    """Initial values (seed 0) of the parameters that no checkpoint gives: extractor and fusers."""
    args, options = opensora.dummies({"tora": model})["tora"]

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = model.init(key, *args, **options)["params"]
        # The compiler drops all that is not returned: the base weights are never made.
        return {path: leaf for path, leaf in mapping.flatten(params).items() if path not in have}

    quick = {"xla_backend_optimization_level": 0}  # runs once: fast to compile beats fast to run
    values = jax.jit(init, compiler_options=quick)(jax.random.key(0))

    def leaf(path: str, value: jax.Array) -> Leaf:
        array = np.asarray(value).astype(dtype or np.float32)
        return Leaf(path, array.dtype, array.shape, (lambda: array,))

    return [leaf(path, value) for path, value in values.items()]


def _readme(command: str, parts: Sequence[Part], use: str = "") -> str:
    sources = "\n".join(f"- {part.kind.name}: {part.source.name}" for part in parts)
    return README.format(title=f"{command}, for tora_jax", command=command, sources=sources, use=use)
