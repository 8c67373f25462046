"""Train an SReT: `python train.py --config=configs/digits.py [--workdir=runs/digits] [--config.any.field=value]`."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sret_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/; --config.key=value changes a key.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, learning curves. Default: runs/<name of the config>."
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Train, or go on where the workdir's last checkpoint stands."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; flags start with --")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        # Orbax and TFDS speak through this logger, of every file that they open and again of what they raise.
        logging.get_absl_logger().setLevel("CRITICAL")
    from sret_jax.training.loop import train  # slow to import: flags are checked first

    workdir = _WORKDIR.value or f"runs/{Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem}"
    try:
        train(_CONFIG.value, workdir)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        rest = app.parse_flags_with_usage(argv)
        _CONFIG.value.keys()  # a file that does not load is reported when it is first used
    except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.args and isinstance(cause.args[0], BaseException):  # ml_collections wraps one in another
            cause = cause.args[0]
        sys.exit(f"error: --config: {str(cause.args[0] if cause.args else cause).strip()}")
    return rest


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
