"""The one exception that means "the caller can mend this", and how its message shows values."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

# Letters of a value that are shown.
_LONGEST = 200


class UserError(ValueError):
    """A mistake in what the user gave: its message says what was wrong, what was expected and what to do.

    The scripts print the message alone and exit with status 1. Any other exception is a defect
    of this library and keeps its traceback.
    """


def brief(value: object, form: Callable[[object], str] = str) -> str:
    """A value for a message: it may be anything, of any length, but what comes back is short and on one line.

    Args:
      value: what a user or a file gave.
      form: `str` or `repr`.
    """
    try:
        text = form(value)
    except (RecursionError, ValueError):  # lists in lists without end, whole numbers of thousands of digits
        return f"a {type(value).__name__} too long to be shown"
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[:_LONGEST])
    return shown + "…" * (len(text) > _LONGEST)


@contextlib.contextmanager
def options_named(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors name options as the caller's user gives them.

    Args:
      names: what stands for an argument of a function that fails, such as {"ema=True": "--ema"}.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        for argument, option in names.items():
            text = text.replace(argument, option)
        raise UserError(text) from error
