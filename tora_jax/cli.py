"""The command line of sampling: flags, files in and out, and errors in one line. `sample.py` starts it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from tora_jax import chain, command, draw, generation, release, trajectory, video_io
from tora_jax.configs import common
from tora_jax.data import buckets
from tora_jax.errors import UserError

USAGE = """Makes a video that moves along drawn trajectories.

Without arguments: the default prompt and trajectory, by the small model with its weights. Writes the video (--out),
the same with the trajectories drawn over it (*_trajectory), the flow map that the model saw (*_flow), and a report
(*.json).
"""


def sample(argv: list[str] | None = None) -> None:
    """Runs the command and exits: 0, 2 after a user's mistake (one line on stderr), 130 after Ctrl-C."""
    command.run(_sample, sys.argv if argv is None else argv)


def _sample(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    args = command.parse(argv, _define, USAGE, common.sampling())
    if args.weights is None and args["config"].using_default_value:
        args.weights = str(release.DEMO)
    config = _config(args)
    settings = _settings(args, config.get("sampling", {}))
    sources = [] if args.no_trajectory else _trajectory_paths(settings["trajectory"])
    out = _output(args.out, [*sources, *filter(None, (args.image, args.last_image))], args.weights)
    trajectories = [points for path in sources for points in trajectory.load(path)]
    if args.image and args.last_image and settings["num_frames"] == 1:
        raise UserError("--image and --last_image name the same frame of a video of one frame; give one of them")
    given = [(0, args.image), (settings["num_frames"] - 1, args.last_image)]
    pictures = {frame: video_io.read_image(path) for frame, path in given if path}
    command.use_compilation_cache()

    seconds: dict[str, dict[str, float]] = {}
    with generation.timed(seconds, "load"):
        models = chain.load(config, args.weights, settings["seed"])
    if args.weights is None:
        print(f"{models.origin}: no --weights given, so the video will be noise", file=sys.stderr)
    size = generation.video_size(models, settings["height"], settings["width"])
    images = {frame: video_io.resize_crop(picture, *size) for frame, picture in pictures.items()}
    tracks = trajectory.tracks(trajectories, settings["num_frames"]) if trajectories else None

    def progress(step: int) -> None:
        bar.update(step - bar.n)
        check_interrupt()

    with tqdm(total=settings["steps"], desc="sampling", unit="step", disable=args.quiet) as bar:
        result = generation.generate(
            models,
            settings["prompt"],
            tracks,
            images,
            negative_prompt=settings["negative_prompt"],
            progress=progress,
            **{name: settings[name] for name in generation.CHECKED},
        )
    check_interrupt()
    seconds.update(result.seconds)
    _write(out, result, tracks, {"settings": settings, "weights": models.origin, "seconds": seconds})
    if not args.quiet:
        spent = ", ".join(f"{part} {s['run']:.1f}+{s['compile']:.1f}" for part, s in seconds.items())
        print(f"wrote {out} (seconds, run+compile: {spent})")


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
    flags.DEFINE_boolean("quiet", False, "No progress bar.", **to)
    flags.DEFINE_boolean("no_trajectory", False, "Plain Open-Sora: leave the fusers out.", **to)
    flags.DEFINE_string("image", None, "Picture for the first frame.", **to)
    flags.DEFINE_string("last_image", None, "Picture for the last frame.", **to)
    # The flags below stand for the config's sampling section, which has their defaults.
    files = f"Trajectory file (text, JSON or .npy), or one of {', '.join(_presets())}. Repeatable."
    flags.DEFINE_multi_string("trajectory", None, files, **to)
    flags.DEFINE_string("prompt", None, "What the video shows.", **to)
    flags.DEFINE_string("negative_prompt", None, "What it shall not show.", **to)
    flags.DEFINE_string("resolution", None, 'Named size, such as "480p"; with --aspect_ratio.', **to)
    flags.DEFINE_string("aspect_ratio", None, 'width:height, such as "16:9".', **to)
    flags.DEFINE_integer("height", None, "Pixels; with --width.", **to)
    flags.DEFINE_integer("width", None, "Pixels.", **to)
    flags.DEFINE_string("num_frames", None, 'Number of frames, or "2s", "4s", ...', **to)
    flags.DEFINE_float("fps", None, "Frames per second.", **to)
    flags.DEFINE_integer("steps", None, "Steps of the sampler.", **to)
    flags.DEFINE_float("guidance", None, "Weight of the prompt; 1 = none.", **to)
    flags.DEFINE_float("trajectory_guidance", None, "Extra weight of the trajectory; 1 = none.", **to)
    flags.DEFINE_integer("seed", None, "Seed of the noise.", **to)


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
                f"{args.weights}: --config.NAME does not fit its config ({command.last_line(error)})"
            ) from None
    return config.to_dict()


