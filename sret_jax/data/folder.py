"""A folder of images, `<split>/<class>/<image>`, read as it is: images and classes of torchvision's ImageFolder."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tensorflow_datasets as tfds

from sret_jax.data.keys import label_key
from sret_jax.data.reading import read_patiently
from sret_jax.data.splits import find_parts, named_splits, with_both_names
from sret_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# Those of torchvision's ImageFolder, in upper and lower case.
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

# That list class folders: on a disk over the network most of the time is waiting.
_LISTING_THREADS = 32


@dataclasses.dataclass(frozen=True)
class FolderExamples:
    """Images of a folder, and which class each one is of. Small to keep and to send: names are rows of one array.

    Attributes:
      folder: what the names are relative to.
      class_names: the sub-folders of `train`, sorted: in the order of the labels.
      names: bytes (examples,), `<split>/<class>/<image>` as the file system has it.
      labels: int32 (examples,).
    """

    folder: str
    class_names: tuple[str, ...]
    names: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        path = Path(self.file_name(index))
        image = read_patiently(path.read_bytes, str(path))
        return {"image": image, "label": int(self.labels[index]), "key": self._key(index)}

    def file_name(self, index: int, /) -> str:
        """Path of the file of one example."""
        return os.path.join(self.folder, os.fsdecode(self.names[index]))

    def keys(self) -> list[str]:
        """The keys of all examples."""
        return [self._key(index) for index in range(len(self))]

    def _key(self, index: int) -> str:
        return label_key(os.fsdecode(self.names[index]))


def split_folders(folder: str) -> dict[str, str]:
    """The sub-folders of a folder of images by the names of their splits.

    Each has its own name; `val` and `validation` are one split, where only one of them is there.

    Raises:
      UserError: if the folder cannot be read or has no sub-folder `train`.
    """
    names = _sub_folders(folder)
    if "train" not in names:
        raise UserError(
            f"{folder} has the sub-folders {names}. Expected train/<class>/<image>, and val/<class>/<image> or "
            "another split beside it: the sub-folders of train are the classes. Give the folder in which train is"
        )
    return with_both_names(names)


def list_classes(folder: str) -> tuple[str, ...]:
    """The classes of a folder of images in the order of their labels: the sub-folders of `train`, sorted.

    Names that begin with a dot are hidden, and nothing is made of them; nor of Synology's `@eaDir`.

    Raises:
      UserError: if `train` cannot be read.
    """
    return tuple(_sub_folders(os.path.join(folder, "train")))


def list_folder(folder: str, split: str) -> FolderExamples:
    """Lists the images of one split without opening any, in the order of a hash of their names.

    So any part of a split holds about as much of each class, as in TFDS's datasets, and where an image is added or
    removed the others keep their order.

    The classes are the sub-folders of `train`, in every split. Images may lie deeper than in their class's folder;
    symbolic links are followed; hidden files and folders, whose names begin with a dot, are not there.

    Args:
      folder: holds `train/<class>/<image>`, `val/<class>/<image>` and so on.
      split: a sub-folder, a part of one or several, in TFDS's words: `train`, `train[:99%]`, `train[-500:]+val`.
        `val` and `validation` are one split, where only one of them is there.

    Returns:
      The examples.

    Raises:
      UserError: if a folder cannot be read, there is no such split, it holds no image or a class that `train` lacks, or
        `train` is asked for and holds a class without images. What only looks wrong in the classes is warned of once.
    """
    splits = split_folders(folder)
    class_names = list_classes(folder)
    for oddity in _oddities(folder, class_names):
        _warn_once(oddity)
    # Only what the split speaks of: listing a million images that nobody asked for takes its time.
    listed = {name: _list_split(folder, name, class_names) for name in named_splits(split, splits.values())}
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[len(names)], num_bytes=0)
        for name, (names, _) in listed.items()
    }
    try:
        parts = find_parts(split, infos)
    except ValueError as error:
        raise UserError(
            f"{folder} has no split {split!r}. Expected one of {sorted(splits)} or a part of one, such as "
            f"'train[:99%]' ({str(error).splitlines()[-1]})"
        ) from error
    names, labels = (
        np.concatenate([listed[part.split][column][part.first : part.end] for part in parts]) for column in (0, 1)
    )
    if not len(names):
        raise UserError(
            f"there is no image in {folder}, split {split!r}. Expected files "
            f"{splits.get(split, 'train')}/<class>/<image> whose names end in one of {', '.join(_IMAGE_SUFFIXES)}"
            + "".join(_loose_images(folder, name) for name in listed)
        )
    return FolderExamples(folder, class_names, names, labels)


def _list_split(folder: str, sub_folder: str, class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Names and labels of all images of a sub-folder."""
    present = _sub_folders(os.path.join(folder, sub_folder))
    if unknown := sorted(set(present) - set(class_names)):
        if twins := [name for name in class_names if _look_alike(name) == _look_alike(unknown[0])]:
            raise UserError(
                f"{os.path.join(folder, sub_folder, unknown[0])} is not a class, though it looks like one: it is "
                f"called {unknown[0]!a}, but train has {twins[0]!a}, the same letters in another Unicode form, as "
                "macOS writes them. Expected one form in all splits: rename one of the folders, or all with `convmv -r "
                f"-f utf8 -t utf8 --nfc --notest {folder}`"
            )
        raise UserError(
            f"{os.path.join(folder, sub_folder, unknown[0])} is not a class: train has no sub-folder {unknown[0]!r}"
            + (f", nor {len(unknown) - 1} others of {sub_folder}" if unknown[1:] else "")
            + f". Expected the {len(class_names)} sub-folders of train or some of them: rename or move what differs"
        )
    with concurrent.futures.ThreadPoolExecutor(_LISTING_THREADS) as executor:
        listed = list(executor.map(lambda name: _image_names(folder, os.path.join(sub_folder, name)), present))
    counts = [len(names) for names, _ in listed]
    if sub_folder == "train" and any(counts) and not all(counts):
        empty = [name for name, count in zip(present, counts, strict=True) if not count]
        raise UserError(
            f"{os.path.join(folder, sub_folder, empty[0])} holds no image"
            + (f", nor do {len(empty) - 1} others of its kind" if empty[1:] else "")
            + f". Expected some of each of the {len(class_names)} classes, whose names end in one of "
            f"{', '.join(_IMAGE_SUFFIXES)}: a folder that is not a class has to go, for it shifts the others' labels"
        )
    if others := [name for _, files in listed for name in files]:
        _LOG.warning(
            "%d files in %s are left out, such as %s: images are those whose names end in one of %s",
            len(others),
            os.path.join(folder, sub_folder),
            others[0],
            ", ".join(_IMAGE_SUFFIXES),
        )
    labels = {name: label for label, name in enumerate(class_names)}
    names = np.concatenate([np.array([], np.bytes_), *(names for names, _ in listed)])
    order = np.argsort(_hashes(names), kind="stable")
    return names[order], np.repeat(np.array([labels[name] for name in present], np.int32), counts)[order]


