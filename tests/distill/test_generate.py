"""Making soft labels: what they are, and that kills and other processes change nothing."""

import concurrent.futures
import dataclasses
import itertools
import math
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from sret_jax import UserError
from sret_jax.data.augment import normalize
from sret_jax.data.decode import central_crop, stored_crops
from sret_jax.data.packed_labels import PackedLabels, open_soft_labels
from sret_jax.data.reading import UnreadableError
from sret_jax.data.soft_labels import LabelType, SoftLabels, check_complete
from sret_jax.data.sources import Source, open_source
from sret_jax.distill import generate as generating
from sret_jax.distill import units
from sret_jax.distill.generate import generate
from sret_jax.distill.recipe import Recipe
from sret_jax.distill.units import plan_units, read_unit, write_unit
from sret_jax.files import read_json, to_json
from sret_jax.training.build import open_labels
from sret_jax.training.config import base_config
from sret_jax.training.teacher import Teacher, load_teachers
from tests.distill import teachers

ROOT = pathlib.Path(__file__).parents[2]
IMAGES, CROPS, SIZE = 36, 5, 16
RECIPE = Recipe("tests.distill.teachers:first", CROPS, "marginal_smoothing_k3", image_size=SIZE, temperature=0.5)


@pytest.fixture(scope="module")
def source(image_folder: pathlib.Path) -> Source:
    """The folder's 36 images, said to be of six classes."""
    return dataclasses.replace(open_source("folder", "train", str(image_folder)), num_classes=teachers.CLASSES)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of three images, files of two units, and no pauses."""
    monkeypatch.setattr(units, "_CROPS", 3 * CROPS)
    monkeypatch.setattr(generating, "_IMAGES_PER_FILE", 6)
    monkeypatch.setattr(generating, "_LOOK_EVERY", 0.02)


def make(source: Source, out: pathlib.Path, recipe: Recipe = RECIPE, **options: Any) -> pathlib.Path:
    settings: dict[str, Any] = {"batch_size": 1, "num_threads": 2, "say": lambda line: None, **options}
    return generate(recipe, source, source, str(out), **settings)


@pytest.fixture(scope="module")
def undisturbed(source: Source, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "_CROPS", 3 * CROPS)
        patch.setattr(generating, "_IMAGES_PER_FILE", 6)
        return make(source, tmp_path_factory.mktemp("made") / "labels")


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def expected_probabilities(source: Source, key: str, labels: SoftLabels, seeds: tuple[int, ...] = (0,)) -> np.ndarray:
    """What the teachers say of an image's crops, averaged."""
    index = source.examples.keys().index(key)  # type: ignore[attr-defined]
    encoded = source.examples[index]["image"]
    crops = np.stack(stored_crops(encoded, SIZE, labels.boxes, labels.flips, bicubic=True))
    seen = np.asarray(teachers.quarters(normalize(jax.numpy.asarray(crops))))
    return np.mean([softmax(seen @ teachers.weights(seed) / RECIPE.temperature) for seed in seeds], axis=0)


def assert_labelled(source: Source, key: str, labels: SoftLabels, seeds: tuple[int, ...] = (0,)) -> None:
    probabilities = expected_probabilities(source, key, labels, seeds)
    ranked = np.argsort(-probabilities, axis=1)[:, :3]
    np.testing.assert_array_equal(labels.classes, ranked)
    # float16
    np.testing.assert_allclose(labels.probabilities, np.take_along_axis(probabilities, ranked, 1), rtol=1e-3, atol=1e-6)


def test_every_image_has_the_teachers_first_classes_of_all_its_crops(source: Source, undisturbed: pathlib.Path) -> None:
    found = open_soft_labels(str(undisturbed), "marginal_smoothing_k3", teachers.CLASSES)
    check_complete(found, source)
    assert len(found) == IMAGES
    everything = []
    for key in source.examples.keys():  # type: ignore[attr-defined]  # noqa: SIM118, it is no dict
        labels = found.read(key)
        assert labels.boxes.shape == (CROPS, 4)
        assert_labelled(source, key, labels)
        everything.append(labels)
    boxes = np.concatenate([labels.boxes for labels in everything]).astype(np.float64)
    areas = boxes[:, 2] * boxes[:, 3]
    assert 0.07 < areas.min() < 0.15 and 0.8 < areas.max() < 0.95
    assert len(np.unique(boxes, axis=0)) > 0.95 * len(boxes)
    assert 0.35 < np.concatenate([labels.flips for labels in everything]).mean() < 0.65
    notes = found.notes  # type: ignore[attr-defined]
    assert (notes["teacher"], notes["temperature"], notes["num_crops"]) == (RECIPE.teacher, 0.5, CROPS)
    assert not undisturbed.with_name("labels.units").exists()


