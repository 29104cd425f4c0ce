"""What the configs share. A config file holds only what differs from here.

`--config configs/tora.py:variant=3B/2` calls `get_config("variant=3B/2")`; `--config.sampling.steps=10` changes one
value. Configs are locked: a wrong name ends with the right one.
"""

from ml_collections import ConfigDict
from tora_jax.configs import sampling


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


def opensora(variant: str = "XL/2") -> dict:
    """Tora on the released sizes."""
    return {
        "tora": {
            "stdit": {
                "variant": variant,
                "caption_channels": 4096,
                "caption_length": 300,
                "base_resolution": 512.0,
                "remat": "nothing_saveable",  # in training, the activations between pairs of blocks alone
                "dtype": "bfloat16",
            },
            "fuser": "adaptive_norm",
            "placement": "temporal",
            "motion_features": 128,
        },
        "vae": opensora_vae(),
        "motion_vae": opensora_vae(),
        "t5": {**t5_xxl(), "dtype": "bfloat16"},
        "sampling": {**sampling.section(), "resolution": "240p", "segment": 204},
    }


SMALL = "3x192x6/2"  # trained in all three jobs, whose weights must be of one size; four times faster than what ships


def small(variant: str = "4x160x5/1") -> dict:
    """The small model: every part of the real chain at 128x128 pixels and 17 frames, in seconds on a laptop."""
    vae = {
        "spatial": {"channels": (16, 32, 64, 64), "layers_per_block": 1, "norm_groups": 8, "latent_channels": 8},
        "temporal": {
            "channels": 8,
            "latent_channels": 32,
            "inner_channels": 32,
            "filters": 32,
            "channel_multipliers": (1, 2, 2),
            "num_res_blocks": 1,
            "norm_groups": 8,
            "temporal_downsample": (True, True),
            "causal_norm": True,  # trained from scratch: see `CausalVAE`
            "shortcut": True,
        },
        "micro_frame_size": 17,
        "frame_batch": 0,
        "spatial_scaling": 1.0,
        "latent_shift": (0.0,) * 32,
        "latent_scale": (1.0,) * 32,
    }
    return {
        "tora": {
            "stdit": {
                "variant": variant,
                "in_channels": 32,
                "caption_channels": 64,
                "caption_length": 48,
                "base_resolution": 128.0,
                "remat": "none",
                "dtype": "float32",
            },
            "fuser": "adaptive_norm",
            "placement": "temporal",
            "motion_features": 64,
            "time_scale": 5.0,  # a small video's colours and paths are settled in much noise: see docs/LOG.md
            "data_std": 0.25,  # about that of the smaller principal components of a patch, whose numbers are 128
        },
        "vae": vae,
        "motion_vae": vae,
        "t5": {
            "vocab_size": 1024,
            "width": 64,
            "num_heads": 4,
            "head_dim": 16,
            "mlp_dim": 128,
            "depth": 2,
            "dtype": "float32",
        },
        "sampling": {
            **sampling.section(),
            "prompt": "a red star over blue waves.",
            "height": 128,
            "width": 128,
            "num_frames": 17,
            "fps": 8.0,
            "steps": 15,
            "guidance": 2.5,
            "trajectory_guidance": 1.5,
        },
    }


