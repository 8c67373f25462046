"""Speed of the input pipeline, from JPEG files in memory to uint8 crops, against plain Pillow.

    python benchmarks/input.py

Needs Linux, and scikit-image beside the package for its photographs. benchmarks/README.md explains the columns.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from sret_jax.data.decode import random_crop_box, random_crops
from sret_jax.data.pipeline import train_batches
from sret_jax.data.rand_augment import RandAugment
from sret_jax.data.sources import Source

POLICY = "rand-m9-mstd0.5-inc1"
SIZE = 224

# From an encoded image and a seed to its crops.
Pipeline = Callable[[bytes, int], Sequence[np.ndarray]]


def main() -> None:
    """Make JPEGs and print a table of what one core does, and one of worker processes."""
    args = _parse_args()
    files = jpegs(args.images)
    packages = ", ".join(f"{name} {version(name)}" for name in ("pillow", "simplejpeg", "cykooz-resizer", "grain"))
    print(f"{len(files)} JPEGs of 500 × 375 pixels, {np.mean([len(f) for f in files]) / 1000:.0f} kB on average")
    print(f"{packages}, {platform.machine()}\n")
    print_pipelines(files, args.rounds)
    print()
    print_workers(files, args.seconds)


def jpegs(count: int) -> list[bytes]:
    """Files such as ImageNet's: 500 × 375 or 375 × 500 pixels, quality 90 to 95, colours at half the resolution."""
    try:
        from skimage import data
    except ImportError:
        sys.exit("error: no scikit-image, whose photographs this needs. Install it: pip install scikit-image")
    pixels = [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    rng, files = np.random.default_rng(0), []
    for photo in itertools.islice(itertools.cycle(map(Image.fromarray, pixels)), count):
        width, height = (500, 375) if rng.random() < 0.7 else (375, 500)
        scale = max(width / photo.width, height / photo.height) * rng.uniform(1, 1.2)
        left, top = (
            rng.uniform(0, side * scale - part) for side, part in zip(photo.size, (width, height), strict=True)
        )
        box = (left / scale, top / scale, (left + width) / scale, (top + height) / scale)
        file = io.BytesIO()
        part = photo.resize((width, height), Image.Resampling.LANCZOS, box)
        part.save(file, "JPEG", quality=int(rng.integers(90, 96)), subsampling="4:2:0")
        files.append(file.getvalue())
    return files


def print_pipelines(files: Sequence[bytes], rounds: int) -> None:
    """Time every pipeline in turns at each image, one thread, by processor time, and print a line for each."""
    pipelines: dict[tuple[str, str, int], Pipeline] = {
        (name, policy, crops): make(RandAugment.parse(policy) if policy else None, crops)
        for policy in ("", POLICY)
        for name, make, crops in (("Pillow", pillow, 1), ("sret_jax", ours, 1), ("sret_jax", ours, 3))
    }
    seconds = np.zeros((len(pipelines), rounds))
    for (turn, (seed, file)), (number, pipeline) in itertools.product(
        itertools.product(range(rounds), enumerate(files)), enumerate(pipelines.values())
    ):
        seconds[number, turn] += _cpu_seconds(pipeline, file, seed)
    crops = np.array([count for _, _, count in pipelines])
    rates = len(files) * crops[:, None] / seconds
    print(f"one core, {rounds} rounds in turns\n")
    print(f"{'pipeline':>8}  {'RandAugment':>20}  {'crops':>5}  {'images/s':>8}  {'min–max':>11}  to Pillow")
    for number, ((name, policy, count), rate) in enumerate(zip(pipelines, rates, strict=True)):
        ratio = np.median(rate / rates[number // 3 * 3])
        spread = f"{rate.min():.0f}–{rate.max():.0f}"
        print(f"{name:>8}  {policy or '-':>20}  {count:>5}  {np.median(rate):8.0f}  {spread:>11}  {ratio:9.2f}")


def print_workers(files: Sequence[bytes], seconds: float) -> None:
    """Time whole training batches, with threads of this process and with worker processes."""
    source = Source([{"image": file, "label": 0} for file in files], 1, "photographs")
    print(f"training batches of {len(files)}, {POLICY}, each image three times, at least {seconds:g} s a line\n")
    print(f"{'workers':>7}  {'threads':>7}  {'images/s':>8}  {'per core':>8}  main process")
    for num_workers, num_threads in ((0, 1), (0, 2), (1, 1), (2, 1)):
        batches = train_batches(
            source,
            batch_size=len(files),
            image_size=SIZE,
            seed=0,
            repeats=3,
            rand_augment=POLICY,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        # What lies ready when the clock starts is made again by the time it stops.
        for _ in range(4 + 4 * num_workers):
            next(batches)
        processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children() if worker.pid)]
        count, start, used = 0, time.perf_counter(), np.array([_processor_seconds(p) for p in processes])
        while time.perf_counter() - start < seconds:
            count += len(next(batches)["label"])
        elapsed = time.perf_counter() - start
        used = np.array([_processor_seconds(p) for p in processes]) - used
        del batches
        rate, per_core, share = count / elapsed, count / used.sum(), used[0] / used.sum()
        print(f"{num_workers or '-':>7}  {num_threads:>7}  {rate:8.0f}  {per_core:8.0f}  {share:12.0%}", flush=True)


def pillow(augment: RandAugment | None, crops: int) -> Pipeline:
    """Plain Pillow; every crop decodes the image again."""

    def crop(encoded: bytes, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        image = image.crop(random_crop_box(*image.size, rng)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        return np.asarray(augment(image, rng) if augment else image)

    return lambda encoded, seed: [crop(encoded, seed + i) for i in range(crops)]


def ours(augment: RandAugment | None, crops: int) -> Pipeline:
    """What a thread of `train_batches` does for an image and its repetitions."""

    def pipeline(encoded: bytes, seed: int) -> Sequence[np.ndarray]:
        rngs = [np.random.default_rng(seed + i) for i in range(crops)]
        images = random_crops(encoded, SIZE, rngs)
        if augment is None:
            return images
        return [np.asarray(augment(Image.fromarray(image), rng)) for image, rng in zip(images, rngs, strict=True)]

    return pipeline


def _cpu_seconds(pipeline: Pipeline, file: bytes, seed: int) -> float:
    start = time.process_time()
    pipeline(file, seed)
    return time.process_time() - start


def _processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=4.0, help="least length of a line of the second table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
