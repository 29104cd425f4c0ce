"""Does the code write the same bytes as an earlier commit? Runs the public commands of both and compares the files.

  python -m benchmarks.same --against REV [--only NAME,...] [--except NAME,...] [--weights DIR] [--repeat N]

Both run as copies in a temporary folder: "there" is REV, "here" the working tree, committed or not. They share the
interpreter, the environment (JAX_PLATFORMS is cpu unless set), the compilation cache, the inputs and the weights: those
of REV's small model, or of --weights. So small weights that ship later are no difference of the code.

Prints a JSON document: for each case whether all is equal, which files differ and by how much, and the seconds of both
sides from start to exit, on the wall and of all cores together, which other work on the machine changes less. A
program's first run compiles it, so for speed take --repeat 3: medians of runs in turns.
Exit code 0: all cases are equal, those of --except aside; 1: one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from benchmarks import trees
from benchmarks.file_differences import differences
from tests import converting
from tora_jax import command_line
from tora_jax.errors import UserError

# ----------------------------------------------------------------------------------------------------------
# Cases
# ----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is run, and what of its files is compared.

    Attributes:
      commands: Python's arguments; {out} is the case's folder, other names are of `TEXTS` and `INPUTS`.
      files: patterns inside {out}.
    """

    commands: tuple[str, ...]
    files: tuple[str, ...] = ("*",)


# Flags of sample.py, and the same for `tora_jax.generate`, whose latents no file of sample.py holds.
SAMPLES = {
    "default": ("", {"trajectories": "arc"}),
    "two_trajectories": (
        "--steps 4 --trajectory circle --trajectory arc",
        {"steps": 4, "trajectories": ["circle", "arc"]},
    ),
    "image": ("--steps 4 --image {image}", {"steps": 4, "trajectories": "arc", "conditions": {0: "{image}"}}),
    "condition": (
        "--steps 4 --condition 4={clip}:0.4",
        {"steps": 4, "trajectories": "arc", "conditions": {4: ("{clip}", 0.4)}},
    ),
    "segments": ("--steps 4 --num_frames 34", {"steps": 4, "trajectories": "arc", "num_frames": 34}),
    "savings": (
        "--steps 6 --solver ab2 --cache_every 2 --guidance_every 2",
        {"trajectories": "arc", "steps": 6, "solver": "ab2", "cache_every": 2, "guidance_every": 2},
    ),
    "no_trajectory": ("--steps 4 --no_trajectory", {"steps": 4}),
}
LATENTS = """
import ast, sys
import numpy as np
from tora_jax import generate, load
from tora_jax.configs import tora
weights, folder, samples = sys.argv[1:]
models, tiny = load(weights), load(config=tora.get_config("runlocal").to_dict())
for name, settings in ast.literal_eval(samples).items():
    result = generate(tiny if name == "runlocal" else models, **settings)
    parts = {part: getattr(result, part) for part in ("latents", "video", "motion")}
    np.savez(f"{folder}/{name}.npz", **{part: value for part, value in parts.items() if value is not None})
"""
# What the commands name and holds spaces.
TEXTS = {
    "script": LATENTS,
    "variant": converting.tora_variant(),
    "settings": repr({name: given for name, (_, given) in SAMPLES.items()} | {"runlocal": {"trajectories": "arc"}}),
}


def sample(flags: str) -> Case:
    return Case((f"sample.py --quiet --out {{out}}/video.mp4 {flags}",))


def training(config: str) -> Case:
    steps = "--config.steps=5 --config.eval_every=5 --config.save_every=5"
    flags = f"--workdir {{out}} --quiet {steps} --config.data.sources=('{{data}}',)"
    return Case((f"train.py --config configs/{config} {flags}",), ("metrics.jsonl", "samples/*", "release/*"))


def conversion() -> Case:
    sources = "--stdit3 {pytorch}/stdit3.safetensors --vae {pytorch}/vae.safetensors --t5 {pytorch}/t5"
    flags = "--variant {variant} --tokenizer {pytorch}/tokenizer.model --report {out}/report.json"
    back = (f"{kind} {{out}}/release {{out}}/{kind}.safetensors --reverse" for kind in ("stdit3", "vae", "t5"))
    commands = (f"tora {sources} {flags} {{out}}/release", *back)
    return Case(tuple(f"-m convert_weights {command}" for command in commands), ("*", "release/*"))


EVALUATION = "-m tora_jax.evals --config configs/eval.py:suite=demo,runlocal --weights {weights} --out {out} --quiet"
CASES = {
    **{name: sample(f"--weights {{weights}} {flags}") for name, (flags, _) in SAMPLES.items()},
    "runlocal": sample("--config configs/tora.py:runlocal"),
    "latents": Case(("-c {script} {weights} {out} {settings}",)),
    "batch": Case(("sample.py --weights {weights} --quiet --batch {batch} --batch_size 2 --out {out}",)),
    "train_vae": training("vae.py:runlocal"),
    "train_motion_vae": training("motion_vae.py:runlocal"),
    "train_stage_1": training("tora.py:stage=1,runlocal"),
    "train_stage_2": training("tora.py:stage=2,runlocal"),
    "convert": conversion(),
    "evaluation": Case((EVALUATION,), ("table.md", "results.json", "*.csv", "*/*")),
}

# ----------------------------------------------------------------------------------------------------------
# Inputs
# ----------------------------------------------------------------------------------------------------------


def make_image(folder: Path, there: Path) -> str:
    y, x = np.mgrid[:128, :128] * 2
    Image.fromarray(np.uint8(np.stack([x, y, 255 - x], axis=-1))).save(folder / "image.png")
    return str(folder / "image.png")


