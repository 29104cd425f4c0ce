"""The video VAE, in three phases, each from the release folder of the one before, and a fourth that mends what ships.

  python train.py --config configs/vae.py:phase=spatial --workdir runs/spatial --config.data.sources="('clips',)"
  python train.py --config configs/vae.py:phase=causal --weights runs/spatial/release --workdir runs/causal ...
  python train.py --config configs/vae.py:phase=joint --weights runs/causal/release --workdir runs/vae ...
  python train.py --config configs/vae.py:phase=decoder --weights runs/vae/release --workdir runs/decoder ...

spatial: single frames through the spatial VAE. causal: the causal VAE learns to give back the spatial VAE's latents
(the reference's identity loss). joint: both, on pixels. decoder: the spatial VAE's decoder alone, on squares around
objects, which weigh more than the rest; latents stay, and so do the denoisers and cached latents that go with them. The
norms get used to squares: stop at three quarters, and go on with whole frames (`--config.resume`,
`--config.resume_anyway`, `--config.data.crop=0`).

Arguments: `phase`; `backbone=cogvideox`: CogVideoX's VAE, one net that trains in one phase, joint; `small`: the small
model's VAE; `runlocal`: either of them at the least size, for a few steps.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common, model_sizes


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, phase="joint", backbone="opensora", small=False, runlocal=False)
    sizes = {"opensora": model_sizes.trained, "cogvideox": model_sizes.trained_cogvideox}
    if arg.backbone not in sizes:
        raise ValueError(f"backbone={arg.backbone}: there are {', '.join(sizes)}")
    config = ConfigDict(sizes[arg.backbone](small=arg.small, runlocal=arg.runlocal))
    config.update(common.training())
    config.job = "vae"
    config.train = common.vae_part("vae", arg.phase)
    config.loss = common.vae_loss(arg.phase)
    if arg.backbone == "cogvideox":
        if arg.phase != "joint":
            raise ValueError(f"phase={arg.phase}: CogVideoX's VAE is one net, trained in one phase, joint")
        config.loss.update(common.ONE_NET)
    # Two frames show what moves where clips have no labels; the small model's clips have them.
    frames = {"spatial": 1, "decoder": 1 if arg.small else 2}.get(arg.phase, 17)
    config.steps, batch, config.data.crop = 100_000, 32, 256
    config.data.buckets = (common.bucket(frames, 256, 256, batch=batch, fps=24.0),)
    if arg.phase == "decoder":
        config.data.object_masks, config.data.crop = True, 128
    if arg.small:
        config.optim = common.quick(2e-3)
        config.ema, config.eval_every = 0.99, 500
        if arg.phase in ("spatial", "decoder"):
            config.optim.update({"optimizer": "muon", "muon_rms": 0.8})
            # Muon on the layers into and out of the latents spreads them over all directions: see docs/LOG.md.
            config.optim.muon_kernels = (r"!.*(conv_in|conv_out|quant_conv)/kernel", r".*/kernel")
        if arg.phase == "spatial":
            config.loss.coarse = 0.25
        config.steps = {"spatial": 1000, "causal": 100, "joint": 90, "decoder": 1000}[arg.phase]
        config.optim.lr = {"spatial": 2e-3, "causal": 1e-3, "joint": 5e-4, "decoder": 2e-3}[arg.phase]
        config.optim.warmup = {"spatial": 100, "causal": 20, "joint": 20, "decoder": 20}[arg.phase]
        batch = {"spatial": 16, "causal": 8, "joint": 4, "decoder": 8}[arg.phase]
        if arg.backbone == "cogvideox":  # from nothing, in one phase
            config.steps, config.optim.optimizer, config.optim.muon_rms = 400, "muon", 0.8
            config.optim.lr = 2e-3
        config.data.crop = 64
        config.data.buckets = (common.bucket(frames, 128, 128, batch=batch),)
    if arg.runlocal:
        config.update(common.few_steps())
        config.data.crop = 32
        length = 9 if arg.backbone == "cogvideox" else min(frames, 5)
        config.data.buckets = (common.bucket(length, 32, 32, batch=2),)
    return config.lock()
