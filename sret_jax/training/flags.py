"""The command line of every program that takes a config: `--config=configs/sret_t.py --config.any.key=value`."""

import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from sret_jax.console import replace_what_cannot_be_shown, silence_libraries
from sret_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/; --config.key=value changes a key.")
flags.mark_flag_as_required("config")


def run(main: Callable[[list[str]], object]) -> None:
    """Parse the flags and call `main` with what is not one; a user's mistake ends the program with its message.

    Args:
      main: takes the program's name and the other arguments.
    """

    def main_in_peace(argv: list[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            silence_libraries()
        try:
            main(argv)
        except UserError as error:
            sys.exit(f"error: {error}")

    replace_what_cannot_be_shown()
    app.run(main_in_peace, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = app.parse_flags_with_usage(argv)
        CONFIG.value.keys()  # a file that does not load is reported when it is first used
    except (AttributeError, KeyError, OSError, OverflowError, SyntaxError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.args and isinstance(cause.args[0], BaseException):  # ml_collections wraps one in another
            cause = cause.args[0]
        sys.exit(f"error: --config: {str(cause.args[0] if cause.args else cause).strip()}")
    return rest
