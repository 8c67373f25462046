"""Makes soft labels (FKD): `python -m sret_jax.distill --teacher=WEIGHTS --data=IMAGES --out=LABELS`."""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c("the same command goes on")

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sret_jax.console import silence_libraries
from sret_jax.data.image_file import WHITE
from sret_jax.data.pack import with_progress
from sret_jax.data.sources import Source, open_source
from sret_jax.distill.generate import generate
from sret_jax.distill.recipe import Recipe
from sret_jax.files import expand
from sret_jax.training.distributed import connect

_DEFAULTS = Recipe(teacher="")


def main() -> None:
    """Make what the flags ask for, with a progress bar on a terminal, and say how to train from it."""
    args = _parse_args()
    silence_libraries()
    try:
        done = with_progress("images", lambda advance: _generate(args, advance))
    except SystemExit as end:
        if jax.process_count() > 1:  # at a usual exit JAX waits for the others, and they wait for this one's units
            print(end, file=sys.stderr, flush=True)
            os._exit(1)
        raise
    if jax.process_index() == 0:
        keys: dict[str, Any] = {"distill.soft_labels": done}
        keys |= {
            f"distill.{name}": getattr(args, name)
            for name in ("label_type", "temperature")
            if getattr(args, name) != getattr(_DEFAULTS, name)
        }
        if tuple(args.background) != WHITE:
            keys["data.background"] = tuple(args.background)
        print(f"{done} is read by", shlex.join(f"--config.{key}={value}" for key, value in keys.items()))


def _generate(args: argparse.Namespace, advance: Callable[[int, int], object]) -> Path:
    connect(ConfigDict({name: getattr(args, name) for name in ("coordinator", "processes", "process")}))
    return generate(
        Recipe(**{field: getattr(args, field) for field in Recipe._fields}),
        _open(args, args.split),
        _open(args, args.eval_split),
        args.out,
        eval_crop_ratio=args.eval_crop_ratio,
        batch_size=args.batch_size,
        authors_layout=args.authors_layout,
        process=jax.process_index(),
        processes=jax.process_count(),
        num_threads=args.threads,
        num_workers=args.workers,
        max_broken=args.max_broken,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        advance=advance,
    )


def _open(args: argparse.Namespace, split: str) -> Source:
    """A split of `--data`, which is a folder of images or the name of a dataset."""
    if os.path.isdir(os.path.join(expand(args.data), "train")):
        source = open_source("folder", split, args.data)
    else:
        source = open_source(args.data, split, args.data_path)
    return dataclasses.replace(source, background=tuple(args.background))


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sret_jax.distill",
        description="Evaluates a teacher, then keeps what it says of many crops of each image, for students to learn "
        "from: FKD, Shen and Xing, ECCV 2022. What was interrupted goes on with the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_argument_group("what to make")
    what.add_argument(
        "--teacher",
        required=True,
        default=argparse.SUPPRESS,
        help="weights (a converted file, a .pth, the workdir of a run), MODEL=WEIGHTS, or MODULE:FUNCTION, which "
        "returns a function from images to logits; several, with commas, are averaged",
    )
    what.add_argument(
        "--data",
        required=True,
        default=argparse.SUPPRESS,
        help="a folder with train/<class>/<image>, or the name of a dataset",
    )
    what.add_argument("--out", required=True, default=argparse.SUPPRESS, help="the folder to write")
    what.add_argument("--num-crops", type=int, default=_DEFAULTS.num_crops, help="of each image")
    what.add_argument("--label-type", default=_DEFAULTS.label_type, help="how much of a distribution is kept")
    what.add_argument("--temperature", type=float, default=_DEFAULTS.temperature, help="divides the teacher's logits")
    what.add_argument("--reference", default="", help="soft labels of this type whose crops are taken")
    what.add_argument("--authors-layout", action="store_true", help="write a file for each image, for PyTorch")
    low_high: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    what.add_argument("--crop-area", **low_high, default=_DEFAULTS.crop_area, help="as a part of the image's")
    what.add_argument("--crop-aspect", **low_high, default=_DEFAULTS.crop_aspect, help="width / height")
    what.add_argument("--flip", type=float, default=_DEFAULTS.flip, help="probability of a crop to be mirrored")
    what.add_argument("--seed", type=int, default=_DEFAULTS.seed, help="decides on crops and flips")
    teacher = parser.add_argument_group("the teacher's input")
    teacher.add_argument("--image-size", type=int, default=0, help="pixels; 0 is its own, and for a function 224")
    rgb: dict[str, Any] = {"type": float, "nargs": 3, "metavar": ("R", "G", "B")}
    teacher.add_argument("--mean", **rgb, default=_DEFAULTS.mean, help="of a function's input, RGB from 0 to 1")
    teacher.add_argument("--std", **rgb, default=_DEFAULTS.std, help="likewise")
    teacher.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default=_DEFAULTS.dtype, help="of its weights and computation"
    )
    data = parser.add_argument_group("the data")
    data.add_argument("--data-path", default="", help="the folder with TFDS datasets, where it is not TFDS's own")
    data.add_argument("--split", default="train", help="to label")
    data.add_argument("--eval-split", default="validation", help="to evaluate the teacher on before")
    data.add_argument(
        "--eval-crop-ratio",
        type=float,
        default=0.0,
        help="part of the shorter side that is kept then; 0 is what the teacher's own run kept, or 0.875",
    )
    data.add_argument(
        "--background",
        type=int,
        nargs=3,
        metavar=("R", "G", "B"),
        default=WHITE,
        help="of transparent images, 0 to 255",
    )
    data.add_argument("--max-broken", type=int, default=100, help="images that may be unreadable")
    how = parser.add_argument_group("how to compute")
    how.add_argument("--batch-size", type=int, default=256, help="crops in a batch, on each device")
    how.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 16), help="that decode, in each worker")
    how.add_argument("--workers", type=int, default=0, help="processes that decode; 0 is this one")
    how.add_argument("--coordinator", default="", help='"host:port" of process 0, where nothing else says it')
    how.add_argument("--processes", type=int, default=0, help="how many share the images")
    how.add_argument("--process", type=int, default=-1, help="which of them this is")
    args = parser.parse_args()
    args.mean, args.std, args.crop_area, args.crop_aspect = map(
        tuple, (args.mean, args.std, args.crop_area, args.crop_aspect)
    )
    if not all(0 <= value <= 255 for value in args.background):
        parser.error(f"--background is {args.background}, expected three numbers of 0 to 255")
    return args


if __name__ == "__main__":
    main()
