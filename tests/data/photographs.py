"""Makes folders of images like ImageNet's from photographs that Python packages ship, for tests and benchmarks."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def scikit_learn_photographs() -> list[np.ndarray]:
    """The photographs that scikit-learn ships: uint8 (427, 640, 3) each."""
    from sklearn.datasets import load_sample_images

    return list(load_sample_images().images)


def scikit_image_photographs() -> list[np.ndarray]:
    """The colour photographs that scikit-image ships, of several sizes; it is no dependency of this library."""
    from skimage import data

    return [data.astronaut(), data.chelsea(), data.coffee(), data.hubble_deep_field(), data.rocket(), data.retina()]


def write_photographs(
    folder: Path,
    *,
    train: int,
    val: int,
    classes: int,
    seed: int = 0,
    photographs: Sequence[np.ndarray] | None = None,
    size: tuple[int, int] = (500, 375),
) -> None:
    """Writes `train/<class>/<image>.JPEG` and `val/…`: random crops of photographs, in ImageNet's sizes.

    Four in five have the given size, give or take an eighth of each side, one in four of these stands upright; the
    others are of any size between a half and twice it. One in fifty is grey. The JPEG quality is 90 to 95.
    Each image depends on `seed`, its split and its number alone.

    Args:
      folder: made if missing.
      train: number of images in `train`.
      val: number of images in `val`.
      classes: number of folders, `n00000000`, `n00000001` and so on, that share the images equally.
      seed: decides on the crops.
      photographs: to crop from, uint8 (height, width, 3); by default scikit-learn's.
      size: the usual width and height, pixels.
    """
    originals = [Image.fromarray(pixels) for pixels in photographs or scikit_learn_photographs()]
    for number_of_split, (split, count) in enumerate([("train", train), ("val", val)]):
        for index in range(count):
            rng = np.random.default_rng((seed, number_of_split, index))
            wnid = f"n{index % classes:08d}"
            path = folder / split / wnid / f"{wnid if split == 'train' else 'ILSVRC2012_val'}_{index:08d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_encode(_crop(originals[rng.integers(len(originals))], size, rng), rng))


def _crop(original: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.8:
        width, height = (round(side * rng.uniform(7 / 8, 9 / 8)) for side in size)
        width, height = (height, width) if rng.random() < 0.25 else (width, height)
    else:
        width, height = (round(side * 2 ** rng.uniform(-1, 1)) for side in size)
    largest = min(original.width / width, original.height / height)
    scale = largest * rng.uniform(0.6, 1)
    left, top = rng.uniform(0, original.width - width * scale), rng.uniform(0, original.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    image = original.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return image.convert("L") if rng.random() < 0.02 else image


def _encode(image: Image.Image, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(90, 95, endpoint=True)))
    return buffer.getvalue()
