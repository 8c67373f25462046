"""From the bytes of an image file to crops of the image, decoding no more of it than they need."""

import io
import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, UnidentifiedImageError

Encoded = bytes | np.ndarray
Box = tuple[int, int, int, int]

# In RGB 270 MB; about where Pillow begins to warn of decompression bombs.
_MAX_PIXELS = 90_000_000

# libjpeg reduces images to 1/2, 1/4 and 1/8 as it decodes them, in no more time.
_MAX_REDUCTION = 8

# Evaluation cuts the ends off images that are longer than this times their other side.
_MAX_ASPECT = 20

# a = -0.5, as Pillow's bicubic filter; PyTorch's has a = -0.75.
_BICUBIC = ResizeAlg.convolution(FilterType.catmull_rom)
_WHOLE = ResizeOptions(_BICUBIC)


def decode_small(encoded: bytes, most_bytes: int) -> np.ndarray | None:
    """All pixels of an image file, as the following functions take them; None if they are more bytes, or a JPEG that
    libjpeg decodes to RGB.

    Returns:
      uint8 (height, width, 3), RGB, read-only.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    image = _open(encoded)
    if isinstance(image.content, bytes) or 3 * image.width * image.height > most_bytes:
        return None
    pixels = np.array(_decode(image, 1, image.height))
    pixels.setflags(write=False)
    return pixels


def random_crops(
    encoded: Encoded,
    image_size: int,
    rngs: Sequence[np.random.Generator],
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> list[np.ndarray]:
    """Crops of one image by `random_crop_box`, resized bicubically with antialiasing.

    The image is decoded once for all of them: a JPEG only down to the lowest row that they need, and at 1/2, 1/4 or 1/8
    of its size for crops that then still have 1.5 times the pixels asked for. Over photographs, crops differ from
    Pillow's by 0.14 grey levels on average, those that were decoded at a reduced size by 0.6.

    Args:
      encoded: an image file in any format that Pillow reads, or pixels, uint8 (height, width, 1 or 3).
      image_size: height and width of the crops, pixels.
      rngs: a source of randomness for each crop.
      area: smallest and largest area of a crop as a part of the image's.
      aspect: smallest and largest width / height of a crop.

    Returns:
      uint8 (image_size, image_size, 3), RGB, for each of `rngs`.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    image = _open(encoded)
    boxes = [random_crop_box(image.width, image.height, rng, area, aspect) for rng in rngs]
    # For each crop by itself: what one shows must not depend on which others are made with it.
    reductions = [_reduction(image, box, 1.5 * image_size) for box in boxes]
    lowest = {n: max(bottom for (*_, bottom), m in zip(boxes, reductions, strict=True) if m == n) for n in reductions}
    decoded = {n: _decode(image, n, rows) for n, rows in lowest.items()}
    return [_resized(decoded[n], box, n, image_size) for box, n in zip(boxes, reductions, strict=True)]


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
    image = _open(encoded)
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
) -> list[np.ndarray]:
    """Crops of one image at given boxes, resized with antialiasing, some of them mirrored.

    They are, bit for bit, what torchvision's `resized_crop` and `hflip` make of a Pillow image: the ends of a box are
    rounded to whole pixels, and what then lies beyond the image is black. Two things differ. A box that rounding leaves
    without a pixel, in a tiny image, becomes the pixel in which it begins; Pillow would show nothing but black. A JPEG
    of more than 90 million pixels is decoded at a part of its size, and its boxes are rounded to those pixels.

    The image is decoded once for all crops, a JPEG only down to the lowest row that they need.

    Args:
      encoded: an image file in any format that Pillow reads, or pixels, uint8 (height, width, 1 or 3).
      image_size: height and width of the crops, pixels.
      boxes: float (crops, 4): top, left, height and width, at least 0, as parts of the image's height, width, height
        and width.
      flips: bool (crops,), which crops to mirror left to right.
      bicubic: resize bicubically, as teachers see images, instead of bilinearly.

    Returns:
      uint8 (image_size, image_size, 3), RGB, for each box.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    opened = _open(encoded)
    reduction = _reduction(opened, (0, 0, opened.width, opened.height), math.inf)
    width, height = -(-opened.width // reduction), -(-opened.height // reduction)
    whole = [_whole_pixels(width, height, box) for box in boxes.tolist()]
    image = Image.fromarray(_decode(opened, reduction, reduction * max(bottom for *_, bottom in whole)))
    # The resizer of `random_crops` takes half the time, but bilinearly it is two grey levels off in one value of 60
    # million, bicubically up to 12 at the edges in photographs.
    filter_type = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    crops = [image.crop(box).resize((image_size, image_size), filter_type) for box in whole]
    # By Pillow: to copy NumPy's mirrored view, as a batch does, takes eight times as long.
    flip = Image.Transpose.FLIP_LEFT_RIGHT
    return [np.asarray(crop.transpose(flip) if flipped else crop) for crop, flipped in zip(crops, flips, strict=True)]


def central_crop(encoded: Encoded, image_size: int, crop_ratio: float = 0.875) -> np.ndarray:
    """What evaluation sees of an image: its shorter side becomes `image_size / crop_ratio`, the centre is kept.

    This is Pillow's result, bit for bit, unless the image has more than 90 million pixels, when a JPEG is decoded at a
    part of its size, or is more than 20 times as long as wide, when its ends are cut off first.

    Args:
      encoded: an image file in any format that Pillow reads, or pixels, uint8 (height, width, 1 or 3).
      image_size: height and width of the crop, pixels.
      crop_ratio: part of the shorter side that is kept, at most 1. The length is rounded down, as in DeiT.

    Returns:
      uint8 (image_size, image_size, 3), RGB.

    Raises:
      Exception: the image is broken; which one depends on its format and the damage.
    """
    opened = _open(encoded)
    reduction = _reduction(opened, (0, 0, opened.width, opened.height), math.inf)
    image = Image.fromarray(_decode(opened, reduction, opened.height))
    longest = _MAX_ASPECT * min(image.size)
    if longest < max(image.size):
        image = image.crop(_central_box(*image.size, min(longest, image.width), min(longest, image.height)))
    shorter_side = int(image_size / crop_ratio)
    width, height = (side * shorter_side // min(image.size) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
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


class _Opened(NamedTuple):
    """An image of which only the header has been read."""

    width: int
    height: int
    content: np.ndarray | Image.Image | bytes  # bytes: of a JPEG that libjpeg decodes straight to RGB
    frame: int = 0  # where the frame header of such a JPEG begins


def _open(encoded: Encoded) -> _Opened:
    """The header of an image. EXIF's orientation is ignored, as in the loaders that the published results come from."""
    if isinstance(encoded, np.ndarray):
        height, width, _ = encoded.shape
        return _Opened(width, height, encoded)
    frame = _frame_header(encoded)
    if frame is not None:
        return _Opened(_uint16(encoded, frame + 7), _uint16(encoded, frame + 5), encoded, frame)
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        raise ValueError("neither JPEG nor PNG nor another format that Pillow reads") from None
    return _Opened(image.width, image.height, image)


