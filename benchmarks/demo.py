"""How well released weights do what they were trained for, on the benchmark sprites, as JSON on stdout.

  python -m benchmarks.demo --weights DIR [--parts path,text] [--clips 64] [--version 2] [--save FOLDER]

Parts:
  measure        the measures themselves, on clips whose truth is known
  path           one object on a path
  no_trajectory  the same prompts and noise without the path
  two            two objects on two paths
  text           the colour and the shape that the prompts of `path` name
  image          the first frame given: is it kept, and does its object follow the path from there?
  vae            PSNR of both VAEs on clips of the test split, and of 8x8x4 average pooling with linear upsampling
  ceiling        `path` and `text` of true clips that went through the video VAE: no denoiser can do better
  denoise        `text` of true clips with noise on their latents, up to some timesteps, after one step straight back:
                 what the denoiser sees in what is still there

The benchmark set comes from its seed, so nothing is read but the weights. Sizes, steps and guidance are those of the
weights' config unless given. An error is the mean distance between an object's centroid (`sprite_metrics`) and its
path in % of the frame's width; "tracker" has the same of a tracker (`evals/traj_error.py`), in pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tora_jax.configs import sampling
from tora_jax.configs.sampling import Settings
from tqdm import tqdm

from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.checkpoints import release
from tora_jax.conditioning import motion_maps
from tora_jax.data.sprites.clips import WORLDS, Clip, exact_flow, make_clip
from tora_jax.diffusion import sampler
from tora_jax.errors import UserError
from tora_jax.evals import quality, track_lk, traj_error
from tora_jax.evals.sprite_metrics import name_colour, name_shape, path_error
from tora_jax.io import overlay
from tora_jax.io.video import from_float, to_float, write_video
from tora_jax.sampling.generate import generate_batch, video_size
from tora_jax.sampling.inputs import Inputs

ONE, TWO, HELD_OUT = "benchmark_one", "benchmark_two", "test"
SETTINGS = ("height", "width", "num_frames", "fps", "steps", "guidance", "trajectory_guidance", "negative_prompt")
SAVED = 8  # clips of each part
TIMESTEPS = (300, 500, 700)  # of `denoise`


class Bench:
    """The weights with their settings, the benchmark's clips, and the videos made so far."""

    def __init__(
        self, models: assembly.Models, settings: Settings, clips: int, batch: int, save: Path | None, version: int
    ):
        self.models, self.settings, self.count, self.batch, self.save = models, settings, clips, batch, save
        self.version = version
        if settings.height != settings.width:
            raise UserError(f"the sprites are square, and the size is {settings.width}x{settings.height}")
        self.side, _ = video_size(models, settings.height, settings.width)
        self.clips, self.videos, self.through = map(functools.cache, (self._clips, self._videos, self._through))

    def _clips(self, split: str) -> list[Clip]:
        frames, fps = self.settings.num_frames, self.settings.fps
        size = {"size": self.side, "frames": frames, "fps": fps}
        return [make_clip(i, split, **size, version=self.version) for i in range(self.count)]

    def _videos(self, split: str, trajectory: bool = True, image: bool = False) -> list[np.ndarray]:
        """A video for each clip's caption, on its tracks, from its first frame; clip i has seed i."""
        clips, made, size = self.clips(split), [], min(self.batch, self.count)
        with self.bar(len(clips), f"{split}{'' if trajectory else ', free'}{', image' if image else ''}") as bar:
            for start in range(0, len(clips), size):
                rows = [
                    (start + i) % len(clips) for i in range(size)
                ]  # the last batch is filled up: nothing new compiles
                inputs = [
                    Inputs(
                        clips[i].caption,
                        clips[i].tracks if trajectory else None,
                        {0: clips[i].video[0]} if image else {},
                    )
                    for i in rows
                ]
                results = generate_batch(self.models, inputs, self.settings, seeds=rows)
                made += [result.video for result in results[: len(clips) - start]]
                bar.update(len(made) - bar.n)
        if self.save is not None:
            self.save.mkdir(parents=True, exist_ok=True)
            kind = split + ("" if trajectory else "_free") + ("_image" if image else "")
            for i, (video, clip) in enumerate(zip(made[:SAVED], clips, strict=False)):
                path = self.save / f"{kind}_{i:02}.mp4"
                write_video(path, overlay.draw_tracks(video, clip.tracks), self.settings.fps)
        return made

    def _through(self, part: str) -> Callable:
        """One video through a VAE and back, compiled."""
        module = getattr(self.models, part)

        def through(params, video):
            return from_float(module.apply(params, video))

        return jax.jit(through)

    def bar(self, total: int, name: str) -> tqdm:
        return tqdm(total=total, desc=name, unit="clip", file=sys.stderr, leave=False)


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


