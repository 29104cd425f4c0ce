"""Compiles a job for TPUs that are not there, and says what it needs: `pip install 'tora_jax[tpu]'` is enough.

  python -m benchmarks.aot --config configs/tora.py:stage=1 --topology v5e:4x4 --mesh fsdp=16 --height 480 --width 854

Prints one JSON line, and ends with 1 where a device has too little memory, or where it is not known how much it has
("fits": null). What is compiled is what `train.py`, `sample.py` run: a whole training step on precomputed clips, the
encoding of a caption, a trajectory's features, one sampling step with guidance, the decoding of a video, the encoding
of clips.
"""

import json
import os
import re
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is taken, so that two may compile at once

import math
from importlib import metadata

import jax
from absl import flags
from flax.core import freeze
from jax.experimental import topologies
from jax.sharding import Mesh
from tora_jax.configs import common

from benchmarks import chips, flops, jobs
from tora_jax import command_line, sharding
from tora_jax.backbones import assembly
from tora_jax.errors import UserError
from tora_jax.io.files import tuples

GIB = 2**30

# What compilers say of a program that does not fit: libtpu 0.0.42 and 0.0.52 while they plan, and when they allocate.
MESSAGES = (
    r"total memory required for .*? \(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)",
    r"Used ([\d.]+)G of ([\d.]+)G hbm",
)


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    jobs.define_flags(values, argv)
    flags.DEFINE_string("topology", "v5e:4x4", "Chips, such as v5e:2x4, v5p:2x2x4, v6e:4x4.", **to)
    flags.DEFINE_boolean("eight_bit", False, "Kernels of the released Tora's denoiser in 8 bits.", **to)
    flags.DEFINE_enum("job", "train", tuple(jobs.JOBS), "What is compiled.", **to)


def main(argv: list[str], _) -> None:
    args = command_line.parse(argv, define_flags, __doc__, common.training())
    config = tuples(args.config.to_dict())
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    except Exception as error:
        raise UserError(f"--topology {args.topology}: {command_line.last_line(error)}; {install()}") from None
    mesh = sharding.make_mesh(config["mesh"] if args.mesh is None else args.mesh, devices)
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    try:
        figures = measure(config, mesh, args.job, size, args.batch, args.eight_bit)
    except jax.errors.JaxRuntimeError as error:
        first = str(error).partition("\n")[0]
        raise UserError(f"the compiler of libtpu {version('libtpu')} gave up ({first}); {install()}") from None
    figures |= {name: version(name) for name in ("jax", "libtpu")}
    print(json.dumps({"job": args.job, "topology": args.topology, "mesh": dict(mesh.shape), **size, **figures}))
    if figures["fits"] is None:
        print(f"how much memory a {figures['device']} has is not known here: benchmarks/chips.py", file=sys.stderr)
    if not figures["fits"]:
        sys.exit(1)


def version(package: str) -> str:
    """The version that is installed, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def install() -> str:
    """What to do where libtpu fails: install the one that JAX is made for, if that is not there."""
    wanted = (re.match(r"libtpu\W*==\s*([\d.]+\*?)", line) for line in metadata.requires("jax") or ())
    wanted = next((match[1] for match in wanted if match), "")
    there = version("libtpu")
    if wanted and f"{there}.".startswith(f"{wanted.rstrip('.*')}."):
        return f"libtpu {there} is the one that jax {version('jax')} is made for: another topology or mesh may compile"
    return f"jax {version('jax')} is made for libtpu {wanted}, not {there}: pip install 'jax[tpu]=={version('jax')}'"


def wanted_memory(error: jax.errors.JaxRuntimeError) -> dict[str, float] | None:
    """GiB that a program wants and that a device has, by the compiler's message that it does not fit.

    Returns:
      None: it is another message.
    """
    if "RESOURCE_EXHAUSTED" not in (text := str(error)):
        return None
    for pattern in MESSAGES:
        if match := re.search(pattern, text):
            return {"total_gib": float(match[1]), "chip_gib": float(match[2])}
    return {}


def measure(config: dict, mesh: Mesh, job: str, size: dict[str, int], batch: int = 0, eight_bit: bool = False) -> dict:
    """Compiles a job on a mesh; the JSON line's figures.

    "fits" is None where the memory of the device is not known.
    """
    rules = tuple(config["rules"].items())
    parts = assembly.modules(config)
    if eight_bit:
        if not hasattr(kind := assembly.backbone(config), "in_eight_bit"):
            raise UserError("--eight_bit: this backbone has no form in 8 bits")
        parts = freeze(kind.in_eight_bit(parts))
    batch = batch or (mesh.shape["data"] * mesh.shape["fsdp"] if job in ("train", "encode") else 1)
    kind = mesh.devices.flat[0].device_kind
    chip = chips.find(kind)
    latents = jobs.latent_shape(parts, **size)
    forward = flops.forward(config["tora"], *latents[:3], parts["tora"].caption_length)
    function, arguments = jobs.JOBS[job](config, parts, mesh, rules, size, batch)
    with sharding.use(mesh, rules):
        start, started = time.perf_counter(), time.process_time()
        lowered = function.lower(*arguments)
        figures = {"batch": batch, "device": kind, "lower_seconds": round(time.perf_counter() - start, 1)}
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if (needs := wanted_memory(error)) is None:
                raise
            return {**figures, "compile_seconds": round(time.perf_counter() - start, 1), **needs, "fits": False}
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    if job == "train":
        trained = {part for part in forward if any(part in path for path in arguments[0].trained)}
        work = batch * flops.training(forward, trained)
    else:
        work = 2 * batch * sum(forward.values()) if job == "sample" else None
    return {
        **figures,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "compile_cpu_seconds": round(time.process_time() - started, 1),  # of all cores; other work does not change it
        "argument_gib": round(memory.argument_size_in_bytes / GIB, 2),
        "temporary_gib": round(memory.temp_size_in_bytes / GIB, 2),
        "total_gib": round(total / GIB, 2),
        "chip_gib": chip and chip.memory,
        "fits": None if chip is None else total <= chip.memory * GIB,
        "tflop": work and float(f"{work / 1e12:.4g}"),
        "collectives": collectives(compiled.as_text()),
    }


KINDS = ("all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8}


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Kind -> count, and GiB of their results on one chip, in a compiled module; the body of a loop counts once."""
    found: dict[str, dict[str, float]] = {}
    for kind, _, size in sent(text):
        entry = found.setdefault(kind, {"count": 0, "gib": 0.0})
        entry["count"] += 1
        entry["gib"] += size / GIB
    return {kind: {**entry, "gib": round(entry["gib"], 3)} for kind, entry in found.items()}


def sent(text: str) -> list[tuple[str, int, int]]:
    """(kind, elements, bytes) of the result of each collective of a compiled module, on one device."""
    found = []
    for line in text.splitlines():
        match = re.match(rf"\s*(?:ROOT )?%?\S+ = (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
        if match:
            shapes = [
                (dtype, math.prod(int(n) for n in dims.split(",") if n))
                for dtype, dims in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", match[1])
            ]
            if f"{match[2]}-start(" in line and len(shapes) > 1:
                shapes = shapes[len(shapes) // 2 :]  # a start gives its operands, too
            elements = sum(n for _, n in shapes)
            found.append((match[2], elements, sum(BYTES.get(dtype, 1) * n for dtype, n in shapes)))
    return found


if __name__ == "__main__":
    command_line.run(main, sys.argv)
