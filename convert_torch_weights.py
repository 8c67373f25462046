"""Official PyTorch checkpoints in, and back out: `python convert_torch_weights.py SReT_S.pth weights/sret_s`."""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()

import argparse
import ast
import sys
import warnings

from sret_jax import UserError, load_variables
from sret_jax.console import replace_what_cannot_be_shown, silence_libraries
from sret_jax.weights.convert import convert
from sret_jax.weights.download import download, sha256


def main() -> None:
    """Convert, and say what was read and written."""
    args = _parse_args()
    replace_what_cannot_be_shown()
    silence_libraries()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    *source, destination = args.paths
    options = {key: getattr(args, key) for key in ("num_classes", "ema", "reverse", "overwrite")}
    try:
        if args.download:
            source = [download(args.model)]
            print(f"fetched  {source[0]}: SHA-256 {sha256(source[0])}")
        model = convert(source[0], destination, name=args.model, fields=args.field, **options)
        if args.check:
            from sret_jax.classify import classify  # needs Grain and Pillow

            classes = classify(args.check, model, load_variables(destination, model))
            print(f"check    {args.check}: " + ", ".join(f"class {c} {p:.1%}" for c, p in classes))
    except UserError as error:
        sys.exit(f"error: {error}")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog="docs/weights.md shows each of these at work.")
    add = parser.add_argument
    add("paths", nargs="+", metavar="SRC DST", help="DST ends in .safetensors, or is a folder; no SRC with --download")
    add("--model", default="", help="name of the model, where SRC does not decide it")
    add("--field", action="append", default=[], metavar="NAME=VALUE", help="a field that differs from the model's")
    add("--num-classes", type=int, help="classes of the head, which is fresh if SRC has others")
    add("--ema", action="store_true", help="take the weights' moving average from SRC")
    add("--reverse", action="store_true", help="write the official layout of PyTorch: DST ends in .pth")
    add("--overwrite", action="store_true", help="replace DST")
    add("--check", metavar="IMAGE", help="classify an image with what was written")
    add("--download", action="store_true", help="fetch the authors' checkpoint of --model as SRC")
    args = parser.parse_args()
    if len(args.paths) != (1 if args.download else 2) or (args.download and not args.model):
        parser.error("expected SRC DST, or --download --model=NAME DST")
    try:
        pairs = [text.partition("=") for text in args.field]
        args.field = {name: ast.literal_eval(value) for name, _, value in pairs}
    except (SyntaxError, ValueError):
        parser.error("expected --field=NAME=VALUE, for example --field='widths=(64, 128, 256)'")
    return args


if __name__ == "__main__":
    main()
