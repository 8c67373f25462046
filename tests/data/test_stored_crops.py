"""Tests of sret_jax.data.decode.stored_crops, against the same crops in plain Pillow."""

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from sret_jax.data import image_file
from sret_jax.data.decode import Encoded, stored_crops
from tests.data.photographs import scikit_learn_photographs

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """500 × 375, as most images of ImageNet, with its details."""
    return Image.fromarray(scikit_learn_photographs()[0][20:395, 60:560])


def encode(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def random_boxes(count: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Boxes of any shape inside the image: the ends of some are the image's."""
    rng = np.random.default_rng(seed)
    sides = rng.uniform(0.05, 1, (count, 2))
    places = rng.choice([0, 0.37, 0.62, 1], (count, 2)) * (1 - sides)
    return np.concatenate([places, sides], axis=1).astype(dtype)


def crop_of(encoded: Encoded, image_size: int, box: list[float], dtype: Any = np.float32, **options: Any) -> np.ndarray:
    (crop,) = stored_crops(encoded, image_size, np.array([box], dtype), np.array([False]), **options)
    return crop


def pillow_crops(
    image: Image.Image, image_size: int, boxes: np.ndarray, flips: np.ndarray, resample: Image.Resampling = BILINEAR
) -> list[np.ndarray]:
    """What the original does, by torchvision: `RandomResizedCrop_FKD` and `RandomHorizontalFlip_FKD`."""
    crops = []
    for box, is_flipped in zip(boxes, flips, strict=True):
        top, height = (number.item() * image.size[1] for number in box[[0, 2]])
        left, width = (number.item() * image.size[0] for number in box[[1, 3]])
        crop = image.crop((left, top, left + width, top + height)).resize((image_size, image_size), resample)
        crops.append(np.asarray(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else crop))
    return crops


def assert_equal(crops: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for crop, other in zip(crops, expected, strict=True):
        np.testing.assert_array_equal(crop, other, strict=True)


FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG 4:2:0": ("RGB", "JPEG", {"quality": 92, "subsampling": "4:2:0"}),
    "JPEG 4:4:4": ("RGB", "JPEG", {"quality": 92, "subsampling": "4:4:4"}),
    "progressive JPEG": ("RGB", "JPEG", {"quality": 92, "progressive": True}),
    "grey JPEG": ("L", "JPEG", {"quality": 92}),
    "CMYK JPEG": ("CMYK", "JPEG", {"quality": 92}),
    "PNG": ("RGB", "PNG", {"compress_level": 1}),
    "grey PNG": ("L", "PNG", {"compress_level": 1}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("mode", "file_format", "options"), FILES.values(), ids=FILES)
def test_crops_are_pillows_bit_for_bit(
    photo: Image.Image, mode: str, file_format: str, options: dict[str, Any], dtype: Any
) -> None:
    encoded = encode(photo.convert(mode), file_format, **options)
    boxes, flips = random_boxes(12, dtype=dtype), np.arange(12) % 3 == 0
    expected = pillow_crops(Image.open(io.BytesIO(encoded)).convert("RGB"), 96, boxes, flips)
    assert_equal(stored_crops(encoded, 96, boxes, flips), expected)
    # One by one, for the lowest row that is decoded is then the box's own.
    for crop in range(12):
        one = slice(crop, crop + 1)
        assert_equal(stored_crops(encoded, 96, boxes[one], flips[one]), expected[one])


def test_bicubic_crops_are_pillows_bit_for_bit(photo: Image.Image) -> None:
    boxes, flips = random_boxes(6), np.arange(6) % 2 == 0
    expected = pillow_crops(photo, 160, boxes, flips, BICUBIC)
    assert_equal(stored_crops(np.asarray(photo), 160, boxes, flips, bicubic=True), expected)


def test_arrays_of_one_channel_are_grey(photo: Image.Image) -> None:
    grey = photo.convert("L")
    boxes, flips = random_boxes(4), np.arange(4) % 2 == 0
    crops = stored_crops(np.asarray(grey)[..., None], 32, boxes, flips)
    assert_equal(crops, pillow_crops(grey.convert("RGB"), 32, boxes, flips))


def test_the_numbers_of_a_box_are_top_left_height_and_width() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(10, 20, 3), dtype=np.uint8)
    crop = crop_of(pixels, 4, [0.3, 0.6, 0.4, 0.2])  # resized to its own size: nothing changes
    np.testing.assert_array_equal(crop, pixels[3:7, 12:16])


@pytest.mark.parametrize("bicubic", [False, True])
def test_a_flipped_crop_is_mirrored_left_to_right(photo: Image.Image, bicubic: bool) -> None:
    boxes = np.repeat(random_boxes(1), 2, axis=0)
    plain, flipped = stored_crops(np.asarray(photo), 64, boxes, np.array([False, True]), bicubic=bicubic)
    np.testing.assert_array_equal(flipped, plain[:, ::-1])
    assert (flipped != plain).any()


def test_ends_are_rounded_to_the_nearest_pixel_and_halves_to_the_even_one() -> None:
    pixels = np.arange(8, dtype=np.uint8)[:, None, None].repeat(8, axis=1).repeat(3, axis=2)
    for start, part, rows in [(0.3125, 0.5, [2, 3, 4, 5]), (0.4375, 0.4375, [4, 5, 6]), (0.2, 0.45, [2, 3, 4])]:
        # From 2.5 to 6.5, from 3.5 to 7.0 and from 1.6 to 5.2.
        crop = crop_of(pixels, len(rows), [start, 0, part, len(rows) / 8])
        np.testing.assert_array_equal(crop[:, 0, 0], rows)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_what_lies_beyond_the_image_is_black(file_format: str, bicubic: bool) -> None:
    encoded = encode(Image.new("RGB", (10, 10), "white"), file_format)
    expected = np.zeros((6, 6, 3), np.uint8)
    expected[:5, :5] = 255
    np.testing.assert_array_equal(crop_of(encoded, 6, [0.5, 0.5, 0.56, 0.56], bicubic=bicubic), expected)


def test_boxes_that_float16_takes_over_the_edge_are_pillows() -> None:
    width = 3000
    lefts = np.arange(2600, 2640)
    boxes = np.stack([0 * lefts, lefts / width, 0 * lefts + 1, 1 - lefts / width], axis=1).astype(np.float16)
    ends = (boxes[:, 1].astype(float) + boxes[:, 3]) * width
    assert (ends > width + 0.5).any() and (ends < width - 0.5).any()
    pixels = np.full((3, width, 3), 255, np.uint8)
    flips = np.zeros(len(boxes), bool)
    expected = pillow_crops(Image.fromarray(pixels), 500, boxes, flips)
    assert any(crop.min() < 200 for crop in expected)
    assert_equal(stored_crops(pixels, 500, boxes, flips), expected)


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize(
    ("top", "part", "row"), [(0.0, 0.1, 0), (0.45, 0.04, 1), (0.9, 0.1, 2), (0.85, 0.1, 2), (0.55, 0.1, 1), (1, 0.1, 2)]
)
def test_a_box_without_a_pixel_becomes_the_one_in_which_it_begins(
    top: float, part: float, row: int, bicubic: bool
) -> None:
    pixels = np.arange(9, dtype=np.uint8).reshape(3, 3)[..., None].repeat(3, axis=2)
    for box, expected in [([top, 0, part, 0.1], pixels[row, 0]), ([0, top, 0.1, part], pixels[0, row])]:
        np.testing.assert_array_equal(
            crop_of(pixels, 5, box, bicubic=bicubic), np.broadcast_to(expected, (5, 5, 3)), strict=True
        )


def test_a_jpeg_is_decoded_once_and_down_to_the_lowest_row_that_is_needed(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode_jpeg, shapes = simplejpeg.decode_jpeg, []

    def recorded(*arguments: Any, **options: Any) -> np.ndarray:
        pixels = decode_jpeg(*arguments, **options)
        shapes.append(pixels.shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", recorded)
    boxes = np.array([[0, 0.5, 0.2, 0.2], [0.1, 0, 0.3, 1], [0.2, 0.2, 0.04, 0.04]], np.float32)
    stored_crops(encode(photo), 32, boxes, np.zeros(3, bool))
    assert shapes == [(151, 500, 3)]  # 0.4 of 375, and the row below, of which the last takes some colour


def test_a_jpeg_too_large_for_the_memory_is_decoded_at_a_part_of_its_size(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "_MOST_BYTES", 300_000)
    encoded = encode(photo, quality=92)
    half = Image.open(io.BytesIO(encoded))
    half.draft("RGB", (250, 187))
    assert half.size == (250, 188)
    boxes, flips = random_boxes(12), np.arange(12) % 3 == 0
    expected = pillow_crops(half, 96, boxes, flips)
    assert_equal(stored_crops(encoded, 96, boxes, flips), expected)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_what_is_cut_short_or_is_no_image_is_refused(photo: Image.Image, file_format: str) -> None:
    encoded = encode(photo, file_format)
    for data in (encoded[: len(encoded) // 2], encoded[:10], b"\xff\xd8\xff\xd9", b"text", b""):
        with pytest.raises((OSError, ValueError)):
            crop_of(data, 32, [0, 0, 0.5, 0.5])
