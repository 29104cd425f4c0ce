"""The small model: every part of the real chain, in seconds on a laptop. `sample.py` runs it by default."""

from ml_collections import ConfigDict
from tora_jax.configs import common


def get_config(arg: str | None = None) -> ConfigDict:
    common.parse_arg(arg)
    config = ConfigDict()
    config.tora = {
        "stdit": {
            "variant": "4x128x4/2",
            "caption_channels": 64,
            "caption_length": 48,
            "base_resolution": 128.0,
            "remat": "none",
            "dtype": "float32",
        },
        "fuser": "adaptive_norm",
        "placement": "temporal",
        "motion_features": 64,
    }
    config.vae = _vae()
    config.motion_vae = _vae()
    config.t5 = {
        "vocab_size": 1024,
        "width": 64,
        "num_heads": 4,
        "head_dim": 16,
        "mlp_dim": 128,
        "depth": 2,
        "dtype": "float32",
    }
    config.sampling = {**common.sampling(), "height": 128, "width": 128, "num_frames": 17, "fps": 8.0}
    return config.lock()


def _vae() -> dict:
    return {
        "spatial": {"channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_groups": 8},
        "temporal": {
            "filters": 16,
            "channel_multipliers": (1, 2, 2, 4),
            "num_res_blocks": 1,
            "norm_groups": 8,
            "temporal_downsample": (False, True, True),
        },
        "micro_frame_size": 17,
        "frame_batch": 0,
    }
