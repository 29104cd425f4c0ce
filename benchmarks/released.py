"""The released Tora's real files, looked at on the day that somebody has them.

  python -m benchmarks.released SRC --converted DIR [--base CogVideoX-5b] [--out report.json]
  python -m benchmarks.released DIR

SRC is what `python -m convert_weights tora_cogvideox` takes; DIR is what it writes, and is written where it is not
there. Prints JSON:

  keys                what the files hold: tensors, numbers, types, names that no parameter needs
  against_diffusers   text features, one step of the denoiser and one video of 9 frames without a trajectory, against
                      diffusers and transformers, which read SRC on their own (a pipeline folder, text to video, and
                      torch, diffusers and transformers in the Python of --reference_python); relative errors are
                      rms(ours - theirs) / rms(theirs)
  open_points         what nobody could say without the files, each as a number or a field
  traj_error          of eight drawn paths, in pixels of 512x512

What could not run says why: {"not_run": "..."}. The settings of the videos are the weights' own where no flag says.
"""

import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import freeze

from convert_weights import __main__ as convert
from convert_weights import folders, pipelines, sources
from convert_weights.tables import tora_cogvideox
from tora_jax import command_line, generate, load
from tora_jax.backbones.assembly import Models
from tora_jax.checkpoints import release
from tora_jax.diffusion import sampler
from tora_jax.errors import UserError
from tora_jax.evals.track_lk import track_lk
from tora_jax.evals.traj_error import traj_error
from tora_jax.io import files, safetensors_io
from tora_jax.models.cogvideox_tora import CogVideoXTora
from tora_jax.models.cogvideox_vae import CHUNK
from tora_jax.sampling import request
from tora_jax.sampling.inputs import Inputs

