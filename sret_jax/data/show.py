"""Draws what the network sees: `python -m sret_jax.data.show --config=configs/sret_t.py OUT.png [--config.any=…]`.

A row is the beginning of a training batch, from the first on, after everything that happens to its images on the host
and on the device. Below an image stands its class; below one mixed from two, or with soft labels, the two likeliest.
"""

from sret_jax.interrupts import end_on_ctrl_c

if __name__ == "__main__":
    end_on_ctrl_c()

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from absl import app
from ml_collections import ConfigDict
from PIL import Image, ImageDraw, ImageFont

from sret_jax.data.augment import MEAN, STD
from sret_jax.files import write_whole

_GRID = 8  # batches shown, and images of each
_MARGIN = 4  # pixels around a tile
_SMALLEST_TILE = 128  # pixels; smaller images are enlarged
_LINES, _LINE_HEIGHT, _FONT_SIZE = 2, 16, 12


def main(argv: list[str]) -> None:
    """Draw the contact sheet of `--config` into the file that is the only other argument."""
    from sret_jax.training.flags import CONFIG

    if len(argv) != 2 or not argv[1].endswith(".png"):
        raise app.UsageError("besides flags, give the file to be written, and nothing else: OUT.png")
    sheet = training_sheet(CONFIG.value)
    write_whole(argv[1], lambda path: sheet.save(path, "PNG"))
    print(f"{argv[1]}: {sheet.width} × {sheet.height} pixels")


def training_sheet(config: ConfigDict) -> Image.Image:
    """The beginnings of a run's first batches, eight images of eight, exactly as the train step sees them.

    Args:
      config: as `configs/` makes them.

    Raises:
      UserError: if the config is not one, or its data cannot be read.
    """
    # The one place where `data` needs `training`, which knows how a config becomes batches.
    import jax

    from sret_jax.training.build import make_augmentation, make_model, open_labels, open_split, training_batches
    from sret_jax.training.config import check_config
    from sret_jax.training.step import step_keys

    check_config(config)
    source = open_split(config, config.data.train_split)
    labels = open_labels(config, source)
    model = make_model(config, source.num_classes)
    # Smoothing changes no image; without it, a label shows what was mixed.
    augmentation = dataclasses.replace(make_augmentation(config), label_smoothing=0.0)

    @jax.jit
    def augment(key: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        images, targets = augmentation(key, batch, model.num_classes)
        return images, targets.dense(model.num_classes)

    rows = []
    for step, batch in zip(range(_GRID), training_batches(config, model, source, 0, labels=labels), strict=False):
        images, targets = augment(step_keys(config.seed, step)[0], batch)
        rows.append((np.asarray(images[:_GRID]), np.asarray(targets[:_GRID])))
    images, targets = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return contact_sheet(images, targets, source.class_names, columns=len(rows[0][0]))


def contact_sheet(images: np.ndarray, targets: np.ndarray, class_names: Sequence[str], columns: int) -> Image.Image:
    """Images side by side, the classes that they count as below them.

    Args:
      images: float32 (count, height, width, 3), normalised. Small ones are drawn larger, a pixel as a square of them.
      targets: float32 (count, classes), a distribution in each row.
      class_names: in the order of the labels.
      columns: images in a row.

    Returns:
      RGB.
    """
    count, height, width, _ = images.shape
    pixels = np.clip(np.round((images * STD + MEAN) * 255), 0, 255).astype(np.uint8)
    scale = math.ceil(_SMALLEST_TILE / width)
    font = ImageFont.load_default(_FONT_SIZE)
    tile_width, tile_height = width * scale, height * scale
    cell_width, cell_height = tile_width + 2 * _MARGIN, tile_height + 2 * _MARGIN + _LINES * _LINE_HEIGHT
    sheet = Image.new("RGB", (columns * cell_width, math.ceil(count / columns) * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (tile, target) in enumerate(zip(pixels, targets, strict=True)):
        left, top = number % columns * cell_width + _MARGIN, number // columns * cell_height + _MARGIN
        sheet.paste(Image.fromarray(tile).resize((tile_width, tile_height), Image.Resampling.NEAREST), (left, top))
        for line, text in enumerate(_caption(target, class_names)):
            while font.getlength(text) > tile_width:
                text = text[:-1]
            draw.text((left, top + tile_height + line * _LINE_HEIGHT), text, "black", font)
    return sheet


def _caption(target: np.ndarray, class_names: Sequence[str]) -> list[str]:
    """The class of an image, or the two of a mixed one with their weights, the heavier first; not smoothed."""
    first, second = np.argsort(-target, kind="stable")[:2]
    if target[second] == 0:
        return [class_names[first]]
    return [f"{target[label]:.0%} {class_names[label]}" for label in (first, second)]


if __name__ == "__main__":
    from sret_jax.training.flags import run

    run(main)
