"""Training batches whose crops and labels a teacher gave in advance."""

import dataclasses
import itertools
import pathlib
from typing import Any

import numpy as np
import pytest

from sret_jax import UserError
from sret_jax.data import soft_labels
from sret_jax.data.decode import stored_crops
from sret_jax.data.pack_soft_labels import pack_soft_labels
from sret_jax.data.packed_labels import open_soft_labels
from sret_jax.data.passes import fkd_passes
from sret_jax.data.pipeline import Batch, train_batches
from sret_jax.data.reading import UnreadableError
from sret_jax.data.soft_labels import (
    LabelType,
    SoftLabels,
    SoftLabelSet,
    check_complete,
    labels_digest,
    write_label_file,
)
from sret_jax.data.sources import Source, open_source

CLASSES, STORED, SIZE, BATCH = 3, 6, 12, 12
TYPE = "marginal_smoothing_k2"

# Of 36 images, three batches an epoch: one epoch, two passes of two epochs, and two epochs.
PASSES = fkd_passes(7, 2, 1)


def random_labels(rng: np.random.Generator, dtype: Any = np.float32) -> SoftLabels:
    sides = rng.uniform(0.3, 1, (STORED, 2))
    boxes = np.concatenate([rng.uniform(0, 1, (STORED, 2)) * (1 - sides), sides], axis=1)
    classes = np.array([rng.permutation(CLASSES)[:2] for _ in range(STORED)], np.int32)
    probabilities = np.sort(rng.dirichlet(np.ones(3), STORED)[:, :2])[:, ::-1]
    return SoftLabels(boxes.astype(dtype), rng.random(STORED) < 0.5, classes, probabilities.astype(dtype))


@pytest.fixture(scope="module")
def source(image_folder: pathlib.Path) -> Source:
    return open_source("folder", "train", str(image_folder))


