"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what the user gave; the message is one line: what is wrong, and what to do.

    The command line prints the message without a traceback and exits with code 2. Everything else
    that is raised is a bug of ours and keeps its traceback.
    """
