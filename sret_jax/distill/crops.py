"""From images to the crops that a teacher sees of them."""

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sret_jax.data.decode import random_boxes, stored_crops
from sret_jax.data.read_ahead import Example, read_ahead
from sret_jax.data.reading import UnreadableError
from sret_jax.data.soft_labels import SoftLabelSet, check_crops
from sret_jax.data.sources import Source
from sret_jax.data.workers import explain_deaths
from sret_jax.distill.recipe import Recipe
from sret_jax.distill.units import Unit
from sret_jax.errors import UserError


class Cropped(NamedTuple):
    """All crops of an image.

    Attributes:
      key: of the image; empty where it could not be read.
      crops: uint8 (crops, image_size, image_size, 3), RGB.
      boxes: float16 (crops, 4), as in `SoftLabels`.
      flips: bool (crops,).
      is_read: whether the disk gave the image.
      broken: why the crops are blank; empty if they are not.
    """

    key: str
    crops: np.ndarray
    boxes: np.ndarray
    flips: np.ndarray
    is_read: bool
    broken: str


class Cropper(NamedTuple):
    """From an image's number to all its crops; what worker processes get a copy of."""

    recipe: Recipe
    source: Source
    reference: SoftLabelSet | None
    image_size: int

    def of_units(self, units: Sequence[Unit], num_threads: int, num_workers: int) -> Iterator[Cropped]:
        """All crops of one image after the other, ahead of the caller.

        Raises:
          UserError: while iterating, if the reference lacks something.
        """
        order = [index for unit in units for index in unit.images]
        if not order:
            return
        images = read_ahead(
            functools.partial(self._load, order),
            batch_size=1,  # an image with all its crops
            rows=None,
            num_batches=len(order),
            example_bytes=self.recipe.num_crops * self.image_size**2 * 3,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        try:
            for image in explain_deaths(images):
                if image["refused"]:
                    raise UserError(image["refused"])
                key = os.fsdecode(image["key"][0].tobytes())
                reasons = [reason for _, reason in image["broken"]]
                # A worker's are in shared memory, which has to be free again before the program ends.
                crops, boxes, flips = (
                    np.array(image[name][0], copy=num_workers > 0) for name in ("image", "boxes", "flips")
                )
                yield Cropped(key, crops, boxes, flips, bool(image["mask"][0]), "".join(reasons))
        finally:
            images.close()

    def _load(self, order: Sequence[int], positions: Sequence[int]) -> list[Example]:
        # Beyond the last there may be a few more, which nobody takes.
        return [self._example(order[min(position, len(order) - 1)]) for position in positions]

    def _example(self, index: int) -> Example:
        crops = np.zeros((self.recipe.num_crops, self.image_size, self.image_size, 3), np.uint8)
        boxes = np.zeros((self.recipe.num_crops, 4), np.float16)
        flips = np.zeros(self.recipe.num_crops, np.bool_)
        key, is_read, broken, refused = "", True, "", ""
        try:
            example = self.source.examples[index]
            key = example["key"]
            boxes, flips = self._boxes_and_flips(key, example["image"])
            crops = np.stack(
                stored_crops(
                    example["image"],
                    self.image_size,
                    boxes,
                    flips,
                    bicubic=True,
                    background=self.source.background,
                )
            )
        except UserError as error:
            refused = str(error)
        except UnreadableError as error:
            is_read, broken = False, f"it cannot be read: {error}"
        except MemoryError:
            raise
        except Exception as error:  # what is raised for broken bytes depends on the format and the damage
            broken = f"it does not decode: {error}"
        target = {"boxes": boxes, "flips": flips, "key": np.frombuffer(os.fsencode(key), np.uint8)}
        return Example(crops, target, is_read, [(index, broken)] if broken else [], refused)

    def _boxes_and_flips(self, key: str, encoded: Any) -> tuple[np.ndarray, np.ndarray]:
        num_crops = self.recipe.num_crops
        if self.reference is not None:
            given = self.reference.read(key)
            if not len(given.boxes):
                raise ValueError("the reference has no crops of it, either")
            check_crops(key, given, num_crops)
            return given.boxes[:num_crops].astype(np.float16), given.flips[:num_crops]
        of_key = int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "big")
        rng = np.random.default_rng((self.recipe.seed, of_key))
        boxes = random_boxes(encoded, num_crops, rng, self.recipe.crop_area, self.recipe.crop_aspect)
        return boxes, rng.random(num_crops) < self.recipe.flip