@pytest.fixture(scope="module")
def labels_folder(source: Source, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Soft labels of every image, in the authors' layout and float32."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(5)
    for key in source.examples.keys():  # type: ignore[attr-defined]  # noqa: SIM118, it is no dict
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        write_label_file(folder / f"{key}.tar", random_labels(rng), LabelType.parse(TYPE), dtype=np.float32)
    return folder


@pytest.fixture(scope="module")
def labels(labels_folder: pathlib.Path) -> SoftLabelSet:
    return open_soft_labels(str(labels_folder), TYPE, CLASSES)


def batches(source: Source, labels: SoftLabelSet, count: int, **arguments: Any) -> list[Batch]:
    arguments = {"batch_size": BATCH, "image_size": SIZE, "seed": 3, "passes": PASSES, **arguments}
    return list(itertools.islice(train_batches(source, soft_labels=labels, **arguments), count))


def crops_of(source: Source, labels: SoftLabelSet) -> dict[bytes, tuple[int, int]]:
    """Which crop of which image each possible row is, by all that it shows and says."""
    found = {}
    for index in range(len(source.examples)):
        example = source.examples[index]
        stored = labels.read(example["key"])
        crops = stored_crops(example["image"], SIZE, stored.boxes.astype(np.float16), stored.flips)
        for crop, pixels in enumerate(crops):
            row = row_bytes(pixels, stored.classes[crop], stored.probabilities[crop].astype(np.float16))
            found[row] = index, crop
    assert len(found) == len(source.examples) * STORED
    return found


def row_bytes(image: np.ndarray, classes: np.ndarray, probabilities: np.ndarray) -> bytes:
    return image.tobytes() + classes.tobytes() + probabilities.tobytes()


def test_every_row_is_a_stored_crop_with_its_label_and_every_pass_shows_every_image(
    source: Source, labels: SoftLabelSet
) -> None:
    known = crops_of(source, labels)
    found = batches(source, labels, 7 * 3)
    assert {name: (array.dtype, array.shape) for name, array in found[0].items()} == {
        "image": (np.uint8, (BATCH, SIZE, SIZE, 3)),
        "classes": (np.int32, (BATCH, 2)),
        "probabilities": (np.float16, (BATCH, 2)),
    }
    rows = [known[row_bytes(*row)] for batch in found for row in zip(*batch.values(), strict=True)]
    epochs = [rows[start : start + 36] for start in range(0, len(rows), 36)]
    for single in (epochs[0], epochs[5], epochs[6]):
        assert sorted(index for index, _ in single) == list(range(36))
    for first in (1, 3):
        pairs = np.reshape(epochs[first] + epochs[first + 1], (36, 2, 2))
        assert sorted(pairs[:, 0, 0]) == list(range(36))
        np.testing.assert_array_equal(pairs[:, 0, 0], pairs[:, 1, 0])  # two crops of one image side by side,
        assert np.all(pairs[:, 0, 1] != pairs[:, 1, 1])  # different ones
    assert len({crop for _, crop in rows}) == STORED
    orders = {tuple(index for index, _ in epoch) for epoch in epochs}
    assert len(orders) == len(epochs)


def test_crops_are_bicubic_on_request(source: Source, labels: SoftLabelSet) -> None:
    (batch,) = batches(source, labels, 1, bicubic=True)
    known = set()
    for index in range(len(source.examples)):
        example = source.examples[index]
        stored = labels.read(example["key"])
        boxes = stored.boxes.astype(np.float16)
        known |= {crop.tobytes() for crop in stored_crops(example["image"], SIZE, boxes, stored.flips, bicubic=True)}
    assert all(image.tobytes() in known for image in batch["image"])


def test_batches_depend_on_their_number_and_rows_alone(source: Source, labels: SoftLabelSet) -> None:
    whole = batches(source, labels, 10)
    later = batches(source, labels, 6, first_batch=4, num_threads=2)
    some = batches(source, labels, 10, rows=[7, 8, 2, 11])
    for number in range(10):
        for name, array in whole[number].items():
            np.testing.assert_array_equal(some[number][name], array[[7, 8, 2, 11]])
            if number >= 4:
                np.testing.assert_array_equal(later[number - 4][name], array)


def test_packed_and_unpacked_labels_give_the_same_batches(
    source: Source, labels: SoftLabelSet, labels_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pack_soft_labels(str(labels_folder), str(tmp_path / "packed"), label_type=TYPE, num_classes=CLASSES)
    packed = open_soft_labels(str(tmp_path / "packed"), TYPE, CLASSES)
    check_complete(packed, source)
    for one, other in zip(batches(source, labels, 7), batches(source, packed, 7), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert labels_digest(packed, source) == labels_digest(labels, source)


def test_a_digest_tells_labels_apart_that_say_something_else(
    source: Source, labels: SoftLabelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {labels_digest(labels, source)}
    key = source.examples[4]["key"]
    stored = labels.read(key)
    for part in ("boxes", "flips", "classes", "probabilities"):
        changed = getattr(stored, part).copy()
        changed[2] = ~changed[2] if part == "flips" else changed[2][::-1]
        instead = Changed(labels, {key: stored._replace(**{part: changed})})
        digests.add(labels_digest(instead, source))  # type: ignore[arg-type]
    assert len(digests) == 5
    assert {len(digest) for digest in digests} == {64}
    monkeypatch.setattr(soft_labels, "_SAMPLE", 3)
    assert labels_digest(labels, source) not in digests  # of fewer images


def test_worker_processes_give_the_same_batches(source: Source, labels: SoftLabelSet) -> None:
    for one, other in zip(batches(source, labels, 3), batches(source, labels, 3, num_workers=1), strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@dataclasses.dataclass
class Changed:
    """A set of labels of which some are as `instead` says."""

    labels: SoftLabelSet
    instead: dict[str, SoftLabels]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.labels, name)

    def read(self, key: str) -> SoftLabels:
        return self.instead[key] if key in self.instead else self.labels.read(key)


def test_an_image_without_crops_is_left_out_as_a_broken_one(
    source: Source, labels: SoftLabelSet, caplog: pytest.LogCaptureFixture
) -> None:
    key = source.examples[4]["key"]
    none = SoftLabels(*(part[:0] for part in labels.read(key)))
    known = crops_of(source, labels)
    found = batches(source, Changed(labels, {key: none}), 3)  # type: ignore[arg-type]
    shown = {known[row_bytes(*row)][0] for batch in found for row in zip(*batch.values(), strict=True)}
    assert shown == set(range(36)) - {4}
    assert f"{key.split('/')[-1]}" in caplog.text
    assert "left out when its soft labels were made" in caplog.text


def test_more_crops_than_are_stored_are_refused(source: Source, labels: SoftLabelSet) -> None:
    message = r"hold 6 crops, but 7 are asked for.*lower config\.distill\.num_crops"
    with pytest.raises(UserError, match=message):
        batches(source, labels, 5, passes=fkd_passes(30, 7, 0), batch_size=14)
    with pytest.raises(UserError, match=message):
        check_complete(labels, source, 7)


def test_labels_that_vanish_during_a_run_are_an_error_that_names_them(
    source: Source, labels_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    vanishing = open_soft_labels(str(labels_folder), TYPE, CLASSES)
    vanishing.folder = str(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"train/\w+/\w+\.tar is missing: the image train/\w+/\w+ has no soft labels"):
        batches(source, vanishing, 1)


def test_labels_of_another_dataset_or_of_a_part_are_refused(
    source: Source, labels: SoftLabelSet, labels_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    check_complete(labels, source)
    other = open_source("synthetic", "train", length=5)
    with pytest.raises(
        UserError, match=r"none of the 5 images of synthetic train has soft labels: the first is train/"
    ):
        check_complete(labels, other)
    keys = source.examples.keys()  # type: ignore[attr-defined]
    for key in sorted(keys)[:30]:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{key}.tar").write_bytes((labels_folder / f"{key}.tar").read_bytes())
    lacking = [key for key in keys if key in sorted(keys)[30:]]
    part = open_soft_labels(str(tmp_path), TYPE, CLASSES)
    with pytest.raises(UserError, match=rf"6 of the 36 images of .* have no soft labels, {lacking[0]} first"):
        check_complete(part, source)

    class Unnamed:
        """Whose names are known when they are read."""

        def __len__(self) -> int:
            return 36

        def __getitem__(self, index: int) -> Any:
            return source.examples[index]

    unnamed = dataclasses.replace(source, examples=Unnamed(), name="unnamed")  # type: ignore[arg-type]
    check_complete(labels, unnamed)
    with pytest.raises(UserError, match="unnamed has 36 images, but only 30 have soft labels"):
        check_complete(part, unnamed)


def test_where_names_are_known_only_when_images_are_read_some_are_looked_up(
    source: Source, labels: SoftLabelSet
) -> None:
    class Unnamed:
        def __init__(self, prefix: str) -> None:
            self.prefix = prefix

        def __len__(self) -> int:
            return 36

        def __getitem__(self, index: int) -> Any:
            if index == 3:
                raise UnreadableError("Input/output error")
            return {"key": self.prefix + source.examples[index]["key"]}

    check_complete(labels, dataclasses.replace(source, examples=Unnamed("")))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"none of the 35 images of other that were looked up has soft labels.*other/"):
        check_complete(labels, dataclasses.replace(source, examples=Unnamed("other/"), name="other"))  # type: ignore[arg-type]


def test_images_whose_labels_have_one_name_are_refused(source: Source, labels: SoftLabelSet) -> None:
    class Twice:
        def __len__(self) -> int:
            return 3

        def keys(self) -> list[str]:
            return ["train/a/b", "train/a/b", "train/a/c"]

    with pytest.raises(UserError, match=r"several images whose soft labels would be called train/a/b\. Expected names"):
        check_complete(labels, dataclasses.replace(source, examples=Twice()))  # type: ignore[arg-type]
