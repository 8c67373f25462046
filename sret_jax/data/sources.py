"""Where images come from: folders, datasets prepared by TFDS, the built-in handwritten digits, and random images."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import hashlib
import os
import resource
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import constants as tfds_constants
from tensorflow_datasets.core.utils import shard_utils
from tensorflow_datasets.proto import tf_example_pb2

from sret_jax.data.decode import decode_small
from sret_jax.data.digits import write_digits_once
from sret_jax.data.folder import list_folder
from sret_jax.data.image_file import WHITE, Colour
from sret_jax.data.keys import label_key
from sret_jax.data.prepared import find_prepared, read_prepared
from sret_jax.data.reading import UnreadableError, read_patiently
from sret_jax.data.splits import Part, find_parts
from sret_jax.errors import UserError
from sret_jax.files import expand, expand_local

# As many as a process is to have open at the same time, where the system lets it.
_OPEN_FILES = 65_536

# That count the records of files: on a disk over the network most of the time is waiting.
_OPENING_THREADS = 32

# Of decoded images that are kept in memory, of a split in a process, and each: those of MNIST, the digits and CIFAR.
_MOST_KEPT_BYTES = 150 << 20
_LARGEST_KEPT_BYTES = 64 << 10


class Examples(Protocol):
    """Random access to `{"image": encoded bytes or uint8 (height, width, channels), "label": int, "key": str}`.

    The key is the image's name for soft labels, the same in every form of a dataset that keeps the names of its files:
    `train/n01440764/n01440764_10026`; in others its number in the split, `train/00010026`. Where no example has to be
    read for it, `keys() -> list[str]` gives those of all.

    The bytes are as they are on disk, whatever they hold; where the disk does not give them, UnreadableError is raised.
    So whoever decodes also reports what is broken: by `file_name(index) -> str`, where examples have such a method and
    it does not return "". Several threads call the methods at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of a dataset.

    Attributes:
      examples: its images, still encoded, and their labels.
      num_classes: labels are in `range(num_classes)`.
      name: dataset and split, as messages show it.
      class_names: in the order of the labels. Where a dataset has none, `open_source` gives their numbers.
      files: a hash of the names of its files, without folders above the dataset's own, and of what is read of them.
      background: RGB, 0 to 255, that images show where they are transparent.
    """

    examples: Examples
    num_classes: int
    name: str
    class_names: tuple[str, ...] = ()
    files: str = ""
    background: Colour = WHITE

    def digest(self) -> str:
        """64 letters that tell apart splits of other lengths, classes or files."""
        return _hash(repr((len(self.examples), self.num_classes, self.class_names, self.files)).encode())


def open_source(
    name: str,
    split: str,
    path: str = "",
    *,
    image_size: int = 224,
    num_classes: int = 1000,
    length: int = 10_000,
) -> Source:
    """Opens one split of a dataset; nothing is decoded and nothing is read over the network.

    Args:
      name: `folder` (of images, `train/<class>/<image>` and so on), `digits` (scikit-learn's 8×8 grey handwritten
        digits; written as a TFDS dataset the first time), `synthetic` (random images, nothing on disk), or a dataset
        that TFDS or `sret_jax.data.pack` has prepared in a random access format: its name, such as `imagenet2012` or
        `cifar10:3.0.2`, or its own folder, in which `dataset_info.json` is.
      split: `train` or `test` for `digits`; any TFDS split for a dataset on disk, such as `validation` or
        `train[:99%]`; for `folder` a sub-folder or a part of one in the same words, see `list_folder`; any word for
        `synthetic`, whose splits differ.
      path: the folder of images; or the folder with TFDS datasets, empty for TFDS's own, `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      image_size: height and width in pixels of `synthetic` images.
      num_classes: number of classes of `synthetic`.
      length: number of `synthetic` examples.

    Returns:
      The source. Datasets know their own sizes: the keyword arguments do not change them.

    Raises:
      UserError: if the dataset, one of its files or the split does not exist, holds no images with class labels, or
        cannot be read at random; if `digits` cannot be written below `path`; what `list_folder` raises.
    """
    if name == "synthetic":
        noise = _SyntheticExamples(split, length, image_size, num_classes)
        return Source(noise, num_classes, f"{name} {split}", tuple(map(str, range(num_classes))))
    if name == "folder":
        if not path:
            raise UserError("the source `folder` has no path. Expected the folder in which train/<class>/<image> are")
        images = list_folder(str(expand_local(path)), split)
        files = _hash(b"\n".join(images.names.tolist()))
        return Source(images, len(images.class_names), f"{path} {split}", images.class_names, files)
    folder = expand(path or tfds_constants.DATA_DIR)
    if name == "digits":
        write_digits_once(str(expand_local(folder)))
    return _open_prepared(name, split, folder)


def keeping_decoded(source: Source) -> Source:
    """The source, whose small images are read and decoded once and then come from memory, as pixels.

    Of the digits, reading takes two thirds of the time that it takes to make a batch. JPEGs are never kept: they are
    decoded no further than a crop needs, at a part of their size. Nor are broken images, of which whoever asks for one
    is to know.
    """
    return dataclasses.replace(source, examples=_KeptExamples(source.examples, source.background))


class _KeptExamples:
    """See `keeping_decoded`."""

    def __init__(self, examples: Examples, background: Colour) -> None:
        self._examples = examples
        self._background = background
        self._kept: dict[int, Mapping[str, Any]] = {}
        self._bytes_left = _MOST_KEPT_BYTES

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self._kept.get(index) or self._kept_if_small(index)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # which a copy for another process asks for before there are any
            raise AttributeError(name)
        return getattr(self._examples, name)  # `file_name` and `keys`, where there are

    def _kept_if_small(self, index: int) -> Mapping[str, Any]:
        example = self._examples[index]
        if isinstance(example["image"], np.ndarray):
            return example
        try:
            pixels = decode_small(example["image"], min(_LARGEST_KEPT_BYTES, self._bytes_left), self._background)
        except Exception:  # which one depends on the damage
            return example
        if pixels is None:
            return example
        self._bytes_left -= pixels.nbytes
        self._kept[index] = {**example, "image": pixels}
        return self._kept[index]


def _open_prepared(name: str, split: str, folder: str) -> Source:
    own_folder = expand(name)
    if os.path.exists(os.path.join(own_folder, "dataset_info.json")):
        found: epath.PathLike | None = own_folder
    else:
        found = find_prepared(name, folder)
    if found is None:
        is_folder_of_images = os.path.isdir(os.path.join(folder, "train"))
        hint = f"{folder} holds a folder `train`: if it is one of images, choose the source `folder`. "
        raise UserError(
            f"no dataset {name!r}: looked for {os.path.join(folder, name.partition(':')[0])}. Expected `folder`, "
            "`digits`, `synthetic`, or the name or the own folder of a dataset that TFDS has prepared. "
            f"{hint if is_folder_of_images else ''}Give the folder in which it is, or prepare it: from a folder of "
            f"images with `python -m sret_jax.data.pack`, or, where TensorFlow is installed, with `tfds build {name} "
            f"--data_dir={folder} --file_format=array_record`"
        )
    prepared = read_prepared(found)
    if not prepared.class_names:
        raise UserError(
            f"dataset {name!r} has the features {list(prepared.features)}. Expected `image` (an image) and `label` (a "
            "class): choose a dataset for image classification"
        )
    if prepared.file_format != "array_record":
        raise UserError(
            f"dataset {name!r} at {prepared.folder} is stored as {prepared.file_format}, which cannot be "
            "read in random order. Expected array_record. Prepare it again, where TensorFlow is installed, with "
            f"`tfds build {name} --data_dir=<another folder> --file_format=array_record`, and give that folder"
        )
    try:
        parts = [part for part in find_parts(split, prepared.splits) if part.first < part.end]
    except ValueError as error:
        raise UserError(
            f"dataset {name!r} has no split {split!r}. Expected one of {sorted(prepared.splits)} or a part of one, "
            f"such as 'train[:99%]' ({str(error).splitlines()[-1]})"
        ) from error
    files = [
        file
        for part in parts
        for file in shard_utils.get_file_instructions(
            part.first,
            part.end,
            [os.fspath(path) for path in prepared.splits[part.split].filepaths],
            prepared.splits[part.split].shard_lengths,
        )
    ]
    if not files:
        raise UserError(f"dataset {name!r} has no image in its split {split!r}. Expected some: give another part of it")
    _check_files(name, [path for part in parts for path in prepared.splits[part.split].filepaths])
    _allow_open_files()
    _check_lengths(files)
    hashed = _hash(repr([(os.path.basename(f.filename), f.skip, f.take, f.examples_in_shard) for f in files]).encode())
    kind = _NamedExamples if "file_name" in prepared.features else _NumberedExamples
    examples = kind(ArrayRecordDataSource(files), tuple(parts), prepared.class_names)
    return Source(examples, len(prepared.class_names), f"{name} {split}", prepared.class_names, hashed)


def _check_files(name: str, paths: Sequence[epath.Path]) -> None:
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(
            f"dataset {name!r} lacks {missing[0]}"
            + (f" and {len(missing) - 1} other files" if missing[1:] else "")
            + ". Expected all that its dataset_info.json speaks of: copy or prepare it again"
        )


def _check_lengths(files: Sequence[shard_utils.FileInstruction]) -> None:
    """Refuses files that hold other images than `dataset_info.json` says: labels and order would be others."""

    def count(path: str) -> int:
        with contextlib.closing(ArrayRecordReader(path, options="readahead_buffer_size:0")) as reader:
            return reader.num_records()

    def check(file: shard_utils.FileInstruction) -> None:
        try:
            found = read_patiently(lambda: count(file.filename), file.filename)
        except UnreadableError as error:
            raise UserError(
                f"{file.filename} cannot be read: {error}. Expected a file of ArrayRecord: copy or prepare it again"
            ) from error
        if found != file.examples_in_shard:
            raise UserError(
                f"{file.filename} holds {found} images, but dataset_info.json says {file.examples_in_shard}. Expected "
                "what was prepared: copy the dataset again, or prepare it again"
            )

    with concurrent.futures.ThreadPoolExecutor(_OPENING_THREADS) as executor:
        for _ in executor.map(check, {file.filename: file for file in files}.values()):
            pass


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _allow_open_files() -> None:
    """Every file of a dataset stays open: TFDS's ImageNet has 1,024, as many as most systems allow unless asked."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if most == resource.RLIM_INFINITY else min(_OPEN_FILES, most)
    if resource.RLIM_INFINITY != allowed < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


