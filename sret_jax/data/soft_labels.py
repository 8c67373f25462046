"""Soft labels that a teacher gave in advance, with the crops that it saw (FKD: Shen and Xing, ECCV 2022)."""

import collections
import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from sret_jax.data.reading import UnreadableError, read_patiently
from sret_jax.data.sources import Source
from sret_jax.errors import UserError, brief
from sret_jax.files import replace
from sret_jax.weights.torch_file import load_torch_content
from sret_jax.weights.torch_pickle import Placeholder
from sret_jax.weights.torch_writer import torch_list_content

# Of a box's end, and of the sum of probabilities, in float16.
_BOX_ROUNDING = 2e-3
_SUM_ROUNDING = 1e-2

# float16 holds every whole number up to it.
_MOST_FLOAT16_CLASSES = 2048

# Images whose labels are read before training.
_SAMPLE = 64

_KINDS = ("hard", "smoothing", "marginal_smoothing", "marginal_renorm", "ori")
_EXAMPLES = "hard, smoothing, marginal_smoothing_k5, marginal_smoothing_k10, marginal_renorm_k5 and ori"


class LabelType(NamedTuple):
    """How much of the teacher's distribution a label keeps.

    Attributes:
      kind: `hard`, the class ranked first; `smoothing`, with its probability, what is left being spread evenly over the
        other classes; `marginal_smoothing`, the same with the first `k`; `marginal_renorm`, the first `k`, scaled to
        sum to 1; `ori`, all of it.
      k: classes that a label names; 0 is all of them.
    """

    kind: str
    k: int

    @classmethod
    def parse(cls, name: str) -> "LabelType":
        """A type by its name there, such as `marginal_smoothing_k5`.

        Raises:
          UserError: there is no such type.
        """
        match = re.fullmatch(r"(hard|smoothing|ori)|(marginal_smoothing|marginal_renorm)_k([1-9]\d{0,4})", name)
        if not match:
            raise UserError(f"there is no type of soft labels {brief(name, repr)}. Expected one like {_EXAMPLES}")
        kind = match[1] or match[2]
        return cls(kind, 0 if kind == "ori" else int(match[3] or 1))

    @property
    def name(self) -> str:
        """As `parse` takes it."""
        return f"{self.kind}_k{self.k}" if self.kind.startswith("marginal") else self.kind

    def size(self, num_classes: int) -> int:
        """Classes that a label names, of `num_classes`.

        Raises:
          UserError: there are not so many.
        """
        if self.k > num_classes:
            raise UserError(f"a soft label of type {self.name} names {self.k} of {num_classes} classes: choose fewer")
        return self.k or num_classes


class SoftLabels(NamedTuple):
    """The soft labels of one image. One that did not decode when they were made has no crops.

    Attributes:
      boxes: float32 or float16 (crops, 4): top, left, height and width of each crop, as parts of the image's height,
        width, height and width.
      flips: bool (crops,), whether the crop is mirrored left to right.
      classes: int32 (crops, k), of each crop those that its label names, no class twice.
      probabilities: float32 or float16 (crops, k), theirs.
    """

    boxes: np.ndarray
    flips: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray


class SoftLabelSet(Protocol):
    """The soft labels of a dataset. Several threads call the methods at once."""

    label_type: LabelType
    num_classes: int
    notes: Mapping[str, Any]

    def __len__(self) -> int:
        """How many images have labels."""
        ...

    def read(self, key: str, /) -> SoftLabels:
        """The labels of an image, checked.

        Raises:
          UserError: it has none, or none that can be used.
        """
        ...

    def missing(self, keys: Sequence[str], /) -> list[str]:
        """Which of these images have no labels."""
        ...


