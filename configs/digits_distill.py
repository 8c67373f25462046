"""The digits with a smaller SReT than that of configs/digits.py, which teaches it: minutes on a laptop's CPU.

    python train.py --config=configs/digits.py         --workdir=runs/digits
    python train.py --config=configs/digits_distill.py --workdir=runs/digits_distill

With --config.distill.teacher= --config.distill.temperature=1 the same student learns from labels alone.
docs/distillation.md compares them.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """See the file."""
    config = digits.get_config()
    config.epochs = 6

    config.model.widths = (16, 32, 64)
    config.model.heads = (1, 2, 4)
    config.model.blocks = (1, 1, 1)

    config.optimizer.warmup_epochs = 0.5

    config.distill.teacher = "runs/digits"
    config.distill.temperature = 4.0  # it learned from smoothed labels, and is sure of itself
    return config
