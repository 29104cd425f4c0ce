"""How often curation tells camera and object motion apart, on drawn clips with the truth about both.

  python -m benchmarks.camera
  python -m benchmarks.camera --method raft --weights DIR

Ten kinds of clips (a camera that is still, pans, tilts, zooms, rolls or shakes, with and without a moving object), each
second one through H.264. A clip is right if its label is, and if it is kept exactly where something moves by itself.
Prints one JSON line: the share of right clips, and how well the masks of moving pixels overlap (intersection over
union, over all frames of a clip).
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tora_jax.configs import curate

from tests import moving
from tora_jax import command_line
from tora_jax.data.curate import camera
from tora_jax.io.video import read_video, write_video


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.camera", __doc__)
    parser.add_argument("--clips", type=int, default=20, help="of each kind")
    parser.add_argument("--method", choices=camera.METHODS, default="dis")
    parser.add_argument("--weights", help="of RAFT")
    args = parser.parse_args(argv[1:])
    flow, config = camera.make_flow(args.method, args.weights), curate.get_config()
    overlaps, wrong, start = {}, [], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for kind in moving.KINDS:
            for seed in range(args.clips):
                clip = moving.make(kind, seed)
                video = clip.video
                if seed % 2:
                    path = Path(folder) / "a.mp4"
                    write_video(path, video, moving.FPS)
                    video, _ = read_video(path)
                found = camera.analyse(video, flow(video), 1 / moving.FPS, config.motion.static)
                kept = found.foreground >= config.rules.min_foreground
                if (found.camera, kept) != (clip.camera, clip.has_object):
                    wrong.append(f"{kind} {seed}: {found.camera}, {'kept' if kept else 'dropped'}")
                if clip.has_object:
                    truth = clip.masks[:-1]
                    overlap = (found.masks & truth).sum() / (found.masks | truth).sum()
                    overlaps.setdefault(kind, []).append(float(overlap))
    count = args.clips * len(moving.KINDS)
    figures = {
        "method": args.method,
        "clips": count,
        "right": round(1 - len(wrong) / count, 4),
        "wrong": wrong,
        "mean_iou": {kind: round(np.mean(values).item(), 3) for kind, values in overlaps.items()},
        "least_iou": {kind: round(min(values), 3) for kind, values in overlaps.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    command_line.run(main, ["camera", *sys.argv[1:]])
