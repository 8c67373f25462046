"""From a source to batches on one host: shuffle, read, decode, crop, augment, batch; for any number of hosts."""

import functools
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from sret_jax.data.decode import Encoded, central_crop, random_crops
from sret_jax.data.rand_augment import RandAugment
from sret_jax.data.read_ahead import Example, read_ahead
from sret_jax.data.reading import UnreadableError
from sret_jax.data.sources import Source
from sret_jax.errors import UserError

_LOG = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


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
    rows: Sequence[int] | None = None,
    crop_area: tuple[float, float] = (0.08, 1.0),
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3),
    repeats: int = 1,
    rand_augment: str = "",
    max_broken: int = 100,
    num_threads: int = 16,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Endless training batches: every epoch in a new order, every image cropped and augmented at random.

    Row `r` of batch `k` depends on `seed`, `k` and `r` alone: not on which rows other hosts load, nor on threads and
    worker processes. The incomplete last batch of an epoch is dropped. So the number of batches taken is the whole
    state of this iterator: to continue, give it as `first_batch`.

    A broken image (one that does not decode, or has a label that is no class) is replaced by the next good one of the
    source.

    Args:
      source: where examples come from.
      batch_size: examples in a global batch.
      image_size: height and width in pixels of the images returned.
      seed: at least 0; decides on the order, the crops and the augmentation.
      first_batch: number of the first batch to return.
      rows: which rows of each global batch this host loads, in this order; all by default.
      crop_area: smallest and largest area of a crop as a part of the image's.
      crop_aspect: smallest and largest width / height of a crop.
      repeats: how often each image comes, one time after the other, each time cropped and augmented anew (Hoffer et
        al., 2020). An epoch keeps its length: it shows the first `1 / repeats` of its order.
      rand_augment: timm's name of a policy, such as `rand-m9-mstd0.5-inc1`; empty for none.
      max_broken: how many different broken images this host puts up with; each is logged once.
      num_threads: threads that read and decode ahead of the caller, in each process.
      num_workers: processes that do so; 0 for threads of this process.

    Yields:
      `image` uint8 (len(rows), image_size, image_size, 3), RGB, and `label` int32 (len(rows),).

    Raises:
      UserError: if the source is smaller than one batch, or there is no such policy; while iterating, if too many
        images are broken.
    """
    blank = np.zeros((image_size, image_size, 3), np.uint8)
    load = functools.partial(
        _train_examples,
        source=source,
        order=grain.MapDataset.range(len(source.examples)).seed(seed).shuffle(),
        epoch_length=steps_per_epoch(source, batch_size) * batch_size,
        repeats=repeats,
        seed=seed,
        crop=functools.partial(random_crops, image_size=image_size, area=crop_area, aspect=crop_aspect),
        augment=RandAugment.parse(rand_augment) if rand_augment else None,
        max_broken=max_broken,
        blank=blank,
    )
    batches = read_ahead(
        load,
        batch_size=batch_size,
        rows=rows,
        first_batch=first_batch,
        example_bytes=blank.nbytes,
        num_threads=num_threads,
        num_workers=num_workers,
    )
    return _checked(batches, source, max_broken, ("image", "label"))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_size: int,
    crop_ratio: float = 0.875,
    rows: Sequence[int] | None = None,
    max_broken: int = 100,
    num_threads: int = 16,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Every example once, in the source's order; equally many batches for every choice of rows.

    Images are cropped by `central_crop`. Rows that stand for no example, or for a broken image (one that does not
    decode, or has a label that is no class), are zero and masked.

    Args:
      source: where examples come from.
      batch_size: examples in a global batch.
      image_size: height and width in pixels of the images returned.
      crop_ratio: part of the shorter side that is kept, at most 1.
      rows: which rows of each global batch this host loads, in this order; all by default.
      max_broken: how many broken images this host puts up with; each is logged once.
      num_threads: threads that read and decode ahead of the caller, in each process.
      num_workers: processes that do so; 0 for threads of this process.

    Yields:
      `image` uint8 (len(rows), image_size, image_size, 3), RGB; `label` int32 and `mask` bool, False where a row is to
      be ignored, both (len(rows),).

    Raises:
      UserError: while iterating, if too many images are broken.
    """
    blank = np.zeros((image_size, image_size, 3), np.uint8)
    load = functools.partial(
        _eval_examples,
        source=source,
        crop=functools.partial(central_crop, image_size=image_size, crop_ratio=crop_ratio),
        blank=blank,
    )
    num_batches = math.ceil(len(source.examples) / batch_size)
    batches = read_ahead(
        load,
        batch_size=batch_size,
        rows=rows,
        num_batches=num_batches,
        example_bytes=blank.nbytes,
        num_threads=num_threads,
        num_workers=num_workers,
    )
    return itertools.islice(_checked(batches, source, max_broken, ("image", "label", "mask")), num_batches)


