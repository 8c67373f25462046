"""The story of a set of soft labels: from a teacher and images to files that students learn from."""

import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from sret_jax.data.augment import MEAN, STD, normalize
from sret_jax.data.decode import random_boxes, stored_crops
from sret_jax.data.packed_labels import PackedLabels, open_soft_labels, write_packed
from sret_jax.data.pipeline import eval_batches
from sret_jax.data.read_ahead import Example, read_ahead
from sret_jax.data.reading import UnreadableError
from sret_jax.data.shards import locked
from sret_jax.data.soft_labels import LabelType, SoftLabels, SoftLabelSet, check_complete, write_label_file
from sret_jax.data.sources import Source
from sret_jax.distill.units import Unit, plan_units, read_units, write_unit
from sret_jax.errors import UserError
from sret_jax.files import naming, remove, replace
from sret_jax.training.build import warnings_to
from sret_jax.training.mesh import make_mesh, replicated, split_batch
from sret_jax.training.teacher import Teacher, load_teachers, place_teachers, teacher_probabilities

# Images in a file of the packed form.
_IMAGES_PER_FILE = 8192

# What the result was made from, as a hash: a note in the packed form, a file in the authors' layout.
_MADE_FROM = "made_from_sha256"

# How many batches the host is ahead of the devices.
_BATCHES_AHEAD = 2

# Seconds between looks at what other processes have written.
_LOOK_EVERY = 2.0


class Recipe(NamedTuple):
    """What decides on a set of soft labels, beside the images.

    Attributes:
      teacher: as `load_teachers` takes it; several average their probabilities.
      num_crops: of each image.
      label_type: how much of the teacher's distribution is kept.
      temperature: that its logits are divided by.
      image_size: of its input; 0 is its own, and for a function 224.
      mean: that a function's input is normalised with.
      std: likewise.
      dtype: of its weights and computation, `float32` or `bfloat16`.
      crop_area: smallest and largest area of a crop as a part of the image's.
      crop_aspect: smallest and largest width / height of a crop.
      flip: probability of a crop to be mirrored left to right.
      seed: decides on crops and flips; together with an image's key, so that they are the same in any order.
      reference: a folder of soft labels of the same type, whose crops and flips are taken instead; empty is none.
    """

    teacher: str
    num_crops: int = 500
    label_type: str = "marginal_smoothing_k5"
    temperature: float = 1.0
    image_size: int = 0
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    dtype: str = "float32"
    crop_area: tuple[float, float] = (0.08, 0.936)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    seed: int = 0
    reference: str = ""


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
    _check(recipe, batch_size)
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
        label = _Labeller(teachers, mesh, batch_size * len(devices), label_type, recipe.temperature)
        if process == 0:
            _evaluate(label, eval_source, eval_crop_ratio, num_threads, num_workers, home, say)
        mine = [unit for unit in units[process::processes] if not unit.path.exists()]
        total = sum(len(unit.images) for unit in units[process::processes])
        advance(total - sum(len(unit.images) for unit in mine), total)
        crop = _Cropper(recipe, source, reference, label.image_size)
        broken: dict[str, str] = {}
        for unit, labels in _labelled(mine, crop, label, num_threads, num_workers, broken, max_broken, say):
            if authors_layout:
                _write_files(home / "labels", labels, label_type)
            write_unit(unit, labels)
            advance(len(unit.images), total)
        if process == 0:
            _wait_until(lambda: all(unit.path.exists() for unit in units))
            if authors_layout:
                _give_name(home, target, origin)
            else:
                _pack(units, target, recipe, source.num_classes, label_type, origin)
            remove(home)
        else:
            _wait_until(target.exists)
    return target


