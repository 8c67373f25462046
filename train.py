"""Train an SReT: `python train.py --config=configs/digits.py [--workdir=runs/digits] [--config.any.field=value]`."""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from sret_jax.training.flags import CONFIG, run

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, learning curves. Default: runs/<name of the config>."
)


def main(argv: list[str]) -> None:
    """Train, or go on where the workdir's last checkpoint stands."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; flags start with --")
    from sret_jax.training.loop import train  # slow to import: flags are checked first

    workdir = _WORKDIR.value or f"runs/{Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem}"
    try:
        train(CONFIG.value, workdir)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    run(main)
