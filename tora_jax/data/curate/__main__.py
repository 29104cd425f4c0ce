"""The command: `python -m tora_jax.data.curate`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from importlib import resources

from absl import flags
from ml_collections import config_flags

from tora_jax import command_line
from tora_jax.errors import UserError
from tora_jax.io.files import tuples

USAGE = """Makes training shards of raw videos: cuts, measures, filters and captions them.

  python -m tora_jax.data.curate --config configs/curate.py --input 'videos/**/*.mp4' --output DIR

Run again, it goes on where it was stopped. Flags after -- are Beam's, such as --runner=DataflowRunner.
"""


def define_flags(values: flags.FlagValues, argv: list[str]) -> None:
    to = {"flag_values": values}
    default = str(resources.files("tora_jax.configs").joinpath("curate.py"))
    config_flags.DEFINE_config_file("config", default, "Options of all stages.", sys_argv=argv, **to)
    flags.DEFINE_boolean("help", False, "Shows this.", short_name="h", **to)
    flags.DEFINE_multi_string("input", [], "Pattern of the videos; ** = any folders. Repeatable.", **to)
    flags.DEFINE_string("output", None, "Folder for shards, report, and what is remembered between runs.", **to)
    flags.DEFINE_integer("workers", 1, "Processes, without a runner of Beam's.", **to)


def main(argv: list[str], check_interrupt: Callable[[], None]) -> None:
    own, _, rest = "\0".join(argv).partition("\0--\0")
    args = command_line.parse(own.split("\0"), define_flags, USAGE, ())
    if not args.input or not args.output:
        raise UserError("give --input and --output, see --help")
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; give at least 1")
    logging.getLogger().setLevel(logging.ERROR)  # Beam tells all that it does, from its import on
    from tora_jax.data.curate import pipeline

    options = tuples(args.config.to_dict())
    stats = pipeline.run(args.input, args.output, options, args.workers, tuple(filter(None, rest.split("\0"))))
    found, clips = stats["files"], stats["clips"]
    print(
        f"{found['used']} of {found['total']} files used, {clips['kept']} of {clips['total']} clips kept, "
        f"{clips['kept seconds'] / 60:.1f} minutes: {stats['data']}"
    )


if __name__ == "__main__":
    command_line.run(main, ["curate", *sys.argv[1:]], "run again to go on")