# On a canvas of 256x256; names are presets.
PATHS: dict[str, Any] = {
    **{name: name for name in ("arc", "circle", "infinity", "pause", "wave")},
    "right": [[64, 128], [192, 128]],
    "fall": [[96, 48], [160, 208]],
    "zigzag": [[48, 176], [101, 80], [155, 176], [208, 80]],
}
SHORT = CHUNK + 1  # frames of the video that is compared
TIMESTEP = 499  # of the step that is compared
CANVAS = (512, 512)  # of TrajError, as in the paper
# field of a folder's file -> what is presumed of it.
PRESUMED = {
    "transformer/config.json": {"norm_eps": 1e-5, "max_text_seq_length": 226, "use_rotary_positional_embeddings": True},
    "scheduler/scheduler_config.json": {
        "snr_shift_scale": 1.0,
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    "vae/config.json": {"scaling_factor": 0.7},
}


def not_run(reason: str) -> dict[str, str]:
    return {"not_run": reason}


def relative(ours: Any, theirs: Any) -> float:
    """rms(ours - theirs) / rms(theirs), to three digits."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return rounded(np.sqrt(np.square(ours - theirs).mean() / np.square(theirs).mean()))


def rounded(value: float) -> float | None:
    """To three digits; none where there is no number, which JSON has no word for."""
    return float(f"{value:.3g}") if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------


def checked(src: Path, flags: list[str]) -> dict[str, Any]:
    """What the converter says of a source folder; it exits with 2 where a name or a shape does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        with contextlib.redirect_stdout(io.StringIO()):  # the mapping, a line for each tensor
            convert.main(["tora_cogvideox", str(src), f"{folder}/none", "--dry_run", f"--report={report}", *flags])
        parts = json.loads(report.read_text())["parts"]
    return {
        Path(part["source"]).name: {
            "variant": part["variant"],
            "tensors": part["source_tensors"],
            "numbers": part["parameters"],
            "dtypes": part["source_dtypes"],
            "unused": part["ignored"],
        }
        for part in parts
    }


def held(folder: Path) -> dict[str, Any]:
    """What a converted folder holds; that it fits its config, `load` checks."""
    found = {}
    for part in release.PARTS:
        if (file := folder / f"{part}.safetensors").is_file():
            tensors = safetensors_io.read_header(file).values()
            sizes = [math.prod(tensor.shape) for tensor in tensors]
            dtypes = Counter(str(np.dtype(tensor.dtype)) for tensor in tensors)
            found[part] = {"tensors": len(sizes), "numbers": sum(sizes), "dtypes": dict(dtypes)}
    return found


def presumed(src: Path | None) -> dict[str, Any]:
    """The fields of `PRESUMED` as a pipeline folder has them."""
    if src is None or not (src / "transformer" / "config.json").is_file():
        return not_run("needs a pipeline folder of diffusers, with its config.json files")
    found = {}
    for name, fields in PRESUMED.items():
        if not (src / name).is_file():
            found[name] = not_run("no such file")
            continue
        config = folders.read_json(src / name)
        found[name] = {key: {"found": config.get(key), "presumed": value} for key, value in fields.items()}
    return found


def same_base(src: Path | None, base: Path | None, variant: str | None, allow_pickle: bool) -> dict[str, Any]:
    """Whether the tensors of a plain CogVideoX are the source's own."""
    if src is None or base is None:
        return not_run("needs SRC and --base, the folder of CogVideoX-5b (of CogVideoX-5b-I2V for image to video)")
    tensors = [
        tora_cogvideox.view(sources.open_source(pipelines.find(str(each), variant)["tora"], allow_pickle))
        for each in (src, base)
    ]
    ours, theirs = tensors
    both = sorted(ours.shapes.keys() & theirs.shapes.keys())
    differ = {}
    for name in both:
        a, b = (each.read(name).astype(np.float32) for each in tensors)
        if a.shape != b.shape or not np.array_equal(a, b):
            differ[name] = relative(a, b) if a.shape == b.shape else None
    return {
        "equal": len(both) - len(differ),
        "differ": len(differ),
        "missing": len(theirs.shapes.keys() - ours.shapes.keys()),
        "largest_relative": max((value for value in differ.values() if value is not None), default=0.0),
        "first": sorted(differ)[:5],
    }


# ----------------------------------------------------------------------------------------------------------
# Against diffusers
# ----------------------------------------------------------------------------------------------------------


def against_diffusers(models: Models, src: Path | None, settings: Mapping[str, Any], python: str) -> dict[str, Any]:
    """Text features, one step and one short video, without a trajectory, which diffusers knows nothing of."""
    if src is None:
        return not_run("a converted folder: give the pipeline folder that it was made of as SRC, this as --converted")
    if not (src / "transformer" / "config.json").is_file():
        return not_run("diffusers reads pipeline folders alone, with transformer/config.json")
    if models.tora.given_channels:
        return not_run("image-to-video weights: diffusers adds the learned positions, unlike their training")
    wanted = request.make(models.sampling, {**settings, "num_frames": SHORT, "solver": "ddim", "trajectories": None})
    settings, kind = wanted.settings, models.backbone
    if settings.guidance == 1:
        return not_run("guidance 1 has no null caption to compare")
    cell = models.vae.space_factor
    shape = models.vae.latent_frames(SHORT), settings.height // cell, settings.width // cell, models.tora.in_channels
    noise = np.asarray(jax.random.normal(jax.random.key(0), (1, *shape)))
    told = kind.conditions(models, [Inputs(wanted.prompts[0])], settings)
    ids, _ = models.tokenizer([wanted.prompts[0]])
    text = np.asarray(told["text"].astype(jnp.float32))
    with tempfile.TemporaryDirectory() as folder:
        given = {"noise": noise.swapaxes(2, 4).swapaxes(3, 4), "text": text, "ids": np.asarray(ids)}
        np.savez(f"{folder}/given.npz", **given)
        job = {"timestep": TIMESTEP, "steps": settings.steps, "guidance": settings.guidance}
        job |= {"frames": SHORT, "height": settings.height, "width": settings.width}
        job |= {"dynamic": models.tora.guidance == "dynamic", "dtype": models.tora.cogvideox.get("dtype", "float32")}
        script = Path(__file__).with_name("released_reference.py")
        command = [python, script, src, folder, json.dumps(job)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            return not_run((ran.stderr.strip().splitlines() or ["the reference ended"])[-1])
        theirs = dict(np.load(f"{folder}/found.npz"))
    found = {"dtype": job["dtype"], "steps": settings.steps, "frames, height, width": [SHORT, *video_size(settings)]}
    if "text" in theirs:
        found["text_relative"] = relative(text[:1], theirs["text"])
    else:
        found["text_relative"] = not_run("no text_encoder/config.json")
    step = one_step(models, noise, text[:1])
    found["step_relative"] = relative(step, theirs["step"].transpose(0, 1, 3, 4, 2))
    if "latents" not in theirs:
        return found | {"video": not_run("no vae/config.json")}
    method = models.method("ddim")
    times = method.process.times(settings.steps, settings.height, settings.width, shape[0])
    weights = kind.guidance(models, settings, times)
    x = sampler.run(method, models.params["tora"], jnp.asarray(noise), times, sampler.Told(told), weights)
    found["latents_relative"] = relative(x, theirs["latents"].transpose(0, 1, 3, 4, 2))
    video, _ = models.decode(SHORT, models.params["vae"], x)
    off = np.abs(np.asarray(video, np.float64) - 255 * theirs["video"])
    return found | {"pixels_mean": rounded(off.mean()), "pixels_largest": rounded(off.max())}


def video_size(settings: Any) -> tuple[int, int]:
    return settings.height, settings.width


def one_step(models: Models, x: Any, text: Any, dtype: Any = None) -> np.ndarray:
    """v of plain CogVideoX at `TIMESTEP`; `dtype`: of matrix products, None = the weights' own."""
    tora = models.tora
    if dtype is not None:
        tora = tora.clone(cogvideox=freeze({**tora.cogvideox, "dtype": dtype}))
    given = {"given": jnp.zeros((*x.shape[:4], tora.given_channels))} if tora.given_channels else {}

    def run(params: Any, x: Any, text: Any) -> Any:
        return models.backbone.denoise(tora, params, x, jnp.full(1, float(TIMESTEP)), text, features=None, **given)[0]

    return np.asarray(jax.jit(run)(models.params["tora"], x, text))


# ----------------------------------------------------------------------------------------------------------
# What was open
# ----------------------------------------------------------------------------------------------------------


def bfloat16(models: Models, settings: Any, prompt: str) -> float:
    """How far a step in bfloat16 is from the same in float32, with the same weights."""
    cell, tora = models.vae.space_factor, models.tora
    shape = 1, models.vae.latent_frames(SHORT), settings.height // cell, settings.width // cell, tora.in_channels
    x = jax.random.normal(jax.random.key(0), shape)
    text = models.backbone.conditions(models, [Inputs(prompt)], settings)["text"][:1]
    low, high = (one_step(models, x, text, dtype) for dtype in ("bfloat16", "float32"))
    return relative(low, high)


def chunks(models: Models, path: Any, settings: Any) -> dict[str, Any]:
    """How far the latents of a map are apart if it is encoded whole, and in chunks."""
    if settings.num_frames < 2 * CHUNK:
        return not_run(f"{settings.num_frames} frames are one chunk")
    tracks = request.make(models.sampling, {"num_frames": settings.num_frames, "trajectories": path}).tracks
    _, colours = models.backbone.motion_map(tracks, video_size(settings), None)

    def encoded(chunk: int) -> np.ndarray:
        vae = models.vae.clone(encoder_chunk=chunk)
        run = jax.jit(lambda params, video: vae.apply({"params": params}, video, method="encode"))
        return np.asarray(run(models.params["vae"], jnp.asarray(colours)[None]))

    whole, cut = encoded(0), encoded(CHUNK)
    return {"relative": relative(cut, whole), "largest": rounded(np.abs(cut - whole).max()), "path": str(path)}


def learned_positions(models: Models) -> dict[str, Any]:
    """How large the learned positions are, beside the kernel that makes tokens of patches."""
    params = models.params["tora"]["cogvideox"]
    if "positions" not in params:
        return not_run("text-to-video weights have none")
    table, kernel = (np.asarray(leaf, np.float64) for leaf in (params["positions"], params["patch_embedder"]["kernel"]))
    # A kernel's output on noise of variance 1 has this rms.
    tokens = np.sqrt(np.square(kernel).sum(axis=(0, 1, 2)).mean())
    rms = np.sqrt(np.square(table).mean())
    return {
        "rms": rounded(rms),
        "of_tokens_of_noise": rounded(rms / tokens),
        "added": models.tora.cogvideox.get("add_positions", False),
    }


# ----------------------------------------------------------------------------------------------------------
# Videos
# ----------------------------------------------------------------------------------------------------------


def along_paths(models: Models, settings: Mapping[str, Any], image: str | None) -> dict[str, Any]:
    """TrajError of a video for each of `PATHS`."""
    if models.tora.given_channels and image is None:
        return not_run("image-to-video weights need a first frame: give --image FILE")
    found, conditions = {}, {} if image is None else {0: image}
    for name, path in PATHS.items():
        video = generate(models, trajectories=path, conditions=conditions, **settings).video
        tracks = request.make(models.sampling, {**settings, "num_frames": len(video), "trajectories": path}).tracks
        tracked, visible = track_lk(video, tracks[:, 0])
        found[name] = {key: rounded(value) for key, value in traj_error(tracks, tracked, visible, CANVAS).items()}
    means = {key: np.mean([one[key] for one in found.values()]) for key in ("l1", "l2", "endpoint", "visible")}
    return {"paths": found, "mean": {key: rounded(value) for key, value in means.items()}}


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m benchmarks.released", __doc__)
    parser.add_argument("folder", metavar="DIR", type=files.path, help="a converted folder, or what it is made of")
    parser.add_argument("--converted", type=files.path, help="what DIR was converted to; written if it is not there")
    parser.add_argument("--base", type=files.path, help="a folder of plain CogVideoX, to compare DIR's tensors with")
    parser.add_argument("--allow_pickle", action="store_true", help="as in convert_weights")
    parser.add_argument("--variant", help="as in convert_weights: t2v or i2v, where DIR holds both")
    parser.add_argument("--image", help="first frame, for image-to-video weights")
    for name in ("num_frames", "height", "width", "steps"):
        parser.add_argument(f"--{name}", type=int, help="unset: the weights' own")
    parser.add_argument("--prompt", help="unset: the weights' own")
    parser.add_argument("--reference_python", default=sys.executable, help="that has torch and diffusers")
    parser.add_argument("--out", type=files.path, help="write the JSON here, too")
    args = parser.parse_args(argv[1:])
    report = json.dumps(run(args), indent=2)
    if args.out is not None:
        files.write_text(args.out, report + "\n")
    print(report)


def run(args: Any) -> dict[str, Any]:
    if not args.folder.exists():
        raise UserError(f"{args.folder}: no such folder")
    src = None if (args.folder / "tora.safetensors").is_file() else args.folder
    converted = args.folder if src is None else args.converted
    flags = ["--allow_pickle"] * args.allow_pickle + ([] if args.variant is None else [f"--variant={args.variant}"])
    report: dict[str, Any] = {"folder": str(args.folder), "converted": None if converted is None else str(converted)}
    report["device"] = jax.devices()[0].device_kind
    report["keys"] = {}
    if src is not None:
        report["keys"]["source"] = checked(src, flags)
        if converted is not None and not converted.exists():
            with contextlib.redirect_stdout(sys.stderr):
                convert.main(["tora_cogvideox", str(src), str(converted), *flags])
    points = {"configs": presumed(src), "base_is_cogvideox": same_base(src, args.base, args.variant, args.allow_pickle)}
    pickles = src is not None and any(name.endswith(folders.PICKLES) for name in sources.listing(str(src)))
    points["weights_only_loader_reads_pickles"] = True if pickles else not_run("no pickles inside")
    if converted is None:
        reason = not_run("needs --converted DIR, which is written if it is not there")
        return report | {"against_diffusers": reason, "open_points": points, "traj_error": reason}
    report["keys"]["converted"] = held(converted)
    models = load(converted, low_memory=True)
    if not isinstance(models.tora, CogVideoXTora):
        raise UserError(f"{converted}: no release of Tora on CogVideoX")
    names = ("num_frames", "height", "width", "steps", "prompt")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    wanted = request.make(models.sampling, given | {"trajectories": None})
    settings = wanted.settings
    report["settings"] = {name: getattr(settings, name) for name in names}
    report["against_diffusers"] = against_diffusers(models, src, given, args.reference_python)
    points |= {
        "step_in_bfloat16_relative": bfloat16(models, settings, wanted.prompts[0]),
        "map_encoded_in_chunks": chunks(models, "arc", settings),
        "learned_positions": learned_positions(models),
    }
    return report | {"open_points": points, "traj_error": along_paths(models, given, args.image)}


if __name__ == "__main__":
    command_line.run(main, sys.argv)
