"""How long one step takes on the devices that are there, with random weights, which time does not depend on.

  python -m benchmarks.step --config configs/tora.py:stage=1 --num_frames 51 --height 480 --width 854
  python -m benchmarks.step --job backward --config configs/tora.py:variant=2x1152x16/2 --nomotion --num_frames 17 \
    --height 144 --width 256 --config.tora.stdit.dtype=float32 --config.tora.stdit.remat=none --reference Open-Sora

Jobs: "train", the whole step of train.py on precomputed clips; "sample", one step of sample.py with guidance; "forward"
and "backward", one pass of the denoiser, and one with the gradients of all its parameters.

--reference times the PyTorch model, of this size and dtype, in turns with this one, each pass of the one after a pass
of the other, so that what else the machine does meets both. For Open-Sora it takes a checkout at tag v1.2.0, and wants
torch, transformers, einops and rotary_embedding_torch, here or in the Python of --reference_python; xformers, timm,
colossalai and mmengine are stood in for. For CogVideoX it takes the word "diffusers", and wants torch and diffusers:

  python -m benchmarks.step --job forward --config configs/tora_cogvideox.py:variant=2x3072x48/2 --nomotion \
    --num_frames 9 --height 240 --width 352 --config.tora.cogvideox.dtype=float32 \
    --config.tora.cogvideox.remat=none --reference diffusers

Prints one JSON line: the median of the repeats after a warm-up, the slowest and the fastest, the operations, and on
known chips the share of their peak. Operations that are done twice to save memory do not count.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags
from tora_jax.configs import common

from benchmarks import chips, flops, jobs
from tora_jax import command_line, sharding
from tora_jax.backbones import assembly
from tora_jax.errors import UserError
from tora_jax.io.files import tuples
from tora_jax.models.cogvideox import size_of


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    jobs.define_flags(values, argv)
    flags.DEFINE_enum("job", "train", ("train", "sample", "forward", "backward"), "What is timed.", **to)
    flags.DEFINE_boolean("motion", True, "With extractor and fusers; in forward and backward.", **to)
    flags.DEFINE_integer("repeats", 10, "After one that warms up.", **to)
    flags.DEFINE_string("reference", None, "Checkout of Open-Sora, or diffusers; one device.", **to)
    flags.DEFINE_string("reference_python", sys.executable, "Python that has torch.", **to)


def passes(config, parts, mesh, rules, size, batch, *, gradients: bool, motion: bool):
    """The denoiser alone, and shapes of its arguments."""
    params = jobs.params_of(config, parts, mesh, rules, "tora")["tora"]
    tora, latents = parts["tora"], jobs.latent_shape(parts, **size)
    shapes = {"x": (batch, *latents), "text": (batch, tora.caption_length, tora.caption_channels)}
    shapes |= {"motion": shapes["x"]} if motion else {}
    shapes["timestep"] = (batch,)
    _, told = assembly.backbone(config).dummies({"tora": tora})["tora"]
    for name, value in told.items():  # a number for each clip, or latents that are given
        if value is not None:
            shapes[name] = (batch,) if value.ndim == 1 else (batch, *latents[:-1], value.shape[-1])
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    inputs = jobs.placed(inputs, sharding.batch_sharding(mesh, rules, batch))
    model = parts["tora"]

    def run(params, inputs):
        arguments = inputs if motion else {**inputs, "motion": None}
        return model.apply({"params": params}, **arguments)

    def loss(params, inputs):
        return jnp.square(run(params, inputs)).mean()

    return jax.jit(jax.value_and_grad(loss) if gradients else run), (params, inputs)


def main(argv: list[str], _) -> None:
    args = command_line.parse(argv, define_flags, __doc__, common.training())
    config = tuples(args.config.to_dict())
    mesh = sharding.make_mesh(config["mesh"] if args.mesh is None else args.mesh)
    rules, parts = tuple(config["rules"].items()), assembly.modules(config)
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    alone = args.job in ("forward", "backward")
    if args.reference and not alone:
        raise UserError("--reference goes with --job forward and --job backward")
    job = jobs.JOBS.get(args.job) or functools.partial(passes, gradients=args.job == "backward", motion=args.motion)
    batch = args.batch or (1 if args.job == "sample" else mesh.shape["data"] * mesh.shape["fsdp"])
    function, shapes = job(config, parts, mesh, rules, size, batch)
    arguments = list(jobs.filled(shapes))
    if args.job == "train":  # Adam's second moments are not below zero
        arguments[0] = arguments[0].replace(opt_state=jax.tree.map(jnp.zeros_like, arguments[0].opt_state))

    def once() -> float:
        start = time.perf_counter()
        out = jax.block_until_ready(function(*arguments))
        seconds = time.perf_counter() - start
        if args.job == "train":
            arguments[0] = out[0]  # what was given is donated
        elif args.job == "sample":
            arguments[1] = out
        return seconds

    runs = {"": once}
    with sharding.use(mesh, rules), Reference(args, parts, batch) as reference:
        if args.reference:
            runs["reference_"] = reference.once
        compiling = {name: run() for name, run in runs.items()}
        seconds = {name: [] for name in runs}
        for _ in range(args.repeats):
            for name, run in runs.items():
                seconds[name].append(run())
    latents = jobs.latent_shape(parts, **size)
    work = flops.forward(config["tora"], *latents[:3], parts["tora"].caption_length)
    if alone and not args.motion:
        del work["fuser"], work["extractor"]
    if args.job == "train":
        work = flops.training(work, {part for part in work if any(part in path for path in shapes[0].trained)})
    else:
        work = sum(work.values()) * {"sample": 2, "forward": 1, "backward": 3}[args.job]
    device = jax.devices()[0]
    figures = {"job": args.job, "device": device.device_kind, "devices": mesh.size, "batch": batch, **size}
    figures["latents"] = latents
    for name, found in seconds.items():
        figures |= {
            f"{name}seconds": round(statistics.median(found), 4),
            f"{name}fastest": round(min(found), 4),
            f"{name}slowest": round(max(found), 4),
        }
    figures["first_seconds"] = round(compiling[""], 1)  # with compilation
    figures["tflop"] = round(batch * work / 1e12, 3)
    figures["tflop_per_second"] = round(batch * work / 1e12 / figures["seconds"], 2)
    if chip := chips.find(device.device_kind):
        figures["mfu"] = round(figures["tflop_per_second"] / mesh.size / chip.peak, 3)
    if stats := device.memory_stats():
        figures["peak_gib"] = round(stats["peak_bytes_in_use"] / 2**30, 2)
    if args.reference:
        pairs = zip(seconds[""], seconds["reference_"], strict=True)
        figures["ratio"] = round(statistics.median(ours / theirs for ours, theirs in pairs), 3)
    print(json.dumps(figures))


class Reference:
    """benchmarks/reference.py in a process of its own; does nothing without --reference."""

    def __init__(self, args, parts, batch: int):
        self._process = None
        if not args.reference:
            return
        tora = parts["tora"]
        sizes = {"latents": [batch, *jobs.latent_shape(parts, args.num_frames, args.height, args.width)]}
        sizes |= {"text": [batch, tora.caption_length, tora.caption_channels]}
        sizes |= {"height": args.height, "width": args.width, "gradients": args.job == "backward"}
        # What the model of `benchmarks.reference.MODELS` is told of this one.
        if hasattr(tora, "stdit"):
            if not (Path(args.reference) / "opensora/models/stdit/stdit3.py").is_file():
                wanted = "no checkout of Open-Sora v1.2.0 (opensora/models/stdit)"
                raise UserError(f"--reference {args.reference}: {wanted}")
            sizes |= {"variant": tora.stdit["variant"], "dtype": tora.stdit["dtype"]}
        else:
            if args.reference != "diffusers" or args.motion:
                raise UserError("for CogVideoX: --reference diffusers --nomotion, since diffusers has no Tora")
            size = size_of(tora.cogvideox["variant"])
            sizes |= {"depth": size.depth, "heads": size.num_heads, "head_width": size.width // size.num_heads}
            sizes |= {"channels": tora.in_channels + tora.given_channels, "dtype": tora.cogvideox["dtype"]}
        script = Path(__file__).with_name("reference.py")
        self._process = subprocess.Popen(
            [args.reference_python, script, args.reference, json.dumps(sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def once(self) -> float:
        """Seconds of one pass."""
        print(flush=True, file=self._process.stdin)
        if not (line := self._process.stdout.readline()):
            raise UserError("--reference: the PyTorch model ended, see above")
        return float(line)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait()


if __name__ == "__main__":
    command_line.run(main, sys.argv)
