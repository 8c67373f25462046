"""From a source to batches on one host: shuffle, read, decode, crop, augment, batch; for any number of hosts."""

import functools
import itertools
import logging
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from PIL import Image

from sret_jax.data.decode import Encoded, central_crop, random_crops
from sret_jax.data.rand_augment import RandAugment
from sret_jax.data.sources import Source
from sret_jax.errors import UserError

_LOG = logging.getLogger(__name__)

# What a thread makes at a time. More rows of an image that is repeated then come from one decoding.
_CHUNK = 12

# More than any run takes; the number of chunks in them is still a number for Grain.
_ENDLESS = 10**12

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
        blank=np.zeros((image_size, image_size, 3), np.uint8),
    )
    batches = _read_ahead(
        load,
        batch_size=batch_size,
        rows=rows,
        first_batch=first_batch,
        num_batches=_ENDLESS,
        num_threads=num_threads,
        num_workers=num_workers,
    )
    return _report_broken(batches, source, max_broken, ("image", "label"))


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
    load = functools.partial(
        _eval_examples,
        source=source,
        crop=functools.partial(central_crop, image_size=image_size, crop_ratio=crop_ratio),
        blank=np.zeros((image_size, image_size, 3), np.uint8),
    )
    num_batches = math.ceil(len(source.examples) / batch_size)
    batches = _read_ahead(
        load,
        batch_size=batch_size,
        rows=rows,
        first_batch=0,
        num_batches=num_batches,
        num_threads=num_threads,
        num_workers=num_workers,
    )
    return _report_broken(batches, source, max_broken, ("image", "label", "mask"), num_batches)


class _Example(NamedTuple):
    image: np.ndarray
    label: int
    mask: bool  # False: there is no such example, or it is broken
    broken: Sequence[tuple[int, str]] = ()  # index and reason for each broken image met on the way to this one


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
) -> list[_Example]:
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
            examples += [_Example(blank, label, False, broken)] * len(of_one_image)
            continue
        if augment is not None:
            crops = [np.asarray(augment(Image.fromarray(pixels), rng)) for pixels, rng in zip(crops, rngs, strict=True)]
        examples += [_Example(pixels, label, True, broken) for pixels in crops]
    return examples


def _eval_examples(
    positions: Sequence[int], *, source: Source, crop: Callable[[Encoded], np.ndarray], blank: np.ndarray
) -> list[_Example]:
    """The examples at some positions, which count the source's own order; blank beyond its end."""
    examples = []
    for index in positions:
        image, label, broken = None, 0, []
        if index < len(source.examples):
            image, label, reason = _read(source, index, crop)
            broken = [(index, reason)] if image is None else []
        examples.append(_Example(blank if image is None else image, label, image is not None, broken))
    return examples


def _read(source: Source, index: int, crop: Callable[[Encoded], Any]) -> tuple[Any, int, str]:
    """What `crop` makes of an image, and its label; or, where the example is broken, None, 0 and the reason."""
    example = source.examples[index]
    label = int(example["label"])
    if not 0 <= label < source.num_classes:
        return None, 0, f"its label {label} is none of the classes 0 to {source.num_classes - 1}"
    if not len(example["image"]):
        return None, 0, "it is empty"
    try:
        return crop(example["image"]), label, ""
    except Exception as error:  # what is raised for broken bytes depends on the format and the damage
        return None, 0, f"it does not decode: {error}"


def _read_ahead(
    load: Callable[[Sequence[int]], list[_Example]],
    *,
    batch_size: int,
    rows: Sequence[int] | None,
    first_batch: int,
    num_batches: int,
    num_threads: int,
    num_workers: int,
) -> grain.DatasetIterator:
    """Batches from number `first_batch` on, of what `load` returns for the positions of their rows."""
    rows = range(batch_size) if rows is None else rows
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    workers = max(num_workers, 1)

    def load_chunk(number: int) -> list[_Example]:
        # Of n workers, Grain gives each every n-th element, and takes a batch from each in turn. So that these are the
        # batches in their order, the n-th elements have to be chunks of every n-th batch.
        of_worker, worker = divmod(number, workers)
        turn, chunk = divmod(of_worker, len(chunks))
        first_row = (first_batch + turn * workers + worker) * batch_size
        return load([first_row + row for row in chunks[chunk]])

    # Worker processes must all get equally many: the last turn may have batches beyond the last.
    turns = math.ceil(num_batches / workers)
    # The threads make parts of batches: the first batch comes soon, and two batches are about all that is kept.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * len(chunks), num_threads))
    dataset = grain.MapDataset.range(turns * workers * len(chunks)).map(load_chunk).to_iter_dataset(options)
    dataset = dataset.batch(len(chunks), batch_fn=_stack)
    if num_workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own, which only programs of absl have parsed
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_init_worker)
    return iter(dataset)


def _stack(chunks: Sequence[Sequence[_Example]]) -> dict[str, Any]:
    examples = list(itertools.chain.from_iterable(chunks))
    return {
        "image": np.stack([example.image for example in examples]),
        "label": np.array([example.label for example in examples], np.int32),
        "mask": np.array([example.mask for example in examples], np.bool_),
        "broken": sorted({image for example in examples for image in example.broken}),
    }


def _init_worker(worker: int, workers: int) -> None:
    """In a worker process: leave signals to the parent, which may need another batch to end well, and end with it."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _report_broken(
    batches: grain.DatasetIterator, source: Source, max_broken: int, fields: Sequence[str], count: int | None = None
) -> Iterator[Batch]:
    """The batches, as long as not too many of their images are broken."""
    broken: dict[int, str] = {}
    try:
        for batch in itertools.islice(batches, count):
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
            # Copied out of memory shared with a worker: what lives there at the program's end is not freed quietly.
            yield {name: np.array(batch[name]) for name in fields}
    finally:
        batches.close()


@functools.cache
def _warn_once(message: str) -> None:
    """Every evaluation meets the same broken images: once is enough."""
    _LOG.warning("%s", message)


def _name(source: Source, index: int) -> str:
    file_name = getattr(source.examples, "file_name", None)
    return file_name(index) if file_name else f"image {index} of {source.name}"
