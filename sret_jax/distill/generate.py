"""The story of a set of soft labels: from a teacher and images to files that students learn from."""

import collections
import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sret_jax.data.packed_labels import PackedLabels, open_soft_labels, write_packed
from sret_jax.data.pipeline import eval_batches
from sret_jax.data.shards import locked
from sret_jax.data.soft_labels import LabelType, SoftLabels, SoftLabelSet, check_complete, write_label_file
from sret_jax.data.sources import Source
from sret_jax.distill.crops import Cropped, Cropper
from sret_jax.distill.labeller import Labeller
from sret_jax.distill.recipe import Recipe, check_recipe
from sret_jax.distill.units import Unit, plan_units, read_units, write_unit
from sret_jax.errors import UserError
from sret_jax.files import naming, remove, replace
from sret_jax.training.build import warnings_to
from sret_jax.training.mesh import make_mesh
from sret_jax.training.teacher import Teacher, load_teachers

# Images in a file of the packed form.
_IMAGES_PER_FILE = 8192

# What the result was made from, as a hash: a note in the packed form, a file in the authors' layout.
_MADE_FROM = "made_from_sha256"

# Seconds between looks at what other processes have written.
_LOOK_EVERY = 2.0


def generate(
    recipe: Recipe,
    source: Source,
    eval_source: Source,
    out: str,
    *,
    eval_crop_ratio: float = 0.875,
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
      eval_crop_ratio: part of the shorter side that the teacher's evaluation keeps.
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
    check_recipe(recipe)
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
    target = Path(os.path.abspath(os.path.expanduser(out)))
    home = target.with_name(target.name + ".units")
    reference = _open_reference(recipe, source)
    _check_keys(source)
    made_of = {
        **recipe._asdict(),
        "reference": reference.digest() if reference else "",
        "teacher": {teacher.name: _hash_of(teacher) for teacher in teachers},
        "images": source.digest(),
        "layout": "authors" if authors_layout else "packed",
    }
    origin = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    units = plan_units(home, len(source.examples), recipe.num_crops)
    devices = jax.local_devices()
    with locked(home.with_name(f".{home.name}.lock"), target) if process == 0 else contextlib.nullcontext():
        if target.exists():
            _check_made(target, label_type, source.num_classes, origin)
            remove(home)  # what a kill may have left
            return target
        _claim(home, made_of, is_first=process == 0)
        mesh = make_mesh({"data": len(devices)}, batch_size * len(devices), devices)
        label = Labeller(teachers, mesh, batch_size * len(devices), label_type, recipe.temperature)
        if process == 0:
            _evaluate(label, eval_source, eval_crop_ratio, num_threads, num_workers, home, say)
        mine = [unit for unit in units[process::processes] if not unit.path.exists()]
        total = sum(len(unit.images) for unit in units[process::processes])
        advance(total - sum(len(unit.images) for unit in mine), total)
        images = Cropper(recipe, source, reference, label.image_size).of_units(mine, num_threads, num_workers)
        broken = _Broken(source.name, max_broken, say)
        for unit in mine:
            labels = _label_unit(unit, images, label, broken)
            if authors_layout:
                _write_files(home / "labels", labels, label_type)
            write_unit(unit, labels)
            advance(len(unit.images), total)
        if process == 0:
            _wait_until(lambda: all(unit.path.exists() for unit in units))
            if authors_layout:
                _give_name(home, target, origin)
            else:
                say(f"labelled       {len(source.examples):,} images; now they are packed")
                _pack(units, target, recipe, source.num_classes, label_type, origin)
            remove(home)
        else:
            _wait_until(target.exists)
    return target


class _Broken:
    """Counts the images that get no crops, and tells of each."""

    def __init__(self, source: str, most: int, say: Callable[[str], object]) -> None:
        self._source, self._most, self._say, self._count = source, most, say, 0

    def add(self, name: str, reason: str) -> None:
        self._count += 1
        self._say(f"{name} gets no crops: {reason}")
        if self._count > self._most:
            raise UserError(
                f"more than {self._most} images of {self._source} are broken, {name} last. Mend or remove them, or "
                "raise --max-broken"
            )


def _label_unit(unit: Unit, images: Iterator[Cropped], label: Labeller, broken: _Broken) -> dict[str, SoftLabels]:
    """The labels of a unit's images by their keys; of a broken one without any crops."""
    shown = []
    for index in unit.images:
        image = next(images)
        label.add(image.crops)
        shown.append(image._replace(crops=image.crops[:0]))
        if image.broken:
            broken.add(image.key or f"image {index}", image.broken)
    classes, probabilities = label.take()
    labels, first = {}, 0
    for image in shown:
        crops = len(image.boxes)
        kept = 0 if image.broken else crops
        labels[image.key] = SoftLabels(
            image.boxes[:kept],
            image.flips[:kept],
            classes[first : first + kept],
            probabilities[first : first + kept].astype(np.float16),
        )
        first += crops
    labels.pop("", None)
    return labels


def _open_reference(recipe: Recipe, source: Source) -> SoftLabelSet | None:
    if not recipe.reference:
        return None
    reference = open_soft_labels(recipe.reference, recipe.label_type, source.num_classes)
    check_complete(reference, source)
    return reference


def _check_keys(source: Source) -> None:
    name_all = getattr(source.examples, "keys", None)
    counted = collections.Counter(name_all() if name_all else ())
    if twice := [key for key, count in counted.items() if count > 1]:
        raise UserError(
            f"{source.name} has several images whose soft labels would be called {twice[0]}"
            + (f", and {len(twice) - 1} other such names" if twice[1:] else "")
            + ". Expected names that differ before their first dot, as the authors' layout wants them: rename some"
        )


def _hash_of(teacher: Teacher) -> str:
    """Of what the teacher computes with; its program is known by its name."""
    digest = hashlib.sha256(repr((teacher.image_size, teacher.mean, teacher.std)).encode())
    for leaf in jax.tree.leaves(teacher.variables):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _check_made(target: Path, label_type: LabelType, num_classes: int, origin: str) -> None:
    """Refuses what is in the place of the result and is not it."""
    with naming(target):
        note = target / _MADE_FROM
        found = note.read_text(encoding="utf-8") if note.exists() else ""
    if not found:
        with contextlib.suppress(UserError):
            found = str(PackedLabels(target, label_type, num_classes).notes.get(_MADE_FROM))
    if found != origin:
        raise UserError(
            f"{target} is something else, or soft labels of another making. Expected nothing, or what this command "
            "makes: give another name, or delete it"
        )


def _claim(home: Path, made_of: Mapping[str, Any], *, is_first: bool) -> None:
    """Makes the folder of units, or sees that what it holds is of the same making."""
    wanted = json.loads(json.dumps(made_of))
    note = home / "made_of.json"
    if is_first and not note.exists():
        with naming(home):
            home.mkdir(parents=True, exist_ok=True)
        replace(note, json.dumps(wanted, indent=1) + "\n")
    _wait_until(note.exists)
    with naming(note):
        there = json.loads(note.read_text(encoding="utf-8"))
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
    num_threads: int,
    num_workers: int,
    home: Path,
    say: Callable[[str], object],
) -> None:
    """Says how accurate the teacher is; once for each making, for that takes its time."""
    note = home / "teacher.json"
    if note.exists():
        with naming(note):
            accuracy = json.loads(note.read_text(encoding="utf-8"))["accuracy"]
    else:
        batches = eval_batches(
            source,
            batch_size=label.batch_size,
            image_size=label.image_size,
            crop_ratio=crop_ratio,
            num_threads=num_threads,
            num_workers=num_workers,
        )
        hits, examples = 0, 0
        for batch in batches:
            hits += label.hits(batch)
            examples += int(batch["mask"].sum())
        accuracy = hits / examples
        replace(note, json.dumps({"accuracy": accuracy}) + "\n")
    size = label.image_size
    say(f"teacher        {100 * accuracy:.2f} % of {source.name} right, at {size} × {size} pixels")


def _write_files(folder: Path, labels: Mapping[str, SoftLabels], label_type: LabelType) -> None:
    for key, one in labels.items():
        path = folder / f"{key}.tar"
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_label_file(path, one, label_type, dtype=np.float32)


def _give_name(home: Path, target: Path, origin: str) -> None:
    """The files of the authors' layout become the result."""
    replace(home / "labels" / _MADE_FROM, origin)
    os.sync()  # or a power cut could leave the name without the content
    with naming(target):
        os.replace(home / "labels", target)


def _pack(
    units: list[Unit], target: Path, recipe: Recipe, num_classes: int, label_type: LabelType, origin: str
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
        workers=1,
        advance=lambda *_: None,
    )


def _wait_until(is_there: Callable[[], bool]) -> None:
    while not is_there():
        time.sleep(_LOOK_EVERY)
