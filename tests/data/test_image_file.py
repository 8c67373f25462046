"""Tests of sret_jax.data.image_file: which files are opened, what they show, and how much memory they may take."""

import io
import itertools
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from sret_jax.data import image_file
from sret_jax.data.decode import central_crop, random_crops, stored_crops
from sret_jax.data.image_file import WHITE, Colour, open_image
from sret_jax.data.pipeline import eval_batches, train_batches
from sret_jax.data.sources import Source, keeping_decoded
from sret_jax.distill.crops import Cropper
from sret_jax.distill.recipe import Recipe

GREEN = (10, 200, 30)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """90 × 70 pixels."""
    return Image.fromarray(load_sample_images().images[0]).resize((90, 70))


@pytest.fixture(scope="module")
def rgba(photo: Image.Image) -> np.ndarray:
    """A photograph, opaque at the left, transparent in the middle, and of any opacity at the right."""
    opacity = np.random.default_rng(0).integers(0, 256, (70, 90, 1), dtype=np.uint8)
    opacity[:, :30], opacity[:, 30:60] = 255, 0
    return np.concatenate([np.asarray(photo), opacity], axis=2)


def encode(image: Image.Image | np.ndarray, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def decoded(encoded: bytes, background: Colour = WHITE) -> np.ndarray:
    image = open_image(encoded)
    return image.decode(1, image.height, background).array((0, 0, image.width, image.height))


def by_pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *chunks: bytes, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    content = chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + content


def tiff(tags: dict[int, tuple[int, int, int]], content: bytes = b"") -> bytes:
    """A TIFF of entries tag: (type, count, value), with `content` at byte 8."""
    entries = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(tags.items()))
    start = 8 + len(content) + len(content) % 2
    return (
        (b"II*\0" + struct.pack("<I", start) + content).ljust(start, b"\0")
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
    )


def grey_tiff(values: np.ndarray, bits: int, content: bytes, photometric: int = 1) -> bytes:
    height, width = values.shape
    sides = {256: (4, 1, width), 257: (4, 1, height), 278: (4, 1, height), 279: (4, 1, len(content))}
    return tiff(
        {**sides, 258: (3, 1, bits), 259: (3, 1, 1), 262: (3, 1, photometric), 273: (4, 1, 8), 277: (3, 1, 1)}, content
    )


@pytest.mark.parametrize("file_format", ["EPS", "JPEG2000", "ICO", "GIF", "TGA", "DDS", "PCX", "SGI"])
def test_no_parser_but_those_of_the_documented_formats_sees_a_file(
    photo: Image.Image, file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(photo.convert("RGB"), file_format)
    _, accept = Image.OPEN[file_format]
    seen: list[str] = []
    monkeypatch.setitem(Image.OPEN, file_format, (lambda *_: seen.append(file_format), accept))
    with pytest.raises(ValueError, match="it is no JPEG, PNG, WebP, BMP, TIFF, PPM or PGM"):
        central_crop(encoded, 32)
    assert not seen


def test_jpegs_of_every_sampling_are_decoded_as_pillow_does(photo: Image.Image) -> None:
    usual = encode(photo, "JPEG", quality=97)
    frame = usual.index(b"\xff\xc0")
    count = 0
    of_a_channel = list(itertools.product(range(1, 5), repeat=2))
    for number, factors in enumerate(itertools.product(of_a_channel, repeat=3)):
        if sum(across * down for across, down in factors) > 10:  # more than a JPEG may have
            continue
        changed = bytearray(usual)  # its blocks then show other pixels
        changed[frame + 11 : frame + 20 : 3] = bytes(16 * across + down for across, down in factors)
        encoded = bytes(changed)
        try:
            expected = by_pillow(encoded)
        except OSError:  # factors that do not divide each other
            continue
        count += 1
        np.testing.assert_array_equal(decoded(encoded), expected)
        crops = [random_crops(image, 32, [np.random.default_rng(number)])[0] for image in (encoded, expected)]
        np.testing.assert_array_equal(*crops)
    assert count >= 275


def test_every_jpeg_that_pillow_decodes_is_decoded_alike(photo: Image.Image) -> None:
    kinds = [
        encode(photo, "JPEG"),
        encode(photo, "JPEG", progressive=True),
        encode(photo, "JPEG", keep_rgb=True),
        encode(photo, "JPEG", subsampling="4:4:4", restart_marker_rows=2),
        encode(photo.convert("L"), "JPEG"),
        encode(photo.convert("CMYK"), "JPEG"),
        encode(photo, "JPEG") + b"more",
    ]
    rng, count = np.random.default_rng(0), 0
    for encoded in kinds * 60:
        changed = bytearray(encoded)
        header = encoded.index(b"\xff\xda") + 20
        for place in rng.integers(2, [header, header, len(encoded)][rng.integers(3)], size=2):
            changed[place] = rng.integers(256)
        try:
            expected = by_pillow(bytes(changed))
        except (OSError, SyntaxError, ValueError):
            continue
        np.testing.assert_array_equal(decoded(bytes(changed)), expected)
        count += 1
    assert count > 150


def test_greyscale_of_more_than_8_bits_keeps_its_levels() -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16
    expected = np.repeat((values >> 8)[..., None], 3, axis=2)
    twelve = (values >> 4).reshape(-1, 2).astype(int)
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], axis=1)
    ten = (values >> 6).astype(">u2").tobytes()
    files = {
        "PNG": encode(values, "PNG"),
        "TIFF": encode(values, "TIFF"),
        "TIFF, big-endian": encode(Image.fromarray(values.astype(">u2")), "TIFF"),
        "TIFF, compressed": encode(values, "TIFF", compression="tiff_lzw"),
        "TIFF of 12 bits": grey_tiff(values, 12, packed.astype(np.uint8).tobytes()),
        "TIFF, white is zero": grey_tiff(values, 16, (0xFFFF - values).astype("<u2").tobytes(), photometric=0),
        "TIFF of 16 bits in 32": encode(values.astype(np.int32), "TIFF"),
        "PGM": encode(values, "PPM"),
    }
    for name, encoded in files.items():
        np.testing.assert_array_equal(decoded(encoded), expected, name)
    ten_bits = decoded(b"P5 64 64 1023\n" + ten).astype(int)
    assert np.abs(ten_bits - (values >> 6)[..., None] / 1023 * 255).max() < 1


