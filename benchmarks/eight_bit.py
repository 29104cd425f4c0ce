"""What 8 bits change: one video with the denoiser's kernels in 8 bits, and the same with all of them.

  python -m benchmarks.eight_bit --weights DIR [--steps 50]
  python -m benchmarks.eight_bit --config configs/tora_cogvideox.py:small      random weights

Prints one JSON line: the size of the denoiser both ways, and how far the last latents and the pixels are apart. Random
weights say how far rounding goes through the steps, not how a video looks.
"""

import gc
import json
import sys

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags
from tora_jax.configs import common

from tora_jax import command_line, generate, load

DEFAULT = "configs/tora_cogvideox.py:small"


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    config_flags.DEFINE_config_file("config", DEFAULT, "Config of random weights.", sys_argv=argv, **to)
    flags.DEFINE_boolean("help", False, "Shows this.", short_name="h", **to)
    flags.DEFINE_string("weights", None, "Release folder, in place of random weights.", **to)
    flags.DEFINE_integer("steps", None, "Of the sampler; none = the config's.", **to)
    flags.DEFINE_integer("num_frames", None, "None = the config's.", **to)
    flags.DEFINE_integer("height", None, "Pixels; none = the config's.", **to)
    flags.DEFINE_integer("width", None, "Pixels; none = the config's.", **to)


def main(argv: list[str], _) -> None:
    args = command_line.parse(argv, define_flags, __doc__, common.training())
    command_line.use_compilation_cache()
    config = None if args.weights else args.config.to_dict()
    names = ("steps", "num_frames", "height", "width")
    settings = {name: args[name].value for name in names if args[name].value is not None}
    found, sizes = [], []
    for eight_bit in (False, True):
        models = load(args.weights, config=config, low_memory=True, eight_bit=eight_bit)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(models.params["tora"])))
        found.append(generate(models, trajectories="arc", **settings))
        del models
        gc.collect()  # of a card, one denoiser at a time
    plain, small = found
    difference = np.square(small.latents - plain.latents).mean() / np.square(plain.latents).mean()
    pixels = np.abs(small.video.astype(np.int16) - plain.video.astype(np.int16))
    figures = {
        "weights": args.weights or "random",
        "device": jax.devices()[0].device_kind,
        "frames, height, width": plain.video.shape[:3],
        "gib": [round(size / 2**30, 3) for size in sizes],
        "latents_relative_rms": float(f"{np.sqrt(difference):.3g}"),
        "pixels_mean": round(float(pixels.mean()), 3),
        "pixels_largest": int(pixels.max()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    command_line.run(main, sys.argv)
