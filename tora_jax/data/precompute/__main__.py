"""The command: `python -m tora_jax.data.precompute`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from tora_jax import command_line
from tora_jax.backbones import assembly
from tora_jax.data import motion
from tora_jax.data.precompute.cache import TEXTS, Options, precompute


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    parser = command_line.Parser("python -m tora_jax.data.precompute", "Caches the latents and the motion of clips.")
    parser.add_argument("--source", required=True, help="folder of clips, as in data.sources")
    parser.add_argument("--weights", required=True, help="release folder with the VAEs and the text encoder")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--split", default="train", help="such as train, or a part of it: train[:50%%]")
    parser.add_argument("--num_frames", type=int, required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--fps", type=float, default=Options.fps, help="thin clips out to about this; 0 = as they are")
    parser.add_argument("--motion", choices=motion.KINDS, default=Options.motion)
    parser.add_argument("--tracks", choices=motion.ORIGINS, default=Options.tracks, help="where sparse ones come from")
    parser.add_argument("--max_tracks", type=int, default=Options.max_tracks)
    parser.add_argument("--variants", type=int, default=Options.variants, help="draws of the motion for each clip")
    parser.add_argument("--text", choices=TEXTS, default=Options.text, help="ids: T5 trains along; embedding: frozen")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--batch", type=int, default=8, help="clips encoded together")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode clips; 0 = a thread")
    parser.add_argument("--damaged_share", type=float, default=0.01, help="of the clips, that may be left out")
    args = parser.parse_args(argv[1:])
    names = {field.name for field in dataclasses.fields(Options)} & vars(args).keys()
    options = Options(frames=args.num_frames, **{name: getattr(args, name) for name in names})
    models = assembly.load(weights=args.weights)
    how = {name: getattr(args, name) for name in ("split", "batch", "workers", "damaged_share")}
    print(precompute(models, args.source, args.out, options, **how))


if __name__ == "__main__":
    command_line.run(main, ["precompute", *sys.argv[1:]], "run again to go on")
