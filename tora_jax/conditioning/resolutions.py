"""Named sizes and lengths of videos: Open-Sora's table of resolutions, aspect ratios and numbers of frames."""

from __future__ import annotations

import functools
import json
from importlib import resources

from tora_jax.errors import UserError


@functools.cache
def table() -> dict:
    """Open-Sora's table: sizes by resolution and aspect ratio (as height:width), lengths by name."""
    return json.loads(resources.files("tora_jax").joinpath("assets/aspect_ratios.json").read_text())


def image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """Pixels (height, width) of a named resolution ("240p") at an aspect ratio.

    Args:
      resolution: "144p" to "4k".
      aspect_ratio: width:height, so that "16:9" is landscape. The reference's names are height:width; this
        function alone turns them around.

    Raises:
      UserError: for a name outside the table; the message lists the table's names.
    """
    sizes, ratios = table()["sizes"], table()["ratio_names"]
    if resolution not in sizes:
        raise UserError(f"unknown resolution {resolution!r}; choose one of {', '.join(sizes)}")
    known = {":".join(reversed(name.split(":"))): key for name, key in ratios.items()}
    by_size = sizes[resolution]["hw"]
    names = [name for name, key in known.items() if _key(key, by_size)]
    if aspect_ratio not in names:
        raise UserError(
            f"aspect ratio {aspect_ratio!r} (width:height) is not in the table for {resolution}; "
            f"choose one of {', '.join(names)}"
        )
    height, width = by_size[_key(known[aspect_ratio], by_size)]
    return height, width


def _key(ratio: str, by_size: dict) -> str | None:
    """The table writes the same ratio as "1.00" or "1.0"."""
    return next((key for key in by_size if float(key) == float(ratio)), None)


def frame_count(name: str) -> int:
    """Frames of a named length ("2s" is 51), or of a plain number.

    Raises:
      UserError: for any other text.
    """
    names = table()["num_frames"]
    if name in names:
        return names[name]
    try:
        return int(name)
    except ValueError:
        raise UserError(f"--num_frames {name!r} is neither a whole number nor one of {', '.join(names)}") from None