def _oddities(folder: str, class_names: tuple[str, ...]) -> Iterator[str]:
    """What looks wrong in the classes of a folder, in words."""
    train = os.path.join(folder, "train")
    if len(class_names) == 1 and (deeper := _sub_folders(os.path.join(train, class_names[0]))):
        some = ", ".join(deeper[:3]) + ", …" * (len(deeper) > 3)
        yield (
            f"{train} has one sub-folder, {class_names[0]}, which is taken for the only class. Its own sub-folders "
            f"({some}) look like the classes: move them up into {train}, and likewise in the other splits"
        )
    if all(name.isascii() and name.isdigit() for name in class_names):
        by_number = sorted(class_names, key=int)
        if by_number != list(class_names):
            label = next(n for n, (a, b) in enumerate(zip(class_names, by_number, strict=True)) if a != b)
            yield (
                f"the classes of {train} are all numbers, and labels follow the order of their names as text, as "
                f"torchvision's ImageFolder has it: label {label} is the class {class_names[label]}, not "
                f"{by_number[label]}. For labels in the order of the numbers, fill the names up with zeros"
            )
    seen: dict[str, str] = {}
    for name in class_names:
        if (other := seen.setdefault(_look_alike(name), name)) != name:
            yield (
                f"{train} has two classes that look the same, {other!a} and {name!a}: the same letters in two Unicode "
                "forms. If they are one class, move the images of one folder into the other"
            )


def _look_alike(name: str) -> str:
    """What names that look the same have in common: macOS takes accents apart, other systems leave them as typed."""
    return unicodedata.normalize("NFC", name)


@functools.cache
def _warn_once(message: str) -> None:
    """A run lists a folder for each of its splits."""
    _LOG.warning("%s", message)


def _hashes(names: np.ndarray) -> np.ndarray:
    digests = [hashlib.blake2b(name, digest_size=8).digest() for name in names.tolist()]
    return np.frombuffer(b"".join(digests), np.dtype(">u8"))


def _image_names(folder: str, class_folder: str) -> tuple[np.ndarray, list[str]]:
    """The images below one class's folder, and the other files there, but for hidden ones."""
    names, others = list[str](), list[str]()
    root = os.path.join(folder, class_folder)
    for inside, folders, files in os.walk(root, onerror=_raise_unlistable, followlinks=True):
        target, parent = os.path.realpath(inside), os.path.realpath(os.path.dirname(inside))
        if os.path.commonpath([target, parent]) == target:
            raise UserError(f"{inside} is a symbolic link to a folder around it. Expected no circles: remove the link")
        folders[:] = filter(_is_shown, folders)
        inside = os.path.relpath(inside, folder)
        for file in filter(_is_shown, files):
            (names if file.lower().endswith(_IMAGE_SUFFIXES) else others).append(f"{inside}/{file}")
    return np.array([os.fsencode(name) for name in sorted(names)], np.bytes_), others


def _loose_images(folder: str, sub_folder: str) -> str:
    """The images of a split that are in no class's folder, in words; none is no word."""
    try:
        with os.scandir(os.path.join(folder, sub_folder)) as entries:
            names = [entry.name for entry in entries if not entry.is_dir() and _is_shown(entry.name)]
    except OSError as error:
        _raise_unlistable(error)
    images = sorted(name for name in names if name.lower().endswith(_IMAGE_SUFFIXES))
    if not images:
        return ""
    return (
        f". {sub_folder}/{images[0]}" + f" and {len(images) - 1} others" * (len(images) > 1) + " are in no class's "
        "folder: move each into that of its class, which has the name that it has in train"
    )


def _sub_folders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and _is_shown(entry.name))
    except OSError as error:
        _raise_unlistable(error)


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "@eaDir"


def _raise_unlistable(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot list {error.filename}: {error.strerror}. Expected a folder of images, train/<class>/<image>, that you "
        "may read: check the path"
    ) from error