def _settings(args: flags.FlagValues, section: Any) -> dict[str, Any]:
    """The sampling section of the config under the flags, sizes resolved to pixels and frames."""
    known = common.sampling()
    if not isinstance(section, dict) or section.keys() - known.keys():
        raise UserError(f"config: sampling should hold {', '.join(known)}")
    defaults = {**known, **section}
    given = {name: args[name].value for name in known if args[name].value is not None}
    settings = {**defaults, **given}
    for name, value in known.items():
        kind = (int, str) if name == "num_frames" else (int, float) if isinstance(value, float) else type(value)
        if not isinstance(release.tuples(settings[name]), kind) or isinstance(settings[name], bool):
            raise UserError(f"config: sampling.{name} is {settings[name]!r}; it should be like {value!r}")
    by_name, by_pixels = {"resolution", "aspect_ratio"} & given.keys(), {"height", "width"} & given.keys()
    if by_name and by_pixels:
        raise UserError("give --resolution with --aspect_ratio, or --height with --width, not both")
    if len(by_pixels) == 1:
        raise UserError("--height and --width belong together; give both")
    if by_name and not settings["resolution"]:
        raise UserError("--aspect_ratio needs --resolution, such as 240p")
    if by_name or not (settings["height"] and settings["width"]):
        size = buckets.image_size(settings["resolution"], settings["aspect_ratio"])
        settings["height"], settings["width"] = size
    del settings["resolution"], settings["aspect_ratio"]
    settings["num_frames"] = buckets.frame_count(str(settings["num_frames"]))
    generation.check_settings(**{name: settings[name] for name in generation.CHECKED})
    return settings


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def _presets() -> list[str]:
    folder = resources.files("tora_jax").joinpath("assets/trajectories")
    return sorted(Path(item.name).stem for item in folder.iterdir())


def _trajectory_paths(sources: Sequence[str]) -> list[Path]:
    folder = Path(str(resources.files("tora_jax").joinpath("assets/trajectories")))
    return [folder / f"{s}.txt" if s in _presets() and not os.path.lexists(s) else Path(s) for s in sources]


def _output(name: str, inputs: Sequence[str | Path], weights: str | None) -> Path:
    """The output path, tried before the long work starts; `_write` makes the folders that are missing."""
    out = Path(name)
    if out.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"--out {name}: a video is written; end the name in .mp4 or .gif")
    if out.is_dir():
        raise UserError(f"--out {name}: this is a folder; name a file")
    try:
        exists = next(folder for folder in out.absolute().parents if os.path.lexists(folder))
        if not exists.is_dir():
            raise NotADirectoryError(None, f"{exists} is no folder")
        with tempfile.TemporaryFile(dir=exists):
            pass
    except OSError as error:
        raise UserError(f"--out {name}: cannot write there ({error.strerror})") from None
    taken = {Path(path).resolve() for path in inputs}
    for path in _outputs(out).values():
        if path.resolve() in taken:
            raise UserError(f"--out {name}: would overwrite {path}, which is read; choose another name")
    if weights is not None and Path(weights).resolve() in out.resolve().parents:
        raise UserError(f"--out {name}: lies in the folder of the weights; choose another place")
    return out


def _outputs(out: Path) -> dict[str, Path]:
    """All that is written: the video, the one with the trajectories, the flow map, the report."""
    named = {part: out.with_stem(f"{out.stem}_{part}") for part in ("trajectory", "flow")}
    return {"video": out, **named, "report": out.with_suffix(".json")}


def _write(out: Path, result: generation.Result, tracks: np.ndarray | None, report: dict[str, Any]) -> None:
    """All files or none: each is written aside, and all are renamed at the end."""
    fps = report["settings"]["fps"]
    paths = _outputs(out)
    videos = {paths["video"]: result.video}
    if tracks is not None:
        videos[paths["trajectory"]] = draw.draw_tracks(result.video, tracks)
        videos[paths["flow"]] = result.motion
    report = {
        **report,
        "files": [path.name for path in videos],
        "seconds": {part: {k: round(v, 3) for k, v in s.items()} for part, s in report["seconds"].items()},
        "versions": {name: importlib.metadata.version(name) for name in ("tora_jax", "jax", "flax", "numpy")},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        aside = {path: stack.enter_context(video_io.write_atomic(path)) for path in (*videos, paths["report"])}
        for path, frames in videos.items():
            video_io.write_video(aside[path], frames, fps)
        aside[paths["report"]].write_text(json.dumps(report, indent=2) + "\n")
