"""Augmentation of whole batches on the device: pure functions of a key and images, to be called inside `jax.jit`."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from sret_jax.data.targets import Targets, label_targets, mix, soft_targets

# Of ImageNet's RGB values in 0..1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 3.3)
_ERASING_ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """All that happens to a training batch on the device, as one function. The defaults change nothing."""

    flip: float = 0.0  # probability
    erasing: float = 0.0  # probability
    mixup: float = 0.0  # alpha
    cutmix: float = 0.0  # alpha
    partner: str = "reversed"  # of mixup and cutmix, or "permuted"
    label_smoothing: float = 0.0
    soft_labels: str = ""  # `LabelType.kind` of the batch's soft labels; empty where it holds labels

    def __call__(self, key: Array, batch: Mapping[str, Array], num_classes: int) -> tuple[Array, Targets]:
        """Normalised and augmented images, and their targets.

        Args:
          key: random key.
          batch: `image` uint8 (batch, height, width, 3), RGB, and `label` int32 (batch,); or, for soft labels,
            `classes` int32 (batch, k) and `probabilities` float16 (batch, k) instead of `label`.
          num_classes: number of classes.

        Returns:
          float32 images of the same shape, and the targets.
        """
        flip_key, mix_key, erasing_key = jax.random.split(key, 3)
        images = random_flip(flip_key, batch["image"], self.flip)
        if self.erasing:  # with noise that no uint8 holds
            images = random_erasing(erasing_key, normalize(images), self.erasing)
        if self.soft_labels:
            targets = soft_targets(batch["classes"], batch["probabilities"], self.soft_labels, num_classes)
        else:
            targets = label_targets(batch["label"], num_classes, self.label_smoothing)
        images, targets = mixup_cutmix(mix_key, images, targets, self.mixup, self.cutmix, self.partner)
        return normalize(images) if images.dtype == jnp.uint8 else images, targets


def normalize(images: Array) -> Array:
    """Brings each channel to mean 0 and standard deviation 1 over ImageNet.

    Args:
      images: uint8 (batch, height, width, 3), RGB.

    Returns:
      float32 of the same shape.
    """
    mean, std = (jnp.array(values, jnp.float32).reshape(1, 1, 1, 3) for values in (MEAN, STD))
    return (images.astype(jnp.float32) / 255 - mean) / std


def random_flip(key: Array, images: Array, probability: float) -> Array:
    """Mirrors each image left to right with the given probability.

    Args:
      key: random key.
      images: (batch, height, width, channels), any dtype.
      probability: of an image to be mirrored.

    Returns:
      Images of the same shape and dtype.
    """
    flipped = jax.random.bernoulli(key, probability, images.shape[:1])
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def random_erasing(key: Array, images: Array, probability: float) -> Array:
    """Fills one rectangle of each image, with the given probability, with normal noise (Zhong et al., 2017).

    The rectangle covers 0.02 to 1/3 of the image, uniformly, and its height / width is 0.3 to 3.3, log-uniformly. As in
    timm, one that does not fit is drawn again, ten times in all; then the image stays as it is.

    Args:
      key: random key.
      images: float32 (batch, height, width, channels), normalised.
      probability: of an image to be erased in part.

    Returns:
      Images of the same shape and dtype.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 6)
    attempts = (batch, _ERASING_ATTEMPTS)
    area = height * width * jax.random.uniform(keys[0], attempts, minval=_ERASED_AREA[0], maxval=_ERASED_AREA[1])
    log_aspect = jax.random.uniform(
        keys[1], attempts, minval=math.log(_ERASED_ASPECT[0]), maxval=math.log(_ERASED_ASPECT[1])
    )
    heights = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect))).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    box_height = jnp.take_along_axis(heights, first, axis=1)
    box_width = jnp.take_along_axis(widths, first, axis=1)
    erased = jnp.any(fits, axis=1) & jax.random.bernoulli(keys[2], probability, (batch,))
    top = jax.random.randint(keys[3], (batch, 1), 0, height - box_height + 1)
    left = jax.random.randint(keys[4], (batch, 1), 0, width - box_width + 1)
    inside = _inside(height, width, top, left, top + box_height, left + box_width) & erased[:, None, None]
    noise = _normal_noise(keys[5], images.shape).astype(images.dtype)
    return jnp.where(inside[..., None], noise, images)


