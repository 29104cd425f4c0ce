"""Is a plain clip read as fast as at an earlier commit, and to the same pixels? Side by side, in turns.

  python -m benchmarks.reading --against REV [--only NAME,...] [--repeats N]

Clips of three sizes, and one in Matroska, which has no index of frames. Each side is a process of its own, which reads
a clip in one thread whenever it is told to. The seconds are those of its processor, which other work on the machine
changes less than those of the wall.

Prints a JSON document: of each clip the median milliseconds of both sides, the median of the ratios of all turns, and
whether the pixels are equal. Exit code 0: all are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np

from benchmarks import trees
from tora_jax import command_line
from tora_jax.errors import UserError
from tora_jax.io.video import write_video

CLIPS = {
    "small.mp4": (17, 128, 128),
    "480p.mp4": (51, 480, 848),
    "long.mp4": (1000, 96, 128),
    "480p.mkv": (51, 480, 848),
}
READER = """
import hashlib, importlib, os, sys, time
name = "tora_jax.io.video" if os.path.exists("tora_jax/io/video.py") else "tora_jax.video_io"  # as it once was
module = importlib.import_module(name)
assert module.__file__.startswith(os.getcwd()), module.__file__
read_video = module.read_video
for line in sys.stdin:
    start = time.process_time()
    frames, fps = read_video(line.strip(), strict=True, threads=1)
    spent = time.process_time() - start
    print(spent, fps, frames.shape, hashlib.sha256(frames).hexdigest(), sep=";", flush=True)
"""


def make_clip(path: Path, frames: int, height: int, width: int) -> None:
    """Coarse noise that drifts."""
    coarse = np.random.default_rng(0).integers(0, 255, (height // 16, width // 16, 3), np.uint8)
    picture = coarse.repeat(16, axis=0).repeat(16, axis=1)
    mp4 = path.with_suffix(".mp4")
    write_video(mp4, np.stack([np.roll(picture, 2 * i, axis=1) for i in range(frames)]), 24)
    if path != mp4:
        with av.open(str(mp4)) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)


def read(side: subprocess.Popen[str], path: Path) -> tuple[float, str]:
    """Seconds, and what was read, as text."""
    side.stdin.write(f"{path}\n")
    side.stdin.flush()
    seconds, _, seen = side.stdout.readline().partition(";")
    if not seen:
        raise UserError(f"{path.name}: a side cannot read it; its error stands above")
    return float(seconds), seen


def compare(path: Path, sides: dict[str, subprocess.Popen[str]], repeats: int) -> dict[str, float | bool]:
    seconds, seen = {name: [] for name in sides}, set()
    for turn in range(repeats + 1):
        for name in sorted(sides, reverse=turn % 2 == 0):
            spent, what = read(sides[name], path)
            seen.add(what)
            if turn:  # the first is for caches
                seconds[name].append(1000 * spent)
    ratios = np.divide(seconds["here"], seconds["there"])
    found = {f"{name}_ms": round(float(np.median(every)), 2) for name, every in seconds.items()}
    return {**found, "ratio": round(float(np.median(ratios)), 3), "equal": len(seen) == 1}


def main(argv: Sequence[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.reading", __doc__)
    parser.add_argument("--against", required=True, metavar="REV", help="commit to compare with")
    parser.add_argument("--only", metavar="NAME,...", help=f"of {', '.join(CLIPS)}")
    parser.add_argument("--repeats", type=int, default=100, metavar="N", help="turns of each clip")
    args = parser.parse_args(argv[1:])
    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}; it must be at least 1")
    names = args.only.split(",") if args.only else list(CLIPS)
    if odd := [name for name in names if name not in CLIPS]:
        raise UserError(f"{odd[0]!r} is no clip; there are {', '.join(CLIPS)}")
    commit, results = trees.commit(args.against), {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        places = {"here": trees.copy(work / "here"), "there": trees.export(commit, work / "there")}
        command, pipe = [sys.executable, "-c", READER], subprocess.PIPE
        sides = {
            name: subprocess.Popen(command, cwd=place, stdin=pipe, stdout=pipe, text=True)
            for name, place in places.items()
        }
        try:
            for name in names:
                make_clip(work / name, *CLIPS[name])
                results[name] = compare(work / name, sides, args.repeats)
                check_interrupt()
        finally:
            for side in sides.values():
                side.communicate()
    print(json.dumps({"against": commit, "repeats": args.repeats, "clips": results}, indent=2))
    sys.exit(0 if all(result["equal"] for result in results.values()) else 1)


if __name__ == "__main__":
    command_line.run(main, ["reading", *sys.argv[1:]])
