"""How fast the input pipeline is: clips per second, decoded, scaled, with motion maps, tokens and masks.

  python -m benchmarks.loader --source DIR --num_frames 17 --height 128 --width 128 --motion sparse --workers 0 1 2

or, for clips of 51 frames at 144p, on shards that curation makes of drawn videos:

  python -m benchmarks.curate --draw videos --height 144
  python -m tora_jax.data.curate --input 'videos/*' --output curated --config.shards.validation=0
  python -m benchmarks.loader --source curated --num_frames 51 --height 144 --width 256 --workers 1 2

Prints one JSON line: for each number of worker processes the median of the repeats, after a warm-up that fills what
is made ahead. Nothing else uses the machine meanwhile: a trainer leaves less to the loader.

--reference takes a checkout of Open-Sora at tag v1.2.0, and times its data set on the same clips afterwards, without
motion maps, tokens and masks, which it has not. That needs torch, pandas and av, here or in the Python of
--reference_python.
"""

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from tora_jax import command_line
from tora_jax.conditioning import text
from tora_jax.data import motion, pipeline, sources
from tora_jax.errors import UserError


def data_config(
    source: str, size: dict[str, int], batch: int, motion_kind: str, tracks: str, workers: int
) -> dict[str, Any]:
    """The section `data` of a config, of one bucket."""
    return {
        "sources": (source,),
        "buckets": ({**size, "fps": 0.0, "batch": batch, "weight": 1.0},),
        "motion": motion_kind,
        "tracks": tracks,
        "max_tracks": 16,
        "crop": 0,
        "object_masks": False,
        "frame_masks": {"random": 0.1, "image_head": 0.2},
        "workers": workers,
        "prefetch": 2,
        "damaged_share": 0.01,
    }


def clips_per_second(config: dict, args: argparse.Namespace, tokenizer: text.Tokenizer) -> list[float]:
    options = {"latent_frames": lambda frames: math.ceil(frames / 4), "tokenizer": tokenizer, "shard": (0, 1)}
    iterator = pipeline.batches(config, args.split, seed=0, **options)
    try:
        for _ in range(config["prefetch"] * max(config["workers"], 1) + 2):
            next(iterator)
        rates = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            for _ in range(args.batches):
                next(iterator)
            rates.append(args.batches * args.batch / (time.perf_counter() - start))
        return rates
    finally:
        iterator.close()


def reference_table(args: argparse.Namespace, folder: Path) -> Path:
    """The clips as videos in a folder, with a CSV file of Open-Sora's form."""
    source = sources.open_source(args.source, args.split)
    with open(folder / "clips.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "text"))
        for index in range(len(source)):
            video = source[index]["video"]
            if isinstance(video, bytes):
                (folder / f"{index}.mp4").write_bytes(video)
                video = folder / f"{index}.mp4"
            rows.writerow((video, source.caption(index)))
    return folder / "clips.csv"


def reference_rates(args: argparse.Namespace, table: Path, workers: int) -> list[float]:
    """Clips per second of benchmarks/reference_loader.py, in a process of its own."""
    options = {"table": str(table), "frames": args.num_frames, "height": args.height, "width": args.width}
    options |= {"workers": workers, "batch": args.batch, "batches": args.batches, "repeats": args.repeats}
    command = [args.reference_python, Path(__file__).with_name("reference_loader.py"), args.reference]
    done = subprocess.run([*command, json.dumps(options)], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError("--reference: the PyTorch loader ended, see above")
    return json.loads(done.stdout)


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.loader", __doc__)
    parser.add_argument("--source", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--num_frames", type=int, default=17)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--motion", choices=motion.KINDS, default="sparse")
    parser.add_argument("--tracks", choices=motion.ORIGINS, default="given")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=20, help="in one repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", help="checkout of Open-Sora, v1.2.0")
    parser.add_argument("--reference_python", default=sys.executable, help="Python that has torch")
    args = parser.parse_args(argv[1:])
    if args.reference and not (Path(args.reference) / "opensora/datasets/datasets.py").is_file():
        raise UserError(f"--reference {args.reference}: no checkout of Open-Sora v1.2.0 (opensora/datasets)")
    tokenizer = text.Tokenizer(resources.files("tora_jax").joinpath("assets/tokenizer.model").read_bytes(), 48)
    size = {"frames": args.num_frames, "height": args.height, "width": args.width}
    rates, load = {}, os.getloadavg()[0]
    for workers in args.workers:
        config = data_config(args.source, size, args.batch, args.motion, args.tracks, workers)
        rates[workers] = clips_per_second(config, args, tokenizer)
    figures = {
        "clips_per_second": {workers: round(statistics.median(found), 1) for workers, found in rates.items()},
        "slowest": {workers: round(min(found), 1) for workers, found in rates.items()},
        "fastest": {workers: round(max(found), 1) for workers, found in rates.items()},
        **size,
        "motion": args.motion,
        "tracks": args.tracks,
        "batch": args.batch,
        "repeats": args.repeats,
        "cores": os.cpu_count(),
        "load": round(load, 1),
    }
    if args.reference:
        with tempfile.TemporaryDirectory() as folder:
            table = reference_table(args, Path(folder))
            theirs = {workers: statistics.median(reference_rates(args, table, workers)) for workers in args.workers}
        figures["reference_clips_per_second"] = {workers: round(rate, 1) for workers, rate in theirs.items()}
        ratios = {workers: round(statistics.median(rates[workers]) / rate, 2) for workers, rate in theirs.items()}
        figures["times_faster"] = ratios
    print(json.dumps(figures))


if __name__ == "__main__":
    command_line.run(main, ["loader", *sys.argv[1:]])
