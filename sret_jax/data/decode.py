"""From the bytes of an image file to crops of the image, decoding no more of it than they need."""

import math
import threading
from collections.abc import Sequence

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image

from sret_jax.data.image_file import MAX_REDUCTION, WHITE, Box, Colour, Encoded, OpenedImage, Pixels, open_image

# Evaluation cuts the ends off images that are longer than this times their other side.
_MAX_ASPECT = 20

# Larger boxes are resized by Pillow, in strips.
_PIXELS_TO_COPY = 1 << 22

# a = -0.5, as Pillow's bicubic filter; PyTorch's has a = -0.75.
_BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)
_WHOLE = ResizeOptions(_BICUBIC)


def decode_small(encoded: bytes, most_bytes: int, background: Colour = WHITE) -> np.ndarray | None:
    """All pixels of an image file, as the following functions take them; None if they are more bytes, or a JPEG.

    Returns:
      uint8 (height, width, 3), RGB, read-only.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    image = open_image(encoded)
    if image.jpeg is not None or 3 * image.width * image.height > most_bytes:
        return None
    pixels = np.array(image.decode(1, image.height, background).array((0, 0, image.width, image.height)))
    pixels.setflags(write=False)
    return pixels


def random_crops(
    encoded: Encoded,
    image_size: int,
    rngs: Sequence[np.random.Generator],
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    background: Colour = WHITE,
) -> list[np.ndarray]:
    """Crops of one image by `random_crop_box`, resized bicubically with antialiasing.

    The image is decoded once for all of them: a JPEG only down to the lowest row that they need, and at 1/2, 1/4 or 1/8
    of its size for crops that then still have 1.5 times the pixels asked for. Over photographs, crops differ from
    Pillow's by 0.14 grey levels on average, those that were decoded at a reduced size by 0.6.

    Args:
      encoded: an image file as `open_image` takes it, or pixels, uint8 (height, width, 1 or 3).
      image_size: height and width of the crops, pixels.
      rngs: a source of randomness for each crop.
      area: smallest and largest area of a crop as a part of the image's.
      aspect: smallest and largest width / height of a crop.
      background: RGB, 0 to 255, of what is transparent.

    Returns:
      uint8 (image_size, image_size, 3), RGB, for each of `rngs`.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    image = open_image(encoded)
    boxes = [random_crop_box(image.width, image.height, rng, area, aspect) for rng in rngs]
    # For each crop by itself: what one shows must not depend on which others are made with it.
    reductions = [_reduction(image, box, 1.5 * image_size) for box in boxes]
    crops: dict[int, np.ndarray] = {}
    for reduction in set(reductions):
        those = [number for number, other in enumerate(reductions) if other == reduction]
        pixels = image.decode(reduction, max(boxes[number][3] for number in those), background)
        crops |= {number: _resized(pixels, boxes[number], reduction, image_size) for number in those}
    return [crops[number] for number in range(len(boxes))]


