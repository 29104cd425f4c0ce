"""The command of sampling: flags, files in and out. `sample.py`, `tora-sample` and `python -m` start it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from importlib import resources
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from tora_jax import command_line, programs, sharding
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.conditioning import images, prompt_rewriting
from tora_jax.configs import common, sampling
from tora_jax.errors import UserError
from tora_jax.io import files
from tora_jax.sampling import batch_file, dry_run, request, writer
from tora_jax.sampling.generate import timed

USAGE = """Makes a video that moves along drawn trajectories.

Without arguments: the default prompt and trajectory, by the small model with its weights. Writes the video (--out),
the same with the trajectories drawn over it (*_trajectory), the flow map that the model saw (*_flow), and a report
(*.json). With --batch: the same for each line of a file.
"""

DEFINE = {  # by the type of a setting; the first that fits wins
    tuple: flags.DEFINE_multi_string,
    str: flags.DEFINE_string,
    float: flags.DEFINE_float,
    int: flags.DEFINE_integer,
}


def sample(argv: list[str] | None = None) -> None:
    """Runs the command and exits: 0, 2 after a user's mistake (one line on stderr), 130 after Ctrl-C."""
    if argv is None:  # a process of its own
        programs.keep()
    command_line.run(_sample, sys.argv if argv is None else argv, "what is finished stays, nothing half-written does")


