"""Tests of sret_jax.data.soft_labels: the authors' files, and what must not pass for one."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sret_jax.data.soft_labels import (
    FolderLabels,
    LabelType,
    SoftLabels,
    check_complete,
    read_label_file,
    write_label_file,
)
from sret_jax.data.sources import Source
from sret_jax.errors import UserError
from sret_jax.weights.torch_writer import torch_list_content
from tests.golden import golden
from tests.weights.forge import archive, call, named, pickled

CLASSES = 50
STORED = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm_k5")
TYPES = (*STORED, "ori")

K5 = LabelType.parse("marginal_smoothing_k5")
GOOD = golden.FOLDER / "fkd" / "marginal_smoothing_k5.tar"


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """What the original code stored, and what it recovered from its files."""
    with np.load(golden.FOLDER / "fkd_labels.npz") as arrays:
        return dict(arrays)


def _recovered(labels: SoftLabels, kind: str) -> np.ndarray:
    """The distributions over all classes."""
    probabilities = labels.probabilities.astype(np.float64)
    totals = probabilities.sum(axis=1, keepdims=True)
    crops, k = probabilities.shape
    if kind == "marginal_renorm":
        probabilities, rest = probabilities / totals, np.zeros((crops, 1))
    else:
        rest = (1 - totals) / max(CLASSES - k, 1)
    full = np.tile(rest, (1, CLASSES))
    np.put_along_axis(full, labels.classes, probabilities, axis=1)
    return full


def _labels(name: str, dtype: Any = np.float32, crops: int = 7) -> SoftLabels:
    """Labels of a teacher that is unsure, in the order of their probabilities."""
    rng = np.random.default_rng(len(name))
    sides = rng.uniform(0.1, 1, (crops, 2))
    boxes = np.concatenate([rng.uniform(0, 1, (crops, 2)) * (1 - sides), sides], axis=1)
    probabilities = rng.dirichlet(np.ones(CLASSES), crops)
    label_type = LabelType.parse(name)
    order = np.argsort(-probabilities, axis=1)[:, : label_type.size(CLASSES)]
    order = np.sort(order, axis=1) if name == "ori" else order
    kept = np.take_along_axis(probabilities, order, axis=1) if name != "hard" else np.ones((crops, 1))
    return SoftLabels(boxes.astype(dtype), rng.random(crops) < 0.5, order.astype(np.int32), kept.astype(dtype))


@pytest.mark.parametrize("suffix", ["", "_fp16"])
@pytest.mark.parametrize("name", STORED)
def test_the_authors_files_hold_what_their_code_recovers(
    name: str, suffix: str, expected: dict[str, np.ndarray]
) -> None:
    label_type = LabelType.parse(name)
    labels = read_label_file(golden.FOLDER / "fkd" / f"{name}{suffix}.tar", label_type, CLASSES)
    dtype = np.float16 if suffix else np.float32
    np.testing.assert_array_equal(labels.boxes, expected["coords"].astype(dtype), strict=True)
    np.testing.assert_array_equal(labels.flips, expected["flip"], strict=True)
    assert (labels.classes.dtype, labels.probabilities.dtype) == (np.int32, dtype)
    assert labels.classes.shape == labels.probabilities.shape == (6, label_type.k)
    golden_values = expected[f"recovered{suffix}_{name}"]
    np.testing.assert_allclose(_recovered(labels, label_type.kind), golden_values, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(labels.classes[:, 0], expected["probabilities"].argmax(axis=1))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("name", TYPES)
def test_what_is_written_is_read(name: str, dtype: Any, tmp_path: Path) -> None:
    label_type = LabelType.parse(name)
    labels = _labels(name, dtype)
    write_label_file(tmp_path / "a.tar", labels, label_type, dtype=dtype)
    found = read_label_file(tmp_path / "a.tar", label_type, CLASSES)
    for part, there in zip(SoftLabels._fields, found, strict=True):
        np.testing.assert_array_equal(there, getattr(labels, part), strict=True, err_msg=part)


def test_labels_of_all_classes_are_written_in_the_order_of_classes(tmp_path: Path) -> None:
    label_type, labels = LabelType.parse("ori"), _labels("ori")
    shuffled = labels._replace(classes=labels.classes[:, ::-1], probabilities=labels.probabilities[:, ::-1])
    write_label_file(tmp_path / "a.tar", shuffled, label_type, dtype=np.float32)
    found = read_label_file(tmp_path / "a.tar", label_type, CLASSES)
    np.testing.assert_array_equal(found.probabilities, labels.probabilities)


def test_float16_names_no_class_that_it_cannot_hold(tmp_path: Path) -> None:
    labels = _labels("marginal_smoothing_k5")
    for highest, fits in [(2048, True), (2049, False), (65_000, False)]:
        labels.classes[3, 2] = highest
        if fits:
            write_label_file(tmp_path / "a.tar", labels, K5)
            assert read_label_file(tmp_path / "a.tar", K5, 100_000).classes[3, 2] == highest
        else:
            with pytest.raises(UserError, match=rf"class {highest} cannot be written in float16.*packed form"):
                write_label_file(tmp_path / "b.tar", labels, K5)
        write_label_file(tmp_path / "c.tar", labels, K5, dtype=np.float32)
        assert read_label_file(tmp_path / "c.tar", K5, 100_000).classes[3, 2] == highest
    assert not (tmp_path / "b.tar").exists()


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        ("hard", "smoothing", r"labels are int64 \(6,\), as of hard; expected \(6, 2\) for smoothing and 50 classes"),
        ("smoothing", "hard", r"\(6, 2\), as of smoothing; expected \(6,\) for hard"),
        ("smoothing", "marginal_smoothing_k5", r"as of smoothing; expected \(6, 2, 5\) for marginal_smoothing_k5"),
        ("marginal_renorm_k5", "marginal_smoothing_k10", r"_k5 or marginal_renorm_k5; expected \(6, 2, 10\)"),
        ("marginal_smoothing_k10", "ori", r"as of marginal_smoothing_k10 or marginal_renorm_k10; expected \(6, 50\)"),
    ],
)
def test_labels_of_another_type_are_refused(stored: str, asked: str, message: str) -> None:
    path = golden.FOLDER / "fkd" / f"{stored}.tar"
    with pytest.raises(UserError, match=rf"^{path} holds no soft labels that can be used: its .*{message}"):
        read_label_file(path, LabelType.parse(asked), CLASSES)


def test_labels_of_other_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"crop \d has the classes .*; expected classes from 0 to 9: .*another dataset"):
        read_label_file(GOOD, K5, 10)
    with pytest.raises(UserError, match=r"of type marginal_smoothing_k5 names 5 of 4 classes: choose fewer"):
        read_label_file(GOOD, K5, 4)
    write_label_file(tmp_path / "a.tar", _labels("ori"), LabelType.parse("ori"))
    with pytest.raises(UserError, match=r"as of ori with 50 classes; expected \(7, 10\) for ori and 10 classes"):
        read_label_file(tmp_path / "a.tar", LabelType.parse("ori"), 10)


BOX = "a box outside the image, .*; expected top and left of at least 0"
PROBABILITY = "the probabilities .*; expected numbers from 0 to 1"


@pytest.mark.parametrize(
    ("part", "column", "value", "message"),
    [
        ("boxes", 0, -0.1, BOX),
        ("boxes", 1, 1.1, BOX),
        ("boxes", 2, 0.0, BOX),
        ("boxes", 3, -0.5, BOX),
        ("boxes", 3, 1.01, BOX),
        ("boxes", 2, np.nan, BOX),
        ("boxes", 0, np.inf, BOX),
        ("classes", 1, -1, r"the classes \[.*; expected classes from 0 to 49"),
        ("classes", 1, 50, r"the classes \[.*; expected classes from 0 to 49"),
        ("classes", 1, 2**31 - 1, r"the classes \[.*; expected classes from 0 to 49"),
        ("probabilities", 4, -0.01, PROBABILITY),
        ("probabilities", 4, 1.5, PROBABILITY),
        ("probabilities", 4, np.nan, PROBABILITY),
        ("probabilities", 4, 0.95, PROBABILITY),  # too much in all
    ],
)
def test_what_no_teacher_gives_is_refused_and_its_crop_named(
    part: str, column: int, value: float, message: str, tmp_path: Path
) -> None:
    labels = _labels("marginal_smoothing_k5")
    getattr(labels, part)[4, column] = value
    write_label_file(tmp_path / "a.tar", labels, K5, dtype=np.float32)
    with pytest.raises(UserError, match=rf"a\.tar holds no soft labels that can be used: crop 4 has {message}"):
        read_label_file(tmp_path / "a.tar", K5, CLASSES)


def test_a_class_that_stands_twice_in_a_label_is_refused(tmp_path: Path) -> None:
    labels = _labels("marginal_smoothing_k5")
    labels.classes[4, 3] = labels.classes[4, 0]
    write_label_file(tmp_path / "a.tar", labels, K5)
    with pytest.raises(UserError, match=r"crop 4 has a class twice, \[.*\]; expected classes that differ"):
        read_label_file(tmp_path / "a.tar", K5, CLASSES)


def test_what_float16_rounds_is_not_refused(tmp_path: Path) -> None:
    labels = _labels("marginal_smoothing_k5")
    labels.boxes[:] = [0.3335, 0.6665, 0.6667, 0.3337]  # the ends are up to 1.0005 in float16
    labels.probabilities[:] = [0.2003] * 5  # 1.0015 in all
    write_label_file(tmp_path / "a.tar", labels, K5)
    assert len(read_label_file(tmp_path / "a.tar", K5, CLASSES).boxes) == 7


BOXES, FLIPS, LABELS = np.full((3, 4), 0.5, np.float32), np.zeros(3, bool), np.zeros((3, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([BOXES, FLIPS], "it is a list, expected a list of boxes, flips and labels"),
        ([BOXES[:, :3], FLIPS, LABELS], r"its boxes are float32 \(3, 3\), expected"),
        ([BOXES.astype(np.int64), FLIPS, LABELS], r"its boxes are int64 \(3, 4\), expected"),
        ([BOXES, FLIPS[:2], LABELS], r"its flips are bool \(2,\), expected bool \(3,\)"),
        ([BOXES, FLIPS.astype(np.uint8), LABELS], r"its flips are uint8 \(3,\), expected bool \(3,\)"),
        ([BOXES, FLIPS, LABELS[:2]], r"its labels are float32 \(2, 2\)"),
        ([BOXES, FLIPS, LABELS.astype(np.int64)], r"its labels are int64 \(3, 2\)"),
        ([BOXES, FLIPS, LABELS + 0.5], "some of its classes are no whole numbers"),
        ([BOXES, FLIPS, LABELS + np.inf], "some of its classes are no whole numbers"),
        ([BOXES, FLIPS, LABELS + 2.0**32], "crop 0 has the classes"),
    ],
)
def test_files_of_another_kind_are_refused(arrays: list[np.ndarray], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(torch_list_content(arrays))
    with pytest.raises(UserError, match=f"a.tar holds no soft labels that can be used: {message}"):
        read_label_file(tmp_path / "a.tar", LabelType.parse("smoothing"), CLASSES)


def test_a_checkpoint_is_no_file_of_soft_labels() -> None:
    with pytest.raises(
        UserError, match=r"tiny_plain\.pth holds no soft labels .*: it is a \w*[dD]ict, expected a list"
    ):
        read_label_file(golden.FOLDER / "tiny_plain.pth", K5, CLASSES)


def test_a_file_cannot_have_anything_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = pickled(call(named("os", "system"), "echo > executed"))
    content = b"".join(bytes(piece) if isinstance(piece, int) else piece for piece in archive(hostile))
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar.*os\.system"):
        read_label_file(tmp_path / "a.tar", K5, CLASSES)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(part: float, tmp_path: Path) -> None:
    content = GOOD.read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: int(part * len(content))])
    with pytest.raises(UserError, match=r"a\.tar"):
        read_label_file(tmp_path / "a.tar", K5, CLASSES)


@pytest.mark.parametrize("name", [*TYPES, "marginal_smoothing_k1", "marginal_renorm_k1000"])
def test_types_have_the_authors_names(name: str) -> None:
    assert LabelType.parse(name).name == name
    assert LabelType.parse(name).size(1000) == {"ori": 1000, "hard": 1, "smoothing": 1}.get(
        name, int(name.rpartition("k")[2]) if "_k" in name else 0
    )


@pytest.mark.parametrize(
    "name", ["", "soft", "hard_k5", "marginal_smoothing", "marginal_smoothing_k0", "ori_k5", "HARD"]
)
def test_unknown_types_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"no type of soft labels '{name}'\. Expected one like hard, smoothing"):
        LabelType.parse(name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files in the authors' layout, and what does not belong to them."""
    for name in ("a/1", "a/2", "b/1", "b/deeper/1"):
        path = tmp_path / "labels" / "train" / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(GOOD.read_bytes())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1.tar").write_bytes(GOOD.read_bytes())
    (tmp_path / "labels" / "train" / "linked").symlink_to(elsewhere)
    (tmp_path / "labels" / "train" / "a" / "3.tar.new").write_bytes(b"what a kill left")
    (tmp_path / "labels" / "README.md").write_text("from a teacher")
    return tmp_path / "labels"


