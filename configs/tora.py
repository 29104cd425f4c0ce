"""Tora on the released sizes: ST-DiT XL/2, the v1.2 video VAE, T5 v1.1 XXL.

  python sample.py --config configs/tora.py --weights DIR --resolution 480p --aspect_ratio 16:9
  python sample.py --config configs/tora.py:runlocal      the same parts, shrunk to seconds on a laptop

Arguments: `variant` (XL/2, 3B/2 or DEPTHxWIDTHxHEADS/PATCH), `runlocal`.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common, demo


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, variant="XL/2", runlocal=False)
    if arg.runlocal:
        return demo.get_config()
    config = ConfigDict()
    config.tora = {
        "stdit": {
            "variant": arg.variant,
            "caption_channels": 4096,
            "caption_length": 300,
            "base_resolution": 512.0,
            "remat": "none",
            "dtype": "bfloat16",
        },
        "fuser": "adaptive_norm",
        "placement": "temporal",
        "motion_features": 128,
    }
    config.vae = common.opensora_vae()
    config.motion_vae = common.opensora_vae()
    config.t5 = {**common.t5_xxl(), "dtype": "bfloat16"}
    config.sampling = {**common.sampling(), "resolution": "240p"}
    return config.lock()
