"""Tests of sret_jax.data.rand_augment."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from sklearn.datasets import load_sample_images

from sret_jax.data.rand_augment import OPERATIONS, RandAugment
from sret_jax.errors import UserError

PUBLISHED = "rand-m9-mstd0.5-inc1"
GREYISH = (124, 116, 104)  # 255 × (0.485, 0.456, 0.406)
DRAWS = 10_000


def affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC, fillcolor=GREYISH
    )


def posterize(image: Image.Image, bits: int) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)


def add_to_dark(image: Image.Image, addend: int) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray(np.where(pixels < 128, pixels + np.minimum(addend, 255 - pixels), pixels).astype(np.uint8))


# timm 0.3.2's definitions, by Pillow's plain functions: of an image, a magnitude and a sign.
EXPECTED = {
    "AutoContrast": lambda image, m, s: ImageOps.autocontrast(image),
    "Equalize": lambda image, m, s: ImageOps.equalize(image),
    "Invert": lambda image, m, s: ImageOps.invert(image),
    "Rotate": lambda image, m, s: image.rotate(s * (m / 10 * 30), resample=Image.Resampling.BICUBIC, fillcolor=GREYISH),
    "PosterizeIncreasing": lambda image, m, s: posterize(image, 4 - int(m / 10 * 4)),
    "SolarizeIncreasing": lambda image, m, s: ImageOps.solarize(image, 256 - int(m / 10 * 256)),
    "SolarizeAdd": lambda image, m, s: add_to_dark(image, int(m / 10 * 110)),
    "ColorIncreasing": lambda image, m, s: ImageEnhance.Color(image).enhance(1 + s * (m / 10 * 0.9)),
    "ContrastIncreasing": lambda image, m, s: ImageEnhance.Contrast(image).enhance(1 + s * (m / 10 * 0.9)),
    "BrightnessIncreasing": lambda image, m, s: ImageEnhance.Brightness(image).enhance(1 + s * (m / 10 * 0.9)),
    "SharpnessIncreasing": lambda image, m, s: ImageEnhance.Sharpness(image).enhance(1 + s * (m / 10 * 0.9)),
    "ShearX": lambda image, m, s: affine(image, 1, s * (m / 10 * 0.3), 0, 0, 1, 0),
    "ShearY": lambda image, m, s: affine(image, 1, 0, 0, s * (m / 10 * 0.3), 1, 0),
    "TranslateXRel": lambda image, m, s: affine(image, 1, 0, s * (m / 10 * 0.45) * image.size[0], 0, 1, 0),
    "TranslateYRel": lambda image, m, s: affine(image, 1, 0, 0, 0, 1, s * (m / 10 * 0.45) * image.size[1]),
}
WITHOUT_MAGNITUDE = {"AutoContrast", "Equalize", "Invert"}
WITHOUT_SIGN = WITHOUT_MAGNITUDE | {"PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"}


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    """A temple at training's size, and a flower that is wider than high."""
    china, flower = map(Image.fromarray, load_sample_images().images)
    return [china.crop((150, 50, 500, 400)).resize((224, 224)), flower.crop((200, 100, 350, 200))]


def test_the_operations_are_timms_fifteen_increasing_ones() -> None:
    assert list(OPERATIONS) == list(EXPECTED)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("name", EXPECTED)
def test_an_operation_gives_the_bytes_of_timms_definition(
    name: str, magnitude: float, sign: int, photographs: list[Image.Image]
) -> None:
    for image in photographs:
        before = image.tobytes()
        result = OPERATIONS[name](image, magnitude, sign)
        assert (result.mode, result.size) == ("RGB", image.size)
        assert result.tobytes() == EXPECTED[name](image, magnitude, sign).tobytes()
        assert image.tobytes() == before, "the operation changed the image that it was given"


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - WITHOUT_MAGNITUDE))
def test_an_operations_effect_increases_with_the_magnitude(name: str, photographs: list[Image.Image]) -> None:
    image = photographs[0]
    pixels = np.asarray(image, np.float64)
    changes = [np.abs(np.asarray(OPERATIONS[name](image, m, 1)) - pixels).mean() for m in (1.0, 4.0, 9.9)]
    assert 0 < changes[0] < changes[1] < changes[2]


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - WITHOUT_SIGN))
def test_the_sign_turns_an_operations_effect_round(name: str, photographs: list[Image.Image]) -> None:
    there = OPERATIONS[name](photographs[0], 9.0, 1)
    assert there.tobytes() != OPERATIONS[name](photographs[0], 9.0, -1).tobytes()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (PUBLISHED, RandAugment(magnitude=9.0, magnitude_std=0.5, count=2)),
        ("rand-inc1-n3-mstd1-m0", RandAugment(magnitude=0.0, magnitude_std=1.0, count=3)),
        ("rand-inc1", RandAugment(magnitude=10.0, magnitude_std=0.0, count=2)),
    ],
)
def test_a_policy_means_what_it_means_to_timm(policy: str, expected: RandAugment) -> None:
    assert RandAugment.parse(policy) == expected


