"""Tests of sret_jax.data.show."""

import itertools
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import app
from PIL import Image

from sret_jax.data.augment import Augmentation, normalize
from sret_jax.data.pipeline import train_batches
from sret_jax.data.show import contact_sheet, main, training_sheet
from sret_jax.data.sources import open_source
from sret_jax.training.config import base_config
from sret_jax.training.step import step_keys

ROOT = Path(__file__).parents[2]


def tiles(sheet: Image.Image, rows: int, columns: int, size: int, scale: int) -> np.ndarray:
    """The images of a sheet, uint8 (rows, columns, size, size, 3); each of their pixels must fill its square."""
    cells = np.asarray(sheet).reshape(rows, sheet.height // rows, columns, sheet.width // columns, 3).swapaxes(1, 2)
    enlarged = cells[:, :, 4 : 4 + size * scale, 4 : 4 + size * scale]
    found = enlarged[:, :, ::scale, ::scale]
    np.testing.assert_array_equal(found.repeat(scale, axis=2).repeat(scale, axis=3), enlarged)
    return found


@pytest.mark.parametrize(("size", "scale"), [(150, 1), (128, 1), (50, 3)])
def test_a_sheet_holds_every_pixel_of_normalised_images_in_order(size: int, scale: int) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(5, size, size, 3), dtype=np.uint8)
    targets = np.eye(3, dtype=np.float32)[[0, 1, 2, 0, 1]]
    sheet = contact_sheet(np.asarray(normalize(pixels)), targets, ["a", "b", "c"], columns=2)
    found = tiles(sheet, 3, 2, size, scale).reshape(6, size, size, 3)
    np.testing.assert_array_equal(found[:5], pixels)
    assert (found[5] == 255).all(), "the place of a sixth image is not empty"


def test_what_is_noise_beyond_black_and_white_is_drawn_black_and_white() -> None:
    images = np.stack([np.full((128, 128, 3), -5, np.float32), np.full((128, 128, 3), 5, np.float32)])
    found = tiles(contact_sheet(images, np.eye(2, dtype=np.float32), ["a", "b"], columns=2), 1, 2, 128, 1)
    assert (found[0, 0] == 0).all() and (found[0, 1] == 255).all()


def labels(targets: list[list[float]], names: list[str]) -> list[np.ndarray]:
    """What is drawn below each image."""
    images = np.zeros((len(targets), 128, 128, 3), np.float32)
    sheet = contact_sheet(images, np.array(targets, np.float32), names, columns=len(targets))
    return list(np.asarray(sheet)[4 + 128 :].reshape(-1, len(targets), 136, 3).swapaxes(0, 1))


def test_below_an_image_stands_its_class_and_below_a_mixed_one_both() -> None:
    cat, dog, mixed, other_way, other_weight = labels(
        [[1, 0, 0], [0, 1, 0], [0.7, 0.3, 0], [0.3, 0.7, 0], [0.6, 0.4, 0]], ["cat", "dog", "cow"]
    )
    first_line, second_line = slice(0, 16), slice(16, 32)
    for one, other in itertools.combinations([cat, dog, mixed, other_way, other_weight], 2):
        assert (one != other).any()
    assert (cat[first_line] < 128).any() and (cat[second_line] == 255).all()
    assert (mixed[first_line] < 128).any() and (mixed[second_line] < 128).any()


def test_a_long_name_stays_below_its_image() -> None:
    (cell,) = labels([[1.0, 0.0]], ["a name that is far too long for what is below an image", "b"])
    assert (cell[:, :4] == 255).all() and (cell[:, 4 + 128 :] == 255).all()
    assert (cell[:, 4 + 100 : 4 + 128] < 128).any()


def test_the_command_draws_the_digits_configs_batches(digits_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sret_jax.data.show", "--config=configs/digits.py", str(tmp_path / "sheet.png")]
    overrides = [f"--config.data.path={digits_folder}", "--config.augment.erasing=0.0"]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}/sheet.png: 1088 × 1344 pixels\n"
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]

    source = open_source("digits", "train", str(digits_folder))
    batches = train_batches(
        source, batch_size=64, image_size=64, seed=0, crop_area=(0.7, 1.0), crop_aspect=(4 / 5, 5 / 4)
    )
    beginnings = [(batch["image"][:8], batch["label"][:8]) for batch in itertools.islice(batches, 8)]
    images, shown_labels = map(np.concatenate, zip(*beginnings, strict=True))
    with Image.open(tmp_path / "sheet.png") as sheet:
        np.testing.assert_array_equal(tiles(sheet, 8, 8, 64, 2).reshape(images.shape), images)
        # The config smooths its labels; the sheet does not.
        hard = contact_sheet(np.asarray(normalize(images)), np.eye(10)[shown_labels], list("0123456789"), columns=8)
        np.testing.assert_array_equal(sheet, hard)


def test_the_sheet_shows_what_the_device_makes_of_each_batch(digits_folder: Path) -> None:
    config = base_config()
    config.batch_size = 5
    config.seed = 3
    config.data.path = str(digits_folder)
    config.model.image_size = 64
    config.augment.update(flip=0.5, erasing=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    found = tiles(training_sheet(config), 8, 5, 64, 2)

    source = open_source("digits", "train", str(digits_folder))
    batches = train_batches(source, batch_size=5, image_size=64, seed=3, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    augmentation = Augmentation(**config.augment)
    augment = jax.jit(lambda key, batch: augmentation(key, batch, 10)[0])
    for step, batch in enumerate(itertools.islice(batches, 8)):
        images = augment(step_keys(3, step)[0], batch)
        pixels = np.clip(np.asarray(images) * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406], 0, 1) * 255
        np.testing.assert_allclose(found[step], pixels, atol=0.502)  # rounded to whole numbers


@pytest.mark.parametrize("arguments", [[], ["sheet.jpg"], ["sheet.png", "other.png"]])
def test_other_than_one_png_to_write_is_refused(arguments: list[str]) -> None:
    with pytest.raises(app.UsageError, match=r"OUT\.png"):
        main(["show", *arguments])
