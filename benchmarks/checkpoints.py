"""Checkpoints of the real sizes with seeded numbers, since the real ones need a download.

  python -m benchmarks.checkpoints stdit3 FILE.safetensors      4.5 GB, the numbers of golden stdit3_xl2_full
  python -m benchmarks.checkpoints vae FILE.safetensors         1.6 GB, the numbers of golden video_vae_full
  python -m benchmarks.checkpoints t5 FOLDER --dtype bfloat16   9.8 GB, two shards and their index, random bits

Names and shapes are those of the published files; T5's embedding is there under both of its names.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from convert_weights import safetensors_io, stream
from convert_weights.safetensors_io import Spec
from convert_weights.tables import t5
from tests.parity import golden
from tora_jax import command_line

VAE_CONSTANTS = {"shift": (-0.10, 0.34, 0.27, 0.98), "scale": (3.85, 2.32, 2.33, 3.06)}


def stdit3_tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A weight of golden stdit3_xl2_full."""
    if key == "rope.freqs":
        width = 2 * shape[0]
        return (1 / 10000.0 ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))).astype(np.float32)
    return golden.procedural(key, shape, seed)


def vae_tensor(key: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A weight of golden video_vae_full."""
    if key in VAE_CONSTANTS:
        return np.float32(VAE_CONSTANTS[key]).reshape(shape)
    return golden.procedural(key, shape, seed)


def random_bits(key: str, spec: Spec) -> np.ndarray:
    """Finite numbers below 2: random bits, the exponent's highest one zero. Normal numbers would take minutes."""
    name = t5.TIED[0] if key == t5.TIED[1] else key
    bits = np.random.default_rng(list(name.encode())).integers(0, 256, (*spec.shape, spec.dtype.itemsize), np.uint8)
    bits[..., -1] &= 0xBF
    return bits.view(spec.dtype)[..., 0]


def make_file(path: Path, keys: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensor: Callable) -> None:
    """Writes one file; `tensor`: (key, spec) -> array."""
    specs = {key: Spec(dtype, shape) for key, shape in keys.items()}
    specs = {key: specs[key] for key in safetensors_io.file_order(specs)}
    data: Iterator[np.ndarray] = (tensor(key, spec) for key, spec in specs.items())
    safetensors_io.write(path, specs, data, {"format": "pt"})


def make(kind: str, path: Path, dtype: str = "float32") -> None:
    """Writes a checkpoint of a kind to `path`: a file, or for T5 a folder."""
    if kind in ("stdit3", "vae"):
        names = {"stdit3": ("stdit3_xl2", stdit3_tensor), "vae": ("opensora_vae_v1_2", vae_tensor)}
        name, tensor = names[kind]
        seed = golden.load("stdit3_xl2_full" if kind == "stdit3" else "video_vae_full").config["seed"]
        keys, numbers = golden.checkpoint_keys(name), stream.DTYPES[dtype]
        make_file(path, keys, numbers, lambda key, spec: tensor(key, spec.shape, seed).astype(numbers, copy=False))
        return
    keys = golden.checkpoint_keys("t5_v1_1_xxl_encoder")
    path.mkdir()
    shards = {f"model-0000{i + 1}-of-00002.safetensors": list(keys)[i::2] for i in range(2)}
    for file, names in shards.items():
        make_file(path / file, {key: keys[key] for key in names}, stream.DTYPES[dtype], random_bits)
    index = {"metadata": {}, "weight_map": {key: file for file, names in shards.items() for key in names}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.checkpoints", __doc__)
    parser.add_argument("kind", choices=("stdit3", "vae", "t5"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", choices=stream.DTYPES, default="float32")
    args = parser.parse_args(argv[1:])
    make(args.kind, args.path, args.dtype)


if __name__ == "__main__":
    command_line.run(main, ["checkpoints", *sys.argv[1:]])
