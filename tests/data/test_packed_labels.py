"""Tests of sret_jax.data.packed_labels and sret_jax.data.pack_soft_labels: the packed form, and how it is made."""

import concurrent.futures
import fcntl
import functools
import hashlib
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from safetensors.numpy import save

from sret_jax.data import pack_soft_labels as packing
from sret_jax.data import packed_labels, shards
from sret_jax.data.pack_soft_labels import pack_soft_labels
from sret_jax.data.packed_labels import PackedLabels, open_soft_labels, write_packed
from sret_jax.data.soft_labels import FolderLabels, LabelType, SoftLabels, write_label_file
from sret_jax.errors import UserError

CLASSES = 20
TYPES = ("hard", "smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10", "marginal_renorm_k5", "ori")
K5 = LabelType.parse("marginal_smoothing_k5")


def _labels(rng: np.random.Generator, label_type: LabelType, crops: int, num_classes: int = CLASSES) -> SoftLabels:
    """Labels of a teacher, in float32."""
    sides = rng.uniform(0.1, 1, (crops, 2))
    boxes = np.concatenate([rng.uniform(0, 1, (crops, 2)) * (1 - sides), sides], axis=1)
    k = label_type.size(num_classes)
    if label_type.kind == "ori":
        classes = np.tile(np.arange(num_classes), (crops, 1))
    else:  # steps of less than num_classes in all, so that no class comes twice
        steps = rng.integers(1, num_classes // k, (crops, k)) if k < num_classes else np.ones((crops, k), int)
        classes = (rng.integers(num_classes, size=(crops, 1)) + steps.cumsum(axis=1)) % num_classes
    probabilities = -np.sort(-rng.dirichlet(np.ones(k + 1), crops)[:, :k], axis=1)
    if label_type.kind == "hard":
        probabilities = np.ones((crops, 1))
    return SoftLabels(
        boxes.astype(np.float32), rng.random(crops) < 0.5, classes.astype(np.int32), probabilities.astype(np.float32)
    )


def _dataset(label_type: LabelType = K5) -> list[tuple[str, SoftLabels]]:
    """11 images with 3 to 13 crops; the names are no ASCII, and one is no UTF-8."""
    rng = np.random.default_rng(label_type.k)
    keys = [f"train/{'äb'[number % 2]}/{number}" for number in range(10)]
    return [(key, _labels(rng, label_type, 3 + i)) for i, key in enumerate([*keys, os.fsdecode(b"train/c/\xff")])]


def _parts(images: list[tuple[str, SoftLabels]], length: int = 4) -> list[Callable[[], Any]]:
    return [functools.partial(list, images[start : start + length]) for start in range(0, len(images), length)]


def _write(out: Path, parts: Any = None, **changes: Any) -> Path:
    options: dict[str, Any] = {"label_type": K5, "num_classes": CLASSES, "notes": {"teacher": "t", "temperature": 1.5}}
    options |= {"origin": "from a test", "workers": 1, "advance": lambda *_: None}
    write_packed(out, _parts(_dataset()) if parts is None else parts, **{**options, **changes})
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed packing of `_dataset()` gives; not to be changed."""
    return _write(tmp_path_factory.mktemp("packed") / "labels")


@pytest.fixture
def copied(packed: Path, tmp_path: Path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(packed, tmp_path / "labels")


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _write_folder(folder: Path, images: list[tuple[str, SoftLabels]], label_type: LabelType = K5) -> Path:
    for key, labels in images:
        path = folder / f"{key}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label_file(path, labels, label_type, dtype=np.float32)
    return folder


def _assert_rounded(found: SoftLabels, labels: SoftLabels) -> None:
    np.testing.assert_array_equal(found.boxes, labels.boxes.astype(np.float16), strict=True)
    np.testing.assert_array_equal(found.flips, labels.flips, strict=True)
    np.testing.assert_array_equal(found.classes, labels.classes, strict=True)
    np.testing.assert_array_equal(found.probabilities, labels.probabilities.astype(np.float16), strict=True)


@pytest.mark.parametrize("name", TYPES)
def test_packed_labels_are_those_of_the_authors_files_in_float16(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    label_type = LabelType.parse(name)
    images = _dataset(label_type)
    src = _write_folder(tmp_path / "labels", images, label_type)
    monkeypatch.setattr(packing, "_IMAGES_PER_FILE", 4)
    out = pack_soft_labels(str(src), str(tmp_path / "out"), label_type=name, num_classes=CLASSES)
    files = open_soft_labels(str(src), name, CLASSES)
    found = open_soft_labels(str(out), name, CLASSES)
    assert isinstance(files, FolderLabels) and isinstance(found, PackedLabels)
    assert len(found) == len(files) == 11
    assert list(found.keys()) == files.keys() == sorted(key for key, _ in images)
    assert (found.label_type, found.num_classes, found.crops) == (label_type, CLASSES, 3)
    for key, labels in images:
        _assert_rounded(found.read(key), labels)
        _assert_rounded(found.read(key), files.read(key))


def test_labels_of_all_classes_are_packed_in_the_order_of_classes(tmp_path: Path) -> None:
    label_type = LabelType.parse("ori")
    labels = _labels(np.random.default_rng(0), label_type, 3)
    turned = labels._replace(classes=labels.classes[:, ::-1], probabilities=labels.probabilities[:, ::-1])
    out = _write(tmp_path / "out", _parts([("train/a", turned)]), label_type=label_type)
    _assert_rounded(PackedLabels(out, label_type, CLASSES).read("train/a"), labels)


def test_500_crops_take_15000_bytes_on_disk_and_are_read_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [(f"train/n01440764/n01440764_{i}", _labels(rng, K5, 500, 1000)) for i in range(64)]
    out = _write(tmp_path / "out", _parts(images, 64), num_classes=1000)
    assert sum(path.stat().st_size for path in out.iterdir()) / len(images) <= 15_000
    (shard,) = out.glob("*array_record*")
    assert shard.name == "soft_labels.array_record-00000-of-00001"
    reader = ArrayRecordReader(str(shard))
    assert "group_size:1," in reader.writer_options_string()
    reader.close()


def test_classes_are_kept_up_to_65536(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = _labels(rng, K5, 30, 2**16)
    labels.classes[0, 0] = 65_535
    out = _write(tmp_path / "out", _parts([("train/a", labels)]), num_classes=2**16)
    _assert_rounded(PackedLabels(out, K5, 2**16).read("train/a"), labels)
    with pytest.raises(UserError, match=r"65537 classes are too many for packed soft labels\. Expected at most 65536"):
        _write(tmp_path / "more", _parts([("train/a", labels)]), num_classes=2**16 + 1)


def test_the_folder_says_what_is_in_it(packed: Path) -> None:
    description = json.loads((packed / "soft_labels.json").read_text())
    index = (packed / "index.npy").read_bytes()
    names = [f"soft_labels.array_record-{number:05d}-of-00003" for number in range(3)]
    assert sorted(_content(packed)) == sorted([*names, "index.npy", "packed_from.sha256", "soft_labels.json"])
    sha256 = description.pop("sha256")
    assert sha256 == hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
    assert description == {
        "version": 1,
        "label_type": "marginal_smoothing_k5",
        "num_classes": CLASSES,
        "images": 11,
        "crops": 3,
        "shards": [
            {"images": images, "bytes": (packed / name).stat().st_size}
            for name, images in zip(names, [4, 4, 3], strict=True)
        ],
        "index_sha256": hashlib.sha256(index).hexdigest(),
        "notes": {"teacher": "t", "temperature": 1.5},
    }
    assert PackedLabels(packed, K5, CLASSES).notes == {"teacher": "t", "temperature": 1.5}


def test_images_without_labels_are_named(packed: Path) -> None:
    labels = PackedLabels(packed, K5, CLASSES)
    keys = [key for key, _ in _dataset()]
    assert labels.missing([]) == labels.missing(keys) == []
    assert labels.missing(["train/x", *keys, "val/ä/1"]) == ["train/x", "val/ä/1"]
    for number in range(100):  # hashes before, between and behind all others
        with pytest.raises(
            UserError, match=rf"labels lacks the image train/x/{number}: it has no soft labels\. Expect"
        ):
            labels.read(f"train/x/{number}")


class _StoppedError(BaseException):
    pass


def _stopping_parts(at: int, images: list[tuple[str, SoftLabels]]) -> list[Callable[[], Any]]:
    """Parts that are stopped before an image."""

    def part(start: int) -> Iterator[tuple[str, SoftLabels]]:
        for number in range(start, min(start + 4, len(images))):
            if number == at:
                raise _StoppedError
            yield images[number]

    return [functools.partial(part, start) for start in range(0, len(images), 4)]


@pytest.mark.parametrize("at", [0, 3, 4, 6, 10])
def test_a_packing_that_was_stopped_between_images_ends_the_same(at: int, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(_StoppedError):
        _write(out, _stopping_parts(at, _dataset()))
    assert not out.exists()
    incomplete = tmp_path / "out.incomplete"
    # What a kill leaves, where an exception has it removed.
    (incomplete / "soft_labels.array_record-00002-of-00003.incomplete-123").write_bytes(b"half")
    # The others are written while the stopped one is given up, or not: never a part of one.
    kept = {path: path.stat().st_ino for path in incomplete.glob("*-of-00003")}
    assert all(path.read_bytes() == (packed / path.name).read_bytes() for path in kept)
    assert at < 4 or incomplete / "soft_labels.array_record-00000-of-00003" in kept
    assert _content(_write(out)) == _content(packed)
    assert all((out / path.name).stat().st_ino == number for path, number in kept.items()), "written again"


@pytest.mark.parametrize("moment", range(21))
def test_a_packing_that_was_stopped_at_any_step_ends_the_same(
    moment: int, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > moment:
                raise _StoppedError
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_count_and_checksum", stopping(shards._count_and_checksum))
        patched.setattr(packed_labels, "replace", stopping(packed_labels.replace))
        patched.setattr(packed_labels, "_read_shard", stopping(packed_labels._read_shard))
        patched.setattr(os, "replace", stopping(os.replace))
        patched.setattr(os, "sync", stopping(os.sync))
        if moment < 20:
            with pytest.raises(_StoppedError):
                _write(tmp_path / "out", advance=stopping(lambda *_: None))
            assert not (tmp_path / "out").exists()
        else:
            _write(tmp_path / "out", advance=stopping(lambda *_: None))
    assert _content(_write(tmp_path / "out")) == _content(packed)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_what_belongs_into_a_file_is_sent_to_the_process_that_writes_it(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sending(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            return super().submit(*pickle.loads(pickle.dumps((function, *args))), **kwargs)

    monkeypatch.setattr(shards, "_executor", Sending)
    advanced = []
    out = _write(tmp_path / "out", workers=3, advance=lambda *counts: advanced.append(counts))
    assert _content(out) == _content(packed)
    assert advanced == [(1, 3)] * 3


def test_packing_again_writes_nothing(copied: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copied.iterdir()}
    _write(copied, _stopping_parts(0, _dataset()))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copied.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        {"origin": "of another teacher"},
        {"notes": {"teacher": "other"}},
        {"label_type": LabelType.parse("marginal_renorm_k5")},
        {"num_classes": 21},
        {"parts": _parts(_dataset(), 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_other_labels_are_not_mixed_with_what_was_packed(
    is_complete: bool, change: dict[str, Any], copied: Path, tmp_path: Path
) -> None:
    place = copied if is_complete else copied.rename(tmp_path / "labels.incomplete")
    before = _content(place)
    with pytest.raises(UserError, match=f"{place} is something else, or was packed from other soft labels"):
        _write(tmp_path / "labels", **change)
    assert _content(place) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="out is something else"):
        _write(tmp_path / "out")


def test_two_processes_do_not_pack_into_the_same_folder(tmp_path: Path) -> None:
    with (tmp_path / ".out.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another process is packing into {tmp_path}/out: wait"):
            _write(tmp_path / "out")


def test_an_image_may_come_once_only(tmp_path: Path) -> None:
    images = _dataset()
    with pytest.raises(UserError, match=r"holds the soft labels of train/b/1 twice. Expected those of each image once"):
        _write(tmp_path / "out", _parts([*images, images[1]]))
    assert not (tmp_path / "out").exists()


def test_names_with_the_same_hash_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_labels, "_hashes", lambda keys: np.array([len(key) for key in keys], np.uint64))
    with pytest.raises(UserError, match="images train/ä/0 and train/b/1 cannot be told apart by their hashes: rename"):
        _write(tmp_path / "out")


def test_nothing_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no soft labels to pack"):
        _write(tmp_path / "out", _parts([])[:1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": np.full((3, 5), 7, np.int32)}, "crop 0 has a class twice"),
        ({"boxes": np.ones((3, 4), np.float32)}, "crop 0 has a box outside the image"),
        ({"probabilities": np.full((3, 5), np.nan)}, "crop 0 has the probabilities"),
        ({"flips": np.zeros(2, bool)}, r"they have the shapes .*expected \[\(3, 4\), \(3,\), \(3, 5\), \(3, 5\)\]"),
        ({"classes": np.zeros((3, 4), np.int32)}, "they have the shapes"),
    ],
)
def test_labels_that_cannot_be_used_are_not_packed(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    images = [(key, labels._replace(**change)) for key, labels in _dataset()[:1]]
    with pytest.raises(UserError, match=f"soft labels of train/ä/0 cannot be packed: {message}"):
        _write(tmp_path / "out", _parts(images))


def test_a_damaged_record_is_named_and_others_are_read(copied: Path) -> None:
    shard = copied / "soft_labels.array_record-00001-of-00003"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    labels, errors = PackedLabels(copied, K5, CLASSES), {}
    for key, expected in _dataset():
        try:
            _assert_rounded(labels.read(key), expected)
        except UserError as error:
            errors[key] = str(error)
    ((key, message),) = errors.items()
    assert key in [key for key, _ in _dataset()[4:8]]
    assert message.startswith(f"{shard} holds no soft labels of {key} that can be used: Corrupted"), message
    with pytest.raises(UserError, match=str(shard)):
        list(labels.keys())


def test_labels_of_another_image_are_refused(copied: Path) -> None:
    first, second = (copied / f"soft_labels.array_record-0000{number}-of-00003" for number in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    first.rename(copied / "moved")
    second.rename(first)
    (copied / "moved").rename(second)
    labels = PackedLabels(copied, K5, CLASSES)
    for path, key, found in [(second, "train/ä/4", "train/ä/0"), (first, "train/b/3", "train/b/7")]:
        with pytest.raises(UserError, match=f"^{path} holds the soft labels of {found} in place of those of {key}"):
            labels.read(key)
    _assert_rounded(labels.read("train/ä/8"), dict(_dataset())["train/ä/8"])


def test_labels_that_no_teacher_gives_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((key, labels),) = _dataset()[:1]
    with monkeypatch.context() as careless:
        careless.setattr(packed_labels, "check_labels", lambda *_: None)
        out = _write(tmp_path / "out", _parts([(key, labels._replace(classes=np.full((3, 5), 7, np.int32)))]))
    with pytest.raises(UserError, match=rf"-00000-of-00001 holds no soft labels of {key} .*: crop 0 has a class twice"):
        PackedLabels(out, K5, CLASSES).read(key)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"no safetensors", "header"),
        (save({"key": np.zeros(3, np.uint8)}), r"a record holds \{'key': .*, expected .*'boxes': \('float16'"),
    ],
)
def test_records_of_another_kind_are_refused(
    record: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_labels, "_to_record", lambda *_: record)
    with pytest.raises(UserError, match=f"array_record-00000-of-00003 is no longer what was written.*{message}"):
        _write(tmp_path / "out")


def test_a_damaged_file_is_written_again_when_packing_goes_on(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(_StoppedError):
        patched.setattr(packed_labels, "_write_index", lambda *_: (_ for _ in ()).throw(_StoppedError))
        _write(tmp_path / "out")
    shard = tmp_path / "out.incomplete" / "soft_labels.array_record-00001-of-00003"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=f"{shard} is no longer what was written.*delete this file and run the same"):
        _write(tmp_path / "out")
    shard.unlink()
    assert _content(_write(tmp_path / "out")) == _content(packed)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("index.npy", lambda content: content[:-1] + b"\7", "is not what was written"),
        ("index.npy", lambda content: content[:-16], "is not what was written"),
        ("index.npy", None, "cannot be read: No such file"),
        ("soft_labels.array_record-00001-of-00003", None, "is missing"),
        ("soft_labels.array_record-00002-of-00003", lambda content: content[:-9], r"has \d+ bytes, expected \d+"),
        ("soft_labels.json", lambda content: content[:100], "is not what was written"),
        ("soft_labels.json", lambda content: b"[]", "is not what was written"),
        (
            "soft_labels.json",
            lambda content: content.replace(b'"crops": 3', b'"crops": "3"'),
            "is not what was written",
        ),
        ("soft_labels.json", lambda content: content.replace(b'"bytes"', b'"size"'), "is not what was written"),
        (
            "soft_labels.json",
            lambda content: content.replace(b'"version": 1', b'"version": 2'),
            "is of version 2, expected 1",
        ),
        (
            "soft_labels.json",
            lambda content: content.replace(b'"temperature": 1.5', b'"temperature": 2.5'),
            "is not wh",
        ),
        ("soft_labels.json", lambda content: content.replace(b'"crops": 3', b'"crops": 7'), "is not what was written"),
        ("soft_labels.json", lambda content: content.replace(b'"sha256"', b'"sha255"'), "is not what was written"),
        ("soft_labels.json", lambda content: b"[" * 200_000, "is not what was written"),
        ("soft_labels.json", lambda content: b"\xff\xfe", "is not what was written"),
    ],
)
def test_a_folder_that_is_not_what_was_packed_is_refused(
    name: str, damage: Callable[[bytes], bytes] | None, message: str, copied: Path
) -> None:
    path = copied / name
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(content))
        assert path.read_bytes() != content
    with pytest.raises(UserError, match=f"{path} {message}.*pack"):
        open_soft_labels(str(copied), K5.name, CLASSES)


def test_no_changed_byte_of_packed_labels_is_used_in_silence(
    packed: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)

    def contents() -> Any:
        labels = PackedLabels(copied, K5, CLASSES)
        keys = [key for key, _ in _dataset()]
        read = [[part.tolist() for part in labels.read(key)] for key in keys]
        return read, sorted(labels.keys()), labels.missing(keys), labels.crops, labels.notes, len(labels)

    sound, noticed = contents(), 0
    generator = random.Random(0)
    for file in sorted(copied.iterdir()) * 30:
        content = (packed / file.name).read_bytes()
        place = generator.choice([place for place, byte in enumerate(content) if byte])  # most of a small file is zeros
        changed = bytes([content[place] ^ generator.randrange(1, 256)])
        file.write_bytes(content[:place] + changed + content[place + 1 :])
        try:
            assert contents() == sound, (file.name, place, changed)
        except UserError as error:
            assert str(copied) in str(error) and "\n" not in str(error)
            noticed += 1
        file.write_bytes(content)
    assert noticed > 100


def test_descriptions_without_a_hash_are_read_but_not_on_trust(copied: Path) -> None:
    path = copied / "soft_labels.json"
    description = json.loads(path.read_text())
    del description["sha256"]
    path.write_text(json.dumps(description))
    assert len(PackedLabels(copied, K5, CLASSES)) == 11
    hostile = [{"images": -1}, {"shards": [{"images": 10**30, "bytes": 1}]}, {"shards": [7]}, {"label_type": "soft"}]
    hostile += [{"label_type": [1]}, {"shards": []}, {"notes": {"a": []}}, {"more": 1}, {"images": True}]
    for change in hostile:
        path.write_text(json.dumps(description | change))
        with pytest.raises(UserError, match=f"{path} is not what was written"):
            PackedLabels(copied, K5, CLASSES)


def test_a_disk_that_comes_back_is_read_again(copied: Path, tmp_path: Path) -> None:
    labels = PackedLabels(copied, K5, CLASSES)
    copied.rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"of train/b/1 that can be used: .*No such file"):
        labels.read("train/b/1")
    (tmp_path / "away").rename(copied)
    _assert_rounded(labels.read("train/b/1"), dict(_dataset())["train/b/1"])


def test_a_reader_is_sent_without_its_index_and_read_by_threads(packed: Path) -> None:
    labels = PackedLabels(packed, K5, CLASSES)
    labels.read("train/b/1")
    sent = pickle.dumps(labels)
    assert (packed / "index.npy").read_bytes()[-50:] not in sent and len(sent) < 2000
    received = pickle.loads(sent)
    images = _dataset() * 20
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        found = list(executor.map(received.read, [key for key, _ in images]))
    for labels_found, (_, expected) in zip(found, images, strict=True):
        _assert_rounded(labels_found, expected)


@pytest.mark.parametrize(
    ("label_type", "num_classes", "message"),
    [
        ("marginal_smoothing_k10", CLASSES, "of type marginal_smoothing_k5, expected marginal_smoothing_k10"),
        ("marginal_renorm_k10", CLASSES, "of type marginal_smoothing_k5, expected marginal_renorm_k10"),
        ("hard", CLASSES, "of type marginal_smoothing_k5, expected hard"),
        ("ori", CLASSES, "of type marginal_smoothing_k5, expected ori"),
        ("marginal_smoothing_k5", 1000, "of 20 classes, expected 1000"),
        ("marginal_smoothing_k5", 3, "names 5 of 3 classes"),
        ("soft", CLASSES, "no type of soft labels 'soft'"),
    ],
)
def test_labels_of_another_type_or_dataset_are_refused(
    label_type: str, num_classes: int, message: str, packed: Path
) -> None:
    with pytest.raises(UserError, match=message):
        open_soft_labels(str(packed), label_type, num_classes)


def test_smoothed_and_renormalised_labels_are_the_same_numbers(packed: Path) -> None:
    labels = open_soft_labels(str(packed), "marginal_renorm_k5", CLASSES)
    assert labels.label_type.name == "marginal_renorm_k5"
    _assert_rounded(labels.read("train/b/1"), dict(_dataset())["train/b/1"])


def test_only_the_right_folder_is_opened_and_others_say_which_it_is(packed: Path, tmp_path: Path) -> None:
    files = _write_folder(tmp_path / "data" / "imagenet", _dataset()[:2])
    (files / "train" / "ä" / "deeper").mkdir()
    for given in (files.parent, files / "train", files / "train" / "ä", files / "nowhere", files / "a.tar"):
        with pytest.raises(UserError, match=f"^{given} (holds no|is not a).*: give {files}$"):
            open_soft_labels(str(given), K5.name, CLASSES)
    for given in (packed.parent, packed / "soft_labels.json"):
        with pytest.raises(UserError, match=f"^{given} (holds no|is not a).*: give {packed}$"):
            open_soft_labels(str(given), K5.name, CLASSES)
    assert len(open_soft_labels(str(files), K5.name, CLASSES)) == 2
    for given, state in [(tmp_path / "nowhere", "is not a folder"), (tmp_path, "holds no soft labels")]:
        with pytest.raises(UserError, match=f"^{given} {state}.*: check the path$"):
            open_soft_labels(str(given), K5.name, CLASSES)
    with pytest.raises(UserError, match=r"gs://bucket/labels is not a folder.*mount the bucket"):
        open_soft_labels("gs://bucket/labels", K5.name, CLASSES)


def test_an_incomplete_packing_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(_StoppedError):
        _write(tmp_path / "out", _stopping_parts(6, _dataset()))
    for given in ("out", "out.incomplete"):
        with pytest.raises(UserError, match=r"out\.incomplete holds soft labels that are not complete.*same command"):
            open_soft_labels(str(tmp_path / given), K5.name, CLASSES)


def test_packing_files_goes_on_and_keeps_teachers_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_IMAGES_PER_FILE", 4)
    images = _dataset()
    src = _write_folder(tmp_path / "labels", images)
    done = pack_soft_labels(str(src), str(tmp_path / "done"), num_classes=CLASSES)

    def stop(*_: int) -> None:
        raise _StoppedError

    with pytest.raises(_StoppedError):
        pack_soft_labels(str(src), str(tmp_path / "out"), num_classes=CLASSES, advance=stop)
    other = _write_folder(
        tmp_path / "other",
        [(key, labels._replace(probabilities=labels.probabilities / 2)) for key, labels in images],
    )
    for out in ("out", "done"):
        with pytest.raises(UserError, match=f"{out}.* was packed from other soft labels"):
            pack_soft_labels(str(other), str(tmp_path / out), num_classes=CLASSES)
    more = _write_folder(tmp_path / "more", [*images, ("train/ö/1", images[0][1])])
    with pytest.raises(UserError, match=r"out.* was packed from other soft labels"):
        pack_soft_labels(str(more), str(tmp_path / "out"), num_classes=CLASSES)
    # The same labels may have been moved.
    moved = src.rename(tmp_path / "moved")
    assert _content(pack_soft_labels(str(moved), str(tmp_path / "out"), num_classes=CLASSES)) == _content(done)


def test_the_command_packs_and_says_how_to_read_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    renorm = LabelType.parse("marginal_renorm_k5")
    src, out = _write_folder(tmp_path / "labels", _dataset(renorm), renorm), tmp_path / "out"
    command = ["pack", str(src), str(out), "--label-type=marginal_renorm_k5", f"--num-classes={CLASSES}", "--workers=1"]
    monkeypatch.setattr(sys, "argv", command)
    packing.main()
    printed = capsys.readouterr()
    size = sum(path.stat().st_size for path in out.iterdir()) / 11
    assert printed.err == ""
    assert f"11 images with 3 crops or more, {size:,.0f} bytes an image" in printed.out
    assert f"--config.distill.soft_labels={out} --config.distill.label_type=marginal_renorm_k5" in printed.out
    assert len(open_soft_labels(str(out), "marginal_renorm_k5", CLASSES)) == 11

    for src_given, message in [
        (out, f"error: {out} is packed already"),
        (tmp_path / "no", "error: .* is not a folder"),
    ]:
        monkeypatch.setattr(sys, "argv", ["pack", str(src_given), str(tmp_path / "again"), *command[3:]])
        with pytest.raises(SystemExit, match=message):
            packing.main()
    assert not (tmp_path / "again").exists()


def test_a_file_that_cannot_be_used_ends_the_command(tmp_path: Path) -> None:
    src = _write_folder(tmp_path / "labels", _dataset())
    (src / "train" / "b" / "3.tar").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"train/b/3\.tar"):
        pack_soft_labels(str(src), str(tmp_path / "out"), num_classes=CLASSES)
    with pytest.raises(UserError, match=r"gs://bucket/out is not a folder.*mount the bucket"):
        pack_soft_labels(str(src), "gs://bucket/out", num_classes=CLASSES)
