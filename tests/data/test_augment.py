"""Tests of sret_jax.data.augment."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sret_jax.data import augment
from sret_jax.data.augment import Augmentation, mixup_cutmix, normalize, random_erasing, random_flip
from sret_jax.data.decode import random_crop_box
from sret_jax.data.targets import Targets, label_targets

DRAWS = 10_000  # over which distributions are compared with their closed forms


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """64 images of 20 × 30 in which no pixel value occurs twice."""
    values = np.random.default_rng(0).permutation(64 * 20 * 30 * 3)
    return values.reshape(64, 20, 30, 3).astype(np.float32)


@pytest.fixture(scope="module")
def targets() -> np.ndarray:
    """Random distributions over 10 classes."""
    return np.random.default_rng(1).dirichlet(np.ones(10), 64).astype(np.float32)


def test_crops_of_the_published_ranges_are_uniform_in_place_and_in_area_and_log_aspect_where_a_box_fits() -> None:
    rng, (width, height) = np.random.default_rng(0), (4000, 3000)
    left, top, right, bottom = np.array([random_crop_box(width, height, rng) for _ in range(DRAWS)]).T
    areas, aspects = (right - left) * (bottom - top) / (width * height), (right - left) / (bottom - top)
    # Of the aspects in 3/4 to 4/3, those of at least the area times 4/3 fit: from an area of 9/16 on, not all.
    grid = np.linspace(0.08, 1, 10_001)
    fitting = np.minimum(2 * np.log(4 / 3), -np.log(grid))
    cumulated = np.append(0, np.cumsum((fitting[1:] + fitting[:-1]) / 2))
    assert stats.kstest(areas, lambda area: np.interp(area, grid, cumulated / cumulated[-1])).pvalue > 0.001
    uniform = stats.uniform(np.log(3 / 4), 2 * np.log(4 / 3))
    assert stats.kstest(np.log(aspects[areas < 0.56]), uniform.cdf).pvalue > 0.001
    for places in [
        (left + rng.uniform(size=DRAWS)) / (width - (right - left) + 1),
        (top + rng.uniform(size=DRAWS)) / (height - (bottom - top) + 1),
    ]:
        assert stats.kstest(places, "uniform").pvalue > 0.001


def test_normalize_subtracts_imagenets_mean_and_divides_by_its_deviation() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(2, 5, 7, 3), dtype=np.uint8)
    expected = np.empty(pixels.shape)
    for channel, (mean, deviation) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        expected[..., channel] = (pixels[..., channel] / 255 - mean) / deviation
    normalized = jax.jit(normalize)(pixels)
    assert normalized.dtype == jnp.float32
    np.testing.assert_allclose(normalized, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_random_flip_leaves_an_image_or_mirrors_it(images: np.ndarray, dtype: type) -> None:
    images = images.astype(dtype)
    flipped = np.asarray(random_flip(jax.random.key(0), images, 0.5))
    assert flipped.dtype == dtype
    mirrored = [np.array_equal(after, before[:, ::-1]) for before, after in zip(images, flipped, strict=True)]
    same = [np.array_equal(after, before) for before, after in zip(images, flipped, strict=True)]
    assert np.all(np.logical_xor(mirrored, same))


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_random_flip_mirrors_with_the_probability_given(probability: float) -> None:
    pairs = np.tile(np.array([0, 1], np.uint8).reshape(1, 1, 2, 1), (4000, 1, 1, 1))
    mirrored = np.asarray(random_flip(jax.random.key(1), pairs, probability))[:, 0, 0, 0].sum()
    assert stats.binomtest(int(mirrored), 4000, probability).pvalue > 0.001


def mixup_cutmix_dense(
    key: jax.Array, images: jax.Array, targets: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """`mixup_cutmix` of targets that name every class."""
    classes = jnp.broadcast_to(jnp.arange(targets.shape[1]), targets.shape)
    named = Targets(classes, jnp.asarray(targets), jnp.zeros(len(targets)))
    mixed_images, mixed_targets = mixup_cutmix(key, images, named, mixup_alpha, cutmix_alpha)
    return mixed_images, mixed_targets.dense(targets.shape[1])


jitted_mixup_cutmix = jax.jit(mixup_cutmix_dense, static_argnums=(3, 4))


jitted_random_erasing = jax.jit(random_erasing)


@functools.cache
def erase(count: int, height: int, width: int, channels: int, probability: float) -> tuple[np.ndarray, np.ndarray]:
    """Erased images of a constant and which of their pixels have changed: bool (count, height, width)."""
    images = jnp.full((count, height, width, channels), 7.0)
    erased = np.asarray(jitted_random_erasing(jax.random.key(2), images, probability))
    changed = erased != 7
    np.testing.assert_array_equal(changed.any(axis=-1), changed.all(axis=-1))
    return erased, changed.any(axis=-1)


def test_random_erasing_changes_one_rectangle_of_a_size_in_the_ranges() -> None:
    _, changed = erase(1000, 60, 80, 3, probability=1.0)
    heights, widths = changed.any(axis=2).sum(axis=1), changed.any(axis=1).sum(axis=1)
    # A set of pixels that is as large as the product of its projections, which are runs, is a rectangle.
    np.testing.assert_array_equal(changed.sum(axis=(1, 2)), heights * widths)
    for projection in [changed.any(axis=2), changed.any(axis=1)]:
        assert (np.abs(np.diff(projection.astype(int), prepend=0, append=0, axis=1)).sum(axis=1) == 2).all()
    areas, aspects = heights * widths / (60 * 80), heights / widths
    assert 0.018 < areas.min() < 0.03 and 0.32 < areas.max() < 0.345
    assert 0.25 < aspects.min() < 0.35 and 2.9 < aspects.max() < 3.7
    for border in [changed[:, 0], changed[:, -1], changed[:, :, 0], changed[:, :, -1]]:
        assert border.any(), "no rectangle reaches this border"


def test_random_erasing_is_uniform_in_place_and_in_area_and_log_aspect_where_a_rectangle_fits() -> None:
    size = 48
    _, changed = erase(DRAWS, size, size, 1, probability=1.0)
    heights, widths = changed.any(axis=2).sum(axis=1), changed.any(axis=1).sum(axis=1)
    tops, lefts = changed.any(axis=2).argmax(axis=1), changed.any(axis=1).argmax(axis=1)
    rng = np.random.default_rng(0)
    for start, length in [(tops, heights), (lefts, widths)]:
        places = (start + rng.uniform(size=DRAWS)) / (size - length + 1)
        assert stats.kstest(places, "uniform").pvalue > 0.001

    # Lengths were rounded: what was lost is uniform.
    heights, widths = (length + rng.uniform(-0.5, 0.5, DRAWS) for length in (heights, widths))
    areas, log_aspects = heights * widths / size**2, np.log(heights / widths)
    # Of the aspects in 0.3 to 3.3, those between the area and its inverse fit.
    grid = np.linspace(0.02, 1 / 3, 10_001)
    fitting = np.minimum(np.log(3.3), -np.log(grid)) - np.maximum(np.log(0.3), np.log(grid))
    cumulated = np.append(0, np.cumsum((fitting[1:] + fitting[:-1]) / 2))
    assert stats.kstest(areas, lambda area: np.interp(area, grid, cumulated / cumulated[-1])).pvalue > 0.001
    uniform = stats.uniform(np.log(0.3), np.log(3.3) - np.log(0.3))
    assert stats.kstest(log_aspects[areas < 0.28], uniform.cdf).pvalue > 0.001


def test_random_erasing_fills_with_independent_normal_noise() -> None:
    erased, changed = erase(1000, 60, 80, 3, probability=1.0)
    noise = erased[changed]
    assert stats.kstest(noise[:20_000].ravel(), "norm").pvalue > 0.001
    np.testing.assert_allclose(np.corrcoef(noise.T), np.eye(3), atol=0.01)


@pytest.mark.parametrize("height", [1, 40, 41])
def test_noise_is_normal_and_independent_in_the_rows_that_share_random_bits(height: int) -> None:
    noise = np.asarray(augment._normal_noise(jax.random.key(0), (50, height, 30, 3)))
    assert noise.shape == (50, height, 30, 3) and noise.dtype == np.float32
    assert stats.kstest(noise.ravel()[:20_000], "norm").pvalue > 0.001
    assert np.abs(noise).max() < 4.33
    upper, lower = noise[:, 0 : height // 2 * 2 : 2], noise[:, 1::2]
    if height > 1:  # 90,000 pairs: five standard deviations
        assert abs(np.corrcoef(upper.ravel(), lower.ravel())[0, 1]) < 5 / math.sqrt(upper.size)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_random_erasing_erases_with_the_probability_given(probability: float) -> None:
    _, changed = erase(DRAWS, 12, 12, 1, probability)
    count = int(changed.any(axis=(1, 2)).sum())
    assert stats.binomtest(count, DRAWS, probability).pvalue > 0.001


def test_random_erasing_tries_again_where_a_rectangle_does_not_fit() -> None:
    # In an image 12 times as wide as high, a rectangle of a third fits only at few aspects: one draw in three or so.
    _, changed = erase(500, 20, 240, 1, probability=1.0)
    heights, widths = changed.any(axis=2).sum(axis=1), changed.any(axis=1).sum(axis=1)
    assert heights.max() == 19
    assert (heights > 0).mean() > 0.9
    assert (heights * widths / (20 * 240)).max() < 0.35


def test_without_alphas_nothing_is_mixed(images: np.ndarray, targets: np.ndarray) -> None:
    mixed_images, mixed_targets = mixup_cutmix_dense(jax.random.key(0), images, targets, 0.0, 0.0)
    np.testing.assert_array_equal(mixed_images, images)
    np.testing.assert_array_equal(mixed_targets, targets)


@pytest.mark.parametrize("seed", range(5))
def test_mixup_averages_an_image_and_its_target_with_the_reversed_batchs(
    images: np.ndarray, targets: np.ndarray, seed: int
) -> None:
    mixed_images, mixed_targets = map(np.asarray, jitted_mixup_cutmix(jax.random.key(seed), images, targets, 0.8, 0.0))
    # Least squares on the targets gives the weight; everything must follow from it.
    difference = (targets - targets[::-1]).ravel()
    weight = difference @ (mixed_targets - targets[::-1]).ravel() / (difference @ difference)
    assert 0 <= weight <= 1
    np.testing.assert_allclose(mixed_targets, weight * targets + (1 - weight) * targets[::-1], atol=1e-6)
    np.testing.assert_allclose(mixed_images, weight * images + (1 - weight) * images[::-1], rtol=1e-5, atol=0.1)
    np.testing.assert_allclose(mixed_targets.sum(axis=1), 1, rtol=1e-5)
    assert mixed_images.dtype == mixed_targets.dtype == np.float32


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_puts_a_box_of_the_reversed_batch_and_weighs_by_true_area(
    images: np.ndarray, targets: np.ndarray, seed: int
) -> None:
    mixed_images, mixed_targets = map(np.asarray, jitted_mixup_cutmix(jax.random.key(seed), images, targets, 0.0, 1.0))
    from_partner = mixed_images != images
    np.testing.assert_array_equal(mixed_images, np.where(from_partner, images[::-1], images))
    box = from_partner.any(axis=(0, 3))
    np.testing.assert_array_equal(from_partner, np.broadcast_to(box[:, :, None], images.shape))
    assert box.sum() == box.any(axis=1).sum() * box.any(axis=0).sum()
    weight = 1 - box.mean()
    np.testing.assert_allclose(mixed_targets, weight * targets + (1 - weight) * targets[::-1], atol=1e-6)
    np.testing.assert_allclose(mixed_targets.sum(axis=1), 1, rtol=1e-5)


MIXED_SIZE = 32


def mix_ones_with_zeros(mixup_alpha: float, cutmix_alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """10,000 draws of an image of ones mixed with one of zeros: its pixels, and the targets of both, one-hot before."""
    pair = jnp.stack([jnp.ones((MIXED_SIZE, MIXED_SIZE, 1)), jnp.zeros((MIXED_SIZE, MIXED_SIZE, 1))])
    mix = jax.vmap(lambda key: mixup_cutmix_dense(key, pair, jnp.eye(2), mixup_alpha, cutmix_alpha))
    mixed_images, mixed_targets = mix(jax.random.split(jax.random.key(3), DRAWS))
    return np.asarray(mixed_images[:, 0, :, :, 0]), np.asarray(mixed_targets)


@pytest.fixture(scope="module")
def published_mix() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels and targets with the published alphas, 0.8 and 1.0, and in which of the draws mixup was used."""
    pixels, mixed_targets = mix_ones_with_zeros(0.8, 1.0)
    return pixels, mixed_targets, ((pixels > 0) & (pixels < 1)).any(axis=(1, 2))