def _sample(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    args = command_line.parse(argv, _define, USAGE, sampling.section())
    if args.weights is None and args["config"].using_default_value:
        args.weights = str(release.DEMO)
    config = _config(args)
    section = config.get("sampling", {})
    given = _given(args)
    wanted = request.make(section, given)
    if args.rewrite_url and args.batch:
        raise UserError(
            "--rewrite_url rewrites the prompt of one video, and --batch has its own prompts; leave one out"
        )
    if args.rewrite_url:
        instructions = assembly.backbone(config).REWRITING
        prompts = prompt_rewriting.rewrite(wanted.prompts, args.rewrite_url, args.rewrite_model, instructions)
        wanted = request.make(section, given | {"prompt": prompts})
    mesh = None if args.dry_run else _mesh(args)  # a dry run leaves the devices alone
    models = assembly.outline(config, args.weights)
    if args.batch:
        folder = files.path(args.out if args["out"].present else "outputs/batch")
        weights = release.checksum(args.weights) if args.weights else ""
        jobs = batch_file.read(args.batch, folder, section, given, weights)
        lines = [line for job in jobs if isinstance(job.wanted, request.Request) for line in job.wanted.lines]
    else:
        out = writer.check(args.out, wanted.files, args.weights, args.dry_run)
        pictures = wanted.read()
        wanted = request.place(models, wanted)
        wanted.warn()
        lines = wanted.lines
    if args.dry_run:
        lines = dry_run.run_batch(models, jobs, folder) if args.batch else dry_run.run(models, wanted, pictures, out)
    if not args.quiet:
        for line in dict.fromkeys(lines):
            print(line)
    if args.dry_run:
        return
    command_line.use_compilation_cache()

    rules = tuple(common.training()["rules"].items())
    seconds: dict[str, dict[str, float]] = {}
    mesh = mesh if mesh.size > 1 else None
    place = None if mesh is None else functools.partial(sharding.param_shardings, mesh=mesh, rules=rules)
    with timed(seconds, "load"):
        models = assembly.load(config, args.weights, wanted.settings.seed, args.low_memory, args.eight_bit, place)
    on_mesh = contextlib.nullcontext() if mesh is None else sharding.use(mesh, rules)
    if args.weights is None:
        print(f"{models.origin}: no --weights given, so the video will be noise", file=sys.stderr)
    if args.batch:
        with on_mesh:
            batch_file.run(models, jobs, folder, args.batch_size, mesh, args.quiet, check_interrupt)
        return

    def progress(step: int, _: Callable) -> None:
        bar.update(step - bar.n)
        check_interrupt()

    report = {"settings": wanted.settings.report(), "lost": wanted.lost, "weights": models.origin, "seconds": seconds}
    with (
        on_mesh,
        tqdm(total=request.steps(models, wanted), desc="sampling", unit="step", disable=args.quiet) as bar,
        writer.open_files(out, wanted.tracks, report) as write,
    ):
        for (piece,) in request.generate(models, [wanted], [pictures], mesh=mesh, progress=progress):
            write(piece)
            check_interrupt()
    if not args.quiet:
        spent = ", ".join(f"{part} {s['run']:.1f}+{s['compile']:.1f}" for part, s in report["seconds"].items())
        print(f"wrote {out} (seconds, run+compile: {spent})")


def _mesh(args: flags.FlagValues) -> Mesh:
    mesh = sharding.make_mesh(args.mesh or f"data={len(jax.devices()) if args.batch and not args.low_memory else 1}")
    if args.low_memory and mesh.size > 1:
        raise UserError(f"--low_memory is for one device, and --mesh={args.mesh} has {mesh.size}; leave one out")
    if not args.batch and mesh.shape["data"] * mesh.shape["fsdp"] > 1:
        raise UserError(
            f"--mesh={args.mesh}: data and fsdp share out the videos of --batch; one video has seq and tensor"
        )
    return mesh


# ----------------------------------------------------------------------------------------------------------
# Flags and config
# ----------------------------------------------------------------------------------------------------------


def _define(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    small = str(resources.files("tora_jax.configs").joinpath("demo.py"))
    config_flags.DEFINE_config_file("config", small, "Config of the models and of sampling.", sys_argv=argv, **to)
    flags.DEFINE_boolean("help", False, "Shows this.", short_name="h", **to)
    folder = "Release folder, used with its own config unless --config is given. Default: the small model's."
    flags.DEFINE_string("weights", None, folder, **to)
    flags.DEFINE_string("out", "outputs/tora.mp4", "Where the video goes (.mp4 or .gif).", **to)
    flags.DEFINE_boolean("low_memory", False, "Parts of the model are on the device only while they are used.", **to)
    flags.DEFINE_boolean("eight_bit", False, "Kernels of the released Tora's denoiser in 8 bits.", **to)
    dry = "Reads every input, says how, writes the report and a picture of the paths, and loads no model."
    flags.DEFINE_boolean("dry_run", False, dry, **to)
    flags.DEFINE_boolean("quiet", False, "No progress bar, and no word on how trajectories were read.", **to)
    flags.DEFINE_boolean("no_trajectory", False, "Plain Open-Sora: leave the fusers out.", **to)
    flags.DEFINE_string("image", None, "Picture for the first frame.", **to)
    flags.DEFINE_string("last_image", None, "Picture for the last frame.", **to)
    what = "frame=image_or_video[:edit_ratio]: what is to be seen from that frame on; -1 = up to the end. Repeatable."
    flags.DEFINE_multi_string("condition", None, what, **to)
    flags.DEFINE_string("batch", None, "JSON lines, a video each (docs/sampling.md); --out is then a folder.", **to)
    flags.DEFINE_integer("batch_size", 1, "Videos that each device makes at once, with --batch.", lower_bound=1, **to)
    flags.DEFINE_string("mesh", "", "Axes of devices, such as data=4,fsdp=2. Default: --batch uses all for data.", **to)
    server = "OpenAI-compatible server that rewrites the prompt, such as http://localhost:8000/v1. Off by default."
    flags.DEFINE_string("rewrite_url", None, server, **to)
    flags.DEFINE_string("rewrite_model", "", "Its model. Default: the first that it names.", **to)
    # A flag that is not given leaves its setting to the config's sampling section.
    for field in dataclasses.fields(sampling.Settings):
        define = next(define for kind, define in DEFINE.items() if kind in sampling.kinds()[field.name])
        define(field.name, None, field.metadata["help"], **to)


def _config(args: flags.FlagValues) -> dict[str, Any]:
    """--config, else the config of --weights, else the small model's; --config.NAME=VALUE changes each of them."""
    if args.weights is None or not args["config"].using_default_value:
        config = args.config
    else:
        try:
            config = ConfigDict(release.read_config(args.weights))
            config.update_from_flattened_dict(config_flags.get_override_values(args["config"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{args.weights}: --config.NAME does not fit its config ({command_line.last_line(error)})"
            ) from None
    return config.to_dict()


def _given(args: flags.FlagValues) -> dict[str, Any]:
    """The flags that were set, as `request.make` takes them."""
    given = {name: args[name].value for name in sampling.kinds() if args[name].value is not None}
    if args.prompt is not None and len(args.prompt) == 1:
        (given["prompt"],) = args.prompt
    given.pop("trajectory", None)
    if args.no_trajectory:
        given["trajectories"] = None
    elif args.trajectory is not None:
        given["trajectories"] = args.trajectory
    pictures = [(0, args.image), (-1, args.last_image)]
    given["conditions"] = [images.Condition(frame, files.path(file)) for frame, file in pictures if file]
    given["conditions"] += map(images.parse, args.condition or ())
    return given


if __name__ == "__main__":
    programs.keep()
    sample(["tora_jax.sampling", *sys.argv[1:]])
