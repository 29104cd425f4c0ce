"""The sections of a config that say how large each part of a model is."""

from tora_jax.configs import sampling

SMALL = "3x192x6/2"  # trained in all three jobs, whose weights must be of one size; four times faster than what ships


# CogVideoX was trained on long captions, and makes poor videos of short ones.
COGVIDEOX_PROMPT = (
    "A red hot-air balloon drifts over a wide green valley on a calm, sunny morning. Low white mist lies along the "
    "river below, and rows of dark trees cast long shadows across the fields. The balloon moves slowly through the "
    "picture while the camera stays still. The light is warm and soft, and the mountains in the background are hazy."
)


def trained(variant: str = "XL/2", *, small: bool, runlocal: bool) -> dict:
    """What a job trains: the released sizes, the small model, or the least size that works."""
    return tiny() if runlocal else small_model(SMALL) if small else opensora(variant)


def trained_cogvideox(
    variant: str = "5B", *, small: bool, runlocal: bool, i2v: bool = False, front_end: str = "sat"
) -> dict:
    """The same for the released Tora."""
    options = {"i2v": i2v, "front_end": front_end}
    if runlocal:
        return tiny_cogvideox(**options)
    return small_cogvideox(**options) if small else cogvideox(variant, **options)


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
        "frame_batch": 1,
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


def cogvideox(variant: str = "5B", *, i2v: bool = False, front_end: str = "sat") -> dict:
    """The released Tora, on CogVideoX.

    Args:
      i2v: image to video: the first frame is given in channels of its own, and the weights hold learned positions,
        which the authors' own code does not add.
      front_end: "sat", the authors' own, or "diffusers"; see `models.cogvideox_tora`.
    """
    diffusers = front_end == "diffusers"
    return {
        "backbone": "cogvideox",
        "tora": {
            "cogvideox": {
                "variant": variant,
                "in_channels": 32 if i2v else 16,
                "learned_positions": 226 + 13 * 30 * 45 if i2v else 0,
                "add_positions": diffusers and i2v,
                "final_eps": 1e-5 if diffusers else 1e-6,
                "remat": "nothing_saveable",
                "dtype": "bfloat16",
            },
            "motion_features": 128,
            "front_end": front_end,
            "guidance": "dynamic",
            "keep_fusion": False,
        },
        "vae": {"encoder_chunk": 8 if diffusers else 0, "dtype": "bfloat16"},
        "t5": {**t5_xxl(), "dtype": "bfloat16"},
        "sampling": {
            **sampling.section(),
            "prompt": COGVIDEOX_PROMPT,
            "height": 480,
            "width": 720,
            "num_frames": 49,
            "fps": 8.0,
            "steps": 50,
            "guidance": 6.0,
            "solver": "dpm2m_sde",
            "overlap": 1 if i2v else 0,  # the frame that the next segment begins with
        },
    }


def small_cogvideox(variant: str = "3x192x3/2", *, i2v: bool = False, front_end: str = "sat") -> dict:
    """The released Tora's parts at the size of `small_model`, with its text encoder."""
    config, small = cogvideox(variant, i2v=i2v, front_end=front_end), small_model()
    t5 = small["t5"]
    channels, length, positions = 16, small["tora"]["stdit"]["caption_length"], 5 * 8 * 8
    config["tora"]["cogvideox"] |= {
        "in_channels": 2 * channels if i2v else channels,
        "out_channels": channels,
        "caption_channels": t5["width"],
        "caption_length": length,
        "time_channels": 64,
        "base_grid": (8, 8),
        "learned_positions": length + positions if i2v else 0,
        "remat": "none",
        "dtype": "float32",
    }
    config["tora"]["motion_features"] = 64
    config["vae"] |= {"channels": (16, 32, 64, 64), "layers_per_block": 1, "norm_groups": 8, "dtype": "float32"}
    config["vae"] |= {"latent_channels": channels, "scaling": 1.0}
    config["t5"] = t5
    names = ("prompt", "height", "width", "num_frames", "fps", "steps", "guidance")
    config["sampling"] |= {name: small["sampling"][name] for name in names}
    return config


def tiny_cogvideox(*, i2v: bool = False, front_end: str = "sat") -> dict:
    """`small_cogvideox` at the least size that works, for `runlocal`."""
    config, least = small_cogvideox("1x32x2/2", i2v=i2v, front_end=front_end), tiny()
    length = config["tora"]["cogvideox"]["caption_length"]
    config["tora"]["cogvideox"] |= {"caption_channels": 8, "time_channels": 8, "base_grid": (2, 2)}
    config["tora"]["cogvideox"] |= {"learned_positions": length + 3 * 2 * 2 if i2v else 0}
    config["tora"]["motion_features"] = 8
    config["vae"] |= {"channels": (4, 4, 4, 4), "norm_groups": 2}
    config["t5"] = least["t5"]
    config["sampling"] |= {name: least["sampling"][name] for name in ("height", "width", "steps")} | {"num_frames": 9}
    return config


def small_model(variant: str = "4x160x5/1") -> dict:
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
    config = small_model()
    spatial = {**config["vae"]["spatial"], "channels": (4, 4, 4, 4), "norm_groups": 2}
    temporal = {**config["vae"]["temporal"], "filters": 4, "channel_multipliers": (1, 1, 2), "norm_groups": 2}
    config["vae"] = config["motion_vae"] = {**config["vae"], "spatial": spatial, "temporal": temporal}
    config["tora"]["stdit"] |= {"variant": "1x16x2/2", "caption_channels": 8}
    config["tora"]["motion_features"] = 8
    config["t5"] |= {"width": 8, "num_heads": 2, "head_dim": 4, "mlp_dim": 8, "depth": 1}
    config["sampling"] |= {"height": 32, "width": 32, "num_frames": 5, "steps": 3}
    return config


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
