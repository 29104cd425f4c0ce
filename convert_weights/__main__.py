"""Converts PyTorch checkpoints to ours and back.

  python -m convert_weights stdit3 hpcai-tech/OpenSora-STDiT-v3 weights/stdit
  python -m convert_weights tora --stdit3 SRC --vae SRC --t5 SRC weights/tora
  python -m convert_weights tora_cogvideox Le0jc/Tora_T2V_diffusers weights/tora
  python -m convert_weights stdit3 weights/tora stdit3.safetensors --reverse

docs/convert.md describes every flag and every message.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import jax

from convert_weights import adapters, export, folders, pipelines, plan, sources, stream, views, writers
from convert_weights.checkpoint_types import CHECKPOINT_TYPES
from convert_weights.mapping import ConversionError
from convert_weights.notes import note
from convert_weights.plan import Part
from convert_weights.releases import COGVIDEOX, OPENSORA, ReleaseType
from convert_weights.tables import tora_cogvideox
from convert_weights.views import Source
from convert_weights.write_release import ReleaseWriter
from tora_jax import command_line, sharding
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.io.buckets import BucketPath


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with 2 after a user's mistake (told on stderr), with 130 after Ctrl-C.

    Args:
      argv: what follows the command's name; None = of this process.
    """
    command_line.run(_convert, ["convert_weights", *(sys.argv[1:] if argv is None else argv)])


