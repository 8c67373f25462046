"""Opens image files: the documented formats and no other, in bounded memory and time, whatever their headers say."""

import io
import math
import re
import struct
from collections.abc import Iterator
from typing import NamedTuple, cast

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

Encoded = bytes | np.ndarray
Box = tuple[int, int, int, int]
Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)

# libjpeg reduces images to 1/2, 1/4 and 1/8 as it decodes them, in no more time.
MAX_REDUCTION = 8

# Pillow knows dozens of formats, one of which starts a program. JPEGs are for it, too, once their headers are read.
_FORMATS = ("PNG", "WEBP", "BMP", "TIFF", "PPM")

# For one image, in each thread that decodes: in RGB as libjpeg gives it, 83 million pixels.
_MOST_BYTES = 250_000_000

# A part of an image that is converted or resized at once, so that conversions need no second whole image.
_PIXELS_AT_ONCE = 1 << 22

# Of a box whose width alone has been resized.
_MOST_NARROW_BYTES = 64_000_000

# Sixteen times as long as a JPEG can be: a few rows of an image are never much memory.
_LONGEST_SIDE = 1 << 20

# libjpeg takes a second or two for so many empty blocks of 8 × 8 values; each counts once for every scan.
_MOST_BLOCKS = 60_000_000

# Pillow takes a second or two for so many, in formats whose pixels it reads one by one.
_MOST_READS = 2_000_000

# As many are decoded and resized in a second or two.
_MOST_PIXELS = 90_000_000

# Those of Pillow in Python, and how many values they decode in a second or two.
_SLOW_CODECS = {"bmp_rle": 16_000_000, "ppm": 3_000_000, "ppm_plain": 3_000_000}

# Tags of TIFF.
_WIDTH, _LENGTH, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 256, 257, 258, 262, 274, 277
_STRIP_OFFSETS, _TILE_OFFSETS, _MOST_STRIPS = 273, 324, 100_000
_YCBCR = 6  # a photometric interpretation
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 278, 322, 323

_MOST_SEGMENTS = 10_000  # before a JPEG's pixels
_MARKER = re.compile(rb"\xff([^\x00\xff])")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_FRAME = struct.Struct(">xB2xBHHB")  # marker, bits, height, width and channels
# What applications add; two of them say which colours the channels are, and stay.
_METADATA = ({*range(0xE0, 0xF0)} | {0xFE}) - {0xE0, 0xEE}