class _PreparedExamples:
    """Examples of a TFDS dataset. Parsed here: TFDS would take six times as long for the features that we leave out."""

    def __init__(self, records: ArrayRecordDataSource, parts: tuple[Part, ...], class_names: tuple[str, ...]) -> None:
        """`parts` says of which splits the records are."""
        self._records = records
        self._parts = parts
        self._class_names = class_names

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        features = _features(read_patiently(lambda: self._read(index), f"record {index}"))
        images, labels = features["image"].bytes_list.value or [b""], features["label"].int64_list.value or [-1]
        if len(images) > 1 or len(labels) > 1:
            raise UnreadableError(f"the record holds {len(images)} images and {len(labels)} labels")
        (image,), (label,) = images, labels
        return {"image": image, "label": label, "key": self._key(index, label, features)}

    def file_name(self, index: int, /) -> str:
        try:
            return _file_name(_features(self._read(index)))
        except (RuntimeError, UnreadableError):
            return ""

    def _key(self, index: int, label: int, features: Mapping[str, Any]) -> str:
        raise NotImplementedError

    def _place(self, index: int) -> tuple[str, int]:
        """The split of an example, and its number there."""
        for split, first, end in self._parts:
            if index < end - first:
                return split, first + index
            index -= end - first
        raise IndexError(f"there is no example {index} beyond the last")

    def _read(self, index: int) -> bytes:
        records = self._records
        try:
            return records[index]
        except RuntimeError:  # ArrayRecord's
            # It keeps a file that did not open as one that never will: a copy opens its files anew.
            self._records = copy.copy(records)
            raise