@pytest.mark.parametrize(
    ("policy", "problem"),
    [
        ("", "it begins with ''"),
        ("augmix-m9-inc1", "it begins with 'augmix'"),
        ("rand-m9-mstd0.5", "inc1 is missing"),
        ("rand-m9-inc0", "'inc0' is not a part of one"),
        ("rand-m11-inc1", "'m11' is not a part of one"),
        ("rand-m9.5-inc1", "'m9.5' is not a part of one"),
        ("rand-n0-inc1", "'n0' is not a part of one"),
        ("rand-mstd101-inc1", "'mstd101' is not a part of one"),
        ("rand-m9-w0-inc1", "'w0' is not a part of one"),
        ("rand-m9-m9-inc1", "a part is there twice"),
    ],
)
def test_another_policy_is_the_users_error(policy: str, problem: str) -> None:
    with pytest.raises(UserError, match=rf"{policy!r} is not .*{problem}.*Expected `rand`.*'{PUBLISHED}'"):
        RandAugment.parse(policy)


@pytest.fixture(scope="module")
def draws() -> list[list[tuple[str, float, int]]]:
    """What the published policy draws for each of 10,000 images."""
    policy, rng = RandAugment.parse(PUBLISHED), np.random.default_rng(0)
    return [policy.draw(rng) for _ in range(DRAWS)]


def test_each_of_two_operations_is_applied_with_probability_one_half(draws: list[list[tuple[str, float, int]]]) -> None:
    counts = Counter(map(len, draws))
    assert stats.chisquare([counts[0], counts[1], counts[2]], DRAWS * np.array([1 / 4, 1 / 2, 1 / 4])).pvalue > 0.001


def test_operations_are_drawn_uniformly_and_with_replacement(draws: list[list[tuple[str, float, int]]]) -> None:
    counts = Counter(name for drawn in draws for name, _, _ in drawn)
    assert stats.chisquare([counts[name] for name in OPERATIONS]).pvalue > 0.001
    pairs = [drawn for drawn in draws if len(drawn) == 2]
    repeated = sum(first[0] == second[0] for first, second in pairs)
    assert stats.binomtest(repeated, len(pairs), 1 / 15).pvalue > 0.001


def test_magnitudes_are_normal_and_clipped_and_signs_equally_probable(
    draws: list[list[tuple[str, float, int]]],
) -> None:
    magnitudes, signs = np.array([(magnitude, sign) for drawn in draws for _, magnitude, sign in drawn]).T
    normal, below = stats.norm(9, 0.5), magnitudes[magnitudes < 10]
    assert magnitudes.max() == 10
    assert stats.binomtest(len(magnitudes) - len(below), len(magnitudes), normal.sf(10)).pvalue > 0.001
    assert stats.kstest(normal.cdf(below) / normal.cdf(10), "uniform").pvalue > 0.001
    assert set(signs) == {-1, 1}
    assert stats.binomtest(int((signs > 0).sum()), len(signs), 0.5).pvalue > 0.001


def test_magnitudes_below_zero_are_zero_and_without_deviation_they_are_the_mean() -> None:
    rng = np.random.default_rng(0)
    around_zero = RandAugment(magnitude=0.0, magnitude_std=1.0, count=2000).draw(rng)
    assert min(magnitude for _, magnitude, _ in around_zero) == 0
    zeros = sum(magnitude == 0 for _, magnitude, _ in around_zero)
    assert stats.binomtest(zeros, len(around_zero), 0.5).pvalue > 0.001
    exact = RandAugment(magnitude=9.0, magnitude_std=0.0, count=100).draw(rng)
    assert {magnitude for _, magnitude, _ in exact} == {9.0}


def test_an_image_gets_what_is_drawn_one_after_the_other(photographs: list[Image.Image]) -> None:
    policy, image = RandAugment.parse(PUBLISHED), photographs[1]
    lengths = set()
    for seed in range(40):
        expected, drawn = image, policy.draw(np.random.default_rng(seed))
        for name, magnitude, sign in drawn:
            expected = EXPECTED[name](expected, magnitude, sign)
        assert policy(image, np.random.default_rng(seed)).tobytes() == expected.tobytes()
        lengths.add(len(drawn))
    assert lengths == {0, 1, 2}


def test_all_randomness_comes_from_the_generator_given(photographs: list[Image.Image]) -> None:
    policy, rng = RandAugment.parse(PUBLISHED), np.random.default_rng(7)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    results = [policy(photographs[1], rng).tobytes() for _ in range(20)]
    np.testing.assert_equal(np.random.get_state(), numpy_state)
    assert random.getstate() == python_state
    random.seed(1)
    np.random.seed(1)
    rng = np.random.default_rng(7)
    assert [policy(photographs[1], rng).tobytes() for _ in range(20)] == results
    assert len(set(results)) > 10
