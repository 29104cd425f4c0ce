"""Checkpoints of the real sizes with seeded numbers, since the real ones need a download.

  python -m benchmarks.checkpoints stdit3 FILE.safetensors      4.5 GB, the numbers of golden stdit3_xl2_full
  python -m benchmarks.checkpoints vae FILE.safetensors         1.6 GB, the numbers of golden video_vae_full
  python -m benchmarks.checkpoints t5 FOLDER --dtype bfloat16   9.8 GB, two shards and their index, random bits
  python -m benchmarks.checkpoints tora_cogvideox FOLDER --dtype bfloat16 --form diffusers    22 GB, random bits; needs
                                                                PyTorch for --form sat, and then 12 GB meanwhile

Names and shapes are those of the published files; T5's embedding is there under both of its names.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from convert_weights import stream
from convert_weights.tables import t5, tora_cogvideox
from tests.parity import golden
from tora_jax import command_line
from tora_jax.io import safetensors_io
from tora_jax.io.safetensors_io import Spec

FORMS = ("diffusers", "sat", "split")  # of the released Tora on CogVideoX
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
    specs = {key: Spec(np.dtype(np.int64) if _is_counter(key) else dtype, shape) for key, shape in keys.items()}
    specs = {key: specs[key] for key in safetensors_io.file_order(specs)}
    data: Iterator[np.ndarray] = (tensor(key, spec) for key, spec in specs.items())
    safetensors_io.write(path, specs, data, {"format": "pt"})


def make_shards(folder: Path, keys: Mapping[str, tuple[int, ...]], dtype: np.dtype, name: str, count: int) -> None:
    """Writes `count` files of random bits and their index."""
    folder.mkdir(parents=True)
    shards = {f"{name}-0000{i + 1}-of-0000{count}.safetensors": list(keys)[i::count] for i in range(count)}
    for file, names in shards.items():
        make_file(folder / file, {key: keys[key] for key in names}, dtype, random_bits)
    index = {"metadata": {}, "weight_map": {key: file for file, names in shards.items() for key in names}}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))


def make_pickle(path: Path, keys: Mapping[str, tuple[int, ...]], dtype: np.dtype, wrapper: str) -> None:
    """Writes a state dict of random bits as torch.save does, from a file of the same size that is there meanwhile."""
    import torch

    path.parent.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as meanwhile:
        raw = Path(meanwhile) / "raw.safetensors"
        make_file(raw, keys, dtype, random_bits)
        state = {}
        for key, at in safetensors_io.read_header(raw).items():
            bits = np.dtype(f"i{at.dtype.itemsize}")
            array = np.memmap(raw, bits, "c", at.begin, at.shape)
            kind = torch.bfloat16 if bits.itemsize == 2 else torch.int64 if _is_counter(key) else torch.float32
            state[key] = torch.from_numpy(array).view(kind)
        torch.save({wrapper: state}, path)


def make_cogvideox(folder: Path, dtype: str, form: str, i2v: bool) -> None:
    """Writes the released Tora: diffusers' pipeline, the authors' files, or a plain pipeline and split files."""
    numbers, name = stream.DTYPES[dtype], "tora_cogvideox" + ("_i2v" if i2v else "")
    text, tokenizer = folder / "text_encoder", folder / "tokenizer"
    if form == "sat":
        text = tokenizer = folder / "t5-v1_1-xxl"
        place = folder / "tora" / ("i2v" if i2v else "t2v") / "mp_rank_00_model_states.pt"
        make_pickle(place, golden.checkpoint_keys(f"{name}_sat"), numbers, "module")
        make_pickle(folder / "vae" / "3d-vae.pt", golden.checkpoint_keys("cogvideox_vae_sat"), numbers, "state_dict")
    else:
        keys = golden.checkpoint_keys(f"{name}_diffusers")
        if form == "split":
            for file, prefix in tora_cogvideox.split({"cogvideox": {"in_channels": 32 if i2v else 16}}).items():
                part = {key.removeprefix(prefix): keys.pop(key) for key in list(keys) if key.startswith(prefix)}
                (folder / "motion" / file).parent.mkdir(parents=True, exist_ok=True)
                make_file(folder / "motion" / file, part, numbers, random_bits)
        make_shards(folder / "transformer", keys, numbers, "diffusion_pytorch_model", 3)
        (folder / "vae").mkdir()
        vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
        make_file(vae, golden.checkpoint_keys("cogvideox_vae"), numbers, random_bits)
    make("t5", text, dtype)
    tokenizer.mkdir(exist_ok=True)
    shutil.copyfile(golden.GOLDEN_DIR / "tokenizer.model", tokenizer / "spiece.model")


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def make(kind: str, path: Path, dtype: str = "float32") -> None:
    """Writes a checkpoint of a kind to `path`: a file, or for T5 a folder."""
    if kind in ("stdit3", "vae"):
        names = {"stdit3": ("stdit3_xl2", stdit3_tensor), "vae": ("opensora_vae_v1_2", vae_tensor)}
        name, tensor = names[kind]
        seed = golden.load("stdit3_xl2_full" if kind == "stdit3" else "video_vae_full").config["seed"]
        keys, numbers = golden.checkpoint_keys(name), stream.DTYPES[dtype]
        make_file(path, keys, numbers, lambda key, spec: tensor(key, spec.shape, seed).astype(numbers, copy=False))
        return
    make_shards(path, golden.checkpoint_keys("t5_v1_1_xxl_encoder"), stream.DTYPES[dtype], "model", 2)


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.checkpoints", __doc__)
    parser.add_argument("kind", choices=("stdit3", "vae", "t5", "tora_cogvideox"))
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", choices=stream.DTYPES, default="float32")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="of tora_cogvideox")
    parser.add_argument("--i2v", action="store_true", help="tora_cogvideox: image to video")
    args = parser.parse_args(argv[1:])
    if args.kind == "tora_cogvideox":
        make_cogvideox(args.path, args.dtype, args.form, args.i2v)
    else:
        make(args.kind, args.path, args.dtype)


if __name__ == "__main__":
    command_line.run(main, ["checkpoints", *sys.argv[1:]])