def _normal_noise(key: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal, float32 of a shape of images, from 16 random bits each: 32, as JAX takes, cost twice as much.

    They are the halves of one number for two rows of an image. None is beyond ±4.33.
    """
    batch, height, width, channels = shape
    bits = jax.random.bits(key, (batch, (height + 1) // 2, 1, width, channels), jnp.uint32)
    halves = (bits >> jnp.array([0, 16], jnp.uint32)[None, None, :, None, None]) & 0xFFFF
    uniform = (halves.reshape(batch, -1, width, channels)[:, :height].astype(jnp.float32) + 0.5) / 2**15 - 1
    return math.sqrt(2) * jax.lax.erf_inv(uniform)


def mixup_cutmix(
    key: Array, images: Array, targets: Targets, mixup_alpha: float, cutmix_alpha: float, partner: str = "reversed"
) -> tuple[Array, Targets]:
    """Mixes each image and its target with those of its partner in the batch, by mixup or cutmix.

    Mixup (Zhang et al., 2018) averages: `w * image + (1 - w) * partner`, w ~ Beta(alpha, alpha). Cutmix (Yun et al.,
    2019) puts a box of the partner into the image, sides `sqrt(1 - w)` of the image's, centre uniform, cut off at the
    border; w then becomes the part of the image that is left. One draw serves the whole batch, as in timm. With both
    alphas positive, either is used with probability 1/2.

    Args:
      key: random key.
      images: float32 (batch, height, width, channels); or uint8, which takes a quarter of the time to exchange between
        devices, and is normalised.
      targets: of the batch.
      mixup_alpha: a Python number; 0 turns mixup off.
      cutmix_alpha: a Python number; 0 turns cutmix off. With both off, nothing changes.
      partner: `reversed`, of the batch in reverse order, as in timm; or `permuted`, of a random permutation, as in FKD,
        where neighbours are crops of one image.

    Returns:
      Mixed images of the same shape, float32, and their targets. Where nothing is mixed, both as they were.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images, targets
    key_switch, key_weight, key_y, key_x = jax.random.split(key, 4)
    cutmix_probability = 0.0 if cutmix_alpha == 0 else 1.0 if mixup_alpha == 0 else 0.5
    use_cutmix = jax.random.bernoulli(key_switch, cutmix_probability)
    alpha = jnp.where(use_cutmix, cutmix_alpha, mixup_alpha)
    weight = jax.random.beta(key_weight, alpha, alpha)

    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - weight)
    half_height, half_width = jnp.int32(height * side) // 2, jnp.int32(width * side) // 2
    y, x = jax.random.randint(key_y, (), 0, height), jax.random.randint(key_x, (), 0, width)
    kept = ~_inside(height, width, y - half_height, x - half_width, y + half_height, x + half_width)

    rows: Array | slice = slice(None, None, -1)
    if partner == "permuted":
        rows = jax.random.permutation(jax.random.fold_in(key, 1), len(images))
    pixel_weights = jnp.where(use_cutmix, kept, weight)[None, ..., None]
    target_weight = jnp.where(use_cutmix, jnp.mean(kept), weight)
    partner_images = images[rows]
    if images.dtype == jnp.uint8:
        images, partner_images = normalize(images), normalize(partner_images)
    images = pixel_weights * images + (1 - pixel_weights) * partner_images
    partners = Targets(*(array[rows] for array in targets))
    return images, mix(targets, partners, target_weight)


def _inside(height: int, width: int, top: Array, left: Array, bottom: Array, right: Array) -> Array:
    """Which pixels a box covers: bool (..., height, width) for bounds (..., 1) or (), bottom and right exclusive."""
    rows, columns = (jax.lax.expand_dims(jnp.arange(size), range(top.ndim - 1)) for size in (height, width))
    in_rows = (top <= rows) & (rows < bottom)
    in_columns = (left <= columns) & (columns < right)
    return in_rows[..., :, None] & in_columns[..., None, :]
