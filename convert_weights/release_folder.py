"""One release folder out of one checkpoint, or out of all that Tora starts from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tora_jax.configs import tora as tora_config

from convert_weights import destinations, mapping, stream
from convert_weights.parts import Part
from convert_weights.reverse import RECORD
from convert_weights.stream import Leaf
from tora_jax import sharding
from tora_jax.errors import UserError
from tora_jax.models.tora import Tora

README = """# {title}

Made by `python -m convert_weights {command}` from:

{sources}

The weights keep the licences of the checkpoints they come from.
{use}"""


def write_part(target: str, part: Part, rules: stream.Rules, tokenizer: Path | None, orbax: bool, mesh: str | None):
    """A folder with one converted model; its section of config.json has the fields of the module.

    Returns:
      A report.
    """
    part.check()
    name = part.kind.part
    leaves = stream.leaves(part.source, part.moves, rules)
    config, record = {name: part.section()}, {name: part.record()}
    readme = _readme(part.kind.name, [part])
    nbytes = _write(target, config, record, {name: leaves}, tokenizer, readme, orbax, mesh)
    return {**part.report(), "new": [], "tokenizer": str(tokenizer) if tokenizer else None, "bytes": nbytes}


def write_tora(
    target: str, parts: Mapping[str, Part], rules: stream.Rules, tokenizer: Path, orbax: bool, mesh: str | None
):
    """A whole release: base weights converted, extractor and fusers fresh, motion VAE from the video VAE.

    Args:
      parts: "stdit", "vae", "t5", and "motion_vae" unless it starts as the video VAE.

    Returns:
      A report.
    """
    for part in parts.values():
        part.check()
    motion = parts.get("motion_vae", parts["vae"])
    config = _config(parts, motion)
    stdit = stream.leaves(parts["stdit"].source, parts["stdit"].moves, rules, prefix="stdit/")
    fresh = _fresh(Tora(**config["tora"]), {leaf.path: leaf.shape for leaf in stdit}, rules.dtype)
    leaves = {
        "tora": [*stdit, *fresh],
        "vae": stream.leaves(parts["vae"].source, parts["vae"].moves, rules),
        "motion_vae": stream.leaves(motion.source, motion.moves, rules),
        "t5": stream.leaves(parts["t5"].source, parts["t5"].moves, rules),
    }
    record = {"tora": parts["stdit"].record(), "vae": parts["vae"].record(), "motion_vae": motion.record()}
    record["t5"] = parts["t5"].record()
    readme = _readme("tora", list(parts.values()), "\nTrajectory extractor and motion fusers are untrained.\n")
    nbytes = _write(target, config, record, leaves, tokenizer, readme, orbax, mesh)
    return {
        "parts": {name: part.report() for name, part in parts.items()},
        "motion_vae": "converted" if "motion_vae" in parts else "started from the video VAE",
        "new": [f"tora/{leaf.path}" for leaf in fresh],
        "new_parameters": sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in fresh),
        "tokenizer": str(tokenizer),
        "bytes": nbytes,
    }


def _config(parts: Mapping[str, Part], motion: Part) -> dict[str, Any]:
    """configs/tora.py with the sizes of the checkpoints."""
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


def _fresh(model: Tora, have: Mapping[str, tuple[int, ...]], dtype: np.dtype | None) -> list[Leaf]:
    """Initial values (seed 0) of the parameters that no checkpoint gives: extractor and fusers."""
    latents, one = jnp.zeros((1, 1, 2, 2, model.in_channels)), jnp.ones(1)
    caption = jnp.zeros((1, 1, model.caption_channels))

    def init(key: jax.Array) -> dict[str, jax.Array]:
        params = model.init(key, latents, one, caption, latents, fps=one, height=one, width=one)["params"]
        # The compiler drops what is not returned: the base weights are never made.
        return {path: leaf for path, leaf in mapping.flatten(params).items() if path not in have}

    quick = {"xla_backend_optimization_level": 0}  # runs once: fast to compile beats fast to run
    values = jax.jit(init, compiler_options=quick)(jax.random.key(0))

    def leaf(path: str, value: jax.Array) -> Leaf:
        array = np.asarray(value).astype(dtype or np.float32)
        return Leaf(path, array.dtype, array.shape, (lambda: array,))

    return [leaf(path, value) for path, value in values.items()]


def _readme(command: str, parts: Sequence[Part], note: str = "") -> str:
    sources = "\n".join(f"- {part.kind.name}: {part.source.name}" for part in parts)
    use = "\n    python sample.py --weights THIS_FOLDER\n" if command == "tora" else ""
    return README.format(title=f"{command}, for tora_jax", command=command, sources=sources, use=note + use)


def _write(
    target: str,
    config: dict[str, Any],
    record: dict[str, Any],
    leaves: Mapping[str, Sequence[Leaf]],
    tokenizer: Path | None,
    readme: str,
    orbax: bool,
    mesh: str | None,
) -> int:
    nbytes = sum(leaf.nbytes for part in leaves.values() for leaf in part)
    if mesh is not None:
        sharding.make_mesh(mesh)  # a wrong mesh is told before the work
    with destinations.aside(target, nbytes) as folder:
        folder.mkdir()
        if orbax:
            destinations.write_orbax(folder / "params", leaves, mesh)
        else:
            for name, part in leaves.items():
                destinations.write_release(folder / f"{name}.safetensors", part)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / RECORD).write_text(json.dumps(record) + "\n")
        (folder / "README.md").write_text(readme)
        if tokenizer is not None:
            suffix = ".json" if tokenizer.suffix == ".json" else ".model"  # CLIP's, or a sentencepiece model
            shutil.copyfile(tokenizer, folder / f"tokenizer{suffix}")
    return nbytes