# ----------------------------------------------------------------------------------------------------------
# Paths, text, the first frame
# ----------------------------------------------------------------------------------------------------------


def follows(videos: Sequence[np.ndarray], clips: Sequence[Clip]) -> dict[str, Any]:
    """How the objects of videos follow the tracks of clips."""
    found, tracked = [], []
    for video, clip in zip(videos, clips, strict=True):
        found.append(path_error(video, [sprite.colour for sprite in clip.sprites], clip.tracks))
        tracks, visible = track_lk.track_lk(video, clip.tracks[:, 0])
        tracked.append(traj_error.traj_error(clip.tracks, tracks, visible, video.shape[2:0:-1]))
    errors, width = [100 * f["error"] for f in found], videos[0].shape[2]
    tracker = {name: mean([t[name] for t in tracked]) for name in tracked[0] if name != "l1_visible"}
    return {
        "error_percent": mean(errors),
        "error_percent_median": float(np.median(errors)),
        "error_percent_worst": max(errors),
        "found": mean([f["found"] for f in found]),
        "tracker": {"l1_percent": 100 * tracker["l1"] / width, "l2_percent": 100 * tracker["l2"] / width, **tracker},
    }


def names(videos: Sequence[np.ndarray], clips: Sequence[Clip]) -> dict[str, float]:
    """Share of videos whose object on the path has the colour, and the shape, that the caption names."""
    colours, shapes = [], []
    for video, clip in zip(videos, clips, strict=True):
        sprite, path = clip.sprites[0], clip.tracks[0]
        colour = name_colour(video, path)
        colours.append(colour == sprite.colour)
        shapes.append(name_shape(video, path, colour or sprite.colour) == sprite.shape)
    return {"colour": mean(colours), "shape": mean(shapes)}


def measure(bench: Bench) -> dict[str, Any]:
    result = {split: follows([clip.video for clip in bench.clips(split)], bench.clips(split)) for split in (ONE, TWO)}
    return {**result, "text": names([clip.video for clip in bench.clips(ONE)], bench.clips(ONE))}


def path(bench: Bench) -> dict[str, Any]:
    return follows(bench.videos(ONE), bench.clips(ONE))


def no_trajectory(bench: Bench) -> dict[str, Any]:
    return follows(bench.videos(ONE, trajectory=False), bench.clips(ONE))


def two(bench: Bench) -> dict[str, Any]:
    return follows(bench.videos(TWO), bench.clips(TWO))


def text(bench: Bench) -> dict[str, Any]:
    return names(bench.videos(ONE), bench.clips(ONE))


def image(bench: Bench) -> dict[str, Any]:
    """Frame 0 heads its micro-frame and has a latent of its own, so the VAE is asked for it as a video of one frame."""
    clips, videos = bench.clips(ONE), bench.videos(ONE, image=True)
    given = [clip.video[:1] for clip in clips]
    vae = reconstruct(bench, "vae", given)
    kept = psnr([video[:1] for video in videos], given)
    return {"psnr_db": kept, "psnr_of_vae_db": psnr(vae, given), **follows(videos, clips)}


