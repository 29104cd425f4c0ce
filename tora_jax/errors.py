"""The one exception that means "the user can fix this", and what its messages suggest."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake in what the user gave.

    The command line prints the message without a traceback and exits with code 2. Everything else
    that is raised is a bug of ours and keeps its traceback.

    Attributes:
      message: one line: what is wrong, and what to do.
      details: further lines, where the message announces a list.
    """

    def __init__(self, message: str, details: Sequence[str] = ()):
        super().__init__("\n".join([message, *details]))
        self.message, self.details = message, tuple(details)


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one is most like, for "did you mean"; None where none is near."""
    return next(iter(difflib.get_close_matches(name, known, 1)), None)
