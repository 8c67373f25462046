"""What distillation costs: a train step from soft labels (FKD) or with a teacher, and the input that soft labels need.

    python benchmarks/distill.py
    python benchmarks/distill.py --part step --image-size 64

The train step needs only jax, flax, optax and numpy; the input also needs the package's other requirements, and
scikit-image for its photographs. benchmarks/README.md explains the columns.
"""

import argparse
import contextlib
import dataclasses
import functools
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from sret_jax import SReT, create_model
from sret_jax.data.augment import MEAN, STD, Augmentation
from sret_jax.training.mesh import make_mesh, put_batch
from sret_jax.training.step import Distillation, init_state, make_train_step
from sret_jax.training.teacher import Teacher, place_teachers

if TYPE_CHECKING:
    from benchmarks import measure

    # Grain and TFDS need not be there for the train step.
    from sret_jax.data.soft_labels import SoftLabels, SoftLabelSet
    from sret_jax.data.sources import Examples, Source
else:
    import measure  # a program's own folder is on the path

NUM_CLASSES = 1000
K = 5
LABEL_TYPE = f"marginal_smoothing_k{K}"
STORED_CROPS = 500
SIZE = 224

# Batches of which the time is taken in a round.
BATCHES = 4

# As ImageNet's. Grain's shuffle takes a millisecond an image of fewer than a few thousand.
LENGTH = 1_281_167
EPOCHS = 300

MOST_STEP = 1.05
MOST_INPUT = 0.6

MIXED = Augmentation(mixup=0.8, cutmix=1.0)
SUPERVISED = dataclasses.replace(MIXED, label_smoothing=0.1)
FKD = dataclasses.replace(MIXED, partner="permuted", soft_labels=LABEL_TYPE.rpartition("_")[0])


class Repeated:
    """A few examples as many."""

    def __init__(self, examples: "Examples") -> None:
        self._examples = examples

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        return self._examples[index % len(self._examples)]


class Contender(NamedTuple):
    """A line of a table; the first is what the others are compared with."""

    labels: tuple[str, ...]
    seconds: measure.Measure


def main() -> None:
    """Print a table for each part, and at the end what distillation costs at most."""
    args = _parse_args()
    parts = {"step": time_steps, "input": time_input}
    print("\n".join([parts[part](args) for part in args.part]))


def time_steps(args: argparse.Namespace) -> str:
    """Train steps of one network on the same images: supervised, from soft labels, and with a teacher in the loop."""
    jax.config.update("jax_enable_compilation_cache", False)  # nothing is left behind
    model = create_model(args.model, **({"image_size": args.image_size} if args.image_size else {}))
    mesh = make_mesh({"data": -1}, args.batch_size)
    batch, soft_batch = ({**put_batch(one, mesh)} for one in _random_batches(model, args.batch_size))
    variables = init_state(model, measure.optimizer(), seed=1, mesh=mesh).variables
    teacher = Teacher(args.model, model.apply, variables, model.image_size, MEAN, STD, model.num_classes)
    in_loop = Distillation((teacher,))
    contenders = [
        Contender(("labels",), _stepper(model, args, SUPERVISED, batch, Distillation())),
        Contender(("soft labels",), _stepper(model, args, FKD, soft_batch, Distillation())),
        Contender(("teacher",), _stepper(model, args, MIXED, batch, in_loop)),
    ]
    measure.print_device()
    print(
        f"train step of {args.model}, {args.batch_size} images of {model.image_size} pixels, {model.num_classes} "
        f"classes, float32; {args.rounds} rounds in turns, every line at least {args.seconds:g} s in each\n"
    )
    seconds = measure.in_turns([contender.seconds for contender in contenders], args.rounds)
    _print_table(["learns from"], "s a step", contenders, seconds, digits=3)
    print(f"\na step with a teacher to one from soft labels: {np.median(seconds[2] / seconds[1]):.3f}\n")
    ratio = np.median(seconds[1] / seconds[0])
    return f"a step from soft labels to a supervised one: {ratio:.3f} (at most {MOST_STEP})"


def time_input(args: argparse.Namespace) -> str:
    """`train_batches` over the same photographs, with one and with more crops of each, by processor time."""
    from input import jpegs  # type: ignore[import-not-found]  # its folder is on the path, as this program's own

    from sret_jax.data.packed_labels import open_soft_labels
    from sret_jax.data.sources import open_source

    with tempfile.TemporaryDirectory() as folder:
        images, files, packed = (Path(folder, name) for name in ("images", "files", "packed"))
        for number, encoded in enumerate(jpegs(args.images)):
            path = images / "train" / f"n{number % 10:08d}" / f"n{number % 10:08d}_{number}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded)
        source = open_source("folder", "train", str(images))
        write_soft_labels(source, files, packed)
        repeated = dataclasses.replace(source, examples=Repeated(source.examples))
        in_form = {path.name: open_soft_labels(str(path), LABEL_TYPE, NUM_CLASSES) for path in (packed, files)}
        contenders = [
            Contender((name, str(crops)), functools.partial(_seconds_per_crop, repeated, labels, crops, args))
            for name, labels in in_form.items()
            for crops in (1, args.crops)
        ]
        contenders.append(Contender(("none", "1"), functools.partial(_seconds_per_crop, repeated, None, 1, args)))
        print(f"{args.images} JPEGs of 500 × 375 pixels in a folder; {platform.machine()}")
        print(
            f"batches of as many crops of {SIZE} pixels, num_threads={args.threads}; {LABEL_TYPE}, {STORED_CROPS} "
            f"crops an image; processor time, {args.rounds} rounds in turns\n"
        )
        seconds = 1000 * measure.in_turns([contender.seconds for contender in contenders], args.rounds)
    _print_table(["soft labels", "crops"], "ms a crop", contenders, seconds, digits=2)
    print()
    ratio = np.median(seconds[1] / seconds[0])
    return f"a crop of {args.crops} from packed soft labels to a crop of 1: {ratio:.3f} (at most {MOST_INPUT})"