@pytest.mark.parametrize("values", [(0, 255), (0, 2**31 - 1), (-5, 60_000), (0, 70_000)])
def test_32_bit_integers_of_which_white_is_not_known_are_refused(values: tuple[int, int]) -> None:
    ramp = np.linspace(*values, 64 * 64).reshape(64, 64).astype(np.int32)
    with pytest.raises(ValueError, match=f"32-bit integers from {values[0]} to {values[1]}.*save it with 8 or 16 bits"):
        central_crop(encode(ramp, "TIFF"), 64, 1.0)


def composite(pixels: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    opacity = opacity[..., None].astype(float)
    return np.round((pixels * opacity + np.array(GREEN) * (255 - opacity)) / 255)


def test_what_is_transparent_shows_the_background(rgba: np.ndarray) -> None:
    colours, opacity = rgba[..., :3], rgba[..., 3]
    grey = np.ascontiguousarray(rgba[..., 0])
    three = np.repeat(grey[..., None], 3, axis=2)
    grey_alpha = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(opacity)))
    expected = composite(colours, opacity)
    bmp = encode(Image.fromarray(rgba), "BMP")[54:]
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    bmp_header = struct.pack("<IiiHHIIiiII", 108, 90, 70, 1, 32, 3, len(bmp), 0, 0, 0, 0) + masks
    files = [(encode(rgba, kind), expected) for kind in ("PNG", "TIFF")]
    files += [(encode(grey_alpha, kind), composite(three, opacity)) for kind in ("PNG", "TIFF")]
    files.append((encode(rgba, "WEBP", lossless=True, exact=True), expected))
    files.append((b"BM" + struct.pack("<III", 122 + len(bmp), 0, 122) + bmp_header.ljust(108, b"\0") + bmp, expected))
    for encoded, right in files:
        np.testing.assert_array_equal(decoded(encoded, GREEN), right)


