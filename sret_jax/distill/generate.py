"""The story of a set of soft labels: from a teacher and images to files that students learn from."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sret_jax.data.image_file import WHITE
from sret_jax.data.packed_labels import PackedLabels, open_soft_labels, write_packed
from sret_jax.data.pipeline import eval_batches
from sret_jax.data.shards import locked
from sret_jax.data.soft_labels import (
    LabelType,
    SoftLabels,
    SoftLabelSet,
    check_complete,
    check_keys,
    check_labels,
    labels_digest,
    write_label_file,
)
from sret_jax.data.sources import Source
from sret_jax.data.workers import MOST_THREADS, MOST_WORKERS, end_if_imported_by_worker
from sret_jax.distill.crops import Cropped, Cropper
from sret_jax.distill.labeller import Labeller
from sret_jax.distill.recipe import Recipe, check_recipe
from sret_jax.distill.units import Unit, plan_units, read_units, write_unit
from sret_jax.errors import UserError
from sret_jax.files import DamagedError, expand_local, naming, read_json, remove, replace, to_json
from sret_jax.training.build import warnings_to
from sret_jax.training.mesh import make_mesh
from sret_jax.training.teacher import Teacher, load_teachers

# Images in a file of the packed form.
_IMAGES_PER_FILE = 8192

# Of what follows here: labels of another are not continued.
_VERSION = 1

# What the result was made from, as a hash: a note in the packed form, a file in the authors' layout.
_MADE_FROM = "made_from_sha256"

# Of a teacher that is of no run: as ImageNet is evaluated.
_CROP_RATIO = 0.875

# Seconds between looks at what other processes have written.
_LOOK_EVERY = 2.0


def generate(
    recipe: Recipe,
    source: Source,
    eval_source: Source,
    out: str,
    *,
    eval_crop_ratio: float = 0.0,
    batch_size: int = 256,
    authors_layout: bool = False,
    process: int = 0,
    processes: int = 1,
    num_threads: int = 16,
    num_workers: int = 0,
    max_broken: int = 100,
    say: Callable[[str], object] = print,
    advance: Callable[[int, int], object] = lambda *_: None,
) -> Path:
    """Writes the soft labels of every image of a source.

    First the teacher is evaluated: labels of a teacher that is loaded or normalised wrongly are worth nothing. Then the
    images are shared out in units of some thousand crops. A unit is written when it is complete, to `<out>.units`,
    where the next call goes on with those that are missing. The result is the same, byte for byte, however often this
    was interrupted, and for any number of processes, on devices of one kind with the same batch size. `out` appears
    when it is complete.

    An image that does not decode gets labels without crops, and a student leaves it out, too.

    Args:
      recipe: what to make.
      source: the images to label.
      eval_source: the images to evaluate the teacher on, of the same classes.
      out: the folder to write, on a disk that all processes see.
      eval_crop_ratio: part of the shorter side that the teacher's evaluation keeps; 0 is what its own run's kept, and
        0.875 for a teacher that is of no run.
      batch_size: crops in a batch, on each device.
      authors_layout: whether to write a file for each image, as the authors' code reads it, instead of the packed form.
        Both hold the same numbers, here in float32, which that code expects.
      process: number of this process; the first waits for the others, and they for the first.
      processes: how many share the images.
      num_threads: threads that decode and crop, in each worker.
      num_workers: worker processes that do so; 0 for threads of this process.
      max_broken: how many images may be broken.
      say: called with lines for a person.
      advance: called with how many more images of this process are labelled, and how many it has to label.

    Returns:
      The folder that was written.

    Raises:
      UserError: the teacher cannot be used, images have the same key, too many are broken, the reference lacks some,
        `out` is something else, or it cannot be written.
    """
    end_if_imported_by_worker()
    check_recipe(recipe)
    target = Path(os.path.abspath(expand_local(out)))
    are_counts = 1 <= num_threads <= MOST_THREADS and 0 <= num_workers <= MOST_WORKERS
    if batch_size < 1 or not are_counts or not 0 <= eval_crop_ratio <= 1:
        raise UserError(
            f"--batch-size is {batch_size}, --threads {num_threads}, --workers {num_workers}, --eval-crop-ratio "
            f"{eval_crop_ratio}. Expected at least 1, from 1 to {MOST_THREADS}, from 0 to {MOST_WORKERS}, and a number "
            "from 0, which is the teacher's own, to 1"
        )
    label_type = LabelType.parse(recipe.label_type)
    label_type.size(source.num_classes)
    with warnings_to(say):
        teachers = load_teachers(
            recipe.teacher,
            num_classes=source.num_classes,
            default_image_size=224,
            image_size=recipe.image_size,
            mean=recipe.mean,
            std=recipe.std,
            dtype=recipe.dtype,
        )
    home = target.with_name(target.name + ".units")
    crop_ratio = eval_crop_ratio or _own_crop_ratio(teachers)
    reference = _open_reference(recipe, source)
    check_keys(source)
    made_of = {
        "version": _VERSION,
        **recipe._asdict(),
        "reference": labels_digest(reference, source) if reference else "",
        "teacher": [teacher.digest() for teacher in teachers],
        "images": source.digest(),
        "layout": "authors" if authors_layout else "packed",
    }
    if source.background != WHITE:  # labels of which nothing is noted have a white one
        made_of["background"] = source.background
    origin = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    units = plan_units(home, len(source.examples), recipe.num_crops)
    devices = jax.local_devices()
    with locked(home.with_name(f".{home.name}.lock"), target) if process == 0 else contextlib.nullcontext():
        if target.exists():
            _check_made(target, label_type, source.num_classes, origin)
            if process == 0:
                remove(home)  # what a kill may have left
            return target
        _claim(home, target, made_of, is_first=process == 0)
        mesh = make_mesh({"data": len(devices)}, batch_size * len(devices), devices)
        label = Labeller(teachers, mesh, batch_size * len(devices), label_type, recipe.temperature, say)
        if process == 0:
            _evaluate(label, eval_source, crop_ratio, max_broken, num_threads, num_workers, home, say)
        mine = [unit for unit in units[process::processes] if not unit.path.exists()]
        total = sum(len(unit.images) for unit in units[process::processes])
        advance(total - sum(len(unit.images) for unit in mine), total)
        images = Cropper(recipe, source, reference, label.image_size).of_units(mine, num_threads, num_workers)
        broken = _Broken(source.name, max_broken, say)
        for unit in mine:
            labels = _label_unit(unit, images, label, broken)
            if labels is not None:
                if authors_layout:
                    _write_files(home / "labels", labels, label_type)
                write_unit(unit, labels)
            advance(len(unit.images), total)
        broken.refuse_unread()
        if process == 0:
            _wait_until(lambda: all(unit.path.exists() for unit in units))
            if authors_layout:
                _give_name(home, target, len(source.examples), origin)
            else:
                say(f"labelled       {len(source.examples):,} images; now they are packed")
                _pack(units, target, recipe, source.num_classes, label_type, origin, max(num_workers, 1))
            remove(home)
        else:
            _wait_until(target.exists)
    return target


class _Broken:
    """Counts the images that get no crops or could not be read, and tells of each."""

    def __init__(self, source: str, most: int, say: Callable[[str], object]) -> None:
        self._source, self._most, self._say = source, most, say
        self._count, self._unread = 0, list[str]()

    def add(self, image: Cropped, number: int) -> None:
        name = image.key or f"image {number}"
        self._count += 1
        self._say(f"{name} gets no crops: {image.broken}")
        if not image.is_read:
            self._unread.append(name)
        if self._count > self._most:
            raise UserError(
                f"more than {self._most} images of {self._source} are broken, {name} last. Mend or remove them, or "
                "raise --max-broken"
            )

    def refuse_unread(self) -> None:
        """What the disk did not give may be there the next time: it is not left out for ever."""
        if self._unread:
            raise UserError(
                f"{len(self._unread)} images of {self._source} could not be read, {self._unread[0]} first. Everything "
                "else is kept: mend the disk, or the data, and run the same command again"
            )


def _label_unit(
    unit: Unit, images: Iterator[Cropped], label: Labeller, broken: _Broken
) -> dict[str, SoftLabels] | None:
    """The labels of a unit's images by their keys; of a broken one without any crops. None if some were not read."""
    shown = []
    for number in unit.images:
        image = next(images)
        label.add(image.crops)
        shown.append(image._replace(crops=image.crops[:0]))
        if image.broken:
            broken.add(image, number)
    classes, probabilities = label.take()
    if not all(image.is_read for image in shown):
        return None
    labels: dict[str, SoftLabels] = {}
    first = 0
    for image in shown:
        crops = len(image.boxes)
        kept = 0 if image.broken else crops
        own = slice(first, first + kept)
        one = SoftLabels(image.boxes[:kept], image.flips[:kept], classes[own], probabilities[own].astype(np.float16))
        if image.key in labels:
            raise UserError(f"two images have the name {image.key}. Expected names that differ: rename one of them")
        try:
            check_labels(one, label.num_classes)
        except ValueError as error:
            raise UserError(
                f"the teacher says of {image.key} what no soft label can be: {error}. Look at its weights, and at "
                "--mean and --std"
            ) from error
        labels[image.key] = one
        first += crops
    return labels


