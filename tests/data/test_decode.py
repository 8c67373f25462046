"""Tests of sret_jax.data.decode."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images

from sret_jax.data.decode import Encoded, central_crop, random_crop_box, random_crops

BICUBIC = Image.Resampling.BICUBIC


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Two photographs, 640 × 427."""
    return [Image.fromarray(pixels) for pixels in load_sample_images().images]


def encode(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def random_crop(encoded: Encoded, seed: int, image_size: int = 224, **arguments: Any) -> np.ndarray:
    (crop,) = random_crops(encoded, image_size, [np.random.default_rng(seed)], **arguments)
    assert crop.shape == (image_size, image_size, 3) and crop.dtype == np.uint8
    return crop


def pillow_crop(encoded: bytes, seed: int) -> np.ndarray:
    """What the same crop is in plain Pillow."""
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    box = random_crop_box(*image.size, np.random.default_rng(seed))
    return np.asarray(image.crop(box).resize((224, 224), BICUBIC))


def mean_difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


JPEGS: dict[str, dict[str, Any]] = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 3},
    "quality 30": {"quality": 30},
    "rgb": {"keep_rgb": True},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_training_decodes_what_a_crop_needs_as_pillow_does(photos: list[Image.Image], options: dict[str, Any]) -> None:
    images = photos if "keep_rgb" in options else [*photos, photos[0].convert("L")]
    for encoded in (encode(image, **({"quality": 92} | options)) for image in images):
        decoded = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
        for seed in range(15):
            np.testing.assert_array_equal(random_crop(encoded, seed), random_crop(decoded, seed))


def test_training_crops_of_photographs_are_nearly_pillows(photos: list[Image.Image]) -> None:
    files = [encode(photo, quality=92) for photo in photos]
    differences = [mean_difference(random_crop(f, seed), pillow_crop(f, seed)) for f in files for seed in range(20)]
    assert np.mean(differences) < 0.3 and max(differences) < 0.5


def test_training_crops_of_large_photographs_are_nearly_pillows_though_decoded_at_reduced_size(
    photos: list[Image.Image],
) -> None:
    files = [encode(photo.resize((1920, 1281), Image.Resampling.LANCZOS), quality=92) for photo in photos]
    differences = [mean_difference(random_crop(f, seed), pillow_crop(f, seed)) for f in files for seed in range(20)]
    assert np.mean(differences) < 0.7 and 0.3 < max(differences) < 1.5


def test_a_crop_does_not_depend_on_those_made_with_it(photos: list[Image.Image]) -> None:
    encoded = encode(photos[0].resize((1920, 1281)), quality=92)
    # Their sides are less than 3 times 160, less than 6 times, and more: three reductions.
    together = random_crops(encoded, 160, [np.random.default_rng(seed) for seed in range(12)])
    for seed, crop in enumerate(together):
        np.testing.assert_array_equal(crop, random_crop(encoded, seed, 160))


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
def test_evaluation_is_pillows_decoding_and_resizing_bit_for_bit(
    photos: list[Image.Image], options: dict[str, Any]
) -> None:
    for photo in photos:
        encoded = encode(photo, **({"quality": 92} | options))
        # 256 / 427 * 640 = 383.7; beside the crop are 159 and 32, of which 79.5 and 16 before.
        resized = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB").resize((383, 256), BICUBIC))
        np.testing.assert_array_equal(central_crop(encoded, 224), resized[16:240, 80:304])


def test_the_orientation_that_a_camera_noted_is_ignored(photos: list[Image.Image]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    np.testing.assert_array_equal(central_crop(encode(photos[0], exif=exif), 224), central_crop(encode(photos[0]), 224))


def test_a_cmyk_jpeg_shows_what_was_put_in(photos: list[Image.Image]) -> None:
    encoded = encode(photos[0].convert("CMYK"), quality=95)
    assert Image.open(io.BytesIO(encoded)).mode == "CMYK"
    assert mean_difference(central_crop(encoded, 224), central_crop(np.asarray(photos[0]), 224)) < 2.5
    assert mean_difference(random_crop(encoded, 0), random_crop(np.asarray(photos[0]), 0)) < 2.5


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "I"])
def test_images_of_other_modes_show_what_was_put_in(mode: str) -> None:
    grey = np.zeros((40, 60), np.uint8)
    grey[:, 30:] = 255
    image = Image.fromarray(grey).convert(mode) if mode[0] != "I" else Image.fromarray(grey * np.uint16(257))
    encoded = encode(image.convert("I"), "TIFF") if mode == "I" else encode(image, "PNG")
    assert Image.open(io.BytesIO(encoded)).mode == mode
    for crop in (central_crop(encoded, 32, 1.0), random_crop(encoded, 0, 32, area=(1, 1), aspect=(1.5, 1.5))):
        assert (crop[:, :12] == 0).all() and (crop[:, 20:] == 255).all()