KEYS = ["train/a/1", "train/a/2", "train/b/1", "train/b/deeper/1", "train/linked/1"]


def test_a_folder_has_the_labels_of_its_files(folder: Path) -> None:
    labels = FolderLabels(str(folder), K5, CLASSES)
    assert (len(labels), labels.keys()) == (5, KEYS)
    assert labels.missing(["train/c/1", *KEYS, "val/a/1"]) == ["train/c/1", "val/a/1"]
    expected = read_label_file(GOOD, K5, CLASSES)
    for key in KEYS:
        np.testing.assert_equal(labels.read(key)._asdict(), expected._asdict())
    with pytest.raises(UserError, match=r"labels/train/c/1\.tar is missing: the image train/c/1 has no soft labels"):
        labels.read("train/c/1")


def test_a_folder_is_sent_to_other_processes_without_its_names(folder: Path) -> None:
    labels = FolderLabels(str(folder), K5, CLASSES)
    labels.keys()
    sent = pickle.dumps(labels)
    assert b"train" not in sent
    assert pickle.loads(sent).keys() == KEYS


def _source(keys: list[str], *, named: bool = True) -> Source:
    class Examples(list[Any]):
        pass

    examples = Examples({"key": key} for key in keys)
    if named:
        examples.keys = lambda: keys  # type: ignore[attr-defined]
    return Source(examples, CLASSES, "images train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (_source(KEYS[:3]), ""),
        (
            _source([*KEYS, "train/x", "train/y"]),
            "2 of the 7 images of images train have no soft labels, train/x first",
        ),
        (_source(["train/x", "train/y"]), "none of the 2 images of images train has soft labels: the first is train/x"),
        (_source(KEYS, named=False), ""),
        (_source([*KEYS, "?"], named=False), "images train has 6 images, but only 5 have soft labels"),
    ],
)
def test_images_without_labels_are_found_before_training(source: Source, message: str, folder: Path) -> None:
    labels = FolderLabels(str(folder), K5, CLASSES)
    if message:
        with pytest.raises(UserError, match=message):
            check_complete(labels, source)
    else:
        check_complete(labels, source)


@pytest.mark.parametrize("name", ["hard", "smoothing", "marginal_renorm_k2", "ori"])
def test_an_image_without_crops_has_labels_of_no_rows(tmp_path: Path, name: str) -> None:
    label_type = LabelType.parse(name)
    none = SoftLabels(*(part[:0] for part in _labels(name, np.float16)))
    write_label_file(tmp_path / "none.tar", none, label_type)
    found = read_label_file(tmp_path / "none.tar", label_type, CLASSES)
    assert [part.shape for part in found] == [part.shape for part in none]