def random_boxes(
    encoded: Encoded,
    count: int,
    rng: np.random.Generator,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> np.ndarray:
    """Boxes of `random_crop_box` as `stored_crops` takes them; only the image's header is read.

    Args:
      encoded: an image file, or pixels, as for `stored_crops`.
      count: of the boxes.
      rng: source of randomness.
      area: smallest and largest area of a box as a part of the image's.
      aspect: smallest and largest width / height of a box.

    Returns:
      float16 (count, 4).

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    image = open_image(encoded)
    sides = np.array([image.height, image.width] * 2)
    drawn = np.array([random_crop_box(image.width, image.height, rng, area, aspect) for _ in range(count)])
    left, top, right, bottom = drawn.T
    return (np.stack([top, left, bottom - top, right - left], axis=1) / sides).astype(np.float16)


def stored_crops(
    encoded: Encoded,
    image_size: int,
    boxes: np.ndarray,
    flips: np.ndarray,
    *,
    bicubic: bool = False,
    background: Colour = WHITE,
) -> list[np.ndarray]:
    """Crops of one image at given boxes, resized with antialiasing, some of them mirrored.

    They are, bit for bit, what torchvision's `resized_crop` and `hflip` make of a Pillow image: the ends of a box are
    rounded to whole pixels, and what then lies beyond the image is black. Two things differ. A box that rounding leaves
    without a pixel, in a tiny image, becomes the pixel in which it begins; Pillow would show nothing but black. A JPEG
    that would take more than 250 MB (of 83 million pixels, fewer in a progressive one) is decoded at a part of its
    size, and its boxes are rounded to those pixels.

    The image is decoded once for all crops, a JPEG only down to the lowest row that they need.

    Args:
      encoded: an image file as `open_image` takes it, or pixels, uint8 (height, width, 1 or 3).
      image_size: height and width of the crops, pixels.
      boxes: float (crops, 4): top, left, height and width, at least 0, as parts of the image's height, width, height
        and width.
      flips: bool (crops,), which crops to mirror left to right.
      bicubic: resize bicubically, as teachers see images, instead of bilinearly.
      background: RGB, 0 to 255, of what is transparent.

    Returns:
      uint8 (image_size, image_size, 3), RGB, for each box.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    opened = open_image(encoded)
    reduction = _reduction(opened, (0, 0, opened.width, opened.height), math.inf)
    width, height = -(-opened.width // reduction), -(-opened.height // reduction)
    whole = [_whole_pixels(width, height, box) for box in boxes.tolist()]
    pixels = opened.decode(reduction, reduction * max(bottom for *_, bottom in whole), background)
    # The resizer of `random_crops` takes half the time, but bilinearly it is two grey levels off in one value of 60
    # million, bicubically up to 12 at the edges in photographs.
    filter_type = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    crops = [pixels.resized(box, (image_size, image_size), filter_type) for box in whole]
    # By Pillow: to copy NumPy's mirrored view, as a batch does, takes eight times as long.
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    return [np.asarray(crop.transpose(flip) if flipped else crop) for crop, flipped in zip(crops, flips, strict=True)]


def central_crop(
    encoded: Encoded, image_size: int, crop_ratio: float = 0.875, background: Colour = WHITE
) -> np.ndarray:
    """What evaluation sees of an image: its shorter side becomes `image_size / crop_ratio`, the centre is kept.

    This is Pillow's result, bit for bit, unless a JPEG would take more than 250 MB (see `stored_crops`), when it is
    decoded at a part of its size, or the image is more than 20 times as long as wide, when its ends are cut off first.

    Args:
      encoded: an image file as `open_image` takes it, or pixels, uint8 (height, width, 1 or 3).
      image_size: height and width of the crop, pixels.
      crop_ratio: part of the shorter side that is kept, at most 1. The length is rounded down, as in DeiT.
      background: RGB, 0 to 255, of what is transparent.

    Returns:
      uint8 (image_size, image_size, 3), RGB.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    opened = open_image(encoded)
    reduction = _reduction(opened, (0, 0, opened.width, opened.height), math.inf)
    pixels = opened.decode(reduction, opened.height, background)
    shorter = min(pixels.width, pixels.height)
    sides = [min(side, _MAX_ASPECT * shorter) for side in (pixels.width, pixels.height)]
    shorter_side = int(image_size / crop_ratio)
    width, height = (side * shorter_side // shorter for side in sides)
    box = _central_box(pixels.width, pixels.height, *sides)
    resized = pixels.resized(box, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop(_central_box(width, height, image_size, image_size)))


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
    log_low, log_high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        # One call for all four: for single numbers, NumPy's calls take longer than the rest.
        of_area, of_aspect, of_left, of_top = rng.random(4).tolist()
        target_area = width * height * (area[0] + (area[1] - area[0]) * of_area)
        target_aspect = math.exp(log_low + (log_high - log_low) * of_aspect)
        box_width = round(math.sqrt(target_area * target_aspect))
        box_height = round(math.sqrt(target_area / target_aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(of_left * (width - box_width + 1))
            top = int(of_top * (height - box_height + 1))
            return left, top, left + box_width, top + box_height
    box_width = min(width, max(1, round(height * aspect[1])))
    box_height = min(height, max(1, round(width / aspect[0])))
    return _central_box(width, height, box_width, box_height)


def _central_box(width: int, height: int, box_width: int, box_height: int) -> Box:
    left, top = round((width - box_width) / 2), round((height - box_height) / 2)
    return left, top, left + box_width, top + box_height


def _whole_pixels(width: int, height: int, parts: Sequence[float]) -> Box:
    """The pixels of a box of top, left, height and width as parts of an image, rounded as `Image.crop` rounds them."""
    part_top, part_left, part_height, part_width = parts
    top, bottom = _whole_side(part_top * height, part_height * height, height)
    left, right = _whole_side(part_left * width, part_width * width, width)
    return left, top, right, bottom


def _whole_side(start: float, length: float, side: int) -> tuple[int, int]:
    first, end = round(start), round(start + length)
    if first == end:
        first = min(int(start), side - 1)
        end = first + 1
    return first, end


class _OfThread(threading.local):
    """A resizer keeps its memory from image to image, and serves one thread."""

    def __init__(self) -> None:
        self.resizer = Resizer()


_of_this_thread = _OfThread()


def _reduction(image: OpenedImage, box: Box, least: float) -> int:
    """How many times smaller to decode an image of which a box is to have `least` pixels each way.

    Only JPEGs are reduced; they are further where they would take too much memory.
    """
    if image.jpeg is None:
        return 1
    left, top, right, bottom = box
    reduction = 1
    while reduction < MAX_REDUCTION and (
        min(right - left, bottom - top) >= 2 * reduction * least or not image.fits(reduction)
    ):
        reduction *= 2
    return reduction


def _resized(pixels: Pixels, box: Box, reduction: int, image_size: int) -> np.ndarray:
    """A box, in pixels of the unreduced image, resized. Cut out first: the filter reads nothing beside it."""
    left, top, right, bottom = (side / reduction for side in box)
    if (right - left) * (bottom - top) > _PIXELS_TO_COPY:
        size = (image_size, image_size)
        return np.asarray(pixels.resized((left, top, right, bottom), size, Image.Resampling.BICUBIC))
    first_column, first_row = math.floor(left), math.floor(top)
    cut = pixels.array((first_column, first_row, math.ceil(right), math.ceil(bottom)))
    source = ImageData(cut.shape[1], cut.shape[0], PixelType.U8x3, cut.tobytes())
    resized = ImageData(image_size, image_size, PixelType.U8x3)
    if reduction == 1:
        options = _WHOLE  # the same as a box of all of it, and quicker
    else:
        inner = CropBox(left - first_column, top - first_row, right - left, bottom - top)
        options = ResizeOptions(_BICUBIC, crop_box=inner)
    _of_this_thread.resizer.resize(source, resized, options)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(image_size, image_size, 3)
