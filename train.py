"""Train or evaluate an SReT: `python train.py --config=configs/digits.py [--workdir=...] [--config.any.key=value]`."""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c("the same command goes on from the last checkpoint")

import contextlib
import signal
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from sret_jax.training.flags import CONFIG, run

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run: checkpoints, metrics, learning curves. Default: runs/<name of the config>."
)


def main(argv: list[str]) -> None:
    """Train, or go on where the workdir's last checkpoint stands; with --config.mode=eval, evaluate."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {' '.join(argv[1:])}; flags start with --")
    # Slow to import: flags are checked first.
    from sret_jax.host_memory import keep_freed_memory
    from sret_jax.training.compilation_cache import use_compilation_cache
    from sret_jax.training.config import check_config
    from sret_jax.training.distributed import connect
    from sret_jax.training.evaluation import evaluate
    from sret_jax.training.loop import train
    from sret_jax.training.lost_hosts import one_line_for_lost_hosts
    from sret_jax.training.preemption import Preempted

    config = CONFIG.value
    workdir = _WORKDIR.value or f"runs/{Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem}"
    check_config(config)
    connect(config.distributed)
    keep_freed_memory()
    use_compilation_cache(config, workdir)
    if config.mode == "eval":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which `connect` may have taken over: here is nothing to save
    verbose = flags.FLAGS["verbosity"].present
    try:
        with contextlib.nullcontext() if verbose else one_line_for_lost_hosts():
            (evaluate if config.mode == "eval" else train)(config, workdir)
    except Preempted as end:
        print(end, file=sys.stderr)
        sys.exit(end.status)


if __name__ == "__main__":
    run(main)
