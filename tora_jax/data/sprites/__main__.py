"""The command: `python -m tora_jax.data.sprites`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tora_jax import command_line
from tora_jax.data.sprites.clips import WORLDS
from tora_jax.data.sprites.dataset import SpritesConfig, build_sprites
from tora_jax.errors import UserError


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m tora_jax.data.sprites", "Writes the sprites set.")
    parser.add_argument("--out", required=True, help="folder for TFDS data")
    parser.add_argument("--train", type=int, default=WORLDS[1].splits["train"], help="clips to train on")
    parser.add_argument("--side", type=int, default=SpritesConfig.side, help="pixels")
    parser.add_argument("--frames", type=int, default=SpritesConfig.frames)
    parser.add_argument("--seed", type=int, default=SpritesConfig.seed)
    parser.add_argument("--version", type=int, default=1, choices=WORLDS, help="2: larger objects, digits in a split")
    args = parser.parse_args(argv[1:])
    for name in ("train", "side", "frames"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    clips = {**WORLDS[args.version].splits, "train": args.train}
    name = f"{args.side}x{args.frames}x{args.train}_seed{args.seed}"
    name = name if args.version == 1 else f"{args.version}_{name}"
    scale = {"side": args.side, "frames": args.frames, "seed": args.seed}
    config = SpritesConfig(name=name, clips=clips, world=args.version, **scale)
    print(build_sprites(args.out, config))


if __name__ == "__main__":
    command_line.run(main, ["sprites", *sys.argv[1:]], "run again to write the set")
