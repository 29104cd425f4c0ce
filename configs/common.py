"""What the configs share. A config file holds only what differs from here.

`--config configs/tora.py:variant=3B/2` calls `get_config("variant=3B/2")`; `--config.sampling.steps=10` changes one
value. Configs are locked: a wrong name ends with the right one.
"""

from ml_collections import ConfigDict


def parse_arg(arg: str | None, **defaults) -> ConfigDict:
    """Reads "name=value,flag" into the types of the defaults; a name on its own means True.

    Raises:
      ValueError: for a name that is not among the defaults, or a value of another type.
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        name, _, text = part.partition("=")
        if name not in defaults:
            raise ValueError(f"unknown argument {name!r} of this config; it has {', '.join(defaults) or 'none'}")
        kind = type(defaults[name])
        values[name] = text.lower() in ("", "true", "1") if kind is bool else kind(text)
    return ConfigDict(values)


def opensora_vae() -> dict:
    """The released v1.2 video VAE."""
    return {
        "spatial": {"channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_groups": 32},
        "temporal": {
            "filters": 128,
            "channel_multipliers": (1, 2, 2, 4),
            "num_res_blocks": 4,
            "norm_groups": 32,
            "temporal_downsample": (False, True, True),
        },
        "micro_frame_size": 17,
        "frame_batch": 4,
    }


def t5_xxl() -> dict:
    """The T5 v1.1 XXL encoder."""
    return {
        "vocab_size": 32128,
        "width": 4096,
        "num_heads": 64,
        "head_dim": 64,
        "mlp_dim": 10240,
        "depth": 24,
    }


def sampling() -> dict:
    """Defaults of `sample.py`; its flags override them."""
    return {
        "prompt": "a red star moves over blue waves.",
        "negative_prompt": "",
        "trajectory": ("arc",),
        "resolution": "",
        "aspect_ratio": "16:9",
        "height": 0,
        "width": 0,
        "num_frames": 51,
        "fps": 24.0,
        "steps": 30,
        "guidance": 7.0,
        "trajectory_guidance": 1.0,
        "seed": 0,
    }
