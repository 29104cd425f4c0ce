"""Data curation, from raw videos to shards. docs/curate.md says what each score and limit means.

python -m tora_jax.data.curate --config configs/curate.py --input 'videos/**/*.mp4' --output DIR
"""

from ml_collections import ConfigDict
from tora_jax.configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    common.parse_arg(arg)
    config = {
        "probe": {
            "damaged_share": 0.01,  # of a file's frames
            "threshold": 3.0,  # the change at a cut, in multiples of the usual change there
            "shortest": 2.0,  # seconds of a clip
            "longest": 16.0,
            "loss": 0.5,  # seconds that a clip may begin later for a key frame, so that it is not encoded anew
        },
        "motion": {
            "method": "dis",  # or "raft", with the folder of its weights
            "weights": "",
            "short": 256,  # pixels of the shorter side
            "fps": 8.0,  # frames compared in a second
            "static": 0.04,  # shorter sides a second, under which a camera stands still
            "track_seconds": 1.0,  # new tracks start so far apart
            "tracks": 8,  # that start at a time
        },
        "looks": {"short": 256, "clip": "", "head": ""},  # folders of CLIP ViT-L/14 and of the aesthetic head
        "rules": {
            "min_side": 144,
            "max_black": 0.1,
            "max_frozen": 1.0,
            "min_flow": 0.1,
            "min_foreground": 0.005,
            "cameras": ("pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "roll", "shake"),
            "strong": 20.0,
            "min_aesthetic": 4.0,
            "copy_bits": 16,  # of 256
        },
        "captions": {
            "server": "",  # such as "http://localhost:8000/v1"; "" = file names and .txt files beside the videos
            "model": "",
            "prompt": (
                "These are frames of one video clip, in order. Describe the clip in one paragraph: what is in it, what "
                "moves and how, the surroundings, the light and the style. Say only what can be seen."
            ),
            "short": 384,  # pixels of the frames' shorter side
            "retries": 6,
            "timeout": 120.0,
            "tokens": 200,
            "parallel": 8,  # calls at a time, of each process
            "scores": True,  # appended in Open-Sora's wording
        },
        "shards": {"clips": 256, "validation": 0.01},  # clips in a file; share of source videos
        "report": {"samples": 24},  # pictures of kept clips, and of those dropped for each reason
    }
    return ConfigDict(config).lock()
