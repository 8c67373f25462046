"""From a source to batches on one host: shuffle, read, decode, crop, batch; the same batches on any number of hosts."""

import functools
import io
import logging
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from PIL import Image

from sret_jax.data.sources import Source
from sret_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# How many examples in a row may be broken before the dataset counts as broken.
_MAX_BROKEN = 16

Batch = dict[str, np.ndarray]
Box = tuple[int, int, int, int]


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Number of complete batches in one pass over the source.

    Args:
      source: where examples come from.
      batch_size: examples in a global batch.

    Raises:
      UserError: if the source is smaller than one batch.
    """
    steps = len(source.examples) // batch_size
    if steps == 0:
        raise UserError(
            f"the batch size is {batch_size}, but {source.name} has only {len(source.examples)} examples. Expected at "
            "most as many: choose a smaller batch"
        )
    return steps


def train_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    seed: int,
    first_batch: int = 0,
    crop_area: tuple[float, float] = (0.08, 1.0),
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 16,
) -> Iterator[Batch]:
    """Endless training batches: every epoch in a new order, every image cropped at random.

    Batch `k` depends on `seed` and `k` alone. It holds the same examples, cropped alike, for any number of hosts, each
    of which gets every `process_count`th of them. The incomplete last batch of an epoch is dropped. So the number of
    batches taken is the whole state of this iterator: to continue, give it as `first_batch`.

    An image that does not decode is logged and replaced by the next one in the source.

    Args:
      source: where examples come from.
      batch_size: examples in a global batch.
      image_size: height and width in pixels of the images returned.
      seed: at least 0; decides on the order and the crops.
      first_batch: number of the first batch to return.
      crop_area: smallest and largest area of a crop as a part of the image's.
      crop_aspect: smallest and largest width / height of a crop.
      process_index: number of this host.
      process_count: number of hosts.
      num_threads: threads that read and decode ahead of the caller.

    Yields:
      `image` uint8 (batch_size / process_count, image_size, image_size, 3), RGB, and `label` int32
      (batch_size / process_count,).

    Raises:
      UserError: if the source is smaller than one batch, or the hosts do not divide the batch; while iterating, if
        16 examples in a row do not decode.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    examples_per_epoch = steps_per_epoch(source, batch_size) * batch_size
    load = functools.partial(_load_train, source, image_size=image_size, crop_area=crop_area, crop_aspect=crop_aspect)
    # The order is cut to whole batches before hosts take their shares, so that all shares are equally long. `load`
    # comes before that too: its random numbers belong to a position in the global order.
    dataset = (
        grain.MapDataset.range(len(source.examples))
        .seed(seed)
        .shuffle()[:examples_per_epoch]
        .random_map(load)[process_index::process_count]
        .repeat()[first_batch * local_batch_size :]
    )
    return _read_ahead(dataset, local_batch_size, num_threads)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    crop_ratio: float = 0.875,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 16,
) -> Iterator[Batch]:
    """Every example once, in the source's order, spread over the hosts; equally many batches on each host.

    Images are cropped by `central_crop`. Rows that stand for no example, or for an image that does not decode (which is
    logged), are zero and masked.

    Args:
      source: where examples come from.
      batch_size: examples in a global batch.
      image_size: height and width in pixels of the images returned.
      crop_ratio: part of the shorter side that is kept, at most 1.
      process_index: number of this host.
      process_count: number of hosts.
      num_threads: threads that read and decode ahead of the caller.

    Yields:
      `image` uint8 (batch_size / process_count, image_size, image_size, 3), RGB; `label` int32 and `mask` bool, False
      where a row is to be ignored, both (batch_size / process_count,).

    Raises:
      UserError: if the hosts do not divide the batch.
    """
    local_batch_size = _local_batch_size(batch_size, process_count)
    padded_length = math.ceil(len(source.examples) / batch_size) * batch_size
    load = functools.partial(_load_eval, source, image_size=image_size, crop_ratio=crop_ratio)
    dataset = grain.MapDataset.range(padded_length)[process_index::process_count].map(load)
    return _read_ahead(dataset, local_batch_size, num_threads)


