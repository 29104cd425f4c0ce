"""Long videos and given frames on the benchmark sprites, as JSON on stdout.

  python -m benchmarks.long [--weights DIR] [--parts extension,pause,ends] [--clips 8] [--frames 136] [--overlap N]

Parts:
  extension  a video of --frames by extension, on a closed curve at a steady speed, so that no fast stretch passes for a
             jump: the frame difference at the seams over the median (aim: at most 1.5), and the path's error segment
             by segment, over what linear growth from the first one allows (aim: at most 1)
  pause      the same length, the path rests for a third of it: the object's speed there over its mean (aim: under 0.1)
  ends       first and last frame given: PSNR of both and that of the VAE's own reconstruction of them (aim: within
             1 dB), and the path's error in between (aim: under 1.5 % of the width); and PSNR of the last frame where
             its given latent is decoded after the true clip's: what is lost beyond that, generated latents lose
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tora_jax.configs import sampling
from tqdm import tqdm

from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.data.sprites.clips import make_clip
from tora_jax.data.sprites.shapes import COLOURS
from tora_jax.evals.quality import psnr
from tora_jax.evals.sprite_metrics import centroid, path_error
from tora_jax.io import overlay
from tora_jax.io.video import from_float, to_float, write_video
from tora_jax.sampling.generate import generate_batch
from tora_jax.sampling.inputs import Inputs
from tora_jax.sampling.segments import generate_pieces

SPEED = 0.045  # of the closed curve, in widths a frame; training clips have 0.025 to 0.0625 on average
REST = (1 / 3, 2 / 3)  # of the video, in `pause`
MARGIN = 4  # frames of the rest at either end that do not count: a latent holds as many


def curve(index: int, frames: int, rest: bool) -> np.ndarray:
    """A closed curve, float32 [1, frames, 2], at one speed; with `rest` it stands still in the middle third."""
    rng = np.random.default_rng([7, index])
    when = np.arange(frames, dtype=np.float64)
    if rest:
        start, stop = (round(share * frames) for share in REST)
        when = np.minimum(when, start) + np.maximum(when - stop, 0)
    phase, turn = rng.uniform(0, 2 * np.pi, 2), np.linspace(0, 2 * np.pi, 1000)
    points = 0.5 + 0.28 * np.stack([np.sin(turn + phase[0]), np.sin(2 * turn + phase[1])], -1)
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    place = when * SPEED % travelled[-1]
    return np.stack([np.interp(place, travelled, points[:, i]) for i in range(2)], -1)[None].astype(np.float32)


def make(bench: dict[str, Any], index: int, rest: bool) -> tuple[np.ndarray, np.ndarray, list[int], str]:
    """A long video, its track, the first frames of its segments but the first, and the object's colour."""
    models, settings, frames = bench["models"], bench["settings"], bench["frames"]
    clip = make_clip(index, "benchmark_one", size=settings.height, frames=2, fps=settings.fps)
    track = curve(index, frames, rest)
    pieces = generate_pieces(
        models,
        [Inputs(clip.caption, track)],
        dataclasses.replace(settings, num_frames=frames, segment=settings.num_frames, overlap=bench["overlap"]),
        seeds=[index],
    )
    videos = [piece.video for (piece,) in pieces]
    seams = np.cumsum([len(video) for video in videos])[:-1].tolist()
    video = np.concatenate(videos)
    if bench["save"]:
        bench["save"].mkdir(parents=True, exist_ok=True)
        path = bench["save"] / f"{'pause' if rest else 'extension'}_{index:02}.mp4"
        write_video(path, overlay.draw_tracks(video, track), settings.fps)
    return video, track, seams, clip.sprites[0].colour