class FolderLabels:
    """Soft labels in the authors' layout: `<folder>/train/<class>/<image without suffix>.tar`."""

    def __init__(self, folder: str, label_type: LabelType, num_classes: int) -> None:
        """`label_type`: the files do not say it, for smoothed and renormalised labels look alike."""
        self.folder = folder
        self.label_type = label_type
        self.num_classes = num_classes
        self.notes: Mapping[str, Any] = {}  # the files say nothing
        self._keys: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self._listed())

    def keys(self) -> list[str]:
        """Every image that has labels, sorted."""
        return sorted(self._listed())

    def read(self, key: str, /) -> SoftLabels:
        """As `SoftLabelSet.read`."""
        path = Path(self.folder, f"{key}.tar")
        try:
            return read_label_file(path, self.label_type, self.num_classes)
        except FileNotFoundError as error:
            raise UserError(
                f"{path} is missing: the image {key} has no soft labels. Expected those of every image of the dataset: "
                "give the folder that was made from this dataset, or make what is missing with `python -m "
                "sret_jax.distill`"
            ) from error

    def missing(self, keys: Sequence[str], /) -> list[str]:
        """As `SoftLabelSet.missing`."""
        there = self._listed()
        return [key for key in keys if key not in there]

    def _listed(self) -> frozenset[str]:
        if self._keys is None:
            names = []
            for inside, _, files in os.walk(self.folder, onerror=_raise_unlistable, followlinks=True):
                below = os.path.relpath(inside, self.folder)
                names += [f"{below}/{file.removesuffix('.tar')}" for file in files if file.endswith(".tar")]
            self._keys = frozenset(names)
        return self._keys

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_keys": None}  # a million names, which a worker process does not need


def check_keys(source: Source) -> None:
    """Refuses a source of which several images would have the same soft labels, as far as names are known.

    Raises:
      UserError: which.
    """
    counted = collections.Counter(_known_keys(source) or ())
    if twice := [key for key, count in counted.items() if count > 1]:
        raise UserError(
            f"{source.name} has several images whose soft labels would be called {twice[0]}"
            + (f", and {len(twice) - 1} other such names" if twice[1:] else "")
            + ". Expected names that differ before their first dot, as the authors' layout wants them: rename some"
        )


def check_complete(labels: SoftLabelSet, source: Source, num_crops: int = 1) -> None:
    """Refuses soft labels that some images of a source lack, as far as that is known before all images are read.

    Where names are known, every image is looked up; elsewhere the number of labels has to do. Some are read.

    Args:
      labels: to be checked.
      source: whose images need them.
      num_crops: that every image needs.

    Raises:
      UserError: how many are missing, and which first; several images have one name; a label that was read cannot be
        used, or has too few crops.
    """
    check_keys(source)
    keys, images = _known_keys(source), len(source.examples)
    if keys is None and len(labels) < images:
        raise UserError(
            f"{source.name} has {images} images, but only {len(labels)} have soft labels. Expected those of every "
            "image: make what is missing with `python -m sret_jax.distill`, or give other soft labels"
        )
    asked = _sample_keys(source) if keys is None else keys
    of_all = f"the {len(asked)} images of {source.name}" + " that were looked up" * (keys is None)
    missing = labels.missing(asked)
    if missing and len(missing) == len(asked):
        raise UserError(
            f"none of {of_all} has soft labels: the first is {missing[0]}. Expected labels that were made from this "
            "dataset; these are of another, or of other names"
        )
    if missing:
        raise UserError(
            f"{len(missing)} of {of_all} have no soft labels, {missing[0]} first. Expected those of every image: make "
            "what is missing with `python -m sret_jax.distill`, or give other soft labels"
        )
    for key in _sample_keys(source):
        check_crops(key, labels.read(key), num_crops)


def check_crops(key: str, labels: SoftLabels, num_crops: int) -> None:
    """Refuses an image with too few crops; one without any is another matter.

    Raises:
      UserError: how many it has.
    """
    if 0 < len(labels.boxes) < num_crops:
        raise UserError(
            f"the soft labels of {key} hold {len(labels.boxes)} crops, but {num_crops} are asked for. Expected at "
            "least as many: lower config.distill.num_crops (or --num-crops)"
        )


def labels_digest(labels: SoftLabelSet, source: Source) -> str:
    """64 letters that tell apart what teachers said of a source, by a sample, the same in every form of the labels."""
    digest = hashlib.sha256()
    for key in _sample_keys(source):
        one = labels.read(key)
        for part, dtype in zip(one, (np.float16, np.bool_, np.int32, np.float16), strict=True):
            digest.update(np.ascontiguousarray(part, dtype).tobytes())
    return digest.hexdigest()


