"""Compiles a job for TPUs that are not there, and says what it needs: `libtpu` from the package index is enough.

  python -m benchmarks.aot --config configs/tora.py:stage=1 --topology v5e:4x4 --mesh fsdp=16 --height 480 --width 854

Prints one JSON line, and ends with 1 where a chip has too little memory. What is compiled is what `train.py`,
`sample.py` run: a whole training step on precomputed clips, one sampling step with guidance, the decoding of a video.
"""

import json
import os
import re
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags
from tora_jax.configs import common

from benchmarks import chips, flops
from tora_jax import chain, command, lora, optim, release, sharding, training
from tora_jax.errors import UserError
from tora_jax.models.video_vae import latent_frames

JOBS = ("train", "sample", "decode")
GIB = 2**30


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    config_flags.DEFINE_config_file("config", "configs/tora.py:stage=1", "Config of a job.", sys_argv=argv, **to)
    flags.DEFINE_boolean("help", False, "Shows this.", short_name="h", **to)
    flags.DEFINE_string("topology", "v5e:4x4", "Chips, such as v5e:2x4, v5p:2x2x4, v6e:4x4.", **to)
    flags.DEFINE_string("mesh", None, "Such as data=4,fsdp=4; none = the config's.", **to)
    flags.DEFINE_enum("job", "train", JOBS, "What is compiled.", **to)
    flags.DEFINE_integer("num_frames", 51, "Frames of a clip.", **to)
    flags.DEFINE_integer("height", 480, "Pixels.", **to)
    flags.DEFINE_integer("width", 854, "Pixels.", **to)
    flags.DEFINE_integer("batch", 0, "Clips in a batch; 0 = one for each part of the mesh that has its own.", **to)


def main(argv: list[str], _) -> None:
    args = command.parse(argv, define_flags, __doc__, common.training())
    config = release.tuples(args.config.to_dict())
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    except Exception as error:
        raise UserError(
            f"--topology {args.topology}: {command.last_line(error)}; it needs pip install libtpu"
        ) from None
    mesh = sharding.make_mesh(config["mesh"] if args.mesh is None else args.mesh, devices)
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    figures = measure(config, mesh, args.job, size, args.batch)
    print(json.dumps({"job": args.job, "topology": args.topology, "mesh": dict(mesh.shape), **size, **figures}))
    if not figures["fits"]:
        sys.exit(1)


def measure(config: dict, mesh: Mesh, job: str, size: dict[str, int], batch: int = 0) -> dict:
    """Compiles a job on a mesh; the JSON line's figures."""
    rules = tuple(config["rules"].items())
    parts = chain.modules(config)
    batch = batch or (mesh.shape["data"] * mesh.shape["fsdp"] if job == "train" else 1)
    kind = mesh.devices.flat[0].device_kind
    chip = chips.find(kind)
    latents = latent_shape(parts, **size)
    forward = flops.forward(config["tora"], *latents[:3], parts["tora"].stdit["caption_length"])
    function, arguments = JOB[job](config, parts, mesh, rules, size, batch)
    with sharding.use(mesh, rules):
        start = time.perf_counter()
        lowered = function.lower(*arguments)
        figures = {"batch": batch, "device": kind, "lower_seconds": round(time.perf_counter() - start, 1)}
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not (used := re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))):
                raise
            needs = {"total_gib": float(used[1]), "chip_gib": float(used[2])}
            return {**figures, "compile_seconds": round(time.perf_counter() - start, 1), **needs, "fits": False}
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    if job == "train":
        trained = {"spatial", "temporal", "fuser", "extractor", "ends"}
        trained = {part for part in trained if any(part in path for path in arguments[0].trained)}
        work = batch * flops.training(forward, trained)
    else:
        work = 2 * batch * sum(forward.values()) if job == "sample" else None
    return {
        **figures,
        "compile_seconds": round(time.perf_counter() - start, 1),
        "argument_gib": round(memory.argument_size_in_bytes / GIB, 2),
        "temporary_gib": round(memory.temp_size_in_bytes / GIB, 2),
        "total_gib": round(total / GIB, 2),
        "chip_gib": chip and chip.memory,
        "fits": chip is None or total <= chip.memory * GIB,
        "tflop": work and round(work / 1e12, 1),
        "collectives": collectives(compiled.as_text()),
    }