def random_crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random box inside an image, as torchvision's `RandomResizedCrop` draws it (Szegedy et al., 2015, section 6).

    The area is uniform, the aspect log-uniform, the place uniform. After ten boxes that do not fit, it is the largest
    central box of an allowed aspect.

    Args:
      width: of the image, pixels.
      height: of the image, pixels.
      rng: source of randomness.
      area: smallest and largest area of the box as a part of the image's.
      aspect: smallest and largest width / height of the box.

    Returns:
      Left, top, right and bottom in pixels, right and bottom exclusive.
    """
    for _ in range(10):
        target_area = width * height * rng.uniform(*area)
        target_aspect = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width = round(math.sqrt(target_area * target_aspect))
        box_height = round(math.sqrt(target_area / target_aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(width - box_width, endpoint=True))
            top = int(rng.integers(height - box_height, endpoint=True))
            return left, top, left + box_width, top + box_height
    box_width = min(width, round(height * aspect[1]))
    box_height = min(height, round(width / aspect[0]))
    return _central_box(width, height, box_width, box_height)


def central_crop(image: Image.Image, image_size: int, crop_ratio: float = 0.875) -> np.ndarray:
    """What evaluation sees of an image: its shorter side becomes `image_size / crop_ratio`, the centre is kept.

    Args:
      image: RGB.
      image_size: height and width of the crop, pixels.
      crop_ratio: part of the shorter side that is kept, at most 1. The length is rounded down, as in DeiT.

    Returns:
      uint8 (image_size, image_size, 3).
    """
    shorter_side = int(image_size / crop_ratio)
    width, height = (side * shorter_side // min(image.size) for side in image.size)
    return np.asarray(_resize(image, width, height).crop(_central_box(width, height, image_size, image_size)))


def _central_box(width: int, height: int, box_width: int, box_height: int) -> Box:
    left, top = round((width - box_width) / 2), round((height - box_height) / 2)
    return left, top, left + box_width, top + box_height


def _local_batch_size(batch_size: int, process_count: int) -> int:
    if batch_size % process_count:
        raise UserError(
            f"the batch size is {batch_size}, which {process_count} hosts cannot share equally. Expected a multiple of "
            f"{process_count}: choose {math.ceil(batch_size / process_count) * process_count}"
        )
    return batch_size // process_count


def _read_ahead(dataset: grain.MapDataset, batch_size: int, num_threads: int) -> Iterator[Batch]:
    # The threads make examples, not batches: the first batch comes soon, and two batches are all that is kept.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * batch_size, num_threads))
    return iter(dataset.to_iter_dataset(options).batch(batch_size, drop_remainder=True))


def _load_train(
    source: Source,
    index: int,
    rng: np.random.Generator,
    *,
    image_size: int,
    crop_area: tuple[float, float],
    crop_aspect: tuple[float, float],
) -> dict[str, Any]:
    for candidate in range(index, index + _MAX_BROKEN):
        image, label = _read(source, candidate % len(source.examples))
        if image is not None:
            # Not `resize(box=...)`, whose filter also reaches for pixels beside the box.
            crop = image.crop(random_crop_box(*image.size, rng, crop_area, crop_aspect))
            return {"image": np.asarray(_resize(crop, image_size, image_size)), "label": label}
    raise UserError(
        f"{_MAX_BROKEN} images in a row of {source.name} do not decode, from number {index} on. Expected JPEG or PNG: "
        "prepare the dataset again"
    )


def _load_eval(source: Source, index: int, *, image_size: int, crop_ratio: float) -> dict[str, Any]:
    image, label = _read(source, index) if index < len(source.examples) else (None, np.int32(0))
    if image is None:
        pixels = np.zeros((image_size, image_size, 3), np.uint8)
    else:
        pixels = central_crop(image, image_size, crop_ratio)
    return {"image": pixels, "label": label, "mask": np.bool_(image is not None)}


def _read(source: Source, index: int) -> tuple[Image.Image | None, np.int32]:
    """An image in RGB, None where it does not decode, and its label."""
    example = source.examples[index]
    encoded = example["image"]
    if isinstance(encoded, np.ndarray):
        image = Image.fromarray(encoded[..., 0] if encoded.shape[-1] == 1 else encoded).convert("RGB")
    else:
        try:
            image = Image.open(io.BytesIO(encoded)).convert("RGB")
        except Exception as error:  # What Pillow raises for broken bytes depends on the format and the damage.
            _LOG.warning("image %d of %s does not decode and is left out: %s", index, source.name, error)
            image = None
    return image, np.int32(example["label"])


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    return image.resize((width, height), Image.Resampling.BICUBIC)
