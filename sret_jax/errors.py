"""The one exception that means "the caller can mend this"."""


class UserError(ValueError):
    """A mistake in what the user gave: its message says what was wrong, what was expected and what to do.

    The scripts print the message alone and exit with status 1. Any other exception is a defect
    of this library and keeps its traceback.
    """