def make_clip(folder: Path, there: Path) -> str:
    clip = str(folder / "clip.mp4")
    trees.run(there, "sample.py --quiet --steps 2 --num_frames 9 --prompt green --out {clip}", {"clip": clip})
    return clip


def make_data(folder: Path, there: Path) -> str:
    data = folder / "data"
    trees.run(there, "-m tora_jax.data.sprites --out {data} --train 8 --side 32 --frames 5", {"data": str(data)})
    (info,) = data.rglob("dataset_info.json")
    return str(info.parent)


def make_pytorch(folder: Path, there: Path) -> str:
    converting.write_tora_sources(folder / "pytorch")
    return str(folder / "pytorch")


def make_batch(folder: Path, there: Path) -> str:
    """Two videos of one shape, one of another, and a line that is refused."""
    line = {"steps": 4, "trajectories": ["wave"]}
    changes = ({"name": "one"}, {"name": "two", "seed": 1}, {"num_frames": 9, "prompt": "a blue circle."}, {"steps": 0})
    (folder / "batch.jsonl").write_text("".join(json.dumps({**line, **change}) + "\n" for change in changes))
    return str(folder / "batch.jsonl")


INPUTS = {"image": make_image, "clip": make_clip, "data": make_data, "pytorch": make_pytorch, "batch": make_batch}


def make_inputs(cases: Sequence[Case], folder: Path, there: Path) -> dict[str, str]:
    """Makes what these cases need, once for both sides: name -> path."""
    folder.mkdir()
    commands = " ".join(trees.filled(command, TEXTS) for case in cases for command in case.commands)
    return {name: make(folder, there) for name, make in INPUTS.items() if f"{{{name}}}" in commands}


# ----------------------------------------------------------------------------------------------------------
# Both sides
# ----------------------------------------------------------------------------------------------------------


def run_case(tree: Path, case: Case, out: str, inputs: Mapping[str, str]) -> tuple[dict[str, float], str]:
    """Runs a case's commands: what they took, and what went wrong."""
    shutil.rmtree(tree / out, ignore_errors=True)
    (tree / out).mkdir(parents=True)
    before, wrong = clocks(), ""
    try:
        for command in case.commands:
            trees.run(tree, command, {**TEXTS, **inputs, "out": out})
    except UserError as error:
        wrong = str(error)
    return {name: after - before[name] for name, after in clocks().items()}, wrong


def clocks() -> dict[str, float]:
    """Seconds of the wall, and of all cores together in processes that have ended."""
    times = os.times()
    return {"seconds": time.perf_counter(), "cpu_seconds": times.children_user + times.children_system}


def compare_case(name: str, sides: Mapping[str, Path], inputs: Mapping[str, str], repeat: int) -> dict[str, Any]:
    """Runs both sides in turns and compares the files of the last turn."""
    out = f"outputs/{name}"  # the same for both, since commands are noted in what they write
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    differs = []
    for turn in range(repeat):
        for side in sorted(sides, reverse=turn % 2 == 0):  # REV compiles first
            times, wrong = run_case(sides[side], CASES[name], out, inputs)
            taken[side].append(times)
            differs += [{"file": "", "how": [f"{side}: {wrong}"]}] if wrong else []
    differs += differences(sides["here"] / out, sides["there"] / out, CASES[name].files)
    figures = {}
    for clock in clocks():
        medians = {side: statistics.median(times[clock] for times in turns) for side, turns in taken.items()}
        medians["ratio"] = medians["here"] / medians["there"]
        figures[clock] = {key: round(value, 3) for key, value in medians.items()}
    return {"equal": not differs, "differs": differs, **figures}


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------


def names(text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    if odd := [name for name in found if name not in CASES]:
        raise UserError(f"{odd[0]!r} is no case; there are {', '.join(CASES)}")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_line.Parser("python -m benchmarks.same", __doc__)
    parser.add_argument("--against", required=True, metavar="REV", help="commit to compare with")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"of {', '.join(CASES)}")
    parser.add_argument("--except", default="", metavar="NAME,...", dest="excepted", help="run, but may differ")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="for both sides; unset: REV's small model")
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="turns; seconds are their median")
    args = parser.parse_args(argv)
    args.only, args.excepted = names(args.only) or list(CASES), names(args.excepted)
    if args.repeat < 1:
        raise UserError(f"--repeat is {args.repeat}; it must be at least 1")
    args.commit = trees.commit(args.against)
    if args.weights is not None and not args.weights.is_dir():
        raise UserError(f"--weights {args.weights}: is no folder")
    return args


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    args = parse(argv[1:])
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        sides = {"here": trees.copy(work / "here"), "there": trees.export(args.commit, work / "there")}
        weights = args.weights or sides["there"] / "tora_jax" / "assets" / "demo"
        inputs = make_inputs([CASES[name] for name in args.only], work / "inputs", sides["there"])
        inputs["weights"] = str(weights.absolute())
        for name in args.only:
            results[name] = compare_case(name, sides, inputs, args.repeat)
            spent = "{here:.1f} s here, {there:.1f} s there".format(**results[name]["seconds"])
            print(f"{name}: {'equal' if results[name]['equal'] else 'DIFFERENT'}, {spent}", file=sys.stderr)
            check_interrupt()
    equal = all(result["equal"] for name, result in results.items() if name not in args.excepted)
    document = {"against": args.commit, "equal": equal, "except": args.excepted, "repeat": args.repeat}
    print(json.dumps({**document, "cores": os.cpu_count(), "cases": results}, indent=2))
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    command_line.run(main, ["same", *sys.argv[1:]])