def kept_by_cutmix(alpha: float) -> np.ndarray:
    """Probability of each number of pixels, 0 to `MIXED_SIZE`², that cutmix leaves of an image; exact, by counting."""
    half_sides, centres = np.arange(MIXED_SIZE // 2 + 1), np.arange(MIXED_SIZE)
    # The side is sqrt(1 - w) of the image's, and 1 - w is as Beta distributed as w.
    edges = np.minimum(2 * np.append(half_sides, half_sides[-1] + 1) / MIXED_SIZE, 1)
    half_side_probabilities = np.diff(stats.beta(alpha, alpha).cdf(edges**2))
    probabilities = np.zeros(MIXED_SIZE**2 + 1)
    for half_side, probability in zip(half_sides, half_side_probabilities, strict=True):
        covered = np.minimum(centres + half_side, MIXED_SIZE) - np.maximum(centres - half_side, 0)
        kept = MIXED_SIZE**2 - np.outer(covered, covered)
        probabilities += np.bincount(kept.ravel(), minlength=len(probabilities)) / MIXED_SIZE**2 * probability
    return probabilities


def assert_kept_as_computed(pixels: np.ndarray, alpha: float) -> None:
    probabilities = kept_by_cutmix(alpha)
    twentieths = np.minimum(np.cumsum(probabilities) * 20, 19.9).astype(int)
    kept = np.bincount(twentieths[pixels.sum(axis=(1, 2)).astype(int)], minlength=20)
    expected = np.bincount(twentieths, weights=probabilities, minlength=20) * len(pixels)
    assert stats.chisquare(kept, expected).pvalue > 0.001


def test_either_mixup_or_cutmix_is_used_with_equal_probability(
    published_mix: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    _, _, is_mixup = published_mix
    assert stats.binomtest(int(is_mixup.sum()), DRAWS, 0.5).pvalue > 0.001


def test_mixups_published_weight_is_beta_distributed(
    published_mix: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    pixels, mixed_targets, is_mixup = published_mix
    weights = mixed_targets[is_mixup, 0, 0]
    assert stats.kstest(weights, stats.beta(0.8, 0.8).cdf).pvalue > 0.001
    np.testing.assert_allclose(pixels[is_mixup], np.broadcast_to(weights[:, None, None], pixels[is_mixup].shape))


def test_cutmixs_published_weight_is_the_area_left_by_a_box_that_may_cross_the_border(
    published_mix: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    pixels, mixed_targets, is_mixup = published_mix
    pixels, weights = pixels[~is_mixup], mixed_targets[~is_mixup, 0, 0]
    assert_kept_as_computed(pixels, alpha=1.0)
    np.testing.assert_allclose(weights, pixels.mean(axis=(1, 2)), rtol=1e-6)
    # The centre is uniform: over many draws, the picture of what is replaced is symmetric.
    replaced = 1 - pixels.mean(axis=0)
    np.testing.assert_allclose(replaced, replaced[::-1], atol=0.05)
    np.testing.assert_allclose(replaced, replaced.T, atol=0.05)


def test_mixed_labels_sum_to_one_and_are_each_others_reverse(
    published_mix: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    _, mixed_targets, _ = published_mix
    assert mixed_targets.min() >= 0
    np.testing.assert_allclose(mixed_targets.sum(axis=2), 1, rtol=1e-6)
    np.testing.assert_array_equal(mixed_targets, mixed_targets[:, ::-1, ::-1])


def test_mixups_weight_is_beta_distributed_for_another_alpha() -> None:
    _, mixed_targets = mix_ones_with_zeros(3.0, 0.0)
    assert stats.kstest(mixed_targets[:, 0, 0], stats.beta(3, 3).cdf).pvalue > 0.001


def test_cutmixs_box_is_as_computed_for_another_alpha() -> None:
    pixels, _ = mix_ones_with_zeros(0.0, 0.5)
    assert_kept_as_computed(pixels, alpha=0.5)


def test_each_augmentation_is_wired_to_its_setting() -> None:
    rng, classes, key = np.random.default_rng(0), 10, jax.random.key(0)
    batch = {
        "image": rng.integers(256, size=(16, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(classes, size=16, dtype=np.int32),
    }

    def augmented(augmentation: Augmentation) -> tuple[jax.Array, jax.Array]:
        images, targets = augmentation(key, batch, classes)
        return images, targets.dense(classes)

    plain, hard = augmented(Augmentation())
    np.testing.assert_array_equal(hard, np.eye(classes)[batch["label"]])

    flipped, targets = augmented(Augmentation(flip=1.0))
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    np.testing.assert_array_equal(targets, hard)

    erased, targets = augmented(Augmentation(erasing=1.0))
    share = np.mean(np.any(np.asarray(erased != plain), axis=-1), axis=(1, 2))
    assert np.all((share > 0.01) & (share < 0.4))
    np.testing.assert_array_equal(targets, hard)

    mixed, targets = augmented(Augmentation(mixup=0.8))
    row = np.argmax(batch["label"] != batch["label"][::-1])  # whose partner has another label
    weight = np.asarray(targets)[row, batch["label"][row]]
    np.testing.assert_allclose(mixed, weight * plain + (1 - weight) * plain[::-1], atol=1e-5)  # float32

    cut, targets = augmented(Augmentation(cutmix=1.0))
    from_partner = np.asarray(cut != plain)
    np.testing.assert_array_equal(np.asarray(cut)[from_partner], np.asarray(plain[::-1])[from_partner])
    np.testing.assert_allclose(np.asarray(targets).sum(1), 1, atol=1e-6)  # float32

    same, smoothed = augmented(Augmentation(label_smoothing=0.1))
    np.testing.assert_array_equal(same, plain)
    np.testing.assert_allclose(smoothed, np.where(hard, 0.91, 0.01), rtol=1e-6)


@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
def test_permuted_partners_are_those_of_a_random_permutation(alphas: tuple[float, float]) -> None:
    # Every row has a colour and a class of its own, and a box or a weight of the partner's in it.
    rows = 32
    images = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.float32)[:, None, None, None], (rows, 16, 16, 3)) ** 2
    targets = label_targets(jnp.arange(rows), rows, 0.0)
    mix = jax.jit(lambda key: mixup_cutmix(key, images, targets, *alphas, "permuted"))
    partners = []
    for seed in range(4):
        mixed_images, mixed_targets = mix(jax.random.key(seed))
        dense = np.asarray(mixed_targets.dense(rows))
        own = np.diag(dense)
        weight = np.median(own)
        assert 0.01 < weight < 0.99
        partner = np.where(own > 0.999, np.arange(rows), np.argmax(dense - np.diag(own), axis=1))
        assert sorted(partner) == list(range(rows))
        np.testing.assert_allclose(dense[np.arange(rows), partner], np.where(own > 0.999, 1, 1 - weight), rtol=1e-4)
        expected = weight * np.arange(rows) ** 2 + (1 - weight) * partner**2
        np.testing.assert_allclose(np.asarray(mixed_images).mean(axis=(1, 2, 3)), expected, rtol=1e-4)
        partners.append(tuple(partner))
    assert len(set(partners)) == 4
    assert tuple(range(rows))[::-1] not in partners


@pytest.mark.parametrize("partner", ["reversed", "permuted"])
def test_uint8_images_are_mixed_as_what_they_are_normalised_to(partner: str) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(8, 12, 12, 3), dtype=np.uint8)
    targets = label_targets(jnp.arange(8), 8, 0.1)
    for seed in range(4):
        found, expected = (
            mixup_cutmix(jax.random.key(seed), images, targets, 0.8, 1.0, partner)
            for images in (jnp.asarray(pixels), normalize(jnp.asarray(pixels)))
        )
        assert found[0].dtype == jnp.float32
        np.testing.assert_allclose(found[0], expected[0], atol=1e-6)  # float32
        jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


def test_soft_labels_of_a_batch_become_its_targets() -> None:
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(256, size=(4, 8, 8, 3), dtype=np.uint8)),
        "classes": jnp.array([[3, 1], [0, 4], [2, 3], [4, 0]]),
        "probabilities": jnp.full((4, 2), 0.25, jnp.float16),
    }
    images, targets = Augmentation(soft_labels="marginal_smoothing")(jax.random.key(0), batch, 5)
    np.testing.assert_array_equal(images, normalize(batch["image"]))
    expected = np.full((4, 5), 0.5 / 3)
    np.put_along_axis(expected, np.asarray(batch["classes"]), 0.25, axis=1)
    np.testing.assert_allclose(targets.dense(5), expected, rtol=1e-6)
    _, renormalised = Augmentation(soft_labels="marginal_renorm")(jax.random.key(0), batch, 5)
    np.testing.assert_allclose(np.sort(renormalised.dense(5)), [[0, 0, 0, 0.5, 0.5]] * 4)
