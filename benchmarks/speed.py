"""What each speed switch of sampling saves, and what it costs in quality, on the benchmark sprites.

  python -m benchmarks.speed [--weights DIR] [--clips 16] [--batch 1] [--only ab2,cache] [--steps 30]

Prints JSON, with a Markdown table on stderr: seconds of a clip without compilation (sampling and decoding), how many
times faster than the plain sampler that is, the mean error of the path in % of the width (`sprite_metrics`), and PSNR
against the plain sampler's videos. The same prompts, paths and noise for all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tora_jax.configs import sampling
from tora_jax.configs.sampling import Settings

from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.data.sprites.clips import make_clip
from tora_jax.evals.quality import psnr
from tora_jax.evals.sprite_metrics import path_error
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs

# Name -> settings, share of the steps, dtype of the VAE's products.
SWITCHES: dict[str, tuple[dict[str, Any], float, str | None]] = {
    "plain": ({}, 1, None),
    "euler, 1/2 of the steps": ({}, 1 / 2, None),
    "ab2, 1/2 of the steps": ({"solver": "ab2"}, 1 / 2, None),
    "ab2, 1/3 of the steps": ({"solver": "ab2"}, 1 / 3, None),
    "guidance from 0.1 to 0.8": ({"guidance_from": 0.1, "guidance_to": 0.8}, 1, None),
    "guidance every 2": ({"guidance_every": 2}, 1, None),
    "guidance every 3": ({"guidance_every": 3}, 1, None),
    "cache every 2": ({"cache_every": 2}, 1, None),
    "cache every 3": ({"cache_every": 3}, 1, None),
    "bfloat16 VAE": ({}, 1, "bfloat16"),
    "ab2, 1/2, guidance every 2": ({"solver": "ab2", "guidance_every": 2}, 1 / 2, None),
}
SETTINGS = ("height", "width", "num_frames", "fps", "steps", "guidance", "trajectory_guidance", "negative_prompt")


def measure(models: assembly.Models, clips: list, settings: Settings, batch: int) -> dict:
    """Seconds of a clip, its error and the videos, of one switch."""
    videos, seconds, errors = [], [], []
    for start in [0, *range(0, len(clips), batch)]:  # the first twice: it compiles
        part = clips[start : start + batch]
        inputs = [Inputs(clip.caption, clip.tracks) for clip in part]
        results = generate_batch(models, inputs, settings, seeds=range(start, start + len(part)))
        videos += [result.video for result in results]
        spent = results[0].seconds
        seconds.append((spent["sample"]["run"] + spent["decode"]["run"]) / len(part))
    videos, seconds = videos[min(batch, len(clips)) :], seconds[1:]
    for video, clip in zip(videos, clips, strict=True):
        errors.append(path_error(video, [sprite.colour for sprite in clip.sprites], clip.tracks)["error"])
    return {"seconds": statistics.median(seconds), "error_%": 100 * float(np.mean(errors)), "videos": videos}


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.speed", __doc__)
    parser.add_argument("--weights", default=str(release.DEMO), help="release folder; left out: the small model's")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="videos at once; it divides --clips")
    parser.add_argument("--steps", type=int, help="of the plain sampler")
    parser.add_argument("--only", default="", help="switches whose names have one of these words, separated by commas")
    options = parser.parse_args(argv[1:])
    if options.clips % options.batch:
        parser.error("--batch should divide --clips")
    command_line.use_compilation_cache()
    models = assembly.load(weights=options.weights)
    settings = sampling.resolve(models.sampling, {"steps": options.steps} if options.steps else {})
    side, frames, fps = settings.height, settings.num_frames, settings.fps
    clips = [make_clip(i, "benchmark_one", size=side, frames=frames, fps=fps) for i in range(options.clips)]
    words = [word for word in options.only.split(",") if word]
    found: dict[str, dict] = {}
    for name, (changes, share, dtype) in SWITCHES.items():
        if name != "plain" and words and not any(word in name for word in words):
            continue
        used = models
        if dtype is not None:
            used = dataclasses.replace(models, parts={**models.parts, "vae": models.vae.clone(dtype=jnp.dtype(dtype))})
        steps = max(round(settings.steps * share), 1)
        changed = dataclasses.replace(settings, steps=steps, **changes)
        found[name] = measure(used, clips, changed, options.batch) | {"steps": steps}
        print(f"{name}: {found[name]['seconds']:.2f} s", file=sys.stderr)
    plain = found["plain"]
    videos = {name: row.pop("videos") for name, row in found.items()}
    for name, row in found.items():
        row["times_faster"] = plain["seconds"] / row["seconds"]
        row["psnr_to_plain"] = float(np.mean([psnr(*pair) for pair in zip(videos[name], videos["plain"], strict=True)]))
    columns = ("steps", "seconds", "times_faster", "error_%", "psnr_to_plain")
    print("| switch | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1), file=sys.stderr)
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(f"{row[column]:.4g}" for column in columns) + " |", file=sys.stderr)
    machine = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in found.items()}
    shown = {name: getattr(settings, name) for name in SETTINGS}
    print(json.dumps({"settings": shown, "clips": options.clips, "switches": rounded, "machine": machine}, indent=2))


if __name__ == "__main__":
    command_line.run(main, ["speed", *sys.argv[1:]])
