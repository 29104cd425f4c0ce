"""Measures released weights: generates videos along given paths, and says how well they follow.

  python -m tora_jax.evals --out DIR [--config configs/eval.py:suite=paper] [--weights DIR] [--page DIR]

Each clip is done when its video and its record are on the disk: stopped at any moment, the command goes on from there.
docs/evaluation.md tells what the figures mean.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from tora_jax import command_line, programs
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.configs import eval as eval_config
from tora_jax.configs.sampling import Settings
from tora_jax.errors import UserError
from tora_jax.evals import report
from tora_jax.evals.metrics import Metrics
from tora_jax.evals.tasks import Benchmark, Task, open_benchmark
from tora_jax.io import files
from tora_jax.io.files import made_otherwise, note_made, tuples, write_atomic
from tora_jax.io.video import read_video, write_video
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs

USAGE = """Measures released weights, or videos that are there.

Writes into --out: CELL/NAME.mp4 and .json, results.json, clips.csv, cells.csv, table.md, plots and index.html.
"""
CONFIG = eval_config.__file__
CONDITIONS = ("seed", "first_frame", "sampling", "benchmark", "videos")  # what the videos of a folder have in common
NO_TRACK = "no trajectory inside the frame"


class Run(NamedTuple):
    """What all clips of an evaluation are made and measured with; `load` gives the models."""

    config: Mapping[str, Any]
    benchmark: Benchmark
    metrics: Metrics
    load: Callable[[], assembly.Models]


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    config_flags.DEFINE_config_file("config", CONFIG, "What to measure: configs/eval.py:suite=...", sys_argv=argv, **to)
    flags.DEFINE_boolean("help", False, "Shows this.", short_name="h", **to)
    flags.DEFINE_string("out", None, "Folder to write into, and to go on in.", **to)
    flags.DEFINE_string("weights", str(release.DEMO), "Release folder; the small model's if left out.", **to)
    flags.DEFINE_string("page", None, "Folder for a README.md with table, stills and plots.", **to)
    flags.DEFINE_boolean("quiet", False, "No progress bar.", **to)


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    args = command_line.parse(argv, define_flags, USAGE, eval_config.get_config())
    if args.out is None:
        raise UserError("--out is missing; name a folder for the videos and the figures")
    config, out = tuples(args.config.to_dict()), files.path(args.out)
    command_line.use_compilation_cache()
    results, records = evaluate(config, args.weights, out, args.quiet, check_interrupt)
    report.write(out, results, records)
    if args.page is not None:
        write_page(out, files.path(args.page), results, records, shlex.join(["python", "-m", *argv]))
    print(report.table(results))
    print(f"wrote {out / 'index.html'}", file=sys.stderr)


def evaluate(
    config: Mapping[str, Any],
    weights: str | Path,
    out: Path,
    quiet: bool = True,
    check_interrupt: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Makes and measures what is not there yet.

    Args:
      config: of configs/eval.py.
      weights: a release folder; not read where no video is missing.
      out: the folder.
      check_interrupt: called after each batch.

    Returns:
      what `report.write` takes.

    Raises:
      UserError: for whatever is wrong with the config, the weights or a video, or a folder that was made otherwise.
    """
    benchmark, metrics = open_benchmark(config["benchmark"]), Metrics(config["measures"])
    cells = {_name(cell): cell for cell in config["cells"]}
    if len(cells) < len(config["cells"]):
        raise UserError("config.cells: two cells are of the same size, length and rate")
    for metric, why in metrics.left_out.items():
        print(f"{metric} is left out: {why}", file=sys.stderr)
    load = functools.cache(lambda: assembly.load(weights=weights))  # once, and only if a video is missing
    run = Run(config, benchmark, metrics, load)
    records = {}
    with tqdm(total=len(cells) * len(benchmark.names), unit="clip", disable=quiet) as bar:
        for name, cell in cells.items():
            folder = out / name
            _claim(folder, config, cell, "" if config["videos"] else weights)
            todo = [i for i in range(len(benchmark.names)) if not _done(folder, benchmark.names[i], metrics)]
            bar.update(len(benchmark.names) - len(todo))
            for start in range(0, len(todo), config["batch"]):
                indices = todo[start : start + config["batch"]]
                _batch(run, cell, folder, indices)
                bar.update(len(indices))
                check_interrupt()
            found = [json.loads((folder / f"{task}.json").read_text()) for task in benchmark.names]
            records[name] = [
                {**record, "video": f"{name}/{record['name']}.mp4"} for record in found if "metrics" in record
            ]
            if not records[name]:
                raise UserError(f"{name}: no clip has a trajectory inside the frame")
    lost = {name: len(benchmark.names) - len(found) for name, found in records.items()}
    return {
        "weights": config["videos"] or str(weights),
        **{name: config[name] for name in CONDITIONS},
        **metrics.asked,
        "left_out": metrics.left_out,
        "cells": [
            {"name": name, **cell, "left_out": lost[name], **report.summarise(records[name])}
            for name, cell in cells.items()
        ],
        "machine": {"device": jax.devices()[0].device_kind, "python": platform.python_version()},
    }, records