def test_a_transparent_colour_shows_the_background(rgba: np.ndarray) -> None:
    few = rgba[..., :3] // 64 * 64
    grey = np.ascontiguousarray(few[..., 0])
    three = np.repeat(grey[..., None], 3, axis=2)
    indices, palette = rgba[..., 1] % 16, np.random.default_rng(1).integers(0, 256, (16, 3), dtype=np.uint8)
    opacities = np.random.default_rng(2).integers(0, 256, 16, dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    sixteen, wide = grey.astype(np.uint16) * 257, few.astype(np.uint16) * 256 + 77
    sixteen[::2] ^= 1  # others, but for the last bit
    rows = np.concatenate([np.zeros((70, 1), np.uint8), sixteen.astype(">u2").view(np.uint8)], axis=1)
    wide_rows = np.concatenate([np.zeros((70, 1), np.uint8), wide.reshape(70, -1).astype(">u2").view(np.uint8)], axis=1)
    four = np.concatenate([np.zeros((70, 1), np.uint8), grey[:, ::2] & 0xF0 | grey[:, 1::2] >> 4], axis=1)
    levels = np.repeat((grey >> 4)[..., None].astype(int) * 17, 3, axis=2)

    def key(values: np.ndarray) -> bytes:
        return chunk(b"tRNS", values.astype(">u2").tobytes())

    def where(hidden: np.ndarray) -> np.ndarray:
        return np.where(hidden, 0, 255)

    is_first, is_first_of_16 = (few == few[0, 0]).all(axis=2), sixteen == sixteen[0, 0]
    files = {
        "palette": (encode(image, "PNG", transparency=opacities.tobytes()), palette[indices], opacities[indices]),
        "one of it": (encode(image, "PNG", transparency=3), palette[indices], where(indices == 3)),
        "RGB": (encode(few, "PNG", transparency=tuple(few[0, 0].tolist())), few, where(is_first)),
        "grey": (encode(grey, "PNG", transparency=int(grey[0, 0])), three, where(grey == grey[0, 0])),
        "grey, 4 bits": (png(90, 70, 4, 0, four.tobytes(), key(grey[0, :1] >> 4)), levels, where(grey == grey[0, 0])),
        "grey, 16 bits": (png(90, 70, 16, 0, rows.tobytes(), key(sixteen[0, :1])), three, where(is_first_of_16)),
        "RGB, 16 bits": (png(90, 70, 16, 2, wide_rows.tobytes(), key(wide[0, 0])), few, where(is_first)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (encoded, pixels, opacity) in files.items():
            np.testing.assert_array_equal(decoded(encoded, GREEN), composite(pixels, opacity), name)


def test_what_is_opaque_stays_as_it_is_bit_for_bit(photo: Image.Image) -> None:
    pixels = np.asarray(photo)
    opaque = np.concatenate([pixels, np.full((70, 90, 1), 255, np.uint8)], axis=2)
    expected = central_crop(pixels, 32)
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(central_crop(encode(opaque, kind), 32, background=GREEN), expected)


def test_a_background_is_seen_by_training_evaluation_and_teachers() -> None:
    hidden = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
    hidden[..., 3] = 0
    examples = [{"image": encode(hidden, "PNG"), "label": 0, "key": "train/0"}]
    for background in (WHITE, GREEN):
        source = Source(examples, 1, "hidden", background=background)
        for one in (source, keeping_decoded(source)):
            batches = [
                next(train_batches(one, batch_size=1, image_size=8, seed=0, num_threads=1)),
                next(eval_batches(one, batch_size=1, image_size=8, num_threads=1)),
            ]
            assert all((batch["image"] == background).all() for batch in batches)
        crops = Cropper(Recipe(teacher="", num_crops=2), source, None, 8)._example(0).image
        assert (crops == background).all()
    assert (central_crop(encode(hidden, "PNG"), 8) == WHITE).all()


def test_large_images_are_resized_in_strips_bit_for_bit_as_by_pillow(
    photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "_PIXELS_AT_ONCE", 10_000)
    large = photo.resize((260, 190))
    opacity = Image.fromarray(np.random.default_rng(0).integers(0, 256, (190, 260), dtype=np.uint8))
    transparent = large.copy()
    transparent.putalpha(opacity)
    shown = Image.new("RGB", large.size, GREEN)
    shown.paste(transparent, mask=opacity)
    boxes = np.array([[0.125, 0.125, 1.0, 1.0], [0.1, 0.1, 0.875, 0.875]])  # the first ends beyond the image
    for encoded, pillow in (
        (encode(transparent, "PNG", compress_level=1), shown),
        (encode(large, "BMP"), large),
        (encode(large, "JPEG"), Image.fromarray(by_pillow(encode(large, "JPEG")))),
    ):
        expected = pillow.resize((131, 96), Image.Resampling.BICUBIC).crop((18, 0, 114, 96))
        np.testing.assert_array_equal(central_crop(encoded, 96, 1.0, GREEN), np.asarray(expected))
        for crop, (top, left, height, width) in zip(
            stored_crops(encoded, 48, boxes, np.zeros(2, bool), background=GREEN), boxes.tolist(), strict=True
        ):
            ends = (left * 260, top * 190, (left + width) * 260, (top + height) * 190)
            cut = pillow.crop(tuple(round(end) for end in ends))
            np.testing.assert_array_equal(crop, np.asarray(cut.resize((48, 48), Image.Resampling.BILINEAR)))


def of_same_bytes(count: int, size: int) -> bytes:
    """A TIFF of which so many tags have the same content."""
    return tiff({60_000 - count + number: (7, size, 8) for number in range(count)}, bytes(size))


def with_chunks(chunks: bytes) -> bytes:
    encoded = encode(Image.new("RGB", (8, 8)), "PNG")
    return encoded[:33] + chunks + encoded[33:]


def progressive(side: int, scans: int) -> bytes:
    """A progressive JPEG that claims to be larger than it is, and repeats its scans."""
    data = bytearray(encode(Image.new("RGB", (64, 64), (200, 10, 10)), "JPEG", progressive=True))
    frame, scan = data.index(b"\xff\xc2"), data.index(b"\xff\xda")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return bytes(data[:scan] + data[scan:-2] * scans + b"\xff\xd9")


# 16383 × 5400 pixels, all black.
LOSSLESS_WEBP = bytes.fromhex("524946461a000000574542505650384c0e0000002ffeff4505071011fd0f4444ff03")


def metadata_of_metadata() -> bytes:
    encoded, segment = encode(Image.new("RGB", (8, 8)), "JPEG"), of_same_bytes(3000, 28_000)
    segment = b"\xff\xe1" + struct.pack(">H", 8 + len(segment)) + b"Exif\0\0" + segment
    return encoded[:2] + 3 * segment + encoded[2:] + b"more"


def strips(count: int) -> bytes:
    sides = {256: (4, 1, 1000), 257: (4, 1, 1000), 258: (3, 1, 8), 262: (3, 1, 1), 277: (3, 1, 1), 278: (4, 1, 1)}
    return tiff({**sides, 259: (3, 1, 1), 273: (3, count, 8), 279: (3, count, 8)}, bytes(2 * count))


def tile(side: int) -> bytes:
    sides = {256: (4, 1, 1000), 257: (4, 1, 1000), 258: (3, 1, 8), 262: (3, 1, 1), 322: (4, 1, side), 323: (4, 1, side)}
    return tiff({**sides, 259: (3, 1, 5), 324: (4, 1, 8), 325: (4, 1, 8)}, bytes(100))


# What they are, and what is said of them; empty where they are decoded.
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "a row of 89 million pixels": (lambda: png(89_000_000, 1, 8, 0, bytes(100)), "89000000 × 1 pixels, longer than"),
    "RGBA, 360 MB": (lambda: png(9480, 9480, 8, 6, bytes(100)), "359 MB to decode, more than the 250 MB"),
    "RGBA, 160 MB": (lambda: png(6300, 6300, 8, 6, bytes(6300 * (1 + 4 * 6300))), ""),
    "interlaced, cut": (lambda: png(7900, 7900, 8, 6, bytes(10**6), interlaced=1), "truncated|broken"),
    "WebP without loss": (lambda: LOSSLESS_WEBP, "16383 × 5400 pixels.*make it smaller"),
    "WebP": (lambda: encode(Image.new("RGBA", (3900, 3900)), "WEBP", lossless=True, method=0), ""),
    "3,000 scans": (lambda: progressive(9000, 300), "9000 × 9000 pixels in 3000 scans take too long"),
    "30 scans": (lambda: progressive(8000, 3), ""),
    "progressive, 20,000 × 20,000": (lambda: progressive(20_000, 1), "20000 × 20000 pixels"),
    "5 million 0xFF": (lambda: b"\xff\xd8" + b"\xff" * 5_000_000 + b"\xff\xd9", "a JPEG without a header"),
    "a million comments": (lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * 10**6 + b"\xff\xd9", "10,000 segments"),
    "metadata of metadata": (metadata_of_metadata, ""),
    "400,000 chunks": (lambda: with_chunks(chunk(b"abCd", b"") * 400_000), "too long to read"),
    "compressed text": (
        lambda: with_chunks(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 300),
        "text chunks",
    ),
    "a profile": (lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(90_000_000)))), "too large"),
    "tags of the same bytes": (lambda: of_same_bytes(5000, 1_000_000), "it is no JPEG|too long to read"),
    "2 million strips": (lambda: strips(2_000_000), "2,000,000 strips"),
    "a huge tile": (lambda: tile(2**31 - 16), "1000 × 1000 pixels"),
    "a large tile": (lambda: tile(2**13), "decoder error"),
    "a PPM's comment": (lambda: b"P6 #" + b"a" * 5_000_000 + b"\n8 8 255\n" + bytes(192), "too long to read"),
    "a PPM in words": (lambda: b"P3 9000 9000 255\n1 1 1", "read one by one"),
}