def _own_crop_ratio(teachers: Sequence[Teacher]) -> float:
    """What the teachers are evaluated on, as their runs did."""
    ratios = {teacher.eval_crop_ratio or _CROP_RATIO: teacher.name for teacher in teachers}
    if len(ratios) > 1:
        each = ", ".join(f"{teacher.name}: {teacher.eval_crop_ratio or _CROP_RATIO:g}" for teacher in teachers)
        raise UserError(
            f"the teachers are not evaluated on the same part of an image ({each}). Give the part on which they are to "
            "be evaluated together, --eval-crop-ratio"
        )
    return next(iter(ratios))


def _open_reference(recipe: Recipe, source: Source) -> SoftLabelSet | None:
    if not recipe.reference:
        return None
    reference = open_soft_labels(recipe.reference, recipe.label_type, source.num_classes)
    check_complete(reference, source, recipe.num_crops)
    return reference


def _check_made(target: Path, label_type: LabelType, num_classes: int, origin: str) -> None:
    """Refuses what is in the place of the result and is not it."""
    with naming(target):
        note = target / _MADE_FROM
        found = note.read_text("ascii", "replace") if note.exists() else ""
    if not found:
        with contextlib.suppress(UserError):
            found = str(PackedLabels(target, label_type, num_classes).notes.get(_MADE_FROM))
    if found != origin:
        raise UserError(
            f"{target} is something else, or soft labels of another making. Expected nothing, or what this command "
            "makes: give another name, or delete it"
        )