def extension(bench: dict[str, Any]) -> dict[str, Any]:
    seam, growth = [], []
    for i in tqdm(range(bench["clips"]), desc="extension"):
        video, track, seams, colour = make(bench, i, rest=False)
        change = np.abs(np.diff(video.astype(np.int16), axis=0)).mean((1, 2, 3))
        seam.append(change[np.array(seams) - 1] / np.median(change))
        parts = zip([0, *seams], [*seams, len(video)], strict=True)
        growth.append([path_error(video[a:b], [colour], track[:, a:b])["error"] for a, b in parts])
    errors = 100 * np.mean(growth, axis=0)
    return {
        "seam_over_median": {"mean": float(np.mean(seam)), "worst": float(np.max(seam))},
        "error_%_by_segment": errors.tolist(),
        "over_linear": float(np.max(errors[1:] / (errors[0] * np.arange(2, len(errors) + 1)))),
    }


def pause(bench: dict[str, Any]) -> dict[str, Any]:
    shares = []
    for i in tqdm(range(bench["clips"]), desc="pause"):
        video, track, _, colour = make(bench, i, rest=True)
        places, _ = centroid(video, COLOURS[colour], near=track[0])
        speed = np.linalg.norm(np.diff(places, axis=0), axis=1)
        start, stop = (round(share * len(video)) for share in REST)
        shares.append(speed[start + MARGIN : stop - MARGIN].mean() / speed.mean())
    return {"speed_in_the_pause_over_mean": float(np.mean(shares)), "worst": float(np.max(shares))}


def ends(bench: dict[str, Any]) -> dict[str, Any]:
    models, settings = bench["models"], bench["settings"]
    frames, params = settings.num_frames, {"params": bench["models"].params["vae"]}
    rows = []
    for i in tqdm(range(bench["clips"]), desc="ends"):
        clip = make_clip(i, "benchmark_one", size=settings.height, frames=frames, fps=settings.fps)
        first, last = clip.video[0], clip.video[-1]
        inputs = Inputs(clip.caption, clip.tracks, {0: first, frames - 1: last})
        (result,) = generate_batch(models, [inputs], settings, seeds=[i])
        video, own = result.video, []
        for still in (first[None], np.repeat(last[None], frames, 0)):
            through = models.vae.apply(params, to_float(jnp.asarray(still))[None])
            own.append(from_float(np.asarray(through[0, -1])))
        true = models.encode_video(models.params["vae"], to_float(jnp.asarray(clip.video))[None])
        mixed, _ = models.decode(frames, models.params["vae"], true.at[0, -1].set(result.latents[-1]))
        between = slice(1, frames - 1)
        error = path_error(video[between], [clip.sprites[0].colour], clip.tracks[:, between])["error"]
        of_first, of_last = (video[0], own[0]), (video[-1], own[1], np.asarray(mixed[0, -1]))
        kept = [psnr(each[None], first[None]) for each in of_first]
        kept += [psnr(each[None], last[None]) for each in of_last]
        rows.append([*kept, 100 * error])
    names = ("first", "first_vae", "last", "last_vae", "last_after_true", "error_%")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


PARTS = {part.__name__: part for part in (extension, pause, ends)}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else round(value, 3)


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.long", __doc__)
    parser.add_argument("--weights", default=str(release.DEMO), help="release folder; left out: the small model's")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, default=136)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--overlap", type=int, default=0, help="latent frames that a segment takes over")
    parser.add_argument("--save", type=Path, help="folder for the long videos, with their paths drawn in")
    options = parser.parse_args(argv[1:])
    parts = options.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    command_line.use_compilation_cache()
    models = assembly.load(weights=options.weights)
    settings = sampling.resolve(models.sampling, {"steps": options.steps} if options.steps else {})
    bench = {"models": models, "settings": settings, **vars(options)}
    found = {part: PARTS[part](bench) for part in parts}
    print(
        json.dumps(
            {
                "weights": options.weights,
                "clips": options.clips,
                "frames": options.frames,
                "overlap": options.overlap,
                **rounded(found),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    command_line.run(main, ["long", *sys.argv[1:]])