def _frame_header(encoded: bytes) -> int | None:
    """Where the frame header begins in a complete, Huffman-coded JPEG of 8 bits and 1 or 3 channels; None otherwise.

    Everything else is for Pillow to decode, or to say what is wrong with it.
    """
    if not (encoded.startswith(b"\xff\xd8") and encoded.endswith(b"\xff\xd9")):
        return None
    position = 2
    while encoded[position : position + 1] == b"\xff" and position + 10 <= len(encoded):
        if 0xC0 <= encoded[position + 1] <= 0xC2:
            known = encoded[position + 4] == 8 and encoded[position + 9] in (1, 3) and _uint16(encoded, position + 5)
            return position if known else None
        position += 2 + _uint16(encoded, position + 2)
    return None


def _uint16(encoded: bytes, position: int) -> int:
    return int.from_bytes(encoded[position : position + 2], "big")


def _reduction(image: _Opened, box: Box, least: float) -> int:
    """How many times smaller to decode an image of which a box is to have `least` pixels each way.

    Only JPEGs are reduced; they are further where they would not fit into memory.
    """
    if not isinstance(image.content, bytes):
        return 1
    left, top, right, bottom = box
    reduction = 1
    while reduction < _MAX_REDUCTION and (
        min(right - left, bottom - top) >= 2 * reduction * least
        or image.width * image.height > reduction**2 * _MAX_PIXELS
    ):
        reduction *= 2
    return reduction


def _decode(image: _Opened, reduction: int, rows: int) -> np.ndarray:
    """The upper `rows` of an image, or more, at 1 / `reduction` of its size: uint8 RGB."""
    if isinstance(image.content, bytes):
        return _decode_jpeg(image.content, image, reduction, rows)
    _check_pixels(image)
    if isinstance(image.content, np.ndarray):
        return np.broadcast_to(image.content, (image.height, image.width, 3))
    return np.asarray(_to_rgb(image.content))


def _decode_jpeg(encoded: bytes, image: _Opened, reduction: int, rows: int) -> np.ndarray:
    if encoded[image.frame + 1] == 0xC2:
        _check_pixels(image)  # progressive: libjpeg holds all of it, whatever the reduction
        rows = image.height
    else:
        # The rows come one after the other. Told that there are fewer, libjpeg stops there. It smooths colours over
        # neighbouring rows: the last one is not what it would have been.
        rows = min(rows + 1, image.height)
        encoded = b"".join([encoded[: image.frame + 5], rows.to_bytes(2, "big"), encoded[image.frame + 7 :]])
    # Not strict: like Pillow, it puts up with bytes between the segments and with damaged ones.
    return simplejpeg.decode_jpeg(
        encoded, min_width=-(-image.width // reduction), min_height=-(-rows // reduction), strict=False
    )


def _check_pixels(image: _Opened) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels, more than the {_MAX_PIXELS:,} that are decoded")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers, of which none is known to be white")
    if image.mode.startswith("I"):  # 16 bits a pixel, which `convert` would not scale but cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 0xFFFF) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _resized(pixels: np.ndarray, box: Box, reduction: int, image_size: int) -> np.ndarray:
    """A box, in pixels of the unreduced image, resized. Cut out first: the filter reads nothing beside it."""
    left, top, right, bottom = (side / reduction for side in box)
    first_column, first_row = math.floor(left), math.floor(top)
    cut = pixels[first_row : math.ceil(bottom), first_column : math.ceil(right)]
    source = ImageData(cut.shape[1], cut.shape[0], PixelType.U8x3, cut.tobytes())
    resized = ImageData(image_size, image_size, PixelType.U8x3)
    if reduction == 1:
        options = _WHOLE  # the same as a box of all of it, and quicker
    else:
        inner = CropBox(left - first_column, top - first_row, right - left, bottom - top)
        options = ResizeOptions(_BICUBIC, crop_box=inner)
    _of_this_thread.resizer.resize(source, resized, options)
    return np.frombuffer(resized.get_buffer(), np.uint8).reshape(image_size, image_size, 3)