def _claim(home: Path, target: Path, made_of: Mapping[str, Any], *, is_first: bool) -> None:
    """Makes the folder of units, or sees that what it holds is of the same making."""
    wanted = json.loads(json.dumps(made_of))
    note = home / "made_of.json"
    if is_first and not note.exists():
        with naming(home):
            home.mkdir(parents=True, exist_ok=True)
        replace(note, to_json(wanted, indent=1) + "\n")
    _wait_until(lambda: note.exists() or target.exists())
    if target.exists():
        return  # the first has nothing left to do
    try:
        there = read_json(note)
    except DamagedError as error:
        raise UserError(f"{error}. Expected a sound disk: give another name, or delete {home}") from error
    if differ := sorted(name for name in wanted.keys() | there.keys() if wanted.get(name) != there.get(name)):
        raise UserError(
            f"{home} holds a part of soft labels of another making: there {differ[0]} is {there.get(differ[0])!r}, "
            f"here {wanted.get(differ[0])!r}"
            + (f"; {', '.join(differ[1:])} differ, too" if differ[1:] else "")
            + ". Give another name, or delete that folder"
        )


def _evaluate(
    label: Labeller,
    source: Source,
    crop_ratio: float,
    max_broken: int,
    num_threads: int,
    num_workers: int,
    home: Path,
    say: Callable[[str], object],
) -> None:
    """Says how accurate the teacher is; not computed again when the same command goes on, for that takes its time."""
    note = home / "teacher.json"
    how = {"images": source.digest(), "crop_ratio": crop_ratio, "size": label.image_size}
    how["background"] = list(source.background)
    try:
        known = read_json(note) if note.exists() else {}
    except DamagedError:
        known = {}
    is_known = isinstance(known.get("accuracy"), float) and 0 <= known["accuracy"] <= 1
    if not is_known or {name: known.get(name) for name in how} != how:
        batches = eval_batches(
            source,
            batch_size=label.batch_size,
            image_size=label.image_size,
            crop_ratio=crop_ratio,
            max_broken=max_broken,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        hits, examples = 0, 0
        for batch in batches:
            hits += label.hits(batch)
            examples += int(batch["mask"].sum())
        known = {**how, "accuracy": hits / examples}
        replace(note, to_json(known) + "\n")
    size = label.image_size
    say(
        f"teacher        {100 * known['accuracy']:.2f} % of {source.name} right, at {size} × {size} pixels, "
        f"crop ratio {crop_ratio:g}"
    )


def _write_files(folder: Path, labels: Mapping[str, SoftLabels], label_type: LabelType) -> None:
    """A file for each image; in threads, because each waits for the disk."""

    def write(key: str) -> None:
        path = folder / f"{key}.tar"
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_label_file(path, labels[key], label_type, dtype=np.float32)

    with concurrent.futures.ThreadPoolExecutor() as executor:
        collections.deque(executor.map(write, labels), maxlen=0)


def _give_name(home: Path, target: Path, images: int, origin: str) -> None:
    """The files of the authors' layout become the result."""
    folder = home / "labels"
    with naming(folder):
        count = sum(name.endswith(".tar") for _, _, names in os.walk(folder) for name in names)
    if count != images:
        raise UserError(
            f"{folder} holds the soft labels of {count} images, expected those of {images}: some were taken away, or "
            f"have the same names. Delete {home}, and run the same command again"
        )
    replace(folder / _MADE_FROM, origin)
    os.sync()  # or a power cut could leave the name without the content
    with naming(target):
        os.replace(folder, target)


def _pack(
    units: list[Unit],
    target: Path,
    recipe: Recipe,
    num_classes: int,
    label_type: LabelType,
    origin: str,
    workers: int,
) -> None:
    per_file = max(_IMAGES_PER_FILE // len(units[0].images), 1)
    notes: dict[str, str | int | float] = {
        "teacher": recipe.teacher,
        "temperature": recipe.temperature,
        "num_crops": recipe.num_crops,
    }
    write_packed(
        target,
        [
            functools.partial(read_units, [unit.path for unit in units[start : start + per_file]])
            for start in range(0, len(units), per_file)
        ],
        label_type=label_type,
        num_classes=num_classes,
        notes={**notes, _MADE_FROM: origin},
        origin=origin,
        workers=workers,
        advance=lambda *_: None,
    )


def _wait_until(is_there: Callable[[], bool]) -> None:
    while not is_there():
        time.sleep(_LOOK_EVERY)
