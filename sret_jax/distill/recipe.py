"""What decides on a set of soft labels."""

import math
from typing import NamedTuple

from sret_jax.data.augment import MEAN, STD
from sret_jax.errors import UserError

# No machine has room for more.
_MOST_CROPS = 2**16
_LARGEST_IMAGE = 2**14


class Recipe(NamedTuple):
    """What decides on a set of soft labels, beside the images.

    Attributes:
      teacher: as `load_teachers` takes it; several average their probabilities.
      num_crops: of each image.
      label_type: how much of the teacher's distribution is kept.
      temperature: that its logits are divided by.
      image_size: of its input; 0 is its own, and for a function 224.
      mean: that a function's input is normalised with.
      std: likewise.
      dtype: of its weights and computation, `float32` or `bfloat16`.
      crop_area: smallest and largest area of a crop as a part of the image's.
      crop_aspect: smallest and largest width / height of a crop.
      flip: probability of a crop to be mirrored left to right.
      seed: decides on crops and flips; together with an image's key, so that they are the same in any order.
      reference: a folder of soft labels of the same type, whose crops and flips are taken instead; empty is none.
    """

    teacher: str
    num_crops: int = 500
    label_type: str = "marginal_smoothing_k5"
    temperature: float = 1.0
    image_size: int = 0
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    dtype: str = "float32"
    crop_area: tuple[float, float] = (0.08, 0.936)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    seed: int = 0
    reference: str = ""


def check_recipe(recipe: Recipe) -> None:
    """Refuses numbers that are out of range.

    Raises:
      UserError: with every such number, by the name of its flag.
    """
    areas, aspects = recipe.crop_area, recipe.crop_aspect
    wrong = {
        f"--num-crops is {recipe.num_crops}, expected 1 to {_MOST_CROPS}": not 1 <= recipe.num_crops <= _MOST_CROPS,
        f"--temperature is {recipe.temperature}, expected a number above 0": not 0 < recipe.temperature < math.inf,
        f"--flip is {recipe.flip}, expected a probability, 0 to 1": not 0 <= recipe.flip <= 1,
        f"--seed is {recipe.seed}, expected at least 0": recipe.seed < 0,
        f"--image-size is {recipe.image_size}, expected 0 to {_LARGEST_IMAGE}": not 0
        <= recipe.image_size
        <= _LARGEST_IMAGE,
        f"--mean is {recipe.mean}, expected numbers": not all(map(math.isfinite, recipe.mean)),
        f"--std is {recipe.std}, expected numbers above 0": not all(0 < number < math.inf for number in recipe.std),
        f"--crop-area is {areas}, expected 0 < low <= high <= 1": not 0 < areas[0] <= areas[1] <= 1,
        f"--crop-aspect is {aspects}, expected 0 < low <= high": not 0 < aspects[0] <= aspects[1] < math.inf,
    }
    if problems := [problem for problem, is_wrong in wrong.items() if is_wrong]:
        raise UserError("\n".join(problems))
