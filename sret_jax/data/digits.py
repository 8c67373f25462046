"""scikit-learn's handwritten digits, written as a TFDS dataset the first time that they are asked for."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from sret_jax.errors import UserError


def write_digits_once(folder: str) -> None:
    """Writes the digits below `folder` unless they are there; no reader ever sees half of them.

    TFDS writes into a folder of another name and renames it when complete, so that whichever of several writers is
    last fails, and finds the dataset of the first.
    """
    home = Path(folder, _DigitsBuilder.name, str(_DigitsBuilder.VERSION))
    if home.exists():  # complete: TFDS's builder would read it, and take what it says on trust
        return
    try:
        # TFDS prints its progress to both.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _DigitsBuilder(data_dir=folder, file_format="array_record").download_and_prepare()
    except (OSError, ValueError, RuntimeError) as error:  # ArrayRecord reports a full disk as the last
        if home.exists():
            return
        raise UserError(
            f"the digits cannot be written below {folder}: {error}. Expected a folder that may be written to, with "
            "1 MB left: give another one, or set TFDS_DATA_DIR"
        ) from error


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


def _encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
