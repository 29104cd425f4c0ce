"""Lines on stderr that say what was taken, where there was a choice."""

from __future__ import annotations

import sys


def note(text: str) -> None:
    """Prints a line for the user."""
    print(f"convert_weights: note: {text}", file=sys.stderr)
