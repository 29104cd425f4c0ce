"""What the configs share beside the sizes of models. A config file holds only what differs from here.

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
            "wide_embed": ("fsdp", "seq"),
            "hidden": "tensor",
            "heads": ("tensor", "seq"),
        },
        "resume": False,  # goes on from the newest checkpoint, as the run began
        "restartable": False,  # `resume` starts the run where there is nothing to go on with: what a launcher repeats
        "resume_anyway": False,  # takes settings, weights or clips that are not those that the run began with
        "from_video_vae": False,  # the motion VAE starts as the video VAE of the weights
        "accumulate": 1,  # micro-batches that a batch is cut into
        "ema": 0.99,
        "skip_above": 10.0,  # a step is skipped whose loss is so many times the largest of late; 0 = none
        "skip_at_most": 10,  # steps in a row that are skipped, also where a loss is not finite; then the run stops
        "hang_after": 1800,  # seconds without a step, after which the process ends for others to start again; 0 = never
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
            "object_masks": False,
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


VAE_PHASES = {  # and what trains in each
    "spatial": "spatial_vae/.*",
    "causal": "temporal_vae/.*",
    "joint": ".*",
    "decoder": "spatial_vae/(decoder|post_quant_conv)/.*",  # latents stay as they are
}


def vae_part(part: str, phase: str) -> tuple[str, ...]:
    """`train` of a VAE's phase.

    Raises:
      ValueError: there is no such phase.
    """
    if phase not in VAE_PHASES:
        raise ValueError(f"phase={phase}: there are {', '.join(VAE_PHASES)}")
    return (f"{part}/{VAE_PHASES[phase]}",)


def vae_loss(phase: str) -> dict:
    """Weights of `losses.vae_loss` in a phase."""
    terms = {"l1": 0.1, "l2": 1.0, "frame": 0.0, "coarse": 0.0, "identity": 0.0, "video": 0.0}
    terms |= {"kl_spatial": 0.0, "kl": 0.0, "near_objects": 0.0}
    changes = {
        "spatial": {"frame": 1.0, "kl_spatial": 1e-4},
        "causal": {"identity": 1.0, "kl": 1e-4},
        "decoder": {"frame": 1.0, "near_objects": 8.0},
        "joint": {"frame": 0.2, "identity": 0.02, "video": 1.0, "kl_spatial": 1e-4, "kl": 1e-4},
    }
    return {**terms, **changes[phase]}


# The terms that a VAE without a spatial half does not have.
ONE_NET = {"frame": 0.0, "identity": 0.0, "kl_spatial": 0.0}


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
