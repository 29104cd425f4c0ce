"""The released Tora, on CogVideoX-5B: sampling with its weights, and training of its motion modules.

  python sample.py --weights DIR --prompt "..." --trajectory path.txt          DIR: of convert_weights tora_cogvideox
  python train.py --config configs/tora_cogvideox.py:stage=1 --weights DIR --workdir runs/dense \\
      --config.data.sources="('clips',)"
  python train.py --config configs/tora_cogvideox.py:stage=2 --weights runs/dense/release --workdir runs/sparse ...
  python train.py --config configs/tora_cogvideox.py:small,stage=1 ...         three blocks, on sprites
  python train.py --config configs/tora_cogvideox.py:runlocal ...              the same, shrunk to seconds on a laptop

As in the released training (sat/configs/tora of alibaba/Tora at 9a23dce), the extractor and the fusers train, and all
else stays as CogVideoX left it; batch norms move their statistics. LoRA: --config.lora.rank=16 adapts attention
instead.

Arguments: `variant` (5B or DEPTHxWIDTHxHEADS/PATCH); `i2v`: image to video; `front_end`: sat or diffusers, see
models/cogvideox_tora.py; `stage`: 1 trains on dense flow, 2 on sparse trajectories; `small`: a small model, of which
everything trains; `runlocal`: the least size, for a few steps.
"""

from ml_collections import ConfigDict
from tora_jax.configs import common, model_sizes


def get_config(arg: str | None = None) -> ConfigDict:
    arg = common.parse_arg(arg, variant="5B", i2v=False, front_end="sat", stage=1, small=False, runlocal=False)
    if arg.stage not in (1, 2):
        raise ValueError(f"stage={arg.stage}: there are 1 (dense flow) and 2 (sparse trajectories)")
    config = ConfigDict(
        model_sizes.trained_cogvideox(
            arg.variant, i2v=arg.i2v, front_end=arg.front_end, small=arg.small, runlocal=arg.runlocal
        )
    )
    config.update(common.training())
    config.job = "tora"
    config.train = (r"tora/extractor/.*", r"tora/cogvideox/blocks/motion_fuser/.*")
    config.lora.kernels = (r"tora/cogvideox/blocks/attn/(q|k|v|proj)/kernel",)
    config.steps = 15_000
    config.optim.lr = 1e-4 if arg.stage == 1 else 5e-5
    config.loss = {
        "timesteps": "uniform",
        "transform": False,
        "drop_text": 0.1,
        "drop_motion": 0.0,  # the released weights have no null trajectory
        "path_weight": 0.0,
    }
    config.data.motion = "dense" if arg.stage == 1 else "sparse"
    config.data.buckets = (common.bucket(49, 480, 720, batch=16, fps=8.0),)
    config.evaluation.clips = 4
    if arg.small:
        config.train = (r"tora/.*", r"t5/.*")
        config.steps = 200 if arg.stage == 1 else 1000
        config.optim = {**common.quick(2.5e-3), "optimizer": "muon", "muon_rms": 0.8}
        config.ema = 0.99
        config.data.buckets = (common.bucket(17, 128, 128, batch=8),)
        config.data.tracks, config.data.max_tracks = "given", 3
    if arg.runlocal:
        config.update(common.few_steps())
        config.data.buckets = (common.bucket(9, 32, 32, batch=2),)
    return config.lock()
