"""Memory, time and exactness of full-size conversions, as JSON on stdout.

  python -m benchmarks.convert stdit3 --folder DIR
  python -m benchmarks.convert t5 --dtype bfloat16 --folder DIR
  python -m benchmarks.convert tora --folder DIR                   a whole release of 18 GB
  python -m benchmarks.convert tora_cogvideox --form sat --i2v --dtype bfloat16 --folder DIR      one of 22 GB

Makes the checkpoint (benchmarks/checkpoints.py) where DIR lacks it, copies it with `cp`, converts it with the real
command, converts it back, and compares every tensor with the first. DIR needs room for three times the checkpoint.

Before each timed command the page cache is written out and the checkpoint's pages are dropped from it, so that
both `cp` and the converter read from the disk and write to a clean cache. RssAnon is polled every 5 ms in /proc.
"""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks import checkpoints
from convert_weights import pipelines, sources, stream, views
from convert_weights.checkpoint_types import CHECKPOINT_TYPES
from convert_weights.releases import COGVIDEOX
from convert_weights.tables import tora_cogvideox
from convert_weights.views import Source
from tests.parity import golden
from tora_jax import command_line
from tora_jax.errors import UserError


def drop_cache(path: Path) -> None:
    """Writes everything out, then drops the pages of a file or of a folder's files."""
    os.sync()
    for file in [file for file in (path, *path.rglob("*")) if file.is_file()]:
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], source: Path) -> dict[str, float]:
    """Runs a command: seconds, those of the processor, and the largest RssAnon of its process in GiB."""
    drop_cache(source)
    start, peak, before = time.perf_counter(), 0, processor_seconds()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        peak = max(peak, *(int(kb) for kb in re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise UserError(f"{' '.join(command)}: exit code {process.returncode}")
    used = processor_seconds() - before
    return {"seconds": round(seconds, 2), "processor": round(used, 2), "rss_anon_gib": round(peak / 2**20, 3)}


def processor_seconds() -> float:
    """What the commands run so far have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same(kind: str, first: Source, second: Path) -> bool:
    """Do two checkpoints hold the same names with the same dtypes, shapes and bytes, but for what is dropped?"""
    checkpoint = CHECKPOINT_TYPES[kind]
    a, b = (checkpoint.view(source) for source in (first, sources.open_source(str(second))))
    keys = [key for key in a.shapes if not any(re.fullmatch(pattern, key) for pattern in checkpoint.dropped)]
    return keys_of(a, keys) == keys_of(b, b.shapes) and all(
        np.array_equal(a.read(key).reshape(-1).view(np.uint8), b.read(key).reshape(-1).view(np.uint8)) for key in keys
    )


def keys_of(source: Source, keys: Iterable[str]) -> dict[str, tuple]:
    return {key: (source.shapes[key], source.dtypes[key]) for key in keys}


def denoiser(source: Path, kind: str) -> Source:
    """The checkpoint that --reverse gives back; of a whole release, that of the denoiser."""
    if kind != COGVIDEOX.name:
        return sources.open_source(str(source))
    base = sources.open_source(pipelines.find(str(source), None)["tora"], allow_pickle=True)
    if not (source / "motion").is_dir():
        return base
    files = pipelines.find_split(str(source / "motion"), tora_cogvideox.takes_images(base.shapes))
    return views.joined({"": base, **{prefix: sources.open_source(file) for prefix, file in files.items()}})


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def make(kind: str, dtype: str, source: Path, form: str, i2v: bool) -> list[str]:
    """Makes what is not there; returns the converter's arguments."""
    if kind == COGVIDEOX.name:
        if not source.exists():
            checkpoints.make_cogvideox(source, dtype, form, i2v)
        more = {"sat": ["--allow_pickle"], "split": ["--motion", str(source / "motion")]}
        return [kind, str(source), *more.get(form, [])]
    if kind != "tora":
        if not source.exists():
            checkpoints.make(kind, source, dtype)
        return [kind, str(source)]
    source.mkdir(exist_ok=True)
    files = {"stdit3": source / "stdit3.safetensors", "vae": source / "vae.safetensors", "t5": source / "t5"}
    for name, path in files.items():
        if not path.exists():
            checkpoints.make(name, path, "bfloat16" if name == "t5" else "float32")
    arguments = [argument for name, path in files.items() for argument in (f"--{name}", str(path))]
    return [kind, *arguments, "--tokenizer", str(golden.GOLDEN_DIR / "tokenizer.model")]


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.convert", __doc__)
    parser.add_argument("kind", choices=("stdit3", "vae", "t5", "tora", COGVIDEOX.name))
    parser.add_argument("--dtype", choices=stream.DTYPES, default="float32", help="of the checkpoint")
    parser.add_argument("--form", choices=checkpoints.FORMS, default=checkpoints.FORMS[0], help="of tora_cogvideox")
    parser.add_argument("--i2v", action="store_true", help="tora_cogvideox: image to video")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--orbax", action="store_true", help="write Orbax checkpoints")
    parser.add_argument("--no_reverse", action="store_true", help="leave the way back out")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in the folder")
    args = parser.parse_args(argv[1:])
    args.folder.mkdir(parents=True, exist_ok=True)
    name = f"{args.kind}_{args.dtype}"
    source = args.folder / (name if args.kind in ("t5", "tora", COGVIDEOX.name) else f"{name}.safetensors")
    copy, ours, back = (args.folder / f"{name}_{what}" for what in ("copy", "ours", "back.safetensors"))
    for old in (copy, ours, back):
        remove(old)
    arguments = make(args.kind, args.dtype, source, args.form, args.i2v)

    forms = {"form": args.form, "i2v": args.i2v} if args.kind == COGVIDEOX.name else {}
    result = {"kind": args.kind, **forms, "dtype": args.dtype, "orbax": args.orbax, "bytes": size(source)}
    result["cp"] = timed(["cp", "-r", str(source), str(copy)], source)
    remove(copy)
    command = [sys.executable, "-m", "convert_weights"]
    options = ["--orbax"] if args.orbax else []
    result["convert"] = timed([*command, *arguments, str(ours), *options], source)
    result["convert"]["times_cp"] = round(result["convert"]["seconds"] / result["cp"]["seconds"], 2)
    if args.kind != "tora" and not args.no_reverse:
        result["reverse"] = timed([*command, args.kind, str(ours), str(back), "--reverse"], ours)
        result["reverse"]["times_cp"] = round(result["reverse"]["seconds"] / result["cp"]["seconds"], 2)
        result["round_trip_exact"] = same(args.kind, denoiser(source, args.kind), back)
    result["machine"] = {"cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    result["python"] = platform.python_version()
    print(json.dumps(result, indent=2))
    for path in (ours, back, *([] if args.keep else [source])):
        remove(path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    command_line.run(main, ["convert", *sys.argv[1:]])