class _NamedExamples(_PreparedExamples):
    """Of a dataset that keeps the names of the images' files."""

    def _key(self, index: int, label: int, features: Mapping[str, Any]) -> str:
        name = _file_name(features)
        if "/" not in name and 0 <= label < len(self._class_names):  # TFDS's ImageNet has names without folders
            name = f"{self._place(index)[0]}/{self._class_names[label]}/{name}"
        return label_key(name)


class _NumberedExamples(_PreparedExamples):
    """Of a dataset that does not."""

    def keys(self) -> list[str]:
        return [f"{split}/{number:08d}" for split, first, end in self._parts for number in range(first, end)]

    def _key(self, index: int, label: int, features: Mapping[str, Any]) -> str:
        split, number = self._place(index)
        return f"{split}/{number:08d}"


def _file_name(features: Mapping[str, Any]) -> str:
    names = features["file_name"].bytes_list.value
    return os.fsdecode(names[0]) if names else ""


def _features(record: bytes) -> Mapping[str, Any]:
    try:
        return tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise UnreadableError(f"the record is damaged ({error})") from error


@dataclasses.dataclass(frozen=True)
class _SyntheticExamples:
    """Uniformly random pixels and labels; an example depends on the split, its index and its shape, on nothing else."""

    split: str
    length: int
    image_size: int
    num_classes: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        if not 0 <= index < self.length:
            raise IndexError(f"synthetic {self.split} has {self.length} examples, asked for number {index}")
        rng = np.random.default_rng((zlib.crc32(self.split.encode()), index))
        image = rng.integers(256, size=(self.image_size, self.image_size, 3), dtype=np.uint8)
        return {"image": image, "label": int(rng.integers(self.num_classes)), "key": f"{self.split}/{index:08d}"}

    def keys(self) -> list[str]:
        return [f"{self.split}/{index:08d}" for index in range(self.length)]
