"""`python -m sret_jax` prints the table of models; with `--help`, what other programs there are."""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()

import argparse
import os
import sys

from sret_jax.models.cost import count_macs, count_params
from sret_jax.models.zoo import PUBLISHED, create_model

_PROGRAMS = """programs, each of which knows --help:
  python train.py                           trains and evaluates
  python convert_torch_weights.py           converts PyTorch's checkpoints
  python -m sret_jax.plan                   what a run takes on devices that need not be there
  python -m sret_jax.distill                makes a teacher's soft labels in advance
  python -m sret_jax.data.pack              packs a folder of images
  python -m sret_jax.data.pack_soft_labels  packs the authors' soft labels
  python -m sret_jax.data.show              draws what the network sees"""


def main(arguments: list[str] | None = None) -> None:
    """Print one line for each published model: computed parameters and MACs beside the published figures."""
    parser = argparse.ArgumentParser(
        prog="python -m sret_jax",
        description="Prints the table of models. It takes no arguments.",
        epilog=_PROGRAMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(
            f"unknown arguments {' '.join(unknown)}; expected none for the table of models, or one of the\n{_PROGRAMS}"
        )
    try:
        print(_table(), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _table() -> str:
    lines = [
        "                                        computed                       published on ImageNet-1k",
        "model                        image      parameters            MACs     params   FLOPs   top-1",
    ]
    for name, row in PUBLISHED.items():
        model = create_model(name)
        computed = f"{count_params(model):15,} {count_macs(model):15,}"
        published = f"{row.params:5.1f} M {row.flops:5.1f} G  {row.top1:4.1f} %"
        lines.append(f"{name:28} {model.image_size:5} {computed}    {published}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