def _known_keys(source: Source) -> list[str] | None:
    """The keys of all images; None where each would have to be read for its own."""
    name_all = getattr(source.examples, "keys", None)
    return name_all() if name_all else None


def _sample_keys(source: Source) -> list[str]:
    """Keys of some images from all over a source, those that can be read."""
    keys, images = _known_keys(source), len(source.examples)
    chosen = range(0, images, -(-images // _SAMPLE))
    if keys is not None:
        return [keys[index] for index in chosen]
    sample = []
    for index in chosen:
        with contextlib.suppress(UnreadableError):
            sample.append(source.examples[index]["key"])
    return sample


def read_label_file(path: Path, label_type: LabelType, num_classes: int) -> SoftLabels:
    """The soft labels in a file of the authors: a list of boxes, flips and labels, written by `torch.save`.

    Neither PyTorch is needed, nor is anything executed that the file asks for.

    Args:
      path: the file.
      label_type: of its labels.
      num_classes: that the labels are of.

    Returns:
      Boxes and probabilities in the dtypes that they are stored in.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the file cannot be read, is not of this kind or type, or holds labels that cannot be used.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        content = read_patiently(path.read_bytes, str(path))
    except UnreadableError as error:
        raise UserError(f"{path} cannot be read: {error}. Expected a file of soft labels on a sound disk") from error
    try:
        contents = load_torch_content(content, path)
    except UserError as error:
        raise UserError(f"{error}. Copy this file of soft labels again, or make it anew") from error
    try:
        labels = _from_authors(contents, label_type, num_classes)
        check_labels(labels, num_classes)
    except ValueError as error:
        raise UserError(f"{path} holds no soft labels that can be used: {error}") from error
    return labels


def write_label_file(path: Path, labels: SoftLabels, label_type: LabelType, *, dtype: Any = np.float16) -> None:
    """Writes the file that `read_label_file` and the authors' code read; the same labels give the same bytes.

    Args:
      path: of the file, in a folder that exists.
      labels: of one image.
      label_type: of its labels.
      dtype: of the numbers, float16 or float32.

    Raises:
      UserError: it cannot be written, or float16 cannot hold the numbers of the classes.
    """
    if dtype == np.float16 and labels.classes.max(initial=0) > _MOST_FLOAT16_CLASSES:
        raise UserError(
            f"{path}: class {labels.classes.max()} cannot be written in float16, which holds whole numbers up to "
            f"{_MOST_FLOAT16_CLASSES}. Choose our packed form instead of the authors' layout"
        )
    kind, probabilities = label_type.kind, labels.probabilities.astype(dtype)
    classes = labels.classes.astype(dtype)
    if kind == "hard":
        stored = labels.classes[:, 0].astype(np.int64)
    elif kind == "smoothing":
        stored = np.concatenate([classes, probabilities], axis=1)
    elif kind == "ori":
        stored = np.zeros_like(probabilities)
        np.put_along_axis(stored, labels.classes, probabilities, axis=1)
    else:
        stored = np.stack([classes, probabilities], axis=1)
    replace(path, torch_list_content([labels.boxes.astype(dtype), labels.flips, stored]))


def _kind(value: Any) -> str:
    """What a value of a pickle is, for a message; of what stands for something unknown, its name."""
    return brief(value.name) if isinstance(value, Placeholder) else f"a {type(value).__name__}"


def _from_authors(contents: Any, label_type: LabelType, num_classes: int) -> SoftLabels:
    if not (isinstance(contents, list | tuple) and len(contents) == 3):
        raise ValueError(f"it is {_kind(contents)}, expected a list of boxes, flips and labels")
    if not all(isinstance(part, np.ndarray) for part in contents):
        raise ValueError(f"its parts are {', '.join(map(_kind, contents))}, expected three arrays")
    boxes, flips, stored = contents
    if boxes.dtype not in (np.float16, np.float32) or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"its boxes are {boxes.dtype} {boxes.shape}, expected float32 or float16 (crops, 4)")
    if flips.dtype != np.bool_ or flips.shape != boxes.shape[:1]:
        raise ValueError(f"its flips are {flips.dtype} {flips.shape}, expected bool {boxes.shape[:1]}")
    k = label_type.size(num_classes)
    marginal = label_type.kind.startswith("marginal")
    shape = {"hard": (), "smoothing": (2,), "ori": (num_classes,)}.get(label_type.kind, (2, k))
    if stored.shape != (len(boxes), *shape) or (stored.dtype.kind != "f" and label_type.kind != "hard"):
        raise ValueError(
            f"its labels are {stored.dtype} {stored.shape}, {_guess(stored)}; expected {(len(boxes), *shape)} for "
            f"{label_type.name} and {num_classes} classes: give the type that they are of, or other files"
        )
    if label_type.kind == "ori":
        return SoftLabels(boxes, flips, np.tile(np.arange(num_classes, dtype=np.int32), (len(boxes), 1)), stored)
    classes = stored[:, 0] if marginal else stored[:, :1] if label_type.kind == "smoothing" else stored[:, None]
    if not (np.isfinite(classes).all() and (classes == np.round(classes)).all()):
        raise ValueError("some of its classes are no whole numbers")
    if label_type.kind == "hard":
        probabilities = np.ones(classes.shape, boxes.dtype)
    else:
        probabilities = stored[:, 1] if marginal else stored[:, 1:]
    return SoftLabels(boxes, flips, classes.astype(np.int64).clip(-1, 2**31 - 1).astype(np.int32), probabilities)


def _guess(stored: np.ndarray) -> str:
    """The type whose labels have this shape, in words."""
    match stored.shape:
        case (_,):
            return "as of hard"
        case (_, 2):
            return "as of smoothing"
        case (_, classes):
            return f"as of ori with {classes} classes"
        case (_, 2, k):
            return f"as of marginal_smoothing_k{k} or marginal_renorm_k{k}"
    return "of no known type"


def check_labels(labels: SoftLabels, num_classes: int) -> None:
    """Refuses labels that no teacher gives.

    Raises:
      ValueError: a box outside the image, a class that is none, or what is no probability; the message says which crop.
    """
    top_left, sides = labels.boxes[:, :2].astype(np.float32), labels.boxes[:, 2:].astype(np.float32)
    # Written so that NaN is refused.
    _refuse(
        ~((top_left >= 0) & (sides > 0) & (top_left + sides <= 1 + _BOX_ROUNDING)).all(axis=1),
        lambda crop: f"a box outside the image, {labels.boxes[crop].tolist()}",
        "top and left of at least 0, height and width above 0, and ends of at most 1, as parts of the image",
    )
    _refuse(
        ((labels.classes < 0) | (labels.classes >= num_classes)).any(axis=1),
        lambda crop: f"the classes {labels.classes[crop].tolist()}",
        f"classes from 0 to {num_classes - 1}: these are labels of another dataset",
    )
    ordered = np.sort(labels.classes, axis=1)
    _refuse(
        (ordered[:, 1:] == ordered[:, :-1]).any(axis=1),
        lambda crop: f"a class twice, {labels.classes[crop].tolist()}",
        "classes that differ",
    )
    probabilities = labels.probabilities.astype(np.float32)
    _refuse(
        ~((probabilities >= 0) & (probabilities <= 1)).all(axis=1) | ~(probabilities.sum(axis=1) <= 1 + _SUM_ROUNDING),
        lambda crop: f"the probabilities {labels.probabilities[crop].tolist()}",
        "numbers from 0 to 1 that sum to at most 1",
    )


def _raise_unlistable(error: OSError) -> NoReturn:
    raise UserError(
        f"cannot list {error.filename}: {error.strerror}. Expected a folder of soft labels that you may read"
    ) from error


def _refuse(is_wrong: np.ndarray | np.bool, found: Any, expected: str) -> None:
    if is_wrong.any():
        crop = int(is_wrong.argmax())
        raise ValueError(f"crop {crop} has {found(crop)[:200]}; expected {expected}")