def _convert(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    args = _parser().parse_args(argv[1:])
    args.command = f"python -m convert_weights {shlex.join([*argv[1:], '--allow_pickle'])}"
    start = time.perf_counter()
    report = _run(args)
    _tell(args, report, time.perf_counter() - start)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--dtype", choices=stream.DTYPES, help="cast to this; unset: every byte stays")
    add("--variant", help="the model's size: a released name, or fields as JSON or a JSON file; unset: from the file")
    add("--orbax", action="store_true", help="write an Orbax checkpoint in place of safetensors")
    add("--mesh", help="write it sharded, such as fsdp=4 (implies --orbax)")
    add("--tokenizer", type=files.path, help="sentencepiece model for T5, where none lies beside its weights")
    add("--dry_run", action="store_true", help="print the mapping and every problem; reads headers only")
    add("--report", type=files.path, help="write what was done as JSON")
    both = "of a training that keeps both: its moving average (the default), or the model as it was trained"
    add("--take", choices=("ema", "model"), help=both)
    add("--allow_nonfinite", action="store_true", help="convert NaN and Inf too")
    add("--allow_pickle", action="store_true", help="read pickles, with torch.load(weights_only=True)")

    parser = command_line.Parser("python -m convert_weights", __doc__)
    names = ",".join([*CHECKPOINT_TYPES, "tora"])
    commands = parser.add_subparsers(dest="kind", required=True, metavar=f"{{{names}}}")
    for kind in CHECKPOINT_TYPES.values():
        one = commands.add_parser(kind.name, parents=[common], help=f"released: {', '.join(kind.released)}")
        one.add_argument("src", metavar="SRC", help="a file, a folder with shards and their index, or a hub id")
        one.add_argument("dst", metavar="DST", help="a folder that is not there yet; with --reverse a file")
        one.add_argument("--reverse", action="store_true", help="from ours to PyTorch-named safetensors")
        if kind.split is not None:
            one.add_argument("--split", action="store_true", help="with --reverse: DST gets fusers and extractor apart")
            one.add_argument("--motion", metavar="SRC", help="fusers and extractor apart, to put on a plain SRC")
            one.add_argument("--vae", metavar="SRC", help="unset: from SRC")
            one.add_argument("--t5", metavar="SRC", help="unset: from SRC")
    whole = commands.add_parser(OPENSORA.name, parents=[common], help="all parts in one release folder")
    for part, kind in OPENSORA.checkpoints.items():
        flag = "--stdit3" if part == "stdit" else f"--{part}"
        optional = "; unset: starts as the video VAE" if part == "motion_vae" else ""
        whole.add_argument(flag, dest=part, metavar="SRC", required=not optional, help=f"{kind} checkpoint{optional}")
    whole.add_argument("dst", metavar="DST", help="a folder that is not there yet")
    return parser


def _run(args: argparse.Namespace) -> dict[str, Any]:
    args.orbax = args.orbax or args.mesh is not None
    if args.mesh is not None:
        _ask_for_devices(math.prod(sharding.parse_mesh(args.mesh).values()))
    cast = stream.Cast(stream.DTYPES.get(args.dtype), args.allow_nonfinite)
    if args.tokenizer is not None and not args.tokenizer.is_file():
        raise UserError(f"--tokenizer {args.tokenizer}: no such file")
    if args.kind == OPENSORA.name:
        found = {part: getattr(args, part) for part in OPENSORA.checkpoints if getattr(args, part) is not None}
        report = _convert_whole(args, OPENSORA, found, cast)
    elif args.reverse:
        report = _export(args, cast)
    elif args.kind == COGVIDEOX.name:
        report = _convert_whole(args, COGVIDEOX, _find_cogvideox(args), cast)
    else:
        report = _convert_part(args, cast)
    return {**report, "nonfinite": sorted(cast.nonfinite)}


def _ask_for_devices(count: int) -> None:
    # It refuses where JAX runs already, in the program that called main, with devices of its own.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)


def _open(args: argparse.Namespace, src: str) -> Source:
    return sources.open_source(src, args.allow_pickle, args.command, args.take or "ema")


def _check_take(args: argparse.Namespace, opened: Iterable[Source]) -> None:
    if args.take is not None and not any(source.chosen for source in opened):
        raise UserError(f"--take {args.take}: {args.dst} comes of one model alone, without a second one; leave it out")


def _plan_part(kind: str, source: Source, variant: str | None, cast: stream.Cast) -> Part:
    part = plan.plan_part(CHECKPOINT_TYPES[kind], source, variant, cast.dtype)
    if part.variant == "own sizes":
        released = ", ".join(part.kind.released)
        note(f"{source.name}: none of the released sizes of {kind} ({released})")
    return part


def _convert_part(args: argparse.Namespace, cast: stream.Cast) -> dict[str, Any]:
    source = _open(args, args.src)
    _check_take(args, [source])
    part = _plan_part(args.kind, source, args.variant, cast)
    if args.dry_run:
        return _dry_run([part])
    for licence in plan.licences([part]):
        note(licence)
    find = part.kind.tokenizer
    tokenizer = None if find is None else args.tokenizer or find(part.source)
    return ReleaseWriter(args.dst, cast, tokenizer, args.orbax, args.mesh).write_part(part)


def _convert_whole(
    args: argparse.Namespace, kind: ReleaseType, found: dict[str, str], cast: stream.Cast
) -> dict[str, Any]:
    variants = _variants(args.variant, kind)
    opened = {part: _open(args, src) for part, src in found.items() if part in kind.checkpoints}
    if getattr(args, "motion", None) is not None:
        opened[kind.denoiser] = _with_motion(args, opened[kind.denoiser])
    _check_take(args, opened.values())
    planned = {
        part: _plan_part(kind.checkpoints[part], source, variants.get(part), cast) for part, source in opened.items()
    }
    if args.dry_run:
        return _dry_run(list(planned.values()))
    beside = found.get("tokenizer")
    tokenizer = args.tokenizer or planned["t5"].source.tokenizer or (beside and sources.locate(beside))
    if tokenizer is None:
        names = " or ".join(folders.TOKENIZERS)
        raise UserError(f"{found['t5']}: no {names} in the folder of the text encoder; name it with --tokenizer FILE")
    for licence in plan.licences(planned.values()):
        note(licence)
    return ReleaseWriter(args.dst, cast, tokenizer, args.orbax, args.mesh).write_whole(kind, planned)


def _find_cogvideox(args: argparse.Namespace) -> dict[str, str]:
    """Where the checkpoints of a release are: in SRC, or where the flags say."""
    if args.split:
        raise UserError("--split means nothing without --reverse")
    given = {part: getattr(args, part) for part in ("vae", "t5") if getattr(args, part) is not None}
    found = pipelines.find(args.src, args.variant) | given
    if missing := [part for part in COGVIDEOX.checkpoints if part not in found]:
        flags = " and ".join(f"--{part} SRC" for part in missing)
        raise UserError(f"{args.src}: holds no {' and no '.join(missing)}; name it with {flags}")
    return found


def _with_motion(args: argparse.Namespace, base: Source) -> Source:
    """A plain base with the fusers and the extractor of split files."""
    base = tora_cogvideox.view(base)
    files = pipelines.find_split(args.motion, tora_cogvideox.takes_images(base.shapes))
    for file in files.values():
        note(f"{file} goes onto {base.name}")
    return views.joined({"": base, **{prefix: _open(args, file) for prefix, file in files.items()}})


def _variants(variant: str | None, kind: ReleaseType) -> dict[str, str]:
    """--variant of a whole release: the denoiser's, or JSON with a section for each part."""
    if variant is None:
        return {}
    fields = folders.parse_json(variant, "--variant") if variant.startswith("{") else {kind.denoiser: variant}
    if odd := sorted(fields.keys() - kind.checkpoints.keys()):
        raise UserError(f"--variant: {odd[0]!r} is no part; parts are {', '.join(kind.checkpoints)}")
    return {part: value if isinstance(value, str) else json.dumps(value) for part, value in fields.items()}


def _export(args: argparse.Namespace, cast: stream.Cast) -> dict[str, Any]:
    flags = ("variant", "mesh", "tokenizer", "take", "motion", "vae", "t5")
    unused = [f"--{flag}" for flag in flags if getattr(args, flag, None) is not None]
    if unused:
        raise UserError(f"{unused[0]} means nothing with --reverse")
    kind, split = CHECKPOINT_TYPES[args.kind], getattr(args, "split", False)
    if adapters.is_adapter(args.src):
        return adapters.write(args.dst, kind, args.src, cast)
    scratch = files.path(args.dst).absolute().parent
    with export.open_ours(args.src, kind, None if isinstance(scratch, BucketPath) else scratch) as ours:
        if args.dry_run:
            for move in export.plan(kind, ours):
                for key in move.sources:
                    print(f"{move.target} -> {key}")
            return {"dry_run": True}
        return export.write(args.dst, kind, ours, cast, split)


def _dry_run(planned: list[Part]) -> dict[str, Any]:
    for part in planned:
        for move in part.moves:
            for layer, key in enumerate(move.sources):
                shape, dtype = list(part.source.shapes[key]), part.source.dtypes[key].name
                place = f"{move.target}[{layer}]" if move.stacked else move.target
                print(f"{key} {shape} {dtype} -> {place} {list(move.target_shape[move.stacked :])}")
        for key in part.ignored:
            print(f"{key}: ignored, our model computes it or does without")
    if complaints := [line for part in planned if part.problems for line in part.complaint()]:
        message, *details = complaints
        raise ConversionError(message, details)
    return {"dry_run": True, "parts": [part.report() for part in planned]}


def _tell(args: argparse.Namespace, report: dict[str, Any], seconds: float) -> None:
    """A line for people and, where --report asks for it, all of it as JSON."""
    versions = {name: importlib.metadata.version(name) for name in ("tora_jax", "jax", "orbax-checkpoint")}
    arguments = {name: str(value) for name, value in vars(args).items() if value is not None and name != "command"}
    report = {"arguments": arguments, **report, "seconds": round(seconds, 3), "versions": versions}
    if args.report is not None:
        text = (json.dumps(report, indent=2) + "\n").encode()
        if args.report.is_file():
            args.report.unlink()  # of an earlier run
        with writers.aside(args.report, len(text)) as path:
            path.write_bytes(text)
    if args.dry_run:
        print("dry run: everything fits; nothing was written")
        return
    new = f", {len(report['new'])} tensors new (untrained)" if report.get("new") else ""
    odd = f", NaN or Inf in {', '.join(report['nonfinite'])}" if report["nonfinite"] else ""
    print(f"wrote {args.dst}: {writers.readable(report['bytes'])} in {seconds:.1f} s{new}{odd}")


def _stop(*_) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # so that what lies aside is removed
    jax.config.update("jax_platforms", "cpu")  # the work is the host's
    main()