class _KilledError(BaseException):
    pass


def killed_after(count: int) -> Callable[[int, int], None]:
    calls = itertools.count(1)

    def advance(images: int, total: int) -> None:
        if next(calls) > count:
            raise _KilledError

    return advance


def test_what_was_interrupted_ten_times_ends_as_undisturbed_byte_for_byte(
    source: Source, undisturbed: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "labels"
    for _ in range(10):
        with pytest.raises(_KilledError):
            make(source, out, advance=killed_after(1))
        assert not out.exists()
    done = len(list(out.with_name("labels.units").glob("unit-*.safetensors")))
    assert done == 10
    pack, write = generating._pack, generating.write_unit

    def fail(*arguments: Any) -> None:
        raise _KilledError

    monkeypatch.setattr(generating, "write_unit", fail)
    with pytest.raises(_KilledError):
        make(source, out)
    monkeypatch.setattr(generating, "write_unit", write)
    monkeypatch.setattr(generating, "_pack", fail)
    with pytest.raises(_KilledError):
        make(source, out)
    monkeypatch.setattr(generating, "_pack", pack)
    monkeypatch.setattr(generating, "remove", fail)
    with pytest.raises(_KilledError):
        make(source, out)
    monkeypatch.undo()
    make(source, out)
    assert contents(out) == contents(undisturbed)
    assert not out.with_name("labels.units").exists()


def test_two_processes_make_what_one_does(source: Source, undisturbed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = []

    def process(number: int) -> pathlib.Path:
        def advance(images: int, total: int) -> None:
            made.append((number, images, total))

        return make(source, tmp_path / "labels", process=number, processes=2, advance=advance)

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        assert list(executor.map(process, range(2))) == [tmp_path / "labels"] * 2
    assert sorted(made) == sorted((number, images, 18) for number in (0, 1) for images in (0, *[3] * 6))
    assert contents(tmp_path / "labels") == contents(undisturbed)


def test_the_authors_layout_holds_the_same_numbers(
    source: Source, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "labels"
    with pytest.raises(_KilledError):
        make(source, out, authors_layout=True, advance=killed_after(4))
    make(source, out, authors_layout=True)
    make(source, out, authors_layout=True)  # nothing is left to do
    packed, files = (
        open_soft_labels(str(folder), RECIPE.label_type, teachers.CLASSES) for folder in (undisturbed, out)
    )
    for key in source.examples.keys():  # type: ignore[attr-defined]  # noqa: SIM118, it is no dict
        one, other = files.read(key), packed.read(key)
        assert one.boxes.dtype == np.float32
        for part, same in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, same)


def test_a_reference_gives_its_crops_and_several_teachers_are_averaged(
    source: Source, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    both = "tests.distill.teachers:first,tests.distill.teachers:second"
    recipe = RECIPE._replace(teacher=both, reference=str(undisturbed), seed=7, num_crops=4)
    found = open_soft_labels(str(make(source, tmp_path / "labels", recipe)), RECIPE.label_type, teachers.CLASSES)
    given = open_soft_labels(str(undisturbed), RECIPE.label_type, teachers.CLASSES)
    for key in source.examples.keys()[:5]:  # type: ignore[attr-defined]
        one, reference = found.read(key), given.read(key)
        np.testing.assert_array_equal(one.boxes, reference.boxes[:4])
        np.testing.assert_array_equal(one.flips, reference.flips[:4])
        assert_labelled(source, key, one, seeds=(0, 1))
    with pytest.raises(UserError, match=r"of train/\w+/\w+ hold 5 crops, but 6 are asked for.*or --num-crops"):
        make(source, tmp_path / "more", recipe._replace(num_crops=6))


@pytest.mark.parametrize("label_type", ["hard", "ori"])
def test_labels_of_one_class_and_of_all(source: Source, label_type: str, tmp_path: pathlib.Path) -> None:
    made = make(source, tmp_path / "labels", RECIPE._replace(label_type=label_type))
    labels = open_soft_labels(str(made), label_type, teachers.CLASSES).read("train/ant/ant_0")
    probabilities = expected_probabilities(source, "train/ant/ant_0", labels)
    if label_type == "hard":
        np.testing.assert_array_equal(labels.classes[:, 0], probabilities.argmax(axis=1))
        assert np.all(labels.probabilities == 1)
    else:
        np.testing.assert_array_equal(labels.classes, np.tile(np.arange(teachers.CLASSES), (CROPS, 1)))
        np.testing.assert_allclose(labels.probabilities, probabilities, rtol=1e-3, atol=1e-6)  # float16


def test_the_teacher_is_evaluated_first_and_once(source: Source, tmp_path: pathlib.Path) -> None:
    lines: list[str] = []
    with pytest.raises(_KilledError):
        make(source, tmp_path / "labels", say=lines.append, eval_crop_ratio=1.0, advance=killed_after(0))
    note = tmp_path / "labels.units" / "teacher.json"
    note.write_text(to_json({**read_json(note), "accuracy": 0.125}))
    with pytest.raises(_KilledError):
        make(source, tmp_path / "labels", say=lines.append, eval_crop_ratio=1.0, advance=killed_after(0))
    with pytest.raises(_KilledError):  # of other crops it is not known
        make(source, tmp_path / "labels", say=lines.append, eval_crop_ratio=0.9, advance=killed_after(0))
    note.write_text(re.sub(r'("accuracy": 0\.)\d', r"\g<1>9", note.read_text()))
    with pytest.raises(_KilledError):  # nor where a digit is damaged
        make(source, tmp_path / "labels", say=lines.append, eval_crop_ratio=0.9, advance=killed_after(0))
    hits = []
    for index in range(IMAGES):
        example = source.examples[index]
        whole = generating_central(example["image"])
        hits.append(int((whole @ teachers.weights(0)).argmax() == example["label"]))
    accuracy = 100 * np.mean(hits)
    lines = but_for_compiling(lines)
    assert lines[:2] == [
        f"teacher        {accuracy:.2f} % of {source.name} right, at 16 × 16 pixels, crop ratio 1",
        f"teacher        12.50 % of {source.name} right, at 16 × 16 pixels, crop ratio 1",
    ]
    assert lines[2].endswith("crop ratio 0.9") and "12.50" not in lines[2]
    assert lines[3] == lines[2]


def but_for_compiling(lines: list[str]) -> list[str]:
    return [line for line in lines if not line.startswith("compil")]


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [([0.6], 0.0, 0.6), ([0.6], 0.9, 0.9), ([0.0], 0.0, 0.875), ([0.6, 0.6], 0.0, 0.6), ([1.0, 0.875], 0.9, 0.9)],
)
def test_a_teacher_is_evaluated_on_the_part_of_images_that_its_own_run_kept(
    source: Source,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    own: list[float],
    given: float,
    expected: float,
) -> None:
    lines = evaluated(source, tmp_path, monkeypatch, own, given)
    central = [central_crop(source.examples[index]["image"], SIZE, expected) for index in range(IMAGES)]
    seen = np.asarray(teachers.quarters(normalize(jax.numpy.asarray(np.stack(central)))))
    ranked = sum(softmax(seen @ teachers.weights(seed)) for seed in range(len(own))).argmax(axis=1)
    right = np.mean(ranked == [source.examples[index]["label"] for index in range(IMAGES)])
    assert but_for_compiling(lines) == [
        f"teacher        {100 * right:.2f} % of {source.name} right, at 16 × 16 pixels, crop ratio {expected:g}"
    ]


def test_teachers_of_other_crops_are_not_evaluated_together_unless_told_how(
    source: Source, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"not evaluated on the same part .*first: 0\.6, .*second: 0\.875.*--eval-crop-ratio"
    with pytest.raises(UserError, match=message):
        evaluated(source, tmp_path, monkeypatch, [0.6, 0.0], 0.0)


def evaluated(
    source: Source, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, own: list[float], given: float
) -> list[str]:
    """What is said of the first teachers, whose runs kept such parts of images."""

    def load(*arguments: Any, **options: Any) -> tuple[Teacher, ...]:
        return tuple(
            teacher._replace(eval_crop_ratio=ratio)
            for teacher, ratio in zip(load_teachers(*arguments, **options), own, strict=True)
        )

    monkeypatch.setattr(generating, "load_teachers", load)
    names = ",".join(f"tests.distill.teachers:{name}" for name in ("first", "second")[: len(own)])
    recipe, lines = RECIPE._replace(teacher=names, temperature=1.0), list[str]()
    with pytest.raises(_KilledError):
        make(source, tmp_path / "labels", recipe, say=lines.append, eval_crop_ratio=given, advance=killed_after(0))
    return lines


def test_labels_of_another_temperature_than_the_students_are_refused(source: Source, undisturbed: pathlib.Path) -> None:
    config = base_config()
    config.distill.soft_labels, config.distill.label_type = str(undisturbed), RECIPE.label_type
    with pytest.raises(
        UserError, match=r"soft_labels: they are of temperature 0\.5, but config\.distill\.temperature is 1"
    ):
        open_labels(config, source)
    config.distill.temperature = 0.5
    assert len(open_labels(config, source) or ()) == IMAGES


def generating_central(encoded: bytes) -> np.ndarray:
    crop = central_crop(encoded, SIZE, 1.0)
    return np.asarray(teachers.quarters(normalize(jax.numpy.asarray(crop[None]))))[0]


class _Broken:
    """The source's examples, two of which do not decode, and some of which the disk does not give."""

    def __init__(self, source: Source, unread: tuple[int, ...] = ()) -> None:
        self.examples = source.examples
        self.unread = unread

    def __len__(self) -> int:
        return len(self.examples)

    def keys(self) -> list[str]:
        return self.examples.keys()  # type: ignore[attr-defined]

    def __getitem__(self, index: int) -> Any:
        if index in self.unread:
            raise UnreadableError("Input/output error")
        example = self.examples[index]
        return {**example, "image": b"no image"} if index in (4, 7) else example


def test_images_that_are_broken_get_no_crops_and_are_told_of(source: Source, tmp_path: pathlib.Path) -> None:
    broken = dataclasses.replace(source, examples=_Broken(source))
    lines: list[str] = []
    out = generate(RECIPE, broken, source, str(tmp_path / "labels"), batch_size=1, num_threads=2, say=lines.append)
    found = PackedLabels(out, LabelType.parse(RECIPE.label_type), teachers.CLASSES)
    keys = broken.examples.keys()  # type: ignore[attr-defined]
    assert [len(found.read(key).boxes) for key in keys] == [0 if i in (4, 7) else CROPS for i in range(IMAGES)]
    assert found.crops == CROPS
    assert_labelled(source, keys[5], found.read(keys[5]))
    assert but_for_compiling(lines)[1:3] == [
        f"{keys[number]} gets no crops: it does not decode: it is no JPEG, PNG, WebP, BMP, TIFF, PPM or PGM, or one of "
        "an unusual kind"
        for number in (4, 7)
    ]
    with pytest.raises(UserError, match=rf"more than 1 images of .* are broken, {keys[7]} last.*raise --max-broken"):
        generate(RECIPE, broken, source, str(tmp_path / "strict"), batch_size=1, max_broken=1, say=lines.append)
    again = RECIPE._replace(reference=str(out))
    same = PackedLabels(make(broken, tmp_path / "again", again), LabelType.parse(RECIPE.label_type), teachers.CLASSES)
    assert len(same.read(keys[4]).boxes) == 0
    np.testing.assert_array_equal(same.read(keys[5]).boxes, found.read(keys[5]).boxes)


def test_what_the_disk_does_not_give_is_not_left_out_but_labelled_the_next_time(
    source: Source, tmp_path: pathlib.Path
) -> None:
    for authors_layout in (False, True):
        whole, lacking = (dataclasses.replace(source, examples=_Broken(source, unread)) for unread in ((), (9, 20)))
        keys = whole.examples.keys()  # type: ignore[attr-defined]
        out = tmp_path / f"labels{authors_layout}"
        with pytest.raises(UserError, match=r"2 images of .* could not be read, image 9 first.*run the same command"):
            make(lacking, out, authors_layout=authors_layout)
        make(whole, out, authors_layout=authors_layout)
        found = open_soft_labels(str(out), RECIPE.label_type, teachers.CLASSES)
        assert [len(found.read(key).boxes) for key in keys] == [0 if i in (4, 7) else CROPS for i in range(IMAGES)]


def test_memory_that_is_not_there_is_no_broken_image(source: Source, tmp_path: pathlib.Path) -> None:
    class Full(_Broken):
        def __getitem__(self, index: int) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        full = dataclasses.replace(source, examples=Full(source))
        generate(RECIPE, full, source, str(tmp_path / "labels"), batch_size=1, num_threads=2, say=lambda line: None)


def test_a_teacher_that_says_nan_is_named_before_anything_is_kept(source: Source, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"the teacher says of train/\w+/\w+ what no soft label can be.*nan"):
        make(source, tmp_path / "labels", RECIPE._replace(teacher="tests.distill.teachers:silent"))
    assert not list(tmp_path.rglob("unit-*"))


def test_files_that_were_taken_away_are_missed(source: Source, tmp_path: pathlib.Path) -> None:
    with pytest.raises(_KilledError):
        make(source, tmp_path / "labels", authors_layout=True, advance=killed_after(3))
    shutil.rmtree(tmp_path / "labels.units" / "labels")
    with pytest.raises(UserError, match=r"holds the soft labels of 27 images, expected those of 36"):
        make(source, tmp_path / "labels", authors_layout=True)


def test_labels_of_another_making_are_never_mixed(
    source: Source, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(_KilledError):
        make(source, tmp_path / "labels", advance=killed_after(2))
    with pytest.raises(UserError, match=r"of another making: there temperature is 0\.5, here 2\.0"):
        make(source, tmp_path / "labels", RECIPE._replace(temperature=2.0))
    with pytest.raises(UserError, match=r"labels is something else, or soft labels of another making"):
        make(source, undisturbed, RECIPE._replace(seed=1))
    before = contents(undisturbed)
    make(source, undisturbed)
    assert contents(undisturbed) == before
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine is something else"):
        make(source, tmp_path / "mine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_crops": 0}, "--num-crops is 0"),
        ({"num_crops": 10**20}, "--num-crops is 100000000000000000000, expected 1 to 65536"),
        ({"image_size": 10**20}, "--image-size is 100000000000000000000, expected 0 to 16384"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"crop_area": (0.5, 0.1)}, "--crop-area is"),
        ({"crop_aspect": (0.0, 1.0)}, "--crop-aspect is"),
        ({"flip": 1.5}, "--flip is 1.5"),
        ({"std": (1.0, 0.0, 1.0)}, "--std is"),
        ({"mean": (math.nan, 0.0, 0.0)}, "--mean is"),
        ({"label_type": "marginal_smoothing_k9"}, "names 9 of 6 classes"),
        ({"label_type": "soft"}, "there is no type of soft labels 'soft'"),
        ({"teacher": "tests.distill.teachers:third"}, "third"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(
    source: Source, changes: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=message):
        make(source, tmp_path / "labels", RECIPE._replace(**changes))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"eval_crop_ratio": 2.0}, "2.0. Expected"),
        ({"num_workers": -1}, "-1"),
        ({"num_threads": 100_000}, "--threads 100000"),
    ],
)
def test_settings_out_of_range_are_refused(
    source: Source, options: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make(source, tmp_path / "labels", **options)
    with pytest.raises(UserError, match="gs://bucket/x is not a folder"):
        generate(RECIPE, source, source, "gs://bucket/x")


def test_images_whose_labels_would_have_one_name_are_refused(source: Source, tmp_path: pathlib.Path) -> None:
    class Twice(_Broken):
        def keys(self) -> list[str]:
            return ["train/a/b", "train/a/b", "train/a/c"]

    twice = dataclasses.replace(source, examples=Twice(source))
    with pytest.raises(UserError, match="several images whose soft labels would be called train/a/b"):
        make(twice, tmp_path / "labels")


def test_a_damaged_unit_is_named(tmp_path: pathlib.Path) -> None:
    unit = plan_units(tmp_path, 4, CROPS)[1]
    assert unit.images == range(3, 4)
    labels = SoftLabels(*(np.zeros(shape) for shape in [(2, 4), (2,), (2, 3), (2, 3)]))
    write_unit(unit, {"train/ä": labels, "train/b": SoftLabels(*(part[:0] for part in labels))})
    (first, one), (second, none) = read_unit(unit.path)
    assert (first, second, len(one.boxes), len(none.boxes)) == ("train/ä", "train/b", 2, 0)
    unit.path.write_bytes(unit.path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"unit-00000003\.safetensors is not what was written"):
        list(read_unit(unit.path))


def test_the_command_makes_labels_and_says_how_to_train_from_them(
    image_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = [
        *(sys.executable, "-m", "sret_jax.distill", "--teacher=tests.distill.test_generate:of_three"),
        *(f"--data={image_folder}", "--eval-split=val", f"--out={tmp_path}/labels", "--num-crops=2"),
        *("--label-type=smoothing", "--image-size=8", "--batch-size=4", "--workers=1"),
        *("--temperature=2", "--background", "1", "2", "3"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{tmp_path}/labels is read by --config.distill.soft_labels={tmp_path}/labels "
        "--config.distill.label_type=smoothing --config.distill.temperature=2.0 "
        "'--config.data.background=(1, 2, 3)'\n"
    )
    steps = re.findall("^(compiling|compiled|teacher )( the .* step)?", done.stderr, re.MULTILINE)
    evaluation, labelling = " the evaluation step", " the labelling step"
    assert steps[:2] == [("compiling", evaluation), ("compiled", evaluation)]
    assert steps[2:] == [("teacher ", ""), ("compiling", labelling), ("compiled", labelling)]
    assert len(open_soft_labels(f"{tmp_path}/labels", "smoothing", 3)) == IMAGES


def of_three() -> Callable[[jax.Array], jax.Array]:
    return lambda images: teachers.first()(images)[:, :3]