def _batch(run: Run, cell: Mapping[str, Any], folder: Path, indices: list[int]) -> None:
    """Makes the videos of some tasks, as far as they are missing, and their records.

    Where all objects start outside the frame there is nothing to follow: the record says so, and has no metrics.
    """
    config, size = run.config, [cell[name] for name in ("frames", "height", "width", "fps")]
    tasks = {i: run.benchmark.task(i, *size) for i in indices}
    for i in [i for i, task in tasks.items() if not len(task.tracks)]:
        name = tasks.pop(i).name
        _write_record(folder / f"{name}.json", {"name": name, "asked": run.metrics.asked, "left_out": NO_TRACK})
    paths = {i: folder / f"{task.name}.mp4" for i, task in tasks.items()}
    missing = [i for i in tasks if not paths[i].is_file()]
    if config["videos"] not in ("", "truth"):
        for i in missing:
            with write_atomic(paths[i]) as aside:  # not encoded again: that would change what is measured
                shutil.copyfile(_find(config["videos"], folder.name, tasks[i].name), aside)
    elif missing:
        chosen = [tasks[i] for i in missing]
        seeds = [config["seed"] + i for i in missing]
        made = map(_true_clip, chosen) if config["videos"] else _generate(config, cell, chosen, seeds, run.load())
        for i, video in zip(missing, made, strict=True):
            write_video(paths[i], video, cell["fps"])
    for i, task in tasks.items():
        video, _ = read_video(paths[i])  # the file, not what it was made from: a second run measures the same
        if len(video) != cell["frames"]:
            raise UserError(f"{paths[i]}: has {len(video)} frames, the cell {cell['frames']}; remove it")
        record = {
            "name": task.name,
            "prompt": task.prompt,
            "seed": config["seed"] + i,
            "given": np.round(task.tracks, 5).tolist(),
            **run.metrics(task, video, config["first_frame"], whole=bool(config["videos"]), fps=cell["fps"]),
            "asked": run.metrics.asked,
        }
        _write_record(paths[i].with_suffix(".json"), record)


def _write_record(path: Path, record: Mapping[str, Any]) -> None:
    with write_atomic(path) as aside:
        aside.write_text(json.dumps(record) + "\n")


def _generate(config, cell, tasks, seeds, models) -> list[np.ndarray]:
    first_frame = config["first_frame"]
    if first_frame and (blind := [task.name for task in tasks if task.video is None]):
        raise UserError(f"{blind[0]}: has no first frame; set config.first_frame to False, or give an image")
    for task in tasks:
        for loss in models.tokenizer.losses(task.prompt):
            warnings.warn(f"{task.name}: the prompt {loss}", stacklevel=2)
    inputs = [
        Inputs(
            task.prompt,
            task.tracks if cell["trajectory"] else None,
            {0: task.video[0]} if first_frame else {},
        )
        for task in tasks
    ]
    size = {"height": cell["height"], "width": cell["width"], "num_frames": cell["frames"], "fps": cell["fps"]}
    solver = models.sampling.get("solver", Settings.solver)  # what the weights are sampled with
    results = generate_batch(models, inputs, Settings(**{**size, "solver": solver, **config["sampling"]}), seeds=seeds)
    return [result.video for result in results]


def _true_clip(task: Task) -> np.ndarray:
    if task.video is None or len(task.video) < task.tracks.shape[1]:
        raise UserError(f"{task.name}: its true clip is not known")
    return task.video


def _find(videos: str, cell: str, task: str) -> Path:
    """A video that is there already."""
    places = (files.path(videos) / cell / f"{task}.mp4", files.path(videos) / f"{task}.mp4")
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"{videos}: has neither {cell}/{task}.mp4 nor {task}.mp4")


def _name(cell: Mapping[str, Any]) -> str:
    free = "" if cell["trajectory"] else "_free"
    return f"{cell['frames']}x{cell['height']}x{cell['width']}_{cell['fps']:g}fps{free}"


def _done(folder: Path, task: str, metrics: Metrics) -> bool:
    """Whether a clip is there, measured as it is asked for now."""
    try:
        record = json.loads((folder / f"{task}.json").read_text())
        asked = record["asked"]
    except (OSError, ValueError, KeyError):
        return False
    there = "left_out" in record or (folder / f"{task}.mp4").is_file()
    return there and tuples(asked) == metrics.asked


def _claim(folder: Path, config: Mapping[str, Any], cell: Mapping[str, Any], weights: str | Path) -> None:
    """Notes what the videos of a folder are made with.

    Raises:
      UserError: it holds videos that were made with something else.
    """
    made = {name: config[name] for name in CONDITIONS} | {
        "cell": cell,
        "weights": release.checksum(weights) if weights else "",
    }
    made["benchmark"] = {name: value for name, value in made["benchmark"].items() if name != "clips"}
    if made["benchmark"]["kind"] == "list":
        made["list"] = hashlib.sha256(files.path(made["benchmark"]["source"]).read_bytes()).hexdigest()
    path = folder / "made.json"
    if not path.is_file():
        note_made(path, made)
    elif differs := made_otherwise(path, made):
        name, before = differs
        raise UserError(f"{folder}: was made with another {name} ({before}); choose another --out")


def write_page(out: Path, folder: Path, results, records, launch: str) -> None:
    """A README.md with the table, stills and plots, small enough for a repository, and the command that made it."""
    folder.mkdir(parents=True, exist_ok=True)
    text = [
        "# Evaluation",
        "",
        "Made by",
        "",
        "```",
        launch,
        "```",
        "",
        report.table(results),
        "![TrajError by the number of frames](error_by_frames.svg)",
        "![TrajError by resolution](error_by_resolution.svg)",
        "",
        "Below, each row is a clip. Coloured: the given path so far; white cross: where the tracker is.",
    ]
    for cell in results["cells"]:
        sheet = report.stills(out, folder, cell["name"], records[cell["name"]])
        text += ["", f"## {report.title(cell)}", "", f"![stills]({sheet.name})", ""]
        text += [f"{i + 1}. {record['prompt']}" for i, record in enumerate(records[cell["name"]][: report.STILL_CLIPS])]
    report.plots(folder, results["cells"])
    with write_atomic(folder / "README.md") as aside:
        aside.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    programs.keep()
    command_line.run(main, ["tora_jax.evals", *sys.argv[1:]], "what is done stays; run the same command to go on")
