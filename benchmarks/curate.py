"""How fast curation is: seconds of video per second, without RAFT, CLIP and a caption server.

  python -m benchmarks.curate --workers 1 2       on videos that it draws: 480p, 24 frames a second, three scenes each
  python -m benchmarks.curate --videos DIR --workers 1 2
  python -m benchmarks.curate --draw DIR --height 144 --codec mpeg4       only draws them, for other measurements

Each run is the whole command in a process of its own, from files to shards, in a new folder. The fixed part, which is
that of a run over a single short video, is taken off: it is what starting Python and Beam costs. Prints one JSON line.
times_real_time_by_cpu is what that many idle cores would reach, by the processor time that was spent: on a machine that
is busy with other things, it says more. `load` is that of the machine before the first run.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np

from tora_jax import command_line

FPS = 24
SCENES = 3


def draw(path: Path, seed: int, seconds: float, height: int, codec: str) -> None:
    """A video of scenes in which a ball crosses the picture, before a camera that is still or pans."""
    rng, width = np.random.default_rng(seed), height * 16 // 18 * 2
    ball = cv2.resize(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8), (height // 3, height // 3))
    noise = rng.normal(0, 3, (8, height, width, 1)).astype(np.float32)  # of the sensor: without it, decoding costs less
    inside = np.hypot(*(np.mgrid[: len(ball), : len(ball)] - len(ball) / 2)) < len(ball) / 2
    options = {"crf": "23", "preset": "veryfast"} if codec == "libx264" else {"qscale:v": "4", "g": "240"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for scene in range(SCENES):
            cells = rng.integers(0, 256, (18 + 12 * scene, 40, 3), dtype=np.uint8)
            picture = cv2.resize(cells, (2 * width, height), interpolation=cv2.INTER_CUBIC)
            picture = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
            speed, count = int(rng.choice([0, 1, 2])) * height // 480, round(seconds / SCENES * FPS)
            for j in range(count):
                frame = np.ascontiguousarray(picture[:, speed * j : speed * j + width])
                left, top = (
                    round((width - len(ball)) * j / count),
                    round((height - len(ball)) * (scene + 1) / (SCENES + 1)),
                )
                frame[top : top + len(ball), left : left + len(ball)][inside] = ball[inside]
                frame = np.clip(frame + noise[rng.integers(len(noise))], 0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def length(folder: Path) -> float:
    """Seconds of all videos in a folder."""
    total = 0.0
    for path in folder.iterdir():
        with av.open(str(path)) as container:
            total += container.duration / av.time_base
    return total


def processor_seconds() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, workers: int) -> tuple[float, float, dict]:
    """Seconds of a run, those of the processor, and its stats."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "tora_jax.data.curate", f"--input={folder}/*", f"--output={output}"]
        start, before = time.perf_counter(), processor_seconds()
        subprocess.run([*command, f"--workers={workers}"], check=True, stdout=subprocess.DEVNULL)
        spent, used = time.perf_counter() - start, processor_seconds() - before
        return spent, used, json.loads((Path(output) / "stats.json").read_text())


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.curate", __doc__)
    parser.add_argument("--videos", type=Path, help="folder of videos; unset: they are drawn")
    parser.add_argument("--count", type=int, default=8, help="videos to draw")
    parser.add_argument("--seconds", type=float, default=24.0, help="length of each")
    parser.add_argument("--height", type=int, default=480, help="of those, at 16:9")
    parser.add_argument("--codec", choices=("libx264", "mpeg4"), default="libx264", help="mpeg4 must be encoded anew")
    parser.add_argument("--draw", type=Path, help="folder for them; nothing else is done")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv[1:])

    def fill(folder: Path, seeds: range, seconds: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            draw(folder / f"{seed}.mp4", seed, seconds, args.height, args.codec)

    if args.draw:
        fill(args.draw, range(1, args.count + 1), args.seconds)
        return
    with tempfile.TemporaryDirectory() as drawn:
        videos, short = Path(drawn) / "videos", Path(drawn) / "short"
        fill(short, range(1), 6.0)
        if args.videos is None:
            fill(videos, range(1, args.count + 1), args.seconds)
        videos = args.videos or videos
        seconds, load, rates, fixed, busy = length(videos), os.getloadavg()[0], {}, {}, {}
        for workers in args.workers:
            short_runs = [measure(short, workers) for _ in range(args.repeats)]
            fixed[workers], fixed_busy = (min(run[i] for run in short_runs) for i in range(2))
            runs = [measure(videos, workers) for _ in range(args.repeats)]
            rates[workers] = [seconds / (run[0] - fixed[workers]) for run in runs]
            busy[workers] = seconds / (min(run[1] for run in runs) - fixed_busy) * workers
        clips = runs[-1][2]["clips"]
        figures = {
            "times_real_time": {workers: round(statistics.median(found), 1) for workers, found in rates.items()},
            "slowest": {workers: round(min(found), 1) for workers, found in rates.items()},
            "fastest": {workers: round(max(found), 1) for workers, found in rates.items()},
            "times_real_time_by_cpu": {workers: round(found, 1) for workers, found in busy.items()},
            "fixed_seconds": {workers: round(spent, 1) for workers, spent in fixed.items()},
            "seconds_of_video": round(seconds, 1),
            **{name: clips[name] for name in ("total", "kept", "copied", "encoded")},
            "repeats": args.repeats,
            "cores": os.cpu_count(),
            "load": round(load, 1),
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    command_line.run(main, ["curate", *sys.argv[1:]])
