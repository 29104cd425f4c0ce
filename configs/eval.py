"""What is measured of released weights, and on which videos.

  python -m tora_jax.evals --out runs/eval                                     the small model on the benchmark sprites
  python -m tora_jax.evals --out runs/paper --config configs/eval.py:suite=paper --weights DIR \
      --config.benchmark.source=DAVIS --config.measures.i3d=I3D --config.measures.clip=CLIP
  python -m tora_jax.evals --out runs/mine --config configs/eval.py:suite=list --config.benchmark.source=list.json ...

Suites:
  demo, sprites   the small model: a few clips at several sizes and lengths; the whole test split
  paper           512x512 at 16, 64 and 128 frames, from a folder of video object segmentation
  sizes           the same clips from 240p to 720p, 2 to 8 seconds
  cogvideox       the released Tora on CogVideoX: 480x720 at 49 frames, from such a folder
  list            a JSON file of prompts and trajectories
`runlocal` shrinks any of them to seconds.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common, model_sizes

SUITES = ("demo", "sprites", "paper", "sizes", "cogvideox", "list")


def cell(frames: int, height: int, width: int, fps: float, trajectory: bool = True) -> dict:
    """A size of videos; without a trajectory it is plain Open-Sora, measured against the same paths."""
    return {"frames": frames, "height": height, "width": width, "fps": fps, "trajectory": trajectory}


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, suite="demo", runlocal=False)
    if arg.suite not in SUITES:
        raise ValueError(f"suite={arg.suite}: there are {', '.join(SUITES)}")
    config = ConfigDict()
    # kind: sprites, segmentation (a folder as DAVIS's) or list (a JSON file). clips: the first ones; 0 = all.
    config.benchmark = {"kind": "sprites", "source": "", "split": "benchmark_one", "version": 1, "clips": 0}
    # "" = generate; "truth" = the benchmark's own clips; else a folder with CELL/NAME.mp4 or NAME.mp4.
    config.videos = ""
    config.first_frame = False  # give the true clip's first frame
    config.seed, config.batch = 0, 1
    config.sampling = {"steps": 30, "guidance": 7.0, "trajectory_guidance": 1.0, "negative_prompt": ""}
    # size: width and height in whose pixels TrajError counts. clip, i3d: folders of the converter; "" = left out.
    config.measures = {"tracker": "lk", "tracker_weights": "", "clip": "", "i3d": "", "size": (512, 512)}
    if arg.suite in ("demo", "sprites"):
        small = model_sizes.small_model()["sampling"]
        config.sampling = {name: small[name] for name in config.sampling}
        config.sampling.steps = 15
        config.batch = 8
        if arg.suite == "demo":
            config.benchmark.clips = 8
            config.cells = (
                cell(17, 128, 128, 8.0),
                cell(17, 128, 128, 8.0, trajectory=False),
                cell(9, 128, 128, 4.0),
                cell(33, 128, 128, 16.0),
                cell(17, 96, 96, 8.0),
                cell(17, 160, 160, 8.0),
            )
        else:
            config.benchmark.split = "test"
            config.cells = (cell(17, 128, 128, 8.0),)
    elif arg.suite == "sizes":
        config.benchmark.kind = "segmentation"
        sides = ((240, 426), (360, 640), (480, 854), (720, 1280))
        config.cells = tuple(
            cell(frames, *(side // 16 * 16 for side in size), 24.0) for size in sides for frames in (51, 102, 204)
        )
    elif arg.suite == "cogvideox":
        config.benchmark.kind = "segmentation"
        config.sampling.update({"steps": 50, "guidance": 6.0})
        config.cells = (cell(49, 480, 720, 8.0),)
    else:
        config.benchmark.kind = "list" if arg.suite == "list" else "segmentation"
        config.first_frame = arg.suite == "paper"
        config.cells = tuple(cell(frames, 512, 512, 24.0) for frames in (16, 64, 128))
    if arg.runlocal:
        config.benchmark.clips = 2
        config.sampling.steps = 2
        config.cells = (cell(5, 32, 32, 8.0),)
    return config.lock()
