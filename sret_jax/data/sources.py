"""Where images come from: datasets prepared by TFDS, the built-in handwritten digits, and random images."""

import contextlib
import dataclasses
import io
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import constants as tfds_constants
from tensorflow_datasets.core import read_only_builder

from sret_jax.errors import UserError

_LOG = logging.getLogger(__name__)


class Examples(Protocol):
    """Random access to `{"image": encoded bytes or uint8 (height, width, channels), "label": int}`.

    `__getitem__` is called from several threads at once.
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
    """

    examples: Examples
    num_classes: int
    name: str
    class_names: tuple[str, ...] = ()


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
      name: `digits` (scikit-learn's 8×8 grey handwritten digits; written as a TFDS dataset the first time),
        `synthetic` (random images, nothing on disk), or a dataset that TFDS has prepared in a random access format,
        such as `imagenet2012` or `cifar10:3.0.2`.
      split: `train` or `test` for `digits`; any TFDS split for a dataset on disk, such as `validation` or
        `train[:99%]`; any word for `synthetic`, whose splits differ.
      path: the folder with TFDS datasets; empty for TFDS's own, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      image_size: height and width in pixels of `synthetic` images.
      num_classes: number of classes of `synthetic`.
      length: number of `synthetic` examples.

    Returns:
      The source. Datasets know their own sizes: the keyword arguments do not change them.

    Raises:
      UserError: if the dataset or the split does not exist, holds no images with class labels, or cannot be read at
        random; if `digits` cannot be written below `path`.
    """
    if name == "synthetic":
        examples = _SyntheticExamples(split, length, image_size, num_classes)
        return Source(examples, num_classes, f"{name} {split}", tuple(map(str, range(num_classes))))
    folder = os.path.expanduser(path or tfds_constants.DATA_DIR)
    if name == "digits":
        _write_digits_once(folder)
    return _open_prepared(name, split, folder)


def _open_prepared(name: str, split: str, folder: str) -> Source:
    try:
        # Not `tfds.builder`: where the files are missing, that one asks Google Cloud Storage for them.
        builder = read_only_builder.builder_from_files(name, data_dir=folder)
    except (tfds.core.DatasetNotFoundError, ValueError, OSError) as error:
        raise UserError(
            f"no dataset {name!r}: looked for {os.path.join(folder, name.partition(':')[0])}. Expected `digits`, "
            "`synthetic` or the name of a dataset that TFDS has prepared. Give the folder in which it is, or prepare "
            f"it, where TensorFlow is installed, with `tfds build {name} --data_dir={folder} "
            "--file_format=array_record`"
        ) from error
    features = dict(builder.info.features.items())
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        raise UserError(
            f"dataset {name!r} has the features {sorted(features)}. Expected `image` (an image) and `label` (a class): "
            "choose a dataset for image classification"
        )
    try:
        examples = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f"dataset {name!r} at {builder.data_dir} is stored as {builder.info.file_format.value}, which cannot be "
            "read in random order. Expected array_record. Prepare it again, where TensorFlow is installed, with "
            f"`tfds build {name} --data_dir=<another folder> --file_format=array_record`, and give that folder"
        ) from error
    except ValueError as error:
        raise UserError(
            f"dataset {name!r} has no split {split!r}. Expected one of {sorted(builder.info.splits)} or a part of one, "
            "such as 'train[:99%]'"
        ) from error
    return Source(examples, label.num_classes, f"{name} {split}", tuple(label.names))


class _DigitsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """scikit-learn's digits: `train` 1437 and `test` 360, equal shares of each digit, in a fixed order."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1797 handwritten digits, 8×8 grey: the test part of UCI ML's optical recognition data.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # The digits come with scikit-learn.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        # 0..16 becomes 0..255.
        images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
        train_images, test_images, train_labels, test_labels = train_test_split(
            images, labels, test_size=360, stratify=labels, random_state=0
        )
        return {
            "train": self._generate_examples(train_images, train_labels),
            "test": self._generate_examples(test_images, test_labels),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, Any]]:
        for key, (image, label) in enumerate(zip(images, labels, strict=True)):
            # Encoded here: TFDS would ask TensorFlow to encode an array.
            yield key, {"image": _encode_png(image), "label": int(label)}


def _write_digits_once(folder: str) -> None:
    """Writes the digits below `folder` unless they are there; no reader ever sees half of them.

    TFDS writes into a folder of another name and renames it when complete, so that whichever of several writers is
    last fails, and finds the dataset of the first.
    """
    builder = _DigitsBuilder(data_dir=folder, file_format="array_record")
    try:
        # TFDS prints its progress to both. Does nothing where the dataset is complete.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError) as error:  # ArrayRecord reports a full disk as the last
        if os.path.exists(builder.data_dir):
            return
        raise UserError(
            f"the digits cannot be written below {folder}: {error}. Expected a folder that may be written to, with "
            "1 MB left: give another one, or set TFDS_DATA_DIR"
        ) from error


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


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
        return {"image": image, "label": int(rng.integers(self.num_classes))}
