"""Sources that the tests of the data room share."""

from pathlib import Path

import numpy as np
import pytest

from sret_jax.data.sources import Source, open_source


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the digits have been written; not to be changed."""
    folder = tmp_path_factory.mktemp("tfds")
    open_source("digits", "train", str(folder))
    return folder


@pytest.fixture(scope="session")
def numbered_source() -> Source:
    """23 different images in memory, each labelled with its own number."""
    rng = np.random.default_rng(0)
    examples = [{"image": rng.integers(256, size=(20, 30, 3), dtype=np.uint8), "label": label} for label in range(23)]
    return Source(examples, 23, "numbered")
