"""How long a video takes, with random weights, which time does not depend on: text, motion, steps and decoding.

  python -m benchmarks.sample --config configs/tora.py --num_frames 51 --height 480 --width 854
  python -m benchmarks.sample --config configs/tora.py:variant=4x1152x16/2 --config.t5.depth=2 --num_frames 17 \\
      --height 64 --width 64 --ready [--against 65ee8fe]

Prints one JSON line: the median of the repeats after one that compiles, by parts; the highest use of the device's
memory; and of the sampler the operations and on known chips their share of the peak.

With `--ready`: how long it takes from the start of `sample.py`, with caches that one run before has filled, until the
first step is done, which at a small size takes a moment. The weights are random, in a release folder in the page cache.
"""

import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from tora_jax.configs import common
from tora_jax.configs.sampling import Settings

from benchmarks import chips, first_run, flops, jobs, trees
from tora_jax import command_line, sharding
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.conditioning import text
from tora_jax.errors import UserError
from tora_jax.io.files import tuples
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    jobs.define_flags(values, argv)
    flags.DEFINE_integer("steps", 30, "Of the sampler.", **to)
    flags.DEFINE_float("guidance", 7.0, "1 = none.", **to)
    flags.DEFINE_boolean("motion", True, "Along a trajectory; else as plain Open-Sora.", **to)
    flags.DEFINE_integer("repeats", 3, "After one that warms up.", **to)
    flags.DEFINE_boolean("ready", False, "From the start of a process to its first step.", **to)
    flags.DEFINE_string("against", None, "Commit to run beside this tree, with --ready.", **to)


def random_models(config: dict, dtype) -> assembly.Models:
    """The parts of a config with random weights of one dtype."""
    kind, parts = assembly.backbone(config), assembly.modules(config)
    mesh = sharding.make_mesh("")
    shapes = jax.eval_shape(functools.partial(assembly.init_params, kind, parts), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    params = jobs.filled(jobs.placed(shapes, sharding.param_shardings(shapes, mesh, ())))
    tokenizer = text.Tokenizer(assembly.tokenizer_path(None).read_bytes(), parts["tora"].caption_length)
    return assembly.Models(kind, parts, params, tokenizer, "random weights")


def ready(config: dict, size: dict[str, int], repeats: int, against: str | None) -> dict:
    """Seconds until the first step is done, of this tree and of another commit's."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_random(folder / "weights", config)
        both = first_run.sides(against, folder)
        for _ in range(repeats + 1):
            for side, tree in both.items():
                found.setdefault(side, []).append(first_step(tree, folder / "weights", folder / side, size))
    timed = {side: seconds[1:] for side, seconds in found.items()}
    return first_run.medians({"ready": timed}) | size | {"repeats": repeats}


def write_random(folder: Path, config: dict) -> None:
    """A release folder of a config with random numbers."""
    kept = {part: values for part, values in config.items() if part in assembly.backbone(config).PARTS}
    release.save(folder, kept, random_numbers(config), assembly.tokenizer_path(None), "random numbers")


def random_numbers(config: dict) -> dict:
    """Parameters of a config, which nobody shall compile for."""
    kind, rng = assembly.backbone(config), np.random.default_rng(0)
    init = functools.partial(assembly.init_params, kind, assembly.modules(config))
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)


def first_step(tree: Path, weights: Path | str, name: Path, size: dict[str, int]) -> float:
    """Runs `sample.py` until its progress bar says that a step is done; seconds.

    Args:
      name: of files that it would write; compiled programs are kept beside them.
    """
    values = [f"--{key}={value}" for key, value in size.items()]
    command = [
        sys.executable,
        "sample.py",
        f"--weights={weights}",
        f"--out={name}.mp4",
        "--steps=3",
        *values,
    ]
    env = trees.environment({"JAX_COMPILATION_CACHE_DIR": f"{name}_cache"})
    start, said = time.perf_counter(), b""
    with subprocess.Popen(command, cwd=tree, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while b" 1/3 " not in said:
            if not (read := process.stderr.read1()):
                last = said.decode().strip().splitlines() or ["no message"]
                raise UserError(f"{' '.join(command)}: ended before its first step: {last[-1]}")
            said += read
        seconds = time.perf_counter() - start
        process.kill()  # what is decoded after it is not asked for
    return seconds


def main(argv: list[str], _) -> None:
    args = command_line.parse(argv, define_flags, __doc__, common.training())
    config = tuples(args.config.to_dict())
    size = {"num_frames": args.num_frames, "height": args.height, "width": args.width}
    if args.ready:
        print(json.dumps(ready(config, size, args.repeats, args.against)))
        return
    models = random_models(config, jnp.dtype(config["tora"]["stdit"]["dtype"]))
    line = np.linspace((0.2, 0.5), (0.8, 0.5), args.num_frames, dtype=np.float32)
    tracks = line[None] if args.motion else None
    inputs = [Inputs("a red star moves over blue waves.", tracks)]
    settings = {**size, "steps": args.steps, "guidance": args.guidance}
    found = [
        generate_batch(models, inputs, Settings(**settings), seeds=[seed])[0].seconds
        for seed in range(args.repeats + 1)
    ]
    seconds = {part: [each[part]["run"] for each in found[1:]] for part in found[0]}
    whole = [sum(each) for each in zip(*seconds.values(), strict=True)]
    latents = jobs.latent_shape(vars(models), **size)
    work = flops.forward(config["tora"], *latents[:3], models.tora.caption_length)
    work = (
        args.steps
        * (1 if args.guidance == 1 else 2)
        * sum(value for part, value in work.items() if args.motion or part not in ("fuser", "extractor"))
    )
    device = jax.devices()[0]
    sampling = statistics.median(seconds["sample"])
    figures = {
        "device": device.device_kind,
        **settings,
        "seconds": round(statistics.median(whole), 2),
        "fastest": round(min(whole), 2),
        "slowest": round(max(whole), 2),
        "parts": {part: round(statistics.median(each), 2) for part, each in seconds.items()},
        "compile_seconds": round(sum(part["compile"] for part in found[0].values()), 1),
        "tflop": round(work / 1e12, 1),
        "tflop_per_second": round(work / 1e12 / sampling, 1),
    }
    if chip := chips.find(device.device_kind):
        figures["mfu"] = round(figures["tflop_per_second"] / chip.peak, 3)
    if stats := device.memory_stats():
        figures["peak_gib"] = round(stats["peak_bytes_in_use"] / 2**30, 2)
    print(json.dumps(figures))


if __name__ == "__main__":
    command_line.run(main, sys.argv)
