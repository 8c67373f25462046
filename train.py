"""Train or evaluate an SReT: `python train.py --config=configs/digits.py [--workdir=...] [--config.any.key=value]`."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from sret_jax.errors import UserError
from sret_jax.training.config import check_config

_CONFIG = config_flags.DEFINE_config_file("config", help_string="A file of configs/; --config.key=value changes a key.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, learning curves. Default: runs/<name of the config>."
)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Train, or go on where the workdir's last checkpoint stands; with --config.mode=eval, evaluate."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; flags start with --")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        # Orbax and TFDS speak through this logger, of every file that they open and again of what they raise.
        logging.get_absl_logger().setLevel("CRITICAL")
    # Slow to import: flags are checked first.
    from sret_jax.training.distributed import connect
    from sret_jax.training.evaluation import evaluate
    from sret_jax.training.loop import train
    from sret_jax.training.preemption import EXIT_STATUS, Preempted

    config = _CONFIG.value
    workdir = _WORKDIR.value or f"runs/{Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem}"
    try:
        check_config(config)
        connect(config.distributed)
        (evaluate if config.mode == "eval" else train)(config, workdir)
    except Preempted as end:
        print(end, file=sys.stderr)
        sys.exit(EXIT_STATUS)
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
