"""`python -m sret_jax.data.pack FOLDER OUT`: a folder of images becomes a TFDS dataset, without TensorFlow."""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c("the same command goes on")

import argparse
import hashlib
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sret_jax.console import replace_what_cannot_be_shown
from sret_jax.data.folder import FolderExamples, list_classes, list_folder, split_folders
from sret_jax.data.prepared import CHECKSUMS, checksums, read_prepared
from sret_jax.data.shards import Shard, example_features, locked, plan_shards, write_shards
from sret_jax.data.workers import end_if_imported_by_worker
from sret_jax.errors import UserError
from sret_jax.files import expand_local, naming, replace

_LOG = logging.getLogger(__name__)

_VERSION = "1.0.0"

# Lies in the dataset: the hash of what it was made from.
_ORIGIN = "packed_from.sha256"


def pack(
    folder: str, out: str, *, name: str = "", workers: int = 1, advance: Callable[[int, int], object] = lambda *_: None
) -> Path:
    """Packs a folder of images into a dataset that TFDS and `open_source` read in random order.

    An example is the unchanged bytes of a file as `image`, its `label`, and its name below `folder` as `file_name`. The
    examples, their order and the classes are those of `open_source("folder", …)`, so that both give the same batches.
    The sub-folder `val` becomes the split `validation`, others keep their names; a sub-folder without any class of
    `train` is left out.

    The dataset appears under its name when it is complete and every record has been read back. Before that it lies
    beside it as `1.0.0.incomplete`, where the next call goes on with the shards that are missing. The result is the
    same, byte for byte, however often this was interrupted and for any number of workers.

    Args:
      folder: holds `train/<class>/<image>`, `val/<class>/<image>` and so on.
      out: the folder of TFDS datasets to which this one is added, as `out/name/1.0.0`.
      name: of the dataset; by default that of `folder`.
      workers: processes; each writes one file of about 256 MiB at a time.
      advance: called with the images in a file that is complete, and those in all files.

    Returns:
      The dataset's own folder.

    Raises:
      UserError: if `folder` is not a folder of images, an image cannot be read, the name cannot be one of TFDS, another
        dataset is in its place, another process packs it, or `out` cannot be written to.
    """
    end_if_imported_by_worker()
    folder, home = os.path.abspath(expand_local(folder)), expand_local(out)
    name = _checked_name(name or os.path.basename(folder))
    splits = _list_splits(folder)
    home /= name
    complete, incomplete = home / _VERSION, home / f"{_VERSION}.incomplete"
    with locked(home / ".lock", home):
        shards = {split: plan_shards(examples, name, split, incomplete) for split, examples in splits.items()}
        origin = _origin_hash(shards)
        _refuse_others(home, complete, incomplete, origin)
        if not complete.exists():
            with naming(incomplete):
                incomplete.mkdir(exist_ok=True)
                for entry in incomplete.iterdir():
                    if entry.is_symlink():
                        entry.unlink()  # TFDS would write its metadata to where it points
            replace(incomplete / _ORIGIN, origin)
            write_shards(list(itertools.chain(*shards.values())), workers, advance)
            _write_metadata(incomplete, shards)
            os.sync()  # or a power cut could leave the name without the content
            with naming(complete):
                os.replace(incomplete, complete)
    return complete


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"a TFDS dataset cannot be called {name!r}. Expected small letters, digits and _, a letter first: give "
            "another name, such as imagenet2012"
        )
    return name


def _list_splits(folder: str) -> dict[str, FolderExamples]:
    """The splits of a folder under the names that TFDS gives them."""
    sub_folders = split_folders(folder)
    if sub_folders.get("val") != sub_folders.get("validation"):
        raise UserError(f"{folder} has val and validation. Expected one of them: move the other away")
    sub_folders.pop("val", None)  # TFDS's name of it is the other
    class_names = list_classes(folder)
    splits = {}
    for split, sub_folder in sub_folders.items():
        if not any(os.path.isdir(os.path.join(folder, sub_folder, class_name)) for class_name in class_names):
            _LOG.warning("%s is left out: it holds no class of train", os.path.join(folder, sub_folder))
            continue
        if not re.fullmatch(r"[\w-]+", split):
            raise UserError(f"a split of TFDS cannot be called {split!r}. Expected letters, digits, _ and -: rename it")
        splits[split] = list_folder(folder, split)
    for class_name in class_names:
        if not class_name.isprintable() or class_name != class_name.strip():
            raise UserError(
                f"{folder} has a class {class_name!r}, which TFDS cannot keep: it writes one name to a line, in UTF-8. "
                "Expected a name of printable characters, without space at its ends: rename its folders"
            )
    return splits