# ----------------------------------------------------------------------------------------------------------
# The VAEs
# ----------------------------------------------------------------------------------------------------------


def vae(bench: Bench) -> dict[str, Any]:
    clips = bench.clips(HELD_OUT)
    videos = [clip.video for clip in clips]
    dense = [motion_maps.flow_to_rgb(exact_flow(clip.labels, clip.tracks)) for clip in clips]
    sparse = [
        motion_maps.flow_to_rgb(motion_maps.displacement_maps(clip.tracks, bench.side, bench.side, clip.visible))
        for clip in clips
    ]
    found = {"video_db": psnr(reconstruct(bench, "vae", videos), videos)}
    found["pooling_db"] = psnr([pooled(video, bench.models.vae) for video in videos], videos)
    found["above_pooling_db"] = found["video_db"] - found["pooling_db"]
    for name, maps in (("motion_dense_db", dense), ("motion_sparse_db", sparse)):
        found[name] = psnr(reconstruct(bench, "motion_vae", maps), maps)
    return found


def ceiling(bench: Bench) -> dict[str, Any]:
    clips = bench.clips(ONE)
    videos = reconstruct(bench, "vae", [clip.video for clip in clips])
    return {**follows(videos, clips), **names(videos, clips)}


def psnr(videos: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Mean over videos of their PSNR in dB, uint8."""
    return mean([quality.psnr(*pair) for pair in zip(videos, truth, strict=True)])


def reconstruct(bench: Bench, part: str, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Videos through a VAE and back, by the posteriors' means."""
    run, params = bench.through(part), {"params": bench.models.params[part]}
    made = []
    with bench.bar(len(videos), part) as bar:
        for video in videos:
            made.append(np.asarray(run(params, to_float(jnp.asarray(video))[None])[0]))
            bar.update()
    return made


def pooled(video: np.ndarray, like: Any) -> np.ndarray:
    """Means over the frames and cells that share a latent of a VAE, made large again with linear interpolation."""
    t, h, w, _ = video.shape
    cell = like.space_factor
    place = np.array([like.latent_of(j, t) for j in range(t)])
    small = video.reshape(t, h // cell, cell, w // cell, cell, 3).mean((2, 4))
    count = like.latent_frames(t)
    means = np.stack([small[place == i].mean(0) for i in range(count)])
    times = np.array([np.flatnonzero(place == i).mean() for i in range(count)])

    def weights(positions: np.ndarray, wanted: int) -> np.ndarray:
        """Of linear interpolation: row j is for frame or pixel j; the ends go on."""
        return np.stack([np.interp(np.arange(wanted), positions, row) for row in np.eye(len(positions))], 1)

    y, x = (weights((np.arange(side // cell) + 0.5) * cell - 0.5, side) for side in (h, w))
    large = np.einsum("tT,yY,xX,TYXc->tyxc", weights(times, t), y, x, means, optimize=True)
    return np.round(large).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------
# The denoiser alone
# ----------------------------------------------------------------------------------------------------------


def denoise(bench: Bench) -> dict[str, Any]:
    """Timestep -> `names` of the estimates of clean clips; with the prompt and the path, without guidance."""
    clips, size = bench.clips(ONE), min(bench.batch, bench.count)
    estimates: dict[str, list[np.ndarray]] = {str(timestep): [] for timestep in TIMESTEPS}
    with bench.bar(len(clips), "denoise") as bar:
        for start in range(0, len(clips), size):
            rows = [(start + i) % len(clips) for i in range(size)]
            for timestep in TIMESTEPS:
                made = cleaned(bench, [clips[i] for i in rows], rows, timestep)
                estimates[str(timestep)] += list(made[: len(clips) - start])
            bar.update(min(size, len(clips) - start))
    return {timestep: names(videos, clips) for timestep, videos in estimates.items()}


def cleaned(bench: Bench, clips: Sequence[Clip], seeds: Sequence[int], timestep: float) -> np.ndarray:
    """Clips with noise up to a timestep, and one step back: uint8 [b, t, h, w, 3]."""
    models, keys = bench.models, jnp.stack([jax.random.key(seed) for seed in seeds])
    settings = dataclasses.replace(bench.settings, guidance=1.0, trajectory_guidance=1.0)
    inputs = [Inputs(clip.caption, clip.tracks, {}) for clip in clips]
    maps = np.stack([models.backbone.motion_map(clip.tracks, (bench.side, bench.side), None)[1] for clip in clips])
    conditions = models.backbone.conditions(models, inputs, settings)
    features = models.extract(models.params, jnp.asarray(maps), keys)
    x = models.encode_video(models.params["vae"], to_float(jnp.asarray(np.stack([clip.video for clip in clips]))))
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    method = models.method(settings.solver)
    x = method.process.add_noise(x, noise, jnp.full(len(clips), float(timestep)))
    told, times = sampler.Told(conditions, features), np.float32([1000, timestep, 0])
    x = sampler.run(method, models.params["tora"], x, times, told, np.ones((1, 2), np.float32))
    return np.asarray(models.decode(settings.num_frames, models.params["vae"], x)[0])


# ----------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    part.__name__: part for part in (measure, path, no_trajectory, two, text, image, vae, ceiling, denoise)
}


def run(
    weights: str | Path,
    parts: Sequence[str] = tuple(PARTS),
    clips: int = 64,
    batch: int = 8,
    save: Path | None = None,
    version: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """All figures on a version of the sprites; `changes` are of the weights' sampling settings, None = as they are.

    Raises:
      UserError: for weights that cannot be read, a part that there is not, or a size that is not square.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if min(clips, batch) < 1:
        raise UserError("--clips and --batch must be at least 1")
    settings = sampling.resolve(release.read_config(weights).get("sampling", {}), {})
    settings = dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})
    bench = Bench(assembly.load(weights=weights), settings, clips, batch, save, version)
    found: dict[str, Any] = {
        "weights": str(weights),
        "settings": {name: getattr(settings, name) for name in SETTINGS},
        "clips": clips,
        "version": version,
    }
    seconds = {}
    for part in parts:
        start = time.perf_counter()
        found[part] = PARTS[part](bench)
        seconds[part] = round(time.perf_counter() - start, 1)
    machine = {"device": jax.devices()[0].device_kind, "cores": os.cpu_count(), "python": platform.python_version()}
    return {**found, "seconds": seconds, "machine": {**machine, "load": round(os.getloadavg()[0], 1)}}


def rounded(value: Any) -> Any:
    """Floats to four digits; JSON knows no NaN, so it becomes None."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return value if not isinstance(value, float) else round(value, 4) if np.isfinite(value) else None


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.demo", __doc__)
    parser.add_argument("--weights", help="release folder; the packaged demo weights if left out")
    parser.add_argument("--parts", default=",".join(PARTS), help="of those above, separated by commas")
    parser.add_argument("--clips", "--limit", type=int, default=64, help="of each set")
    parser.add_argument("--batch", type=int, default=8, help="videos that are made at once")
    parser.add_argument("--save", type=Path, help=f"folder for {SAVED} videos of each kind, with their paths drawn in")
    parser.add_argument("--version", type=int, default=1, choices=WORLDS, help="of the sprites")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--trajectory_guidance", type=float)
    options = vars(parser.parse_args(argv[1:]))
    weights, parts = options.pop("weights"), options.pop("parts").split(",")
    command_line.use_compilation_cache()
    found = run(weights or release.DEMO, parts, **options)
    print(json.dumps(rounded(found), indent=2))


if __name__ == "__main__":
    command_line.run(main, ["demo", *sys.argv[1:]])