def tiny() -> dict:
    """The small model's parts at the least size that works, for `runlocal`: they learn nothing."""
    config = small()
    spatial = {**config["vae"]["spatial"], "channels": (4, 4, 4, 4), "norm_groups": 2}
    temporal = {**config["vae"]["temporal"], "filters": 4, "channel_multipliers": (1, 1, 2), "norm_groups": 2}
    config["vae"] = config["motion_vae"] = {**config["vae"], "spatial": spatial, "temporal": temporal}
    config["tora"]["stdit"] |= {"variant": "1x16x2/2", "caption_channels": 8}
    config["tora"]["motion_features"] = 8
    config["t5"] |= {"width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, "depth": 1}
    config["sampling"] |= {"height": 32, "width": 32, "num_frames": 5, "steps": 3}
    return config


def training() -> dict:
    """What every job of `train.py` has; a job's config says what differs."""
    return {
        "seed": 0,
        "mesh": "",  # such as "data=8,fsdp=4"; axes left out are 1
        # Logical names of axes -> axes of the mesh, see `sharding`.
        "rules": {
            "batch": ("data", "fsdp"),
            "time": "seq",
            "space": "seq",
            "frames": ("data", "fsdp", "seq", "tensor"),
            "embed": "fsdp",
            "hidden": "tensor",
        },
        "resume": False,
        "from_video_vae": False,  # the motion VAE starts as the video VAE of the weights
        "accumulate": 1,  # micro-batches that a batch is cut into
        "ema": 0.99,
        "log_every": 10,
        "eval_every": 1000,
        "save_every": 500,
        "keep": 2,  # latest checkpoints, beside the best
        "optim": {
            "optimizer": "adamw",
            "lr": 1e-4,
            "warmup": 1000,
            "decay": "constant",
            "final": 1.0,
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-15,  # the reference's
            "muon_rms": 0.2,  # of the optimizer "muon" alone, as is the next one
            "muon_kernels": (r".*/kernel",),
            "clip": 1.0,
            "weight_decay": (),
            "lr_multipliers": (),
        },
        # Rank 0 = off; else adapters of these kernels train, in the place of what `train` says.
        "lora": {
            "rank": 0,
            "alpha": 16.0,
            "kernels": (r"tora/stdit/blocks/temporal/(attn|cross_attn|mlp)/\w+/kernel",),
        },
        "data": {
            "sources": (),
            "split": "train",
            "validation": "validation",
            "motion": "none",
            "tracks": "flow",
            "max_tracks": 16,
            "crop": 0,
            "frame_masks": {},
            "workers": 0,
            "prefetch": 2,
            "damaged_share": 0.01,
        },
        # batches: of the validation split. clips: that Tora samples, in so many steps, along the tracks of a split of
        # source, a folder as in data.sources ("" = the first of those, or what it was precomputed from).
        "evaluation": {"batches": 4, "clips": 0, "steps": 10, "source": "", "split": "validation"},
    }


def quick(lr: float) -> dict:
    """The small model's optimizer: minutes, not days."""
    return {**training()["optim"], "lr": lr, "warmup": 100, "decay": "cosine", "final": 0.02, "b2": 0.99}


def few_steps() -> dict:
    """What `runlocal` changes."""
    return {"steps": 4, "log_every": 1, "eval_every": 4, "save_every": 2, "evaluation": {"batches": 1, "steps": 2}}


VAE_PHASES = {"spatial": "spatial_vae/.*", "causal": "temporal_vae/.*", "joint": ".*"}  # and what trains in each


def vae_part(part: str, phase: str) -> tuple[str, ...]:
    """`train` of a VAE's phase.

    Raises:
      ValueError: there is no such phase.
    """
    if phase not in VAE_PHASES:
        raise ValueError(f"phase={phase}: there are {', '.join(VAE_PHASES)}")
    return (f"{part}/{VAE_PHASES[phase]}",)


def vae_loss(phase: str) -> dict:
    """Weights of `training.vae_loss` in a phase."""
    terms = {"l1": 0.1, "l2": 1.0, "frame": 0.0, "coarse": 0.0, "identity": 0.0, "video": 0.0}
    terms |= {"kl_spatial": 0.0, "kl": 0.0}
    changes = {
        "spatial": {"frame": 1.0, "kl_spatial": 1e-4},
        "causal": {"identity": 1.0, "kl": 1e-4},
        "joint": {"frame": 0.2, "identity": 0.02, "video": 1.0, "kl_spatial": 1e-4, "kl": 1e-4},
    }
    return {**terms, **changes[phase]}


def magvit(small: bool) -> dict:
    """A motion VAE in one causal net, pixels to latents of the video VAE's grid."""
    channels = 32 if small else 4
    return {
        "spatial": None,
        "temporal": {
            "channels": 3,
            "latent_channels": channels,
            "inner_channels": channels,
            "filters": 16 if small else 64,
            "channel_multipliers": (1, 2, 4, 4),
            "num_res_blocks": 1 if small else 2,
            "norm_groups": 8 if small else 32,
            "temporal_downsample": (False, True, True),
            "spatial_downsample": (True, True, True),
            "causal_norm": True,
        },
        "micro_frame_size": 17,
        "frame_batch": 0,
        "latent_shift": (0.0,) * channels,
        "latent_scale": (1.0,) * channels,
    }


def bucket(frames: int, height: int, width: int, batch: int, fps: float = 0.0) -> dict:
    """A size of clips; fps 0 takes every frame."""
    return {"frames": frames, "height": height, "width": width, "fps": fps, "batch": batch, "weight": 1.0}


def opensora_buckets(devices: int, fps: float = 24.0, part: int = 2) -> tuple[dict, ...]:
    """Open-Sora v1.2's buckets for videos: 144p to 360p, 51 to 204 frames, in any aspect ratio.

    A device gets 2 to 51 clips there; a half of that is 1 to 25, as in Tora's training. `height` and `width` are
    those of samples in evaluation; a clip has the shape of its own bucket.

    Args:
      devices: over which the batches are split.
    """
    sizes = {"144p": (144, 256, 1.0, (51, 27, 13)), "240p": (240, 426, 0.4, (20, 10, 5))}
    sizes["360p"] = (360, 640, 0.15, (8, 4, 2))
    return tuple(
        {**bucket(frames, height, width, batch // part * devices, fps), "resolution": name, "share": share}
        for name, (height, width, keep, batches) in sizes.items()
        for frames, share, batch in zip((51, 102, 204), (keep, (keep, 0.33), (keep, 0.1)), batches, strict=True)
    )
