"""`python -m sret_jax.data.pack_soft_labels SRC OUT`: soft labels in the authors' layout become our packed form."""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c("the same command goes on")

import argparse
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sret_jax.data.pack import with_progress
from sret_jax.data.packed_labels import PackedLabels, open_soft_labels, write_packed
from sret_jax.data.soft_labels import FolderLabels, LabelType, SoftLabels
from sret_jax.data.workers import end_if_imported_by_worker
from sret_jax.errors import UserError
from sret_jax.files import expand_local, naming

_IMAGES_PER_FILE = 8192


def pack_soft_labels(
    src: str,
    out: str,
    *,
    label_type: str = "marginal_smoothing_k5",
    num_classes: int = 1000,
    workers: int = 1,
    advance: Callable[[int, int], object] = lambda *_: None,
) -> Path:
    """Packs soft labels of the authors' layout, a file per image, into a few large files that are read at random.

    float32 is rounded to float16, as it is on the way to training anyway: both forms give the same batches.

    What was interrupted goes on where it was; see `write_packed`.

    Args:
      src: the folder in which `train/<class>/<image>.tar` is.
      out: the folder to write.
      label_type: of the labels, which the files do not say.
      num_classes: that they are of.
      workers: processes; each writes one file of 8192 images at a time.
      advance: called with how many more files are complete, and how many there will be.

    Returns:
      The folder that was written.

    Raises:
      UserError: `src` is no such folder or packed already, one of its files cannot be used, and as `write_packed`.
    """
    end_if_imported_by_worker()
    labels = open_soft_labels(src, label_type, num_classes)
    if not isinstance(labels, FolderLabels):
        raise UserError(f"{src} is packed already. Expected the authors' layout, train/<class>/<image>.tar")
    target = Path(os.path.abspath(expand_local(out)))
    keys = labels.keys()
    parts = [keys[start : start + _IMAGES_PER_FILE] for start in range(0, len(keys), _IMAGES_PER_FILE)]
    write_packed(
        target,
        [functools.partial(_read_part, labels, part) for part in parts],
        label_type=LabelType.parse(label_type),
        num_classes=num_classes,
        notes={"packed_from": "the authors' layout"},
        origin=_origin_hash(labels, parts),
        workers=workers,
        advance=advance,
    )
    return target


def _read_part(labels: FolderLabels, keys: list[str]) -> Iterator[tuple[str, SoftLabels]]:
    return ((key, labels.read(key)) for key in keys)


def _origin_hash(labels: FolderLabels, parts: list[list[str]]) -> str:
    """A hash of all names, and of one file for each that is written: those of two teachers have the same names."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(os.fsencode("\n".join([*part, ""])))
        with naming(path := Path(labels.folder, f"{part[0]}.tar")):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def main() -> None:
    """Pack, with a progress bar on a terminal, and say how to read the result."""
    parser = argparse.ArgumentParser(prog="python -m sret_jax.data.pack_soft_labels", description=__doc__)
    parser.add_argument("src", metavar="SRC", help="the folder in which train/<class>/<image>.tar is")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument("--label-type", default="marginal_smoothing_k5", help="of the labels: %(default)s")
    parser.add_argument("--num-classes", type=int, default=1000, help="that the labels are of: %(default)s")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, by default one for each core")
    args = parser.parse_args()
    for name in ("workers", "num_classes"):
        if getattr(args, name) < 1:
            parser.error(f"expected --{name.replace('_', '-')} of at least 1")
    done = with_progress(
        "files",
        lambda advance: pack_soft_labels(
            args.src,
            args.out,
            label_type=args.label_type,
            num_classes=args.num_classes,
            workers=args.workers,
            advance=advance,
        ),
    )
    packed = PackedLabels(done, LabelType.parse(args.label_type), args.num_classes)
    size = sum(path.stat().st_size for path in done.iterdir())
    print(f"{len(packed):,} images with {packed.crops} crops or more, {size / len(packed):,.0f} bytes an image")
    print(f"{done} is read by --config.distill.soft_labels={done} --config.distill.label_type={args.label_type}")


if __name__ == "__main__":
    main()