def latent_shape(parts, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Frames, height, width and channels of the latents of a clip."""
    vae = parts["vae"]
    frames = latent_frames(num_frames, vae.micro_frame_size, vae.time_factor)
    return frames, height // vae.space_factor, width // vae.space_factor, parts["tora"].stdit.get("in_channels", 4)


def params_of(parts, mesh: Mesh, rules: sharding.Rules, part: str, dtype=None):
    """Shapes of a part's parameters where they lie on a mesh; `dtype` replaces float32."""
    shapes = jax.eval_shape(functools.partial(chain.init_params, parts), jax.random.key(0))
    shapes = {part: shapes[part]}
    if dtype is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    return placed(shapes, sharding.param_shardings(shapes, mesh, rules))


def placed(shapes, shardings):
    """Shapes with their shardings: a tree of them, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def train(config, parts, mesh, rules, size, batch):
    """train.py's step, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "tora")
    if config["lora"]["rank"]:
        rank, alpha = config["lora"]["rank"], config["lora"]["alpha"]
        make = functools.partial(lora.init, patterns=config["lora"]["kernels"], rank=rank, key=jax.random.key(0))
        trained, frozen = jax.eval_shape(make, params), optim.flatten(params)
        combine = functools.partial(lora.merge, alpha=alpha)
    else:
        (trained, frozen), combine = optim.split(params, config["train"]), optim.join
    optimizer = optim.make(config["optim"], trained, config["steps"])
    state = jax.eval_shape(lambda trained: training.init_state(trained, optimizer), trained)
    state = placed(state, sharding.param_shardings(state, mesh, rules))
    frames, height, width, channels = latent_shape(parts, **size)
    stdit = parts["tora"].stdit
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float16)
    latents = half((batch, frames, height, width, channels))
    text = (batch, stdit["caption_length"], stdit["caption_channels"])
    clips = {name: latents for name in ("latent_mean", "latent_std", "motion_mean", "motion_std")}
    clips |= {"text": half(text), "text_mask": jax.ShapeDtypeStruct(text[:2], bool)}
    clips |= {"frame_mask": jax.ShapeDtypeStruct((batch, frames), bool)}
    clips |= {name: jax.ShapeDtypeStruct((batch,), jnp.float32) for name in ("fps", "height", "width")}
    clips = placed(clips, sharding.batch_sharding(mesh, rules, batch))
    key = placed(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec()))
    return training.jit_train_step(config, parts, optimizer, combine, state), (state, frozen, clips, key)


def sample(config, parts, mesh, rules, size, batch):
    """One step of sample.py with guidance, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "tora", jnp.bfloat16)["tora"]
    frames, height, width, channels = latent_shape(parts, **size)
    stdit, dtype = parts["tora"].stdit, parts["tora"].stdit["dtype"]
    whole = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((batch, frames, height, width, channels), jnp.float32)
    motion = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    rows = 2 * batch
    conditions = {
        "text": jax.ShapeDtypeStruct((rows, stdit["caption_length"], stdit["caption_channels"]), dtype),
        "text_mask": jax.ShapeDtypeStruct((rows, stdit["caption_length"]), bool),
        "drop_text": jax.ShapeDtypeStruct((rows,), bool),
        "has_motion": jax.ShapeDtypeStruct((rows,), bool),
        **{name: jax.ShapeDtypeStruct((rows,), jnp.float32) for name in ("fps", "height", "width")},
    }
    extract = functools.partial(parts["tora"].apply, method="extract")
    features = jax.eval_shape(lambda params, motion: extract({"params": params}, motion), params, motion)
    by_time = nn.logical_to_mesh_axes((None, None, "time", None, None, None), rules)
    features = placed(features, NamedSharding(mesh, by_time))
    scalars = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3,), (), ())]
    x, conditions, scalars = placed((x, conditions, scalars), whole)
    models = chain.Models(**parts, params={}, tokenizer=None, origin="")
    return models.step, (params, x, *scalars, conditions, features, None, None)


def decode(config, parts, mesh, rules, size, batch):
    """The decoding of latents to a video, and shapes of its arguments."""
    params = params_of(parts, mesh, rules, "vae")["vae"]
    latents = jax.ShapeDtypeStruct((batch, *latent_shape(parts, **size)), jnp.float32)
    latents = placed(latents, NamedSharding(mesh, PartitionSpec()))
    models = chain.Models(**parts, params={}, tokenizer=None, origin="")
    return models.decode, (size["num_frames"], params, latents)


JOB = {"train": train, "sample": sample, "decode": decode}

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
    command.run(main, sys.argv)