def write_soft_labels(source: "Source", files: Path, packed: Path) -> None:
    """Random soft labels for every image, in the authors' layout and in our packed form."""
    from sret_jax.data.decode import random_boxes
    from sret_jax.data.packed_labels import write_packed
    from sret_jax.data.soft_labels import LabelType, SoftLabels, write_label_file

    label_type, rng = LabelType.parse(LABEL_TYPE), np.random.default_rng(0)
    for example in map(source.examples.__getitem__, range(len(source.examples))):
        boxes = random_boxes(example["image"], STORED_CROPS, rng, (0.08, 1.0), (3 / 4, 4 / 3))
        classes = rng.random((STORED_CROPS, NUM_CLASSES)).argpartition(K, axis=1)[:, :K].astype(np.int32)
        probabilities = rng.dirichlet(np.full(K + 1, 0.5), STORED_CROPS)[:, :K].astype(np.float16)
        path = files / f"{example['key']}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label_file(path, SoftLabels(boxes, rng.random(STORED_CROPS) < 0.5, classes, probabilities), label_type)
    write_packed(
        packed,
        [functools.partial(_read_files, str(files))],
        label_type=label_type,
        num_classes=NUM_CLASSES,
        notes={},
        origin="benchmark",
        workers=1,
        advance=lambda more, all_files: None,
    )


def _read_files(folder: str) -> "Iterator[tuple[str, SoftLabels]]":
    from sret_jax.data.soft_labels import FolderLabels, LabelType

    labels = FolderLabels(folder, LabelType.parse(LABEL_TYPE), NUM_CLASSES)
    keys = labels.keys()
    return ((key, labels.read(key)) for key in keys)


def _stepper(
    model: SReT,
    args: argparse.Namespace,
    augmentation: Augmentation,
    batch: Mapping[str, jax.Array],
    distillation: Distillation,
) -> measure.Measure:
    """Compiles a train step and gives what times it."""
    mesh = make_mesh({"data": -1}, args.batch_size)
    step = make_train_step(
        model, measure.optimizer(), measure.schedule(), augmentation, seed=0, mesh=mesh, distillation=distillation
    )
    state = init_state(model, measure.optimizer(), seed=0, mesh=mesh)
    frozen = [place_teachers(distillation.teachers, mesh)] if distillation.teachers else []
    compiled = step.lower(state, batch, *frozen).compile()  # type: ignore[attr-defined]

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = compiled(state, batch, *frozen)
        jax.block_until_ready(state)

    run(1)
    return measure.timer(run, args.seconds)


def _random_batches(model: SReT, batch_size: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """This host's part of a batch of noise, with labels and with soft labels."""
    rng, count = np.random.default_rng(0), batch_size // jax.process_count()
    image = rng.integers(0, 256, (count, model.image_size, model.image_size, 3), np.uint8)
    classes = np.array([rng.choice(model.num_classes, K, replace=False) for _ in range(count)], np.int32)
    probabilities = rng.dirichlet(np.full(K + 1, 0.5), count)[:, :K].astype(np.float16)
    return {"image": image, "label": classes[:, 0]}, {
        "image": image,
        "classes": classes,
        "probabilities": probabilities,
    }


def _seconds_per_crop(
    source: "Source", soft_labels: "SoftLabelSet | None", crops: int, args: argparse.Namespace, number: int
) -> float:
    """Processor time of all threads for a crop, while batches come one after the other."""
    from sret_jax.data.passes import fkd_passes
    from sret_jax.data.pipeline import train_batches

    batches = train_batches(
        source,
        batch_size=args.images,
        image_size=SIZE,
        seed=number,
        soft_labels=soft_labels,
        passes=fkd_passes(EPOCHS, crops, warmup_epochs=0),
        num_threads=args.threads,
    )
    with contextlib.closing(batches):  # type: ignore[type-var]
        next(batches)  # when the clock starts, the threads are as far ahead as when it stops
        start = time.process_time()
        for _ in range(BATCHES):
            next(batches)
        return (time.process_time() - start) / (BATCHES * args.images)


def _print_table(
    header: list[str], unit: str, contenders: Sequence[Contender], values: np.ndarray, digits: int
) -> None:
    """Over the rounds: median, least and most, and median, lower and upper quartile of the ratio to the first line."""
    lines = []
    for contender, of_rounds in zip(contenders, values, strict=True):
        low, middle, high = np.percentile(of_rounds / values[0], (25, 50, 75))
        spread = measure.median_spread(of_rounds, digits)
        lines.append([*contender.labels, *spread, f"{middle:.3f}", f"{low:.3f}–{high:.3f}"])
    measure.print_aligned([*header, unit, "min–max", "to first", "quartiles"], lines)


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["step", "input"], choices=["step", "input"])
    parser.add_argument("--rounds", type=measure.positive, default=15)
    step = parser.add_argument_group("train step")
    step.add_argument("--model", default="sret_t", help="one of sret_jax.list_models(); the teacher is another of it")
    step.add_argument("--image-size", type=measure.positive, help="in pixels; default: the model's own")
    step.add_argument("--batch-size", type=measure.positive, default=8, help="images, over all devices")
    step.add_argument("--seconds", type=float, default=1.0, help="least length of a line in a round")
    data = parser.add_argument_group("input")
    data.add_argument("--images", type=measure.positive, default=96, help="photographs, and crops in a batch")
    data.add_argument("--crops", type=measure.positive, default=4, help="of an image, one behind the other")
    data.add_argument("--threads", type=measure.positive, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    measure.run_program(main)