def test_16_bits_are_scaled_to_8_not_cut_off() -> None:
    ramp = np.broadcast_to(np.arange(0, 65536, 256, dtype=np.uint16), (256, 256))
    crop = central_crop(encode(Image.fromarray(np.ascontiguousarray(ramp)), "PNG"), 256, 1.0)
    np.testing.assert_array_equal(crop, np.broadcast_to(np.arange(256)[:, None], (256, 256, 3)))


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="floating point"):
        central_crop(encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"), 8)


@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), (20_000, 300), (3, 2)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_images_of_any_shape_are_cropped(size: tuple[int, int], file_format: str) -> None:
    encoded = encode(Image.new("RGB", size, (200, 100, 50)), file_format)
    for crop in (central_crop(encoded, 64), random_crop(encoded, 0, 64)):
        assert crop.shape == (64, 64, 3)
        assert np.abs(crop.astype(int) - (200, 100, 50)).max() <= 3


def sized(encoded: bytes, width: int, height: int) -> bytes:
    """The file with other sides in its header."""
    if encoded.startswith(b"\x89PNG"):
        header = b"IHDR" + struct.pack(">II", width, height) + encoded[24:29]
        return encoded[:12] + header + struct.pack(">I", zlib.crc32(header)) + encoded[33:]
    frame = max(encoded.find(b"\xff\xc0"), encoded.find(b"\xff\xc2"))
    return encoded[: frame + 5] + struct.pack(">HH", height, width) + encoded[frame + 9 :]


@pytest.mark.parametrize("crop", [central_crop, lambda encoded, size: random_crop(encoded, 0, size)])
def test_a_jpeg_of_20000_times_20000_pixels_needs_little_memory(crop: Callable[[bytes, int], np.ndarray]) -> None:
    encoded = sized(encode(Image.new("RGB", (64, 64), "white")), 20_000, 20_000)
    tracemalloc.start()
    crop(encoded, 224)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 300e6


def test_what_cannot_be_decoded_in_little_memory_is_refused(photos: list[Image.Image]) -> None:
    with pytest.raises(ValueError, match="20000 × 20000 pixels"):
        central_crop(sized(encode(photos[0], progressive=True), 20_000, 20_000), 224)
    with pytest.raises(Image.DecompressionBombError):
        central_crop(sized(encode(photos[0], "PNG"), 20_000, 20_000), 224)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_what_is_cut_short_or_is_no_image_is_refused(photos: list[Image.Image], file_format: str, part: float) -> None:
    encoded = encode(photos[0], file_format)
    for crop in (central_crop, lambda data, size: random_crop(data, 0, size)):
        for data in (encoded[: int(part * len(encoded))], b"\xff\xd8\xff\xd9", b"text", b""):
            with pytest.raises((OSError, ValueError)):
                crop(data, 224)


def test_a_damaged_jpeg_shows_what_pillow_shows(photos: list[Image.Image]) -> None:
    encoded = bytearray(encode(photos[0], quality=92))
    encoded[40_000:40_050] = bytes(50)
    trailed = encode(photos[0], quality=92) + bytes(100)  # nor does it matter what follows the image
    for data in (bytes(encoded), trailed):
        resized = np.asarray(Image.open(io.BytesIO(data)).resize((383, 256), BICUBIC))
        np.testing.assert_array_equal(central_crop(data, 224), resized[16:240, 80:304])


def test_crop_boxes_are_uniform_in_area_and_place_and_log_uniform_in_aspect() -> None:
    rng, (width, height) = np.random.default_rng(0), (5000, 3750)
    # At up to a quarter of this area every aspect fits: no box is drawn twice, which would bend the distributions.
    boxes = np.array([random_crop_box(width, height, rng, area=(0.08, 0.25)) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    box_width, box_height = right - left, bottom - top
    areas, log_aspects = box_width * box_height / (width * height), np.log(box_width / box_height)
    uniforms = [
        (areas - 0.08) / (0.25 - 0.08),
        (log_aspects - np.log(3 / 4)) / (np.log(4 / 3) - np.log(3 / 4)),
        left / (width - box_width),
        top / (height - box_height),
    ]
    for values in uniforms:
        assert stats.kstest(values, "uniform").pvalue > 0.001


def test_crop_boxes_of_the_full_range_stay_inside_the_image_and_the_ranges() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_crop_box(500, 375, rng) for _ in range(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0 and right.max() == 500 and bottom.max() == 375
    areas, aspects = (right - left) * (bottom - top) / (500 * 375), (right - left) / (bottom - top)
    assert 0.079 < areas.min() < 0.1 and 0.95 < areas.max() <= 1
    assert 0.74 < aspects.min() < 0.77 and 1.3 < aspects.max() < 1.35


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 12), (492, 0, 508, 12)), ((12, 1000), (0, 492, 12, 508)), ((1000, 1000), (0, 0, 1000, 1000))],
)
def test_where_no_box_fits_the_crop_is_the_largest_central_one(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert random_crop_box(*size, np.random.default_rng(0), area=(1.1, 1.2)) == box