def _origin_hash(shards: Mapping[str, list[Shard]]) -> str:
    """A hash of the images' names and sizes, their classes, and where the files are cut."""
    digest = hashlib.sha256()
    for split, parts in sorted(shards.items()):
        for line in [split, *parts[0].examples.class_names]:
            digest.update(os.fsencode(line) + b"\n")
        for part in parts:
            digest.update(b"\n".join([*part.examples.names.tolist(), str(part.image_bytes).encode(), b""]))
    return digest.hexdigest() + "\n"


def _refuse_others(home: Path, complete: Path, incomplete: Path, origin: str) -> None:
    """Refuses to add to what was not packed from the same images: TFDS would read the one or the other."""
    ours = {complete: [origin], incomplete: [origin, ""]}  # the second where a kill came before it was written
    with naming(home):
        for entry in sorted(home.iterdir()):
            found = (entry / _ORIGIN).read_text("ascii", "replace") if (entry / _ORIGIN).exists() else ""
            if entry.name != ".lock" and found not in ours.get(entry, []):
                raise UserError(
                    f"{entry} is another dataset, or one packed from other images. Expected nothing, or what an "
                    "interrupted packing of the same images left: give another name or another folder, or delete it"
                )


def _write_metadata(folder: Path, shards: Mapping[str, list[Shard]]) -> None:
    """Adds what TFDS wants to know: features, classes, splits and their files."""
    split_infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(part.examples) for part in parts],
            num_bytes=sum(part.path.stat().st_size for part in parts),
        )
        for split, parts in sorted(shards.items())
    ]
    with naming(folder):
        tfds.folder_dataset.write_metadata(
            data_dir=folder,
            features=example_features(shards["train"][0].examples.class_names),
            split_infos=split_infos,
            version=_VERSION,
            description="A folder of images, packed by sret_jax.data.pack.",
            disable_shuffling=True,  # the order is that of the folder, so that batches are the same
            check_data=False,  # that needs TensorFlow
        )
    replace(folder / CHECKSUMS, checksums(folder))


def main() -> None:
    """Pack, with a progress bar on a terminal, and say how to read the result."""
    parser = argparse.ArgumentParser(prog="python -m sret_jax.data.pack", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="holds train/<class>/<image>, val/<class>/<image> and so on")
    parser.add_argument("out", metavar="OUT", help="the folder of TFDS datasets to which this one is added")
    parser.add_argument("--name", default="", help="of the dataset, by default FOLDER's; imagenet2012 for ImageNet-1k")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, by default one for each core")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error("expected --workers of at least 1")
    done = with_progress(
        "images",
        lambda advance: pack(args.folder, args.out, name=args.name, workers=args.workers, advance=advance),
    )
    splits = read_prepared(done).splits.values()
    print(", ".join(f"{split.name}: {split.num_examples:,} images in {split.num_shards} files" for split in splits))
    print(f"{done} is read by --config.data.source={done.parent.name} --config.data.path={done.parent.parent}")


def with_progress(what: str, pack_it: Callable[[Callable[[int, int], object]], Path]) -> Path:
    """Runs a packing for a command line: with a progress bar on a terminal, and errors that are one line.

    Args:
      what: is counted.
      pack_it: given a function to call with how many more are done, and how many there are.

    Returns:
      What `pack_it` returns.
    """
    replace_what_cannot_be_shown()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task(what, total=None)
            return pack_it(lambda count, total: bar.update(task, advance=count, total=total))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
