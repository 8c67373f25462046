"""How often training goes over its images, and how many crops of each it takes at a time."""

import bisect
import dataclasses
import math
from typing import NamedTuple

from sret_jax.errors import UserError


class Pass(NamedTuple):
    """One pass over the images: it counts as as many epochs as it takes crops of each image.

    Attributes:
      number: of the pass, from 0.
      first_epoch: from 0.
      crops: of each image, which stand one behind the other.
    """

    number: int
    first_epoch: int
    crops: int


@dataclasses.dataclass(frozen=True)
class Passes:
    """The passes of a run. Beyond them, and where there are none, every epoch is a pass with one crop of each image."""

    planned: tuple[Pass, ...] = ()

    @property
    def most_crops(self) -> int:
        """Of an image, in any pass."""
        return max((one.crops for one in self.planned), default=1)

    def at(self, epoch: int) -> Pass:
        """The pass that an epoch belongs to."""
        if self.planned and epoch < self.planned[-1].first_epoch + self.planned[-1].crops:
            return self.planned[bisect.bisect_right(self.planned, epoch, key=lambda one: one.first_epoch) - 1]
        done = self.planned[-1] if self.planned else Pass(-1, -1, 1)
        return Pass(done.number + 1 + epoch - (done.first_epoch + done.crops), epoch, 1)


# Every epoch is a pass.
ONE_CROP = Passes()


def fkd_passes(epochs: int, num_crops: int, warmup_epochs: float) -> Passes:
    """The passes of a run from soft labels, as the authors' training code makes them (FKD: `train_ViT_FKD.py` there).

    The warm-up takes one crop of each image in an epoch. Then each pass takes `num_crops` and counts as so many epochs,
    as long as it begins before the last `num_crops` epochs; what is left takes one crop in an epoch again. For 300
    epochs, 4 crops and 5 epochs of warm-up: 5 epochs, 73 passes, 3 epochs.

    Args:
      epochs: of the run.
      num_crops: at least 1.
      warmup_epochs: of which a part counts as a whole one.

    Raises:
      UserError: the run is too short for a single pass with so many crops.
    """
    first = min(math.ceil(warmup_epochs), epochs)
    begins = range(first, epochs - num_crops, num_crops)
    if num_crops > 1 and not begins:
        raise UserError(
            f"{num_crops} crops of an image (config.distill.num_crops) are never taken in {epochs} epochs, of which "
            f"{first} are warm-up and the last {num_crops} take one. Expected more than {first + num_crops} epochs, or "
            "fewer crops"
        )
    last = begins[-1] + num_crops if begins else first
    starts = [*range(first), *begins, *range(last, epochs)]
    ends = [*starts[1:], epochs]
    return Passes(tuple(Pass(i, start, end - start) for i, (start, end) in enumerate(zip(starts, ends, strict=True))))