class _Labeller:
    """The teachers on the devices: from crops to what is kept of their probabilities."""

    def __init__(
        self, teachers: tuple[Teacher, ...], mesh: Mesh, batch_size: int, label_type: LabelType, temperature: float
    ) -> None:
        self.image_size = max(teacher.image_size for teacher in teachers)
        self.batch_size = batch_size
        self.num_classes = teachers[0].num_classes
        self.k = label_type.size(self.num_classes)
        self._split = split_batch(mesh)
        self._variables = place_teachers(teachers, mesh)
        whole = replicated(mesh)

        def probabilities(variables: Any, images: jax.Array) -> jax.Array:
            variables = jax.lax.with_sharding_constraint(variables, whole)
            return teacher_probabilities(teachers, variables, normalize(images), temperature)

        def labels(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            every = probabilities(variables, images)
            if label_type.kind == "ori":
                classes = jax.lax.broadcasted_iota(np.int32, every.shape, 1)
                return classes, every
            kept, classes = jax.lax.top_k(every, self.k)
            return classes, jax.numpy.ones_like(kept) if label_type.kind == "hard" else kept

        def hits(variables: Any, images: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
            return ((probabilities(variables, images).argmax(axis=1) == labels) & mask).sum()

        self._labels, self._hits = jax.jit(labels), jax.jit(hits)

    def labels(self, images: np.ndarray) -> tuple[jax.Array, jax.Array]:
        """Classes int32 and probabilities float32, (batch, k), of uint8 images; does not wait for them."""
        return self._labels(self._variables, jax.device_put(images, self._split))

    def hits(self, batch: Mapping[str, np.ndarray]) -> int:
        """How many examples of a batch the teacher is right about."""
        arrays = (jax.device_put(batch[name], self._split) for name in ("image", "label", "mask"))
        return int(self._hits(self._variables, *arrays))


class _Cropper(NamedTuple):
    """From an image's number to all its crops; what worker processes get a copy of."""

    recipe: Recipe
    source: Source
    reference: SoftLabelSet | None
    image_size: int

    def __call__(self, images: Iterable[int]) -> list[Example]:
        return [self._example(index) for index in images]

    def _example(self, index: int) -> Example:
        # What cannot be labelled has no crops, but a key where it can be read.
        key, broken, refused = "", "", ""
        crops = np.zeros((self.recipe.num_crops, self.image_size, self.image_size, 3), np.uint8)
        boxes = np.zeros((self.recipe.num_crops, 4), np.float16)
        flips = np.zeros(self.recipe.num_crops, np.bool_)
        try:
            example = self.source.examples[index]
            key = example["key"]
            boxes, flips = self._boxes_and_flips(key, example["image"])
            crops = np.stack(stored_crops(example["image"], self.image_size, boxes, flips, bicubic=True))
        except UserError as error:
            refused = str(error)
        except UnreadableError as error:
            broken = f"it cannot be read: {error}"
        except Exception as error:  # what is raised for broken bytes depends on the format and the damage
            broken = f"it does not decode: {error}"
        target = {"boxes": boxes, "flips": flips, "key": np.array(key, np.object_)}
        return Example(crops, target, not broken, [(index, broken)] if broken else [], refused)

    def _boxes_and_flips(self, key: str, encoded: Any) -> tuple[np.ndarray, np.ndarray]:
        num_crops = self.recipe.num_crops
        if self.reference is not None:
            given = self.reference.read(key)
            if len(given.boxes) < num_crops:
                raise UserError(
                    f"{self.recipe.reference} holds {len(given.boxes)} crops of {key}, but {num_crops} are asked for: "
                    "lower --num-crops"
                )
            return given.boxes[:num_crops].astype(np.float16), given.flips[:num_crops]
        of_key = int.from_bytes(hashlib.blake2b(os.fsencode(key), digest_size=8).digest(), "big")
        rng = np.random.default_rng((self.recipe.seed, of_key))
        boxes = random_boxes(encoded, num_crops, rng, self.recipe.crop_area, self.recipe.crop_aspect)
        return boxes, rng.random(num_crops) < self.recipe.flip


def _labelled(
    units: list[Unit],
    crop: _Cropper,
    label: _Labeller,
    num_threads: int,
    num_workers: int,
    broken: dict[str, str],
    max_broken: int,
    say: Callable[[str], object],
) -> Iterator[tuple[Unit, dict[str, SoftLabels]]]:
    """The labels of each unit. The crops of a unit fill batches of their own, whatever was labelled before."""
    images = _images(units, crop, num_threads, num_workers)
    for unit in units:
        shown = []
        pieces: list[np.ndarray] = []
        results: list[tuple[jax.Array, jax.Array]] = []
        waiting, count = 0, 0
        for index in unit.images:
            image = next(images)
            if image["refused"]:
                raise UserError(image["refused"])
            for _, reason in image["broken"]:
                name = str(image["key"][0]) or f"image {index} of {crop.source.name}"
                broken[name] = reason
                say(f"{name} gets no crops: {reason}")
                if len(broken) > max_broken:
                    raise UserError(
                        f"more than {max_broken} images of {crop.source.name} are broken, {name} last. Mend or remove "
                        "them, or raise --max-broken"
                    )
            shown.append((str(image["key"][0]), image["boxes"][0], image["flips"][0], bool(image["mask"][0])))
            pieces.append(image["image"][0])
            waiting += len(pieces[-1])
            while waiting >= label.batch_size:
                batch, pieces = _cut(pieces, label.batch_size)
                waiting -= label.batch_size
                results.append(label.labels(batch))
                count += 1
                if len(results) > _BATCHES_AHEAD:
                    jax.block_until_ready(results[-1 - _BATCHES_AHEAD])
        if waiting:
            rest = np.concatenate(pieces)
            padding = np.zeros((label.batch_size - waiting, *rest.shape[1:]), np.uint8)
            results.append(label.labels(np.concatenate([rest, padding])))
        classes, probabilities = (np.concatenate(parts) for parts in zip(*jax.device_get(results), strict=True))
        labels = {}
        for number, (key, boxes, flips, is_whole) in enumerate(shown):
            own = slice(number * len(boxes), (number + 1) * len(boxes) if is_whole else number * len(boxes))
            kept = slice(None) if is_whole else slice(0)
            if key:
                labels[key] = SoftLabels(boxes[kept], flips[kept], classes[own], probabilities[own].astype(np.float16))
        yield unit, labels


def _images(units: list[Unit], crop: _Cropper, num_threads: int, num_workers: int) -> Iterator[Mapping[str, Any]]:
    """All crops of one image after the other, as `read_ahead` gives batches of one."""
    order = [index for unit in units for index in unit.images]
    if not order:
        return
    batches = read_ahead(
        functools.partial(_load, crop=crop, order=order),
        batch_size=1,
        rows=None,
        num_batches=len(order),
        example_bytes=crop.recipe.num_crops * crop.image_size**2 * 3,
        num_threads=num_threads,
        num_workers=num_workers,
    )
    try:
        yield from batches
    finally:
        batches.close()


def _load(positions: Iterable[int], *, crop: _Cropper, order: list[int]) -> list[Example]:
    return crop(order[position] for position in positions)


def _cut(pieces: list[np.ndarray], rows: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The first rows of several arrays, and the arrays that are left."""
    taken = []
    while rows:
        piece = pieces.pop(0)
        taken.append(piece[:rows])
        if len(piece) > rows:
            pieces.insert(0, piece[rows:])
        rows -= len(taken[-1])
    return np.concatenate(taken), pieces


def _check(recipe: Recipe, batch_size: int) -> None:
    areas, aspects = recipe.crop_area, recipe.crop_aspect
    wrong = {
        f"--num-crops is {recipe.num_crops}, expected at least 1": recipe.num_crops < 1,
        f"--batch-size is {batch_size}, expected at least 1": batch_size < 1,
        f"--temperature is {recipe.temperature}, expected a number above 0": not 0 < recipe.temperature < math.inf,
        f"--flip is {recipe.flip}, expected a probability, 0 to 1": not 0 <= recipe.flip <= 1,
        f"--seed is {recipe.seed}, expected at least 0": recipe.seed < 0,
        f"--image-size is {recipe.image_size}, expected at least 0": recipe.image_size < 0,
        f"--std is {recipe.std}, expected numbers above 0": not min(recipe.std) > 0,
        f"--crop-area is {areas}, expected 0 < low <= high <= 1": not 0 < areas[0] <= areas[1] <= 1,
        f"--crop-aspect is {aspects}, expected 0 < low <= high": not 0 < aspects[0] <= aspects[1] < math.inf,
    }
    if problems := [problem for problem, is_wrong in wrong.items() if is_wrong]:
        raise UserError("\n".join(problems))


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
    label: _Labeller,
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