class Pixels:
    """A decoded image, of which boxes are taken as RGB, with the background where it is transparent."""

    def __init__(self, content: np.ndarray | Image.Image, background: Colour = WHITE) -> None:
        """Takes uint8 (height, width, 3), RGB, or an image as `OpenedImage.decode` makes them."""
        self._content = content
        self._background = background
        self.width, self.height = content.size if isinstance(content, Image.Image) else content.shape[1::-1]
        self._is_small = self.width * self.height <= _PIXELS_AT_ONCE
        self._whole: Image.Image | None = None  # in RGB, of a small one

    def array(self, box: Box) -> np.ndarray:
        """A box inside the image: uint8 (height, width, 3), RGB; it may share memory with the image."""
        if isinstance(self._content, np.ndarray):
            left, top, right, bottom = box
            return self._content[top:bottom, left:right]
        return np.asarray(self._cut(box))

    def resized(
        self, box: tuple[float, float, float, float], size: tuple[int, int], resample: Image.Resampling
    ) -> Image.Image:
        """A box in RGB, cut out and resized by Pillow; what lies beyond the image is black.

        Large boxes are resized in strips, first their width and then their height, as Pillow does: the result is the
        same, bit for bit.

        Raises:
          ValueError: the box is so many times as high as wide that this would take much memory.
        """
        left, top, right, bottom = box
        outer = math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)
        columns, rows = outer[2] - outer[0], outer[3] - outer[1]
        in_columns, in_rows = (left - outer[0], right - outer[0]), (top - outer[1], bottom - outer[1])
        if columns * rows <= _PIXELS_AT_ONCE:
            return self._cut(outer).resize(size, resample, (in_columns[0], in_rows[0], in_columns[1], in_rows[1]))
        if 4 * size[0] * rows > _MOST_NARROW_BYTES:
            raise ValueError(f"a box of {columns} × {rows} pixels is too high to be resized to {size[0]} × {size[1]}")
        narrow = Image.new("RGB", (size[0], rows))
        step = max(1, _PIXELS_AT_ONCE // 4 // columns)
        for row in range(0, rows, step):
            strip = self._cut((outer[0], outer[1] + row, outer[2], outer[1] + min(row + step, rows)))
            strip = strip.resize((size[0], strip.height), resample, (in_columns[0], 0, in_columns[1], strip.height))
            narrow.paste(strip, (0, row))
        return narrow.resize(size, resample, (0, in_rows[0], size[0], in_rows[1]))

    def _cut(self, box: Box) -> Image.Image:
        if self._is_small:
            if self._whole is None:
                self._content = self._whole = self._to_rgb((0, 0, self.width, self.height))
            return self._whole if box == (0, 0, self.width, self.height) else self._whole.crop(box)
        left, top, right, bottom = box
        inside = max(left, 0), max(top, 0), min(right, self.width), min(bottom, self.height)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            return Image.new("RGB", (right - left, bottom - top))
        image = self._to_rgb(inside)
        if inside == box:
            return image
        return image.crop((left - inside[0], top - inside[1], right - inside[0], bottom - inside[1]))

    def _to_rgb(self, box: Box) -> Image.Image:
        if isinstance(self._content, np.ndarray):
            left, top, right, bottom = box
            return Image.fromarray(self._content[top:bottom, left:right])
        whole = box == (0, 0, self.width, self.height)
        image = self._content if whole else self._content.crop(box)
        if image.mode.startswith("I"):
            image = _from_16_bits(image)
        elif image.mode == "La":  # of premultiplied alpha, which is known to "LA" alone
            image = image.convert("LA")
        if not image.has_transparency_data:
            return image if image.mode == "RGB" else image.convert("RGB")
        image = image.convert("RGBA")
        composite = Image.new("RGB", image.size, self._background)
        composite.paste(image, mask=image)
        return composite


class _JpegHeader(NamedTuple):
    """What a JPEG says of itself before its pixels."""

    frame: int  # where the frame header begins
    is_usual: bool  # of a kind that TurboJPEG decodes, and complete
    channels: int
    coefficient_bytes: int  # which libjpeg holds of all the image, where its parts come in several scans


class OpenedImage(NamedTuple):
    """An image of which only the header has been read.

    EXIF's orientation is ignored, as in the loaders that the published results come from.
    """

    width: int
    height: int
    content: np.ndarray | ImageFile.ImageFile | bytes  # bytes: of a JPEG
    jpeg: _JpegHeader | None = None

    def fits(self, reduction: int) -> bool:
        """Whether 1 / `reduction` of its size can be decoded in the memory that a thread may take."""
        return self._needed_bytes(reduction, self.height) <= _MOST_BYTES

    def decode(self, reduction: int, rows: int, background: Colour = WHITE) -> Pixels:
        """The upper `rows` of the image, or more, at 1 / `reduction` of its size, which is 1 for all but JPEGs.

        Raises:
          ValueError: it would take too much memory or time.
          Exception: the image is broken; which one depends on its format and the damage.
        """
        if isinstance(self.content, np.ndarray):
            return Pixels(np.broadcast_to(self.content, (self.height, self.width, 3)))
        if isinstance(self.content, ImageFile.ImageFile):
            self._check_memory(1, rows)
            return Pixels(_load(self.content), background)
        assert self.jpeg is not None
        if self.jpeg.is_usual:
            self._check_memory(reduction, rows)
            try:
                return Pixels(self._decode_usual_jpeg(self.content, self.jpeg, reduction, rows))
            except MemoryError:
                raise
            except Exception:
                # TurboJPEG has no name for most samplings of colours. Pillow also says what is wrong with broken ones.
                return self._replace(jpeg=self.jpeg._replace(is_usual=False)).decode(reduction, rows, background)
        self._check_memory(reduction, self.height)
        image = _open_in_pillow(io.BytesIO(_without_metadata(self.content)), ("JPEG",))
        image.draft(None, (max(1, self.width // reduction), max(1, self.height // reduction)))
        image.load()
        return Pixels(image, background)

    def _decode_usual_jpeg(self, encoded: bytes, header: _JpegHeader, reduction: int, rows: int) -> np.ndarray:
        if header.coefficient_bytes:
            rows = self.height
        # The rows come one after the other. Told that there are fewer, libjpeg stops there. It smooths colours over
        # neighbouring rows: the last one is not what it would have been.
        rows = min(rows + 1, self.height)
        if rows < self.height:
            view, place = memoryview(encoded), header.frame + 5
            encoded = b"".join([view[:place], rows.to_bytes(2, "big"), view[place + 2 :]])
        # Not strict: like Pillow, it puts up with bytes between the segments and with damaged ones.
        return simplejpeg.decode_jpeg(
            encoded, min_width=-(-self.width // reduction), min_height=-(-rows // reduction), strict=False
        )

    def _needed_bytes(self, reduction: int, rows: int) -> int:
        """The most that decoding holds at a time."""
        if isinstance(self.content, np.ndarray):
            return 0
        if isinstance(self.content, ImageFile.ImageFile):
            return _bytes_in_pillow(self.content)
        assert self.jpeg is not None
        pixels = -(-self.width // reduction) * -(-rows // reduction)
        if self.jpeg.is_usual:
            return self.jpeg.coefficient_bytes + 3 * pixels
        copied = len(self.content)  # without its metadata
        return copied + self.jpeg.coefficient_bytes + (1 if self.jpeg.channels == 1 else 4) * pixels

    def _check_memory(self, reduction: int, rows: int) -> None:
        needed = self._needed_bytes(reduction, rows)
        if needed > _MOST_BYTES:
            raise ValueError(
                f"{self.width} × {self.height} pixels of this kind take {needed / 1e6:.0f} MB to decode, more than the "
                f"{_MOST_BYTES / 1e6:.0f} MB that a thread may take: make it smaller, or a JPEG that is not progressive"
            )


def open_image(encoded: Encoded) -> OpenedImage:
    """Reads the header of an image: JPEG, PNG, WebP, BMP, TIFF, PPM or PGM, whatever its name is.

    Args:
      encoded: the file, or pixels, uint8 (height, width, 1 or 3).

    Raises:
      ValueError: it is none of these, what its numbers mean is not known, or it would take too long.
      Exception: the header is broken; which one depends on its format and the damage.
    """
    if isinstance(encoded, np.ndarray):
        height, width, _ = encoded.shape
        return OpenedImage(width, height, encoded)
    if encoded.startswith(b"\xff\xd8"):
        return _open_jpeg(encoded)
    if encoded.startswith((b"II", b"MM")):
        _check_strips(encoded)
    stream = _Stream(encoded)
    image = _open_in_pillow(stream, _FORMATS)
    stream.header_is_read()
    if max(image.size) > _LONGEST_SIDE:
        raise ValueError(f"{image.width} × {image.height} pixels, longer than the {_LONGEST_SIDE:,} that are decoded")
    pixels = image.width * image.height
    if pixels > _MOST_PIXELS:
        raise ValueError(f"{image.width} × {image.height} pixels, more than the {_MOST_PIXELS:,} that are decoded")
    if pixels * len(image.getbands()) > _SLOW_CODECS.get(_codec(image), math.inf):
        raise ValueError(f"{image.width} × {image.height} pixels that are read one by one: save it in another format")
    if image.mode == "F":
        raise ValueError("its pixels are floating point numbers, of which none is known to be white")
    return OpenedImage(image.width, image.height, image)


def _open_in_pillow(stream: io.BytesIO, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    try:
        return Image.open(stream, formats=formats)
    except UnidentifiedImageError:
        raise ValueError("it is no JPEG, PNG, WebP, BMP, TIFF, PPM or PGM, or one of an unusual kind") from None


def _check_strips(encoded: bytes) -> None:
    """Refuses a TIFF of which Pillow's list of strips would take more memory than its pixels."""
    order, is_big = "<" if encoded.startswith(b"II") else ">", encoded[2:3] == b"+"
    head, count, entry = ("8xQ", "Q", "HHQ8x") if is_big else ("4xL", "H", "HHL4x")
    try:
        (position,) = struct.unpack_from(order + head, encoded)
        (entries,) = struct.unpack_from(order + count, encoded, position)
        position += struct.calcsize(order + count)
        for number in range(min(entries, 0xFFFF)):
            place = position + number * struct.calcsize(order + entry)
            tag, _, values = struct.unpack_from(order + entry, encoded, place)
            if tag in (_STRIP_OFFSETS, _TILE_OFFSETS) and values > _MOST_STRIPS:
                raise ValueError(f"a TIFF of {values:,} strips or tiles, more than the {_MOST_STRIPS:,} that are read")
    except struct.error:
        return  # Pillow says what is wrong


class _Stream(io.BytesIO):
    """A file in memory that is not read without end: a few kB can tell Pillow to read the same again and again."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._reads_left = 20_000 + len(content) // 64
        self._bytes_left = 2 * len(content) + (1 << 20)

    def header_is_read(self) -> None:
        self._reads_left, self._bytes_left = _MOST_READS, self._bytes_left + 2 * _MOST_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._reads_left -= 1
        self._bytes_left -= len(content)
        if min(self._reads_left, self._bytes_left) < 0:
            raise ValueError("it takes too long to read: save it in another format")
        return content


def _open_jpeg(encoded: bytes) -> OpenedImage:
    frame = scan = 0
    for marker, start, _ in _segments(encoded):
        if marker in _FRAMES:
            frame = frame or start
        elif marker == _START_OF_SCAN:
            scan = start
    if not (frame and scan):
        raise ValueError("a JPEG without a header of its pixels")
    marker, bits, height, width, channels = _FRAME.unpack_from(encoded, frame)
    sampling = [(both >> 4, both & 15) for both in encoded[frame + 11 : frame + 10 + 3 * channels : 3]]
    if not (width and height and sampling) or min(map(min, sampling)) == 0:
        raise ValueError("a JPEG without pixels")
    most_across, most_down = (max(factors) for factors in zip(*sampling, strict=True))
    blocks = -(-width // (8 * most_across)) * -(-height // (8 * most_down)) * sum(a * d for a, d in sampling)
    in_several_scans = marker in _PROGRESSIVE or encoded[scan + 4] < channels
    scans = encoded.count(b"\xff\xda", frame) if in_several_scans else 1
    if blocks * scans > _MOST_BLOCKS:
        raise ValueError(f"{width} × {height} pixels in {scans} scans take too long to decode: save it as a usual JPEG")
    is_usual = marker <= 0xC2 and bits == 8 and channels in (1, 3) and encoded.endswith(b"\xff\xd9")
    return OpenedImage(
        width, height, encoded, _JpegHeader(frame, is_usual, channels, 128 * blocks if in_several_scans else 0)
    )


def _segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the segments of a JPEG up to its first scan, as libjpeg finds them."""
    start, last = 2, len(encoded) - 4
    for _ in range(_MOST_SEGMENTS):
        marker = encoded[start + 1] if start <= last and encoded[start] == 0xFF else 0
        if marker in (0, 0xFF):  # something lies between
            found = _MARKER.search(encoded, start)
            if found is None:
                return
            start, marker = found.start(), found[1][0]
        end = start + 2 + (0 if marker in _WITHOUT_LENGTH else _uint16(encoded, start + 2))
        yield marker, start, end
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            return
        start = end
    raise ValueError(f"a JPEG with more than {_MOST_SEGMENTS:,} segments before its pixels")


def _without_metadata(encoded: bytes) -> bytes:
    """A JPEG without what is of no matter for its pixels; Pillow reads metadata of metadata."""
    view, parts = memoryview(encoded), [memoryview(b"\xff\xd8")]
    for marker, start, end in _segments(encoded):
        if marker not in _METADATA:
            parts.append(view[start : None if marker == _START_OF_SCAN else end])
    return b"".join(parts)


def _uint16(encoded: bytes, position: int) -> int:
    return int.from_bytes(encoded[position : position + 2], "big")


def _bytes_in_pillow(image: ImageFile.ImageFile) -> int:
    """What Pillow and its libraries hold at a time to decode an image of any format but JPEG."""
    pixels = image.width * image.height
    held = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}.get(image.mode, 4) * pixels
    if image.format == "WEBP":
        return held + 12 * pixels  # two canvases, and one of them as bytes
    if _codec(image) in _SLOW_CODECS:
        return 3 * held  # twice as bytes
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        is_copied = image.mode == "I;16" or image.tag_v2.get(_ORIENTATION, 1) != 1
        return held * (2 if is_copied else 1) + (_strip_bytes(image.tag_v2) if _codec(image) == "libtiff" else 0)
    return held


def _strip_bytes(tags: TiffImagePlugin.ImageFileDirectory_v2) -> int:
    """What libtiff holds of a TIFF: a strip or a tile, which may be all of the image."""
    width, rows = tags[_WIDTH], min(tags.get(_ROWS_PER_STRIP, math.inf), tags[_LENGTH])
    if _TILE_WIDTH in tags:
        width, rows = tags[_TILE_WIDTH], tags[_TILE_LENGTH]
    bits = max(tags.get(_BITS, (1,))) * tags.get(_SAMPLES, 1)
    return width * rows * max(bits, 32 if tags.get(_PHOTOMETRIC) == _YCBCR else 1) // 8  # as RGBA


def _codec(image: ImageFile.ImageFile) -> str:
    return image.tile[0].codec_name if image.tile else ""


def _load(image: ImageFile.ImageFile) -> Image.Image:
    """Decodes an image, and gives numbers of more than 8 bits and keys of transparency the meaning that they have."""
    tags, encoded_as = getattr(image, "tag_v2", {}), str(image.tile[0].args) if image.tile else ""
    image.load()
    key = image.info.get("transparency")
    if key is not None and image.format == "PNG" and image.mode in ("L", "RGB"):
        image.info["transparency"] = _key_of_8_bits(key, encoded_as)
    if image.mode == "I":
        low, high = cast(tuple[int, int], image.getextrema())
        if not (image.format == "PPM" or (low >= 0 and 0xFF < high <= 0xFFFF)):
            raise ValueError(
                f"its pixels are 32-bit integers from {low} to {high}, of which none is known to be white: save it "
                "with 8 or 16 bits"
            )
    if image.mode == "I;16" and tags.get(_BITS) == (12,):
        return image.point(lambda value: value * 16)
    if image.mode == "I;16" and tags.get(_PHOTOMETRIC) == 0:  # white is zero
        return image.point(lambda value: value * -1 + 0xFFFF)
    return image


def _key_of_8_bits(key: int | tuple[int, ...], encoded_as: str) -> int | tuple[int, ...]:
    """The colour that a PNG says is transparent, in the numbers that Pillow makes of its pixels."""
    if isinstance(key, tuple):
        return tuple(value >> 8 for value in key) if "16" in encoded_as else key
    for bits in (2, 4):
        if encoded_as == f"L;{bits}":
            return key * 255 // (2**bits - 1)
    return key


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 0 to 65535 as "L", or as "LA" where one of its values is transparent."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if "transparency" not in image.info:
        return grey
    opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(opaque)))
