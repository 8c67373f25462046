"""Sources that the tests of the data room share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sret_jax.data.sources import Source, open_source


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the digits have been written; not to be changed."""
    folder = tmp_path_factory.mktemp("tfds")
    open_source("digits", "train", str(folder))
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 small images of 3 classes in train and 6 of 2 of them in val; not to be changed."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(1)
    for split, class_name, count in [
        ("train", "ant", 10),
        ("train", "bee", 14),
        ("train", "cat", 12),
        ("val", "ant", 2),
        ("val", "cat", 4),
    ]:
        (folder / split / class_name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(256, size=(20 + number, 30, 3), dtype=np.uint8)
            suffix = ".PNG" if number % 3 == 0 else ".JPEG"
            Image.fromarray(pixels).save(folder / split / class_name / f"{class_name}_{number}{suffix}")
    return folder


@pytest.fixture(scope="session")
def numbered_source() -> Source:
    """23 different images in memory, each labelled with its own number."""
    rng = np.random.default_rng(0)
    examples = [{"image": rng.integers(256, size=(20, 30, 3), dtype=np.uint8), "label": label} for label in range(23)]
    return Source(examples, 23, "numbered")
