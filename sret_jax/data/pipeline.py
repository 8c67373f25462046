"""From a source to batches on one host: shuffle, read, decode, crop, augment, batch; for any number of hosts."""

import functools
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np
from PIL import Image

from sret_jax.data.decode import central_crop, random_crops, stored_crops
from sret_jax.data.image_file import Colour
from sret_jax.data.passes import ONE_CROP, Passes
from sret_jax.data.rand_augment import RandAugment
from sret_jax.data.read_ahead import Example, read_ahead
from sret_jax.data.reading import UnreadableError
from sret_jax.data.soft_labels import SoftLabelSet, check_crops
from sret_jax.data.sources import Source
from sret_jax.data.workers import explain_deaths
from sret_jax.errors import UserError

_LOG = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# An image of a batch, and its label or soft labels by their names there.
_Shown = tuple[np.ndarray, Mapping[str, Any]]

# Keeps apart what is drawn from one seed for rows and for images.
_OF_IMAGES = 1


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
    soft_labels: SoftLabelSet | None = None,
    bicubic: bool = False,
    passes: Passes = ONE_CROP,
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

    With soft labels, an image is cropped and flipped as theirs say, by `stored_crops`: crops drawn at random from them,
    no two in a pass the same. They are rounded to float16, whatever they are stored in.

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
      soft_labels: of every image of the source; then `crop_area`, `crop_aspect` and `rand_augment` are not used.
      bicubic: resize their crops bicubically, instead of bilinearly as the authors do.
      passes: how many crops of an image stand one behind the other in which epochs; one by default.
      max_broken: how many different broken images this host puts up with; each is logged once.
      num_threads: threads that read and decode ahead of the caller, in each process.
      num_workers: processes that do so; 0 for threads of this process.

    Yields:
      `image` uint8 (len(rows), image_size, image_size, 3), RGB, and `label` int32 (len(rows),); with soft labels,
      instead of the latter, `classes` int32 and `probabilities` float16, both (len(rows), k).

    Raises:
      UserError: if the source is smaller than one batch, or there is no such policy; while iterating, if too many
        images are broken, or soft labels are missing, damaged or too few.
    """
    blank = np.zeros((image_size, image_size, 3), np.uint8)
    show: _Show
    if soft_labels is None:
        show = _RandomCrops(
            seed=seed,
            crop=functools.partial(
                random_crops, image_size=image_size, area=crop_area, aspect=crop_aspect, background=source.background
            ),
            augment=RandAugment.parse(rand_augment) if rand_augment else None,
        )
        blank_target: Mapping[str, Any] = {"label": np.int32(0)}
    else:
        show = _StoredCrops(
            seed=seed, image_size=image_size, soft_labels=soft_labels, bicubic=bicubic, background=source.background
        )
        k = soft_labels.label_type.size(soft_labels.num_classes)
        blank_target = {"classes": np.zeros(k, np.int32), "probabilities": np.zeros(k, np.float16)}
    load = functools.partial(
        _train_examples,
        source=source,
        order=grain.MapDataset.range(len(source.examples)).seed(seed).shuffle(),
        epoch_length=steps_per_epoch(source, batch_size) * batch_size,
        repeats=repeats,
        passes=passes,
        show=show,
        max_broken=max_broken,
        blank=(blank, blank_target),
    )
    batches = read_ahead(
        load,
        batch_size=batch_size,
        rows=rows,
        first_batch=first_batch,
        group=passes.most_crops * repeats,
        example_bytes=blank.nbytes,
        num_threads=num_threads,
        num_workers=num_workers,
    )
    return _checked(batches, source, max_broken, ("image", *blank_target))


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
        crop=functools.partial(
            central_crop, image_size=image_size, crop_ratio=crop_ratio, background=source.background
        ),
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


class _Group(NamedTuple):
    """Rows of a batch that show the same image, one behind the other."""

    place: int  # of the image, in the order of all passes
    positions: Sequence[int]  # of the rows; a position counts the rows of all batches of all epochs
    crops: Sequence[int]  # which of the pass's crops of the image they show
    crops_in_pass: int


class _Show(Protocol):
    """What rows of a batch show of an example: a function that worker processes get a copy of."""

    def __call__(self, example: Mapping[str, Any], group: _Group) -> list[_Shown]: ...


class _BrokenError(Exception):
    """An example that cannot be used; the message is its reason, in a few words."""


class _RandomCrops(NamedTuple):
    """Crops an image at random."""

    seed: int
    crop: Callable[..., list[np.ndarray]]
    augment: RandAugment | None

    def __call__(self, example: Mapping[str, Any], group: _Group) -> list[_Shown]:
        rngs = [np.random.default_rng((self.seed, position)) for position in group.positions]
        crops = self.crop(example["image"], rngs=rngs)
        if self.augment is not None:
            crops = [
                np.asarray(self.augment(Image.fromarray(pixels), rng)) for pixels, rng in zip(crops, rngs, strict=True)
            ]
        return [(pixels, {"label": np.int32(example["label"])}) for pixels in crops]


class _StoredCrops(NamedTuple):
    """Crops an image as its soft labels say."""

    seed: int
    image_size: int
    soft_labels: SoftLabelSet
    bicubic: bool
    background: Colour

    def __call__(self, example: Mapping[str, Any], group: _Group) -> list[_Shown]:
        labels = self.soft_labels.read(example["key"])
        if not len(labels.boxes):
            raise _BrokenError("it was left out when its soft labels were made")
        check_crops(example["key"], labels, group.crops_in_pass)
        rng = np.random.default_rng((self.seed, group.place, _OF_IMAGES))
        chosen = rng.choice(len(labels.boxes), group.crops_in_pass, replace=False)[group.crops]
        boxes = labels.boxes[chosen].astype(np.float16)
        crops = stored_crops(
            example["image"],
            self.image_size,
            boxes,
            labels.flips[chosen],
            bicubic=self.bicubic,
            background=self.background,
        )
        classes = labels.classes[chosen].astype(np.int32)
        probabilities = labels.probabilities[chosen].astype(np.float16)
        return [
            (pixels, {"classes": classes[row], "probabilities": probabilities[row]}) for row, pixels in enumerate(crops)
        ]


def _train_examples(
    positions: Sequence[int],
    *,
    source: Source,
    order: grain.MapDataset,
    epoch_length: int,
    repeats: int,
    passes: Passes,
    show: _Show,
    max_broken: int,
    blank: _Shown,
) -> list[Example]:
    """The examples at some positions; a position counts the rows of all batches of all epochs."""
    examples = []
    for group in _groups(positions, epoch_length, passes, len(order), repeats):
        first = order[group.place]
        shown: list[_Shown] = []
        broken = []
        # One more than are allowed is enough to know that there are too many.
        for index in range(first, first + min(len(order), max_broken + 1)):
            index %= len(order)
            try:
                shown = _read(source, index, functools.partial(show, group=group))
                break
            except _BrokenError as error:
                broken.append((index, str(error)))
            except UserError as error:
                return [Example(blank[0], blank[1], False, broken, str(error))] * len(positions)
        for image, target in shown or [blank] * len(group.positions):
            examples.append(Example(image, target, bool(shown), broken))
    return examples


def _groups(
    positions: Sequence[int], epoch_length: int, passes: Passes, order_length: int, repeats: int
) -> Iterator[_Group]:
    def place(position: int) -> tuple[int, int, int]:
        """The image's place, which of the pass's crops this is, and how many those are."""
        one = passes.at(position // epoch_length)
        offset = position - one.first_epoch * epoch_length
        return one.number * order_length + offset // one.crops // repeats, offset % one.crops, one.crops

    for (image, crops_in_pass), rows in itertools.groupby(
        ((position, *place(position)) for position in positions), lambda row: (row[1], row[3])
    ):
        group = list(rows)
        yield _Group(image, [row[0] for row in group], [row[2] for row in group], crops_in_pass)


def _eval_examples(
    positions: Sequence[int], *, source: Source, crop: Callable[..., np.ndarray], blank: np.ndarray
) -> list[Example]:
    """The examples at some positions, which count the source's own order; blank beyond its end."""

    def show(example: Mapping[str, Any]) -> _Shown:
        return crop(example["image"]), {"label": np.int32(example["label"])}

    examples = []
    nothing = blank, {"label": np.int32(0)}
    for index in positions:
        try:
            image, target = _read(source, index, show) if index < len(source.examples) else nothing
            examples.append(Example(image, target, mask=index < len(source.examples)))
        except _BrokenError as error:
            examples.append(Example(*nothing, mask=False, broken=[(index, str(error))]))
    return examples


def _read(source: Source, index: int, show: Callable[[Mapping[str, Any]], Any]) -> Any:
    """What `show` makes of an example.

    Raises:
      _BrokenError: the example cannot be used.
      UserError: as `show` raises it.
    """
    try:
        example = source.examples[index]
    except UnreadableError as error:
        raise _BrokenError(f"it cannot be read: {error}") from error
    label = int(example["label"])
    if not 0 <= label < source.num_classes:
        raise _BrokenError(f"its label {label} is none of the classes 0 to {source.num_classes - 1}")
    if not len(example["image"]):
        raise _BrokenError("it is empty")
    try:
        return show(example)
    except (UserError, _BrokenError):
        raise
    except Exception as error:  # what is raised for broken bytes depends on the format and the damage
        raise _BrokenError(f"it does not decode: {error}") from error


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
        for batch in explain_deaths(batches):
            if batch["refused"]:
                raise UserError(batch["refused"])
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