def _train_examples(
    positions: Sequence[int],
    *,
    source: Source,
    order: grain.MapDataset,
    epoch_length: int,
    repeats: int,
    seed: int,
    crop: Callable[..., list[np.ndarray]],
    augment: RandAugment | None,
    max_broken: int,
    blank: np.ndarray,
) -> list[Example]:
    """The examples at some positions; a position counts the rows of all batches of all epochs."""

    def place(position: int) -> int:
        epoch, offset = divmod(position, epoch_length)
        return epoch * len(order) + offset // repeats

    examples = []
    for place_in_order, group in itertools.groupby(positions, place):
        of_one_image, first = list(group), order[place_in_order]
        crops, label, broken = None, 0, []
        # One more than are allowed is enough to know that there are too many.
        for index in range(first, first + min(len(order), max_broken + 1)):
            index %= len(order)
            rngs = [np.random.default_rng((seed, position)) for position in of_one_image]
            crops, label, reason = _read(source, index, functools.partial(crop, rngs=rngs))
            if crops is not None:
                break
            broken.append((index, reason))
        if crops is None:
            examples += [Example(blank, label, False, broken)] * len(of_one_image)
            continue
        if augment is not None:
            crops = [np.asarray(augment(Image.fromarray(pixels), rng)) for pixels, rng in zip(crops, rngs, strict=True)]
        examples += [Example(pixels, label, True, broken) for pixels in crops]
    return examples


def _eval_examples(
    positions: Sequence[int], *, source: Source, crop: Callable[[Encoded], np.ndarray], blank: np.ndarray
) -> list[Example]:
    """The examples at some positions, which count the source's own order; blank beyond its end."""
    examples = []
    for index in positions:
        image, label, broken = None, 0, []
        if index < len(source.examples):
            image, label, reason = _read(source, index, crop)
            broken = [(index, reason)] if image is None else []
        examples.append(Example(blank if image is None else image, label, image is not None, broken))
    return examples


def _read(source: Source, index: int, crop: Callable[[Encoded], Any]) -> tuple[Any, int, str]:
    """What `crop` makes of an image, and its label; or, where the example is broken, None, 0 and the reason."""
    try:
        example = source.examples[index]
    except UnreadableError as error:
        return None, 0, f"it cannot be read: {error}"
    label = int(example["label"])
    if not 0 <= label < source.num_classes:
        return None, 0, f"its label {label} is none of the classes 0 to {source.num_classes - 1}"
    if not len(example["image"]):
        return None, 0, "it is empty"
    try:
        return crop(example["image"]), label, ""
    except Exception as error:  # what is raised for broken bytes depends on the format and the damage
        return None, 0, f"it does not decode: {error}"


def _checked(batches: grain.DatasetIterator, source: Source, max_broken: int, fields: Sequence[str]) -> Iterator[Batch]:
    """The batches without what is known of their broken images, which is reported and counted."""
    checked = _check(batches, source, max_broken, fields)
    # At the program's end Grain would close it when what it needs is gone.
    weakref.finalize(checked, _close_if_there, weakref.ref(checked))
    return checked


def _close_if_there(generator: Callable[[], Generator[Batch, None, None] | None]) -> None:
    if there := generator():
        there.close()


def _check(
    batches: grain.DatasetIterator, source: Source, max_broken: int, fields: Sequence[str]
) -> Generator[Batch, None, None]:
    broken: dict[int, str] = {}
    try:
        for batch in batches:
            for index, reason in batch["broken"]:
                if index not in broken:
                    broken[index] = _name(source, index)
                    _warn_once(f"{broken[index]} is left out: {reason}")
            if len(broken) > max_broken or len(broken) == len(source.examples):
                some = ", ".join(itertools.islice(broken.values(), 3))
                raise UserError(
                    f"{len(broken)} of {source.name}'s {len(source.examples)} images are broken, among them {some}. "
                    f"Expected at most {max_broken}: mend or remove them, or raise config.data.max_broken"
                )
            # Copied: a worker's are in shared memory, which has to be free again before the program ends.
            batch = {name: np.array(batch[name]) for name in fields}
            yield batch
    finally:
        batches.close()


@functools.cache
def _warn_once(message: str) -> None:
    """Every evaluation meets the same broken images: once is enough."""
    _LOG.warning("%s", message)


def _name(source: Source, index: int) -> str:
    file_name = getattr(source.examples, "file_name", None)
    return (file_name and file_name(index)) or f"image {index} of {source.name}"
