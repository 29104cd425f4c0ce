"""The paper's ablations on sprites: python -m benchmarks.ablations --out DIR

Trains and measures every cell of configs/ablations/, with the same seeds, data and number of steps, on cached latents
of 64-pixel clips, and writes DIR/table.md and DIR/results.json. All start from one base, as the paper's start from
Open-Sora: the weights that ship, trained on with captions alone, and with extractor and fusers that are new. Each is
trained by train.py in a process of its own. Stopped at any moment, it goes on from there when it is started again; a
cell that is done stays.

Key frames and mean pooling stand in the motion VAE's place as in the paper: the middle one of each latent's maps, or
their mean, with 8x8 pixels of it side by side as channels. Those 192 numbers are brought to as many as the motion VAE's
latents have by the principal components of training maps, so that all cells have the same extractor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tora_jax.configs import eval as eval_config
from tora_jax.configs.ablations import base
from tora_jax.configs.sampling import Settings

from benchmarks import train_demo
from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.conditioning import motion_maps
from tora_jax.data.precompute.cache import Options, precompute
from tora_jax.data.sprites.clips import exact_flow, make_clip
from tora_jax.data.sprites.dataset import SpritesConfig, build_sprites
from tora_jax.errors import UserError
from tora_jax.evals.metrics import Metrics
from tora_jax.evals.tasks import Sprites
from tora_jax.io.files import made_otherwise, note_made, tuples, write_atomic
from tora_jax.models.video_vae import Gaussian, Moments, VideoVAE
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs
from tora_jax.training import optim

ROOT = Path(__file__).parent.parent
TABLES = ("motion", "fuser", "placement", "stages", "trajectory")
METRICS = {"traj_error": "TrajError", "path_error_percent": "path error, %"}  # by which the orderings are judged
SHARED = ("weights", "train", "clips", "steps", "runlocal")  # options that all results of a folder have in common
NEW = r"^tora/extractor/|_fuser/"  # parameters that the cells do not take over from the base
LENGTHS = ("steps", "eval_every", "save_every")
FITTED = 64  # clips whose maps give the principal components


class Cell(NamedTuple):
    """One model of the tables.

    Attributes:
      name: such as "fuser.form=cross_attention"; the cell of the paper's defaults is "default".
      file, arg: config file and its argument, without the stage.
    """

    name: str
    file: str
    arg: str

    def config(self, stage: str = "sparse", runlocal: bool = False) -> dict[str, Any]:
        return tuples(table(self.file).get_config(self.launch(stage, runlocal)).to_dict())

    def launch(self, stage: str, runlocal: bool) -> str:
        return f"{self.arg},stage={stage}" + (",runlocal" if runlocal else "")


def table(name: str):
    """A module of configs/ablations: TITLE, PAPER (argument -> the paper's TrajError, the worst first), get_config."""
    return importlib.import_module(f"tora_jax.configs.ablations.{name}")


def cells() -> dict[tuple[str, str], Cell]:
    """(table, argument) -> cell. The last row of each table is one and the same, and trained once."""
    default = base.make("sparse", False).to_dict()
    found = {}
    for name in TABLES:
        for arg in table(name).PAPER:
            same = table(name).get_config(arg).to_dict() == default
            found[name, arg] = Cell("default" if same else f"{name}.{arg}", name, arg)
    return found


# ----------------------------------------------------------------------------------------------------------
# Motion without a VAE
# ----------------------------------------------------------------------------------------------------------


class Compression(VideoVAE):
    """In the motion VAE's place, on its grid, and without a network: key frames or mean pooling.

    The parameters, `centre` [192] and `basis` [192, channels], are those of `fit`.
    """

    form: str = "mean_pooling"
    channels: int = 8

    def setup(self):
        width = 3 * self.space_factor**2
        self.centre = self.param("centre", nn.initializers.zeros, (width,))
        self.basis = self.param("basis", nn.initializers.zeros, (width, self.channels))
        self.shift, self.scale = jnp.zeros(self.channels), jnp.ones(self.channels)

    def moments(self, video: Float[Array, "b t h w 3"], rng: Array | None = None) -> Moments:
        frames = video.shape[1]
        place = [self.latent_of(j, frames) for j in range(frames)]
        groups = [[j for j, _ in group] for _, group in itertools.groupby(enumerate(place), key=lambda item: item[1])]
        if self.form == "key_frames":
            groups = [group[len(group) // 2 :][:1] for group in groups]
        clip = jnp.stack([video[:, jnp.array(group)].mean(1) for group in groups], 1)
        cell = {"p": self.space_factor, "q": self.space_factor}
        patches = einops.rearrange(clip, "b t (h p) (w q) c -> b t h w (p q c)", **cell)
        mean = (patches - self.centre) @ self.basis
        return Moments(None, clip, Gaussian(mean, jnp.full_like(mean, -jnp.inf)))  # no spread


def fit(form: str, like: VideoVAE, channels: int, side: int, frames: int) -> tuple[Compression, dict[str, Any]]:
    """A `Compression` on the grid of a VAE, and its parameters: principal components, each of variance 1.

    Of the dense and sparse maps of the first training clips.
    """
    width = 3 * like.space_factor**2
    plain = Compression(like.spatial, like.temporal, like.micro_frame_size, form=form, channels=width)
    maps = []
    for clip in (make_clip(i, "train", size=side, frames=frames) for i in range(FITTED)):
        sparse = motion_maps.displacement_maps(clip.tracks, side, side, clip.visible)
        maps += [
            motion_maps.flow_to_color(sparse),
            motion_maps.flow_to_color(exact_flow(clip.labels, clip.tracks)),
        ]
    whole = {"params": {"centre": np.zeros(width, np.float32), "basis": np.eye(width, dtype=np.float32)}}
    patches = np.asarray(plain.apply(whole, jnp.asarray(np.stack(maps)), method="encode"), np.float64)
    patches = patches.reshape(-1, width)
    variances, directions = np.linalg.eigh(np.cov(patches, rowvar=False))
    strongest = slice(-1, -channels - 1, -1)
    basis = directions[:, strongest] / np.sqrt(np.maximum(variances[strongest], 1e-6))
    params = {"centre": patches.mean(0).astype(np.float32), "basis": basis.astype(np.float32)}
    return plain.clone(channels=channels), params


def with_motion(models: assembly.Models, motion: str, side: int, frames: int) -> assembly.Models:
    """Models whose motion is compressed in another way."""
    if motion not in ("key_frames", "mean_pooling"):
        return models
    channels = models.tora.in_channels
    compression, params = fit(motion, models.motion_vae, channels, side, frames)
    params = {**models.params, models.backbone.MOTION: params}
    parts = {**models.parts, models.backbone.MOTION: compression}
    return dataclasses.replace(models, parts=parts, params=params, origin=f"{models.origin}, {motion}")


# ----------------------------------------------------------------------------------------------------------
# One cell
# ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """Where the cells are, and what they share.

    Attributes:
      weights: a release folder, from which the base starts.
      train: clips to train on, beside those held out. clips: to be measured on.
      changes: flags for train.py, such as "--config.steps=20".
    """

    out: Path
    weights: Path
    train: int = 1024
    clips: int = 32
    changes: tuple[str, ...] = ()
    runlocal: bool = False
    keep: bool = False

    @functools.cached_property
    def bucket(self) -> dict[str, int]:
        return dict(base.make("sparse", self.runlocal).data.buckets[0])

    @functools.cached_property
    def models(self) -> assembly.Models:
        return assembly.load(weights=self.weights)

    def cache(self, motion: str, stage: str) -> Path:
        """Latents and motion of the training clips; "none" takes those of the motion VAE."""
        motion = "motion_vae" if motion == "none" else motion
        side, frames = self.bucket["height"], self.bucket["frames"]
        held_out = 2 if self.runlocal else base.HELD_OUT
        name = f"{side}x{frames}x{self.train + held_out}"
        scale = SpritesConfig(name=name, side=side, frames=frames, clips={"train": self.train + held_out})
        folder = self.out / "caches" / f"{motion}_{stage}"
        options = Options(
            frames, side, side, motion=stage, tracks="given", max_tracks=3, variants=2 if stage == "sparse" else 1
        )
        source = build_sprites(self.out / "data", scale)
        if not folder.is_dir():
            precompute(with_motion(self.models, motion, side, frames), source, folder, options, batch=16)
        return folder

    def run(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Trains and measures a cell, as far as it is not done.

        Returns:
          its figures, and the seconds of training and of measuring.
        """
        folder = self.out / "cells" / cell.name / str(seed)
        if (folder / "result.json").is_file():
            return json.loads((folder / "result.json").read_text())
        config = cell.config(runlocal=self.runlocal)
        weights = folder / "start"
        if not weights.exists():
            self.start(config, seed, weights, assembly.load(weights=self.base()).params)
        stages = config["ablation"]["stages"]
        for stage in stages:
            self.cache(config["ablation"]["motion"], stage)
        begun = time.perf_counter()
        for stage in stages:
            self.train_stage(cell, stage, weights, folder / stage, f"--config.seed={seed}", *self.changes)
            weights = folder / stage / "release"
        trained = time.perf_counter()
        result = self.measure(config, weights)
        lines = [json.loads(line) for line in (weights.parent / "metrics.jsonl").read_text().splitlines()]
        result["held_out_loss"] = next(line["objective"] for line in reversed(lines) if "objective" in line)
        result["seconds"] = {"train": trained - begun, "measure": time.perf_counter() - trained}
        with write_atomic(folder / "result.json") as aside:
            aside.write_text(json.dumps(result) + "\n")
        if not self.keep:
            for inside in (folder / "start", *(folder / stage for stage in stages)):
                shutil.rmtree(inside)
        return result

    def base(self) -> Path:
        """The release folder that the cells start from: their weights, trained on without trajectories."""
        cell, folder = cells()["trajectory", "motion=none"], self.out / "base"
        if not (folder / "train" / "release").exists():
            if not (folder / "start").exists():
                self.start(cell.config(runlocal=self.runlocal), 0, folder / "start", self.models.params)
            steps = () if self.runlocal else (f"--config.{name}={base.BASE_STEPS}" for name in LENGTHS)
            self.train_stage(cell, "sparse", folder / "start", folder / "train", *steps)
        return folder / "train" / "release"

    def start(self, config: Mapping[str, Any], seed: int, folder: Path, given: Mapping[str, Any]) -> None:
        """A release folder with given parameters, but for extractor and fusers, which are new."""
        taken = {path: leaf for path, leaf in optim.flatten(given).items() if not re.search(NEW, path)}
        params = optim.join({**optim.flatten(assembly.load(config, seed=seed).params), **taken}, {})
        sections = assembly.sections(config)
        release.save(folder, sections, params, assembly.tokenizer_path(self.weights), f"Untrained, seed {seed}.\n")

    def train_stage(self, cell: Cell, stage: str, weights: Path, workdir: Path, *flags: str) -> None:
        if not (workdir / "release").exists():
            train(
                f"--config={ROOT}/configs/ablations/{cell.file}.py:{cell.launch(stage, self.runlocal)}",
                f"--weights={weights}",
                f"--workdir={workdir}",
                f"--config.data.sources=('{self.cache(cell.config()['ablation']['motion'], stage)}',)",
                "--config.resume",
                "--config.restartable",
                *flags,
            )

    def measure(self, config: Mapping[str, Any], weights: Path) -> dict[str, Any]:
        """Means over the benchmark's clips, each with noise of its own that is the same for all cells."""
        motion, side, frames = config["ablation"]["motion"], self.bucket["height"], self.bucket["frames"]
        models = with_motion(assembly.load(weights=weights), motion, side, frames)
        names = ("height", "width", "num_frames", "fps", "steps", "guidance", "trajectory_guidance", "negative_prompt")
        settings = Settings(**{name: config["sampling"][name] for name in names})
        benchmark = Sprites("benchmark_one", self.clips)
        one = Metrics(eval_config.get_config().measures.to_dict())
        tasks = [benchmark.task(i, frames, side, side, settings.fps) for i in range(self.clips)]
        found = []
        for start in range(0, self.clips, 16):
            part = tasks[start : start + 16]
            inputs = [Inputs(task.prompt, None if motion == "none" else task.tracks) for task in part]
            results = generate_batch(models, inputs, settings, seeds=range(start, start + len(part)))
            found += [one(task, result.video)["metrics"] for task, result in zip(part, results, strict=True)]
        means = {name: [m[name] for m in found if m[name] is not None] for name in found[0]}
        return {name: float(np.mean(values)) for name, values in means.items() if values}


def train(*flags: str) -> None:
    """train.py, in a process of its own.

    Raises:
      UserError: it stopped; it goes on from there when it is started again.
    """
    env, more = train_demo.launch()
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags, *more], env=env)
    if done.returncode:
        raise UserError(f"train.py stopped with exit code {done.returncode}; start again to go on")


# ----------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------


def verdict(worst_first: Sequence[Sequence[float]]) -> str:
    """Whether values over seeds (the lower the better) fall from each row to the next.

    "holds" where every seed of a row is better than every seed of the row before; "does not hold" where for some pair
    it is the other way round; else "not decided": the spreads overlap.
    """
    pairs = list(itertools.pairwise(worst_first))
    if any(max(worse) < min(better) for worse, better in pairs):
        return "does not hold"
    return "holds" if all(max(better) < min(worse) for worse, better in pairs) else "not decided"


def summary(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Cell -> seed -> figures, to orderings by table, with the verdict by each metric; None while a cell is missing."""
    orderings = {}
    for name in TABLES:
        rows = [results.get(cell.name, {}) for (of, _), cell in cells().items() if of == name]
        for metric in METRICS:
            values = [[figures[metric] for figures in row.values()] for row in rows]
            orderings.setdefault(name, {})[metric] = verdict(values) if all(values) else None
    return orderings


def markdown(results: Mapping[str, Mapping[int, Mapping[str, Any]]], seeds: Sequence[int]) -> str:
    """The tables with mean and range over seeds, beside the paper's TrajError, and which orderings hold."""

    def spread(row: Mapping[int, Mapping[str, Any]], name: str) -> str:
        values = [figures[name] for figures in row.values() if name in figures]
        return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "–"

    head = ["cell", "seeds", *METRICS.values(), "held-out loss", "the paper's TrajError"]
    lines, orderings = [], summary(results)
    for name in TABLES:
        lines += [f"**{table(name).TITLE}**", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for (of, arg), cell in cells().items():
            if of == name:
                row = results.get(cell.name, {})
                figures = [spread(row, metric) for metric in (*METRICS, "held_out_loss")]
                shown = [arg.partition("=")[2].replace("_", " "), f"{len(row)} of {len(seeds)}", *figures]
                lines.append(f"| {' | '.join([*shown, str(table(name).PAPER[arg])])} |")
        told = (f"{orderings[name][metric] or 'not all trained'} by {METRICS[metric]}" for metric in METRICS)
        lines += ["", f"The paper's ordering: {'; '.join(told)}.", ""]
    seconds = [sum(figures["seconds"].values()) for row in results.values() for figures in row.values()]
    if seconds:
        lines.append(f"{len(seconds)} runs, {np.mean(seconds):.0f} s each, {max(seconds):.0f} s at most.")
    return "\n".join(lines) + "\n"


def report(out: Path, results: Mapping[str, Mapping[int, Mapping[str, Any]]], seeds: Sequence[int]) -> None:
    with write_atomic(out / "table.md") as aside:
        aside.write_text(markdown(results, seeds), encoding="utf-8")
    machine = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    with write_atomic(out / "results.json") as aside:
        whole = {"cells": results, "orderings": summary(results), "machine": machine}
        aside.write_text(json.dumps(whole, indent=2) + "\n")


def order(names: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Seed by seed, so that a table stopped early has all its rows."""
    return ((name, seed) for seed in seeds for name in names)


def claim(out: Path, options: Mapping[str, Any]) -> None:
    """Notes what the caches and results of a folder are made with.

    Raises:
      UserError: it holds those of other options.
    """
    made = {name: options[name] for name in SHARED}
    path = out / "made.json"
    if not path.is_file():
        note_made(path, made)
    elif differs := made_otherwise(path, made):
        name, before = differs
        raise UserError(f"{out}: was made with another --{name} ({before}); choose another --out")


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    """`python -m benchmarks.ablations`"""
    known = {cell.name: cell for cell in cells().values()}
    parser = command_line.Parser("python -m benchmarks.ablations", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="working folder, kept for the next start")
    parser.add_argument("--weights", type=Path, default=release.DEMO, help="release folder that the base starts from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cells", default=",".join(known), help="some of them, separated by commas")
    parser.add_argument("--steps", type=int, help="of each stage, in place of the config's")
    parser.add_argument("--train", type=int, default=Run.train, help="clips to train on")
    parser.add_argument("--clips", type=int, default=Run.clips, help="clips to measure on")
    parser.add_argument("--runlocal", action="store_true", help="the least size, to try the command")
    parser.add_argument("--keep", action="store_true", help="keep the trained weights of each cell")
    args = parser.parse_args(argv[1:])
    names, seeds = args.cells.split(","), range(args.seeds)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no cell {unknown[0]!r}; there are {', '.join(known)}")
    command_line.use_compilation_cache()
    out = args.out.absolute()
    steps = () if args.steps is None else (f"--config.steps={args.steps}",)
    run = Run(out, args.weights.absolute(), args.train, args.clips, steps, args.runlocal, args.keep)
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(out.glob("cells/*/*/result.json")):  # of other cells, from an earlier start
        with contextlib.suppress(ValueError):
            results.setdefault(path.parts[-3], {})[int(path.parts[-2])] = json.loads(path.read_text())
    claim(out, vars(args) | {"weights": str(run.weights)})
    for name, seed in order(names, seeds):
        results.setdefault(name, {})[seed] = run.run(known[name], seed)
        report(out, results, seeds)
        seconds = sum(results[name][seed]["seconds"].values())
        print(f"{name}, seed {seed}: {seconds:.0f} s, TrajError {results[name][seed]['traj_error']:.2f}")
    print(markdown(results, seeds))


if __name__ == "__main__":
    command_line.run(main, ["ablations", *sys.argv[1:]])
