"""How fast what lies in a bucket is read, against the same on disk, and what reading weights onto a mesh takes.

  pip install 'tora_jax[cloud,train]' gcp-storage-emulator
  python -m benchmarks.bandwidth sampling [--variant 4x1152x16/2] [--repeats 5]
  python -m benchmarks.bandwidth clips [--repeats 5]
  python -m benchmarks.bandwidth mesh [--variant XL/2] [--mesh fsdp=8]

The bucket is that of `benchmarks/gcs.py` on this machine, in a process of its own. Prints one JSON line, of medians
after a run that warms up; disk and bucket take turns.

  sampling  seconds from the start of `sample.py` until its first step is done, with the small model's weights, or
            random ones of a variant, with a text encoder of one layer
  clips     clips a second of ArrayRecord, decoded, with motion maps, by two worker processes
  mesh      the denoiser of a release in bfloat16 onto 8 devices of a CPU: how many bytes of the file are read, how
            often each, and how much memory that takes beyond the shards, which on a CPU are the host's
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tora_jax.configs import common, tora

from benchmarks import gcs, loader, trees
from benchmarks import sample as sampling
from tora_jax import sharding
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.conditioning import text
from tora_jax.data.sprites.dataset import SpritesConfig, build_sprites
from tora_jax.io import files, safetensors_io
from tora_jax.io.files import tuples

SIZE = {"num_frames": 17, "height": 64, "width": 64}
CLIPS = SpritesConfig(name="bandwidth", side=128, frames=17, clips={"train": 128, "validation": 1})


def send(here: Path) -> Path:
    """Copies a folder into the bucket."""
    there = files.path(f"gs://{gcs.BUCKET}/{here.name}")
    for name in files.sizes(here):
        (there / name).send(here / name)
    return there


def in_turns(disk: Callable[[], float], bucket: Callable[[], float], repeats: int) -> dict[str, list[float]]:
    """What both give, after a first turn that warms up."""
    turns = [(disk(), bucket()) for _ in range(repeats + 1)][1:]
    return dict(zip(("disk", "bucket"), map(list, zip(*turns, strict=True)), strict=True))


def figures(found: dict[str, list[float]], unit: str) -> dict[str, Any]:
    """Medians of both, and of the ratios of turns."""
    medians = {f"{side}_{unit}": round(statistics.median(values), 2) for side, values in found.items()}
    ratios = [bucket / disk for disk, bucket in zip(*found.values(), strict=True)]
    spread = {"ratio": statistics.median(ratios), "least_ratio": min(ratios), "largest_ratio": max(ratios)}
    return medians | {name: round(value, 2) for name, value in spread.items()} | {"repeats": len(ratios)}


def start_of_sampling(folder: Path, variant: str | None, repeats: int) -> dict[str, Any]:
    here = release.DEMO
    if variant:
        config = tuples(tora.get_config(f"variant={variant}").to_dict())
        config["t5"] |= {"vocab_size": 1024, "depth": 1}  # the VAEs have the size of a release
        here = folder / "weights"
        sampling.write_random(here, config)
    there = send(here)
    starts = (functools.partial(sampling.first_step, trees.ROOT, place, folder / "v", SIZE) for place in (here, there))
    found = in_turns(*starts, repeats)
    return figures(found, "s") | {"gib": gib(sum(files.sizes(here).values())), **SIZE}


def clips_a_second(folder: Path, repeats: int) -> dict[str, Any]:
    here = build_sprites(folder, CLIPS)
    args = argparse.Namespace(split="train", repeats=1, batches=16, batch=8)
    tokenizer = text.Tokenizer(resources.files("tora_jax").joinpath("assets/tokenizer.model").read_bytes(), 48)
    size = {"frames": CLIPS.frames, "height": CLIPS.side, "width": CLIPS.side}

    def rate(source: Path) -> float:
        config = loader.data_config(str(source), size, args.batch, "sparse", "given", workers=2)
        return loader.clips_per_second(config, args, tokenizer)[0]

    found = in_turns(*(functools.partial(rate, place) for place in (here, send(here))), repeats)
    return figures(found, "clips_per_second") | size | {"workers": 2}


def onto_a_mesh(folder: Path, variant: str, mesh: str) -> dict[str, Any]:
    path, rules = folder / "tora.safetensors", tuple(common.training()["rules"].items())
    place = functools.partial(sharding.param_shardings, mesh=sharding.make_mesh(mesh), rules=rules)
    write_denoiser(path, variant)
    spans, read = [], files.read_range

    def counted(name: Path, start: int, size: int) -> bytes:
        spans.append((start, size))
        return read(name, start, size)

    files.read_range = counted
    before = resident()
    params = release.load_part(folder, "tora", place)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    ends = sorted(itertools.chain(*(((start, 1), (start + size, -1)) for start, size in spans[1:])))
    return {
        "mesh": mesh,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "file_gib": gib(path.stat().st_size),
        "read_gib": gib(sum(size for _, size in spans)),
        "most_reads_of_a_byte": max(itertools.accumulate(change for _, change in ends)),
        "requests": len(spans),
        "shards_gib": gib(shards),
        "peak_beyond_shards_gib": gib(peak - before - shards),
    }


def write_denoiser(path: Path, variant: str) -> None:
    """Random numbers, tensor by tensor."""
    config = tuples(tora.get_config(f"variant={variant}").to_dict())
    init = functools.partial(assembly.init_params, assembly.backbone(config), assembly.modules(config))
    shapes = traverse_util.flatten_dict(jax.eval_shape(init, jax.random.key(0))["tora"], sep="/")
    specs = {name: safetensors_io.Spec(np.dtype(jnp.bfloat16), leaf.shape) for name, leaf in shapes.items()}
    rng = np.random.default_rng(0)

    def parts() -> Iterator[np.ndarray]:
        for spec in specs.values():
            yield rng.integers(0, 0x3C00, spec.shape, np.uint16).view(spec.dtype)

    safetensors_io.write(path, specs, parts())


def resident() -> int:
    """Bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def gib(size: float) -> float:
    return round(size / 2**30, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sampling", "clips", "mesh"))
    parser.add_argument("--variant", help="of the denoiser, as configs/tora.py has it")
    parser.add_argument("--mesh", default="fsdp=8")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    load = round(os.getloadavg()[0], 1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.kind == "mesh":
            jax.config.update("jax_num_cpu_devices", 8)
            found = onto_a_mesh(folder, args.variant or "XL/2", args.mesh)
        else:
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            with gcs.serve_apart():
                if args.kind == "sampling":
                    found = start_of_sampling(folder, args.variant, args.repeats)
                else:
                    found = clips_a_second(folder, args.repeats)
    print(json.dumps(found | {"cores": os.cpu_count(), "load": load}))


if __name__ == "__main__":
    main()
