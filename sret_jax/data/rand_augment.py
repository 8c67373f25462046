"""RandAugment (Cubuk et al., 2020) with the operations, ranges and policy names of timm 0.3.2, which DeiT used.

timm's policy `rand-m9-mstd0.5-inc1` means: two operations an image, drawn with replacement from fifteen; each is left
out with probability 1/2; each that is not draws its magnitude anew, normal with mean 9 and standard deviation 0.5,
clipped to 0..10, and the sign of its effect, where it has one. Interpolation is bicubic and what comes in from outside
the image is ImageNet's mean colour, as in DeiT. timm 1.0 computes the same from the same draws.

The operations give the same bytes as timm's do with Pillow, with one exception: Pillow 13 refuses to keep 0 bits of a
colour, `PosterizeIncreasing` at magnitude 10. Older releases return black, and so does this module.

timm mirrors an image before these operations, here that happens after them, on the device. For all but `ShearY` the
order does not matter, because signs are random; that one leaves the left edge in place, and so, mirrored, the right.

It runs on the host because interpolation at arbitrary places suits no TPU: for v5e, the compiler's own estimate of a
rough version was at least 1.0 M cycles an image, about as long as SReT-T's whole train step takes to move its bytes. On
the host it is 1.0 ms of one CPU core for 224 × 224 pixels, five sixths of it for bicubic rotation, shear and
translation (2.0 to 2.8 ms each); reading and cropping a JPEG of 500 × 375 with Pillow takes 2.6 ms.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageOps

from sret_jax.data.augment import MEAN
from sret_jax.errors import UserError

_MAX_MAGNITUDE = 10.0
_PROBABILITY = 0.5  # of an operation that was drawn to be applied

_PART = re.compile(r"m(?P<m>10|[0-9])|n(?P<n>[1-9][0-9]*)|mstd(?P<mstd>10|[0-9](?:\.[0-9]+)?)|inc(?P<inc>1)")
_FILL = tuple(round(255 * mean) for mean in MEAN)
_BICUBIC = Image.Resampling.BICUBIC

# From an RGB image, the magnitude, 0..10, and the sign, 1 or -1, to an RGB image of the same size.
Operation = Callable[[Image.Image, float, int], Image.Image]


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Random operations on one image after the other; the randomness is the caller's.

    Attributes:
      magnitude: mean of the magnitudes, 0..10.
      magnitude_std: their standard deviation before they are clipped to 0..10.
      count: operations that are drawn for an image.
    """

    magnitude: float
    magnitude_std: float
    count: int

    @classmethod
    def parse(cls, policy: str) -> "RandAugment":
        """The policy that timm's string names: `rand`, then `m9`, `n2`, `mstd0.5` and `inc1` in any order, with dashes.

        Args:
          policy: as in `rand-m9-mstd0.5-inc1`. As in timm, `m` is 10 where it is not given, `n` is 2 and `mstd` is 0.
            `inc1`, the operations whose effect increases with the magnitude, must be given: there are no others here.

        Raises:
          UserError: if it is not such a string, or a number is out of range.
        """
        name, *parts = policy.split("-")
        matches = [match for part in parts if (match := _PART.fullmatch(part))]
        given = {key: value for match in matches for key, value in match.groupdict().items() if value}
        problems = [f"{part!r} is not a part of one" for part in parts if not _PART.fullmatch(part)]
        if name != "rand":
            problems.append(f"it begins with {name!r}")
        if len(given) < len(matches):
            problems.append("a part is there twice")
        if "inc" not in given:
            problems.append("inc1 is missing, and only operations whose effect increases with the magnitude are here")
        if problems:
            raise UserError(
                f"{policy!r} is not a RandAugment policy: {'; '.join(problems)}. Expected `rand` and, after dashes, "
                "inc1 and any of m0 to m10 (magnitude), n1 or more (operations an image) and mstd0 to mstd10 (standard "
                "deviation of the magnitude): the published recipe is 'rand-m9-mstd0.5-inc1'"
            )
        return cls(
            magnitude=float(given.get("m", _MAX_MAGNITUDE)),
            magnitude_std=float(given.get("mstd", 0)),
            count=int(given.get("n", 2)),
        )

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """The image after the operations that `draw` returns.

        Args:
          image: RGB.
          rng: the only source of randomness.

        Returns:
          RGB of the same size.
        """
        for name, magnitude, sign in self.draw(rng):
            image = OPERATIONS[name](image, magnitude, sign)
        return image

    def draw(self, rng: np.random.Generator) -> list[tuple[str, float, int]]:
        """What one image gets: names, magnitudes in 0..10 and signs, 1 or -1, of `count` operations or fewer."""
        drawn = []
        for _ in range(self.count):
            name = _NAMES[rng.integers(len(_NAMES))]
            if rng.random() < _PROBABILITY:
                magnitude = min(max(rng.normal(self.magnitude, self.magnitude_std), 0.0), _MAX_MAGNITUDE)
                drawn.append((name, magnitude, 1 if rng.random() < 0.5 else -1))
        return drawn


def _auto_contrast(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageOps.equalize(image)


def _invert(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageChops.invert(image)  # The same as ImageOps.invert, ten times as quick.


def _rotate(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return image.rotate(sign * _part_of(30.0, magnitude), _BICUBIC, fillcolor=_FILL)


def _posterize(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    lowest = 1 << (8 - (4 - int(_part_of(4, magnitude))))
    return image.point([value // lowest * lowest for value in range(256)] * 3)


def _solarize(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    threshold = 256 - int(_part_of(256, magnitude))
    return image.point([value if value < threshold else 255 - value for value in range(256)] * 3)


def _solarize_add(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    added = int(_part_of(110, magnitude))
    return image.point([value + added if value < 128 else value for value in range(256)] * 3)


def _color(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Color(image).enhance(_factor(magnitude, sign))


def _contrast(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(_factor(magnitude, sign))


def _brightness(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_factor(magnitude, sign))


def _sharpness(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_factor(magnitude, sign))


def _shear_x(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return _affine(image, (1, sign * _part_of(0.3, magnitude), 0, 0, 1, 0))


def _shear_y(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, 0, sign * _part_of(0.3, magnitude), 1, 0))


def _translate_x(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, sign * _part_of(0.45, magnitude) * image.width, 0, 1, 0))


def _translate_y(image: Image.Image, magnitude: float, sign: int) -> Image.Image:
    return _affine(image, (1, 0, 0, 0, 1, sign * _part_of(0.45, magnitude) * image.height))


def _part_of(maximum: float, magnitude: float) -> float:
    return magnitude / _MAX_MAGNITUDE * maximum


def _factor(magnitude: float, sign: int) -> float:
    """Of an enhancement: 1 changes nothing; 0.1 and 1.9 are the farthest."""
    return 1.0 + sign * _part_of(0.9, magnitude)


def _affine(image: Image.Image, coefficients: tuple[float, ...]) -> Image.Image:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, _BICUBIC, fillcolor=_FILL)


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "AutoContrast": _auto_contrast,
        "Equalize": _equalize,
        "Invert": _invert,
        "Rotate": _rotate,
        "PosterizeIncreasing": _posterize,
        "SolarizeIncreasing": _solarize,
        "SolarizeAdd": _solarize_add,
        "ColorIncreasing": _color,
        "ContrastIncreasing": _contrast,
        "BrightnessIncreasing": _brightness,
        "SharpnessIncreasing": _sharpness,
        "ShearX": _shear_x,
        "ShearY": _shear_y,
        "TranslateXRel": _translate_x,
        "TranslateYRel": _translate_y,
    }
)
_NAMES = tuple(OPERATIONS)
