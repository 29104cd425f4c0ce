"""The one exception that means "the user can fix this"."""

from collections.abc import Sequence


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