MEASURE = """
import pathlib, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from sret_jax.data import image_file
from sret_jax.data.decode import central_crop, random_crops, stored_crops
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10
central_crop(np.zeros((8, 8, 3), np.uint8), 8)
before = memory("VmRSS:")
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    encoded, said = path.read_bytes(), ""
    for crop in (
        lambda: central_crop(encoded, 64),
        lambda: random_crops(encoded, 64, [np.random.default_rng(0)]),
        lambda: stored_crops(encoded, 64, np.array([[0, 0, 1, 1]]), np.array([False])),
    )[: int(sys.argv[2])]:
        try:
            crop()
        except MemoryError:
            raise
        except Exception as error:
            said = str(error)
    print(memory("VmHWM:") - before, path.name, said.replace(chr(10), " "), sep="|", flush=True)
"""


def measured(folder: Path, ways: int) -> list[tuple[int, str, str]]:
    """Bytes above the start so far, name and error for each file of a folder, in one process."""
    command = [sys.executable, "-c", MEASURE, str(folder), str(ways)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.split("|", 2) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == len(list(folder.iterdir())), done.stderr
    return [(int(most), name, said) for most, name, said in lines]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_hostile_files_take_little_memory_or_are_refused_in_words(tmp_path: Path) -> None:
    for name, (make, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(make())
    for most, name, said in measured(tmp_path, 1):
        assert most < 300e6, name
        expected = HOSTILE[name][1]
        assert re.search(expected, said) if expected else not said, (name, said)


@pytest.mark.by_hand
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_random_changes_of_files_of_every_format_end_in_crops_or_usual_errors(
    photo: Image.Image, rgba: np.ndarray, tmp_path: Path
) -> None:
    grey = photo.convert("L")
    files = [
        *(encode(photo, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")),
        *(encode(rgba, kind) for kind in ("PNG", "TIFF", "WEBP")),
        *(encode(photo.quantize(16), kind) for kind in ("PNG", "TIFF", "BMP")),
        *(encode(np.asarray(grey).astype(np.uint16) * 257, kind) for kind in ("PNG", "TIFF", "PPM")),
        *(encode(photo, "TIFF", compression=how) for how in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        *(encode(photo, kind, save_all=True, append_images=[photo.rotate(9)]) for kind in ("PNG", "WEBP")),
        encode(photo.convert("1"), "TIFF", compression="group4"),
        encode(photo, "JPEG", progressive=True),
        encode(photo.convert("CMYK"), "JPEG"),
        encode(rgba, "WEBP", lossless=True),
    ]
    rng = np.random.default_rng(0)
    for number in range(200 * len(files)):
        changed = bytearray(files[number % len(files)])
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(len(changed) if rng.random() < 0.4 else min(len(changed), 120)))
            changed[place] = 255 if rng.random() < 0.3 else rng.integers(256)
        (tmp_path / f"{number:05d}").write_bytes(with_checksums(bytes(changed)))
    for most, name, _ in measured(tmp_path, 3):
        assert most < 300e6, name


def with_checksums(encoded: bytes) -> bytes:
    """A PNG whose checksums are right, as far as its chunks are; other files as they are."""
    if not encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        return encoded
    parts, place = [encoded[:8]], 8
    while place + 12 <= len(encoded):
        (length,) = struct.unpack_from(">I", encoded, place)
        parts.append(chunk(encoded[place + 4 : place + 8], encoded[place + 8 : place + 8 + length]))
        place += 12 + length
    return b"".join(parts)
