"""Tests of sret_jax.data.sources."""

import io
import json
import pickle
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from sret_jax.data import digits, sources
from sret_jax.data.decode import decode_small
from sret_jax.data.image_file import Colour
from sret_jax.data.reading import UnreadableError
from sret_jax.data.sources import Source, open_source
from sret_jax.errors import UserError


def test_digits_are_scikit_learns_in_a_stratified_split(digits_folder: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    for split, split_images, split_labels in [("train", parts[0], parts[2]), ("test", parts[1], parts[3])]:
        source = open_source("digits", split, str(digits_folder))
        assert (source.name, source.num_classes) == (f"digits {split}", 10)
        assert len(source.examples) == {"train": 1437, "test": 360}[split]
        examples = [source.examples[i] for i in range(len(source.examples))]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(example["image"]))) for example in examples])
        assert pixels.dtype == np.uint8 and (pixels.min(), pixels.max()) == (0, 255)
        # 17 levels of grey, 255 / 16 = 15.9 apart: going back must give each of scikit-learn's values.
        np.testing.assert_array_equal(np.round(pixels / 255 * 16).reshape(-1, 64), split_images)
        np.testing.assert_array_equal([example["label"] for example in examples], split_labels)


def test_digits_are_written_once(digits_folder: Path) -> None:
    files = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in digits_folder.rglob("*")}
    open_source("digits", "test", str(digits_folder))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in digits_folder.rglob("*")} == files


def test_digits_are_written_without_tensorflow_and_quietly(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from sret_jax.data.sources import open_source\n"
        "source = open_source('digits', 'train', sys.argv[1])\n"
        "assert len(source.examples) == 1437 and source.examples[0]['image']\n"
        "assert not any(name.partition('.')[0] == 'tensorflow' for name in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from sret_jax.data import digits, sources\n"
        "calls = []\n"
        "digits._encode_png = lambda image: calls.append(image) or (os._exit(9) if len(calls) > 1700 else b'bytes')\n"
        "sources.open_source('digits', 'train', sys.argv[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], check=False).returncode == 9
    assert list((tmp_path / "digits").iterdir()), "the writer was killed before it began"
    source = open_source("digits", "train", str(tmp_path))
    assert len(source.examples) == 1437
    assert source.examples[0]["image"].startswith(b"\x89PNG")


def test_the_slower_of_two_writers_reads_what_the_faster_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_png, faster = digits._encode_png, []

    def encode_after_the_faster_writer(image: np.ndarray) -> bytes:
        monkeypatch.setattr(digits, "_encode_png", encode_png)
        faster.append(open_source("digits", "train", str(tmp_path)))
        return encode_png(image)

    monkeypatch.setattr(digits, "_encode_png", encode_after_the_faster_writer)
    slower = open_source("digits", "train", str(tmp_path))
    assert len(faster) == 1
    assert slower.examples[7] == faster[0].examples[7]
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_a_folder_that_cannot_be_written_to_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"digits cannot be written below .*file.*TFDS_DATA_DIR"):
        open_source("digits", "train", str(tmp_path / "file"))


def test_a_full_disk_is_the_users_error_and_the_digits_can_be_written_later(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # Python ignores the signal; writing fails.
    try:
        with pytest.raises(UserError, match="digits cannot be written below"):
            open_source("digits", "train", str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(open_source("digits", "train", str(tmp_path)).examples) == 1437


def test_an_unknown_dataset_is_the_users_error_and_asks_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda *args: calls.append(args))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: calls.append(args))
    for name in ["imagenet2012", "no_such_dataset:1.0.0", "../elsewhere"]:
        with pytest.raises(UserError) as raised:
            open_source(name, "train", str(tmp_path))
        for part in [name, str(tmp_path / name.partition(":")[0]), "`digits`", "`synthetic`", f"tfds build {name}"]:
            assert part in str(raised.value)
    assert calls == []


def test_the_default_folder_is_tfds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.tfds_constants, "DATA_DIR", "~/a folder that is not there")
    with pytest.raises(UserError, match=str(Path.home() / "a folder that is not there" / "mnist")):
        open_source("mnist", "train")


def test_a_part_of_a_split_can_be_opened(digits_folder: Path) -> None:
    whole, part = (open_source("digits", split, str(digits_folder)) for split in ["train", "train[100:110]"])
    assert [part.examples[i] for i in range(10)] == [whole.examples[i] for i in range(100, 110)]
    assert len(part.examples) == 10


def test_a_folder_of_images_is_opened_by_its_path(image_folder: Path) -> None:
    source = open_source("folder", "validation", str(image_folder))
    assert (source.num_classes, source.class_names) == (3, ("ant", "bee", "cat"))
    assert source.name == f"{image_folder} validation"
    assert [source.examples[index]["label"] for index in range(len(source.examples))] == [0, 0, 2, 2, 2, 2]
    with pytest.raises(UserError, match="`folder` has no path"):
        open_source("folder", "train")


def test_a_folder_of_images_taken_for_a_dataset_names_the_source_that_reads_it(image_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset 'imagenet2012'.*choose the source `folder`.*sret_jax.data.pack"):
        open_source("imagenet2012", "train", str(image_folder))


def test_classes_without_names_are_called_by_their_numbers(digits_folder: Path) -> None:
    assert open_source("digits", "train", str(digits_folder)).class_names == tuple("0123456789")
    assert open_source("synthetic", "train", num_classes=3).class_names == ("0", "1", "2")


def test_examples_that_were_no_files_have_no_names(digits_folder: Path) -> None:
    assert open_source("digits", "train", str(digits_folder)).examples.file_name(7) == ""
    assert not hasattr(open_source("synthetic", "train").examples, "file_name")


def test_without_names_of_files_the_key_is_the_number_in_the_whole_split(digits_folder: Path) -> None:
    whole, part = (open_source("digits", split, str(digits_folder)).examples for split in ("train", "train[5:9]+test"))
    assert whole.keys()[:2] == ["train/00000000", "train/00000001"]
    assert len(whole.keys()) == len(set(whole.keys())) == len(whole)
    assert part.keys()[:5] == ["train/00000005", "train/00000006", "train/00000007", "train/00000008", "test/00000000"]
    for index in (0, 3, 4, len(part) - 1):
        assert part[index]["key"] == part.keys()[index]
    assert part[1] == whole[6]
    noise = open_source("synthetic", "train", length=3).examples
    assert [noise[index]["key"] for index in range(3)] == noise.keys() == [f"train/{i:08d}" for i in range(3)]


def test_a_dataset_may_have_any_features_beside_image_and_label(tmp_path: Path) -> None:
    class Named(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "named"
        VERSION = tfds.core.Version("2.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=["yes", "no"]),
                "file_name": tfds.features.Text(),
                "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Any]]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[Any]:
            for number in range(2):
                image = digits._encode_png(np.full((3, 3, 3), number, np.uint8))
                yield number, {"image": image, "label": 1 - number, "file_name": f"{image[-9]}.png", "boxes": []}

    Named(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    by_name = open_source("named", "train", str(tmp_path))
    by_its_folder = open_source(str(tmp_path / "named" / "2.0.0"), "train")
    for source in [by_name, by_its_folder]:
        assert (source.num_classes, source.class_names) == (2, ("yes", "no"))
        for index in range(2):
            example = source.examples[index]
            assert example.keys() == {"image", "label", "key"}
            number = 1 - example["label"]
            assert example["key"] == f"train/{['yes', 'no'][example['label']]}/{example['image'][-9]}"
            assert example["image"] == digits._encode_png(np.full((3, 3, 3), number, np.uint8))
            assert source.examples.file_name(index) == f"{example['image'][-9]}.png"


def test_an_unknown_split_names_the_splits(digits_folder: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'validation'.*\['test', 'train'\]"):
        open_source("digits", "validation", str(digits_folder))


def test_a_dataset_without_images_is_the_users_error(tmp_path: Path) -> None:
    class Words(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "words"
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            features = {"word": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager: object) -> dict[str, Iterator[Any]]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator[Any]:
            yield 0, {"word": "sliced", "label": 1}

    Words(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match=r"'words' has the features \['label', 'word'\].*`image`"):
        open_source("words", "train", str(tmp_path))


def test_a_dataset_that_cannot_be_read_in_random_order_is_the_users_error(digits_folder: Path, tmp_path: Path) -> None:
    dataset = tmp_path / "records" / "1.0.0"
    shutil.copytree(digits_folder / "digits" / "1.0.0", dataset)
    info = json.loads((dataset / "dataset_info.json").read_text())
    (dataset / "dataset_info.json").write_text(json.dumps(info | {"name": "records", "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"stored as tfrecord.*Expected array_record"):
        open_source("records", "train", str(tmp_path))


def test_a_damaged_record_is_unreadable_at_once(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", None)
    shutil.copytree(digits_folder / "digits", tmp_path / "digits")
    (file,) = tmp_path.rglob("*train.array_record*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    sound, damaged = (open_source("digits", "train", str(folder)).examples for folder in [digits_folder, tmp_path])
    broken = []
    for index in range(len(sound)):
        try:
            assert damaged[index] == sound[index]
        except UnreadableError as error:
            assert "Corrupted" in str(error)
            broken.append(index)
    assert len(broken) == 1
    assert damaged.file_name(broken[0]) == ""


def test_a_file_that_could_not_be_opened_for_a_while_is_read_later(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits_folder / "digits", tmp_path / "digits")
    (file,) = tmp_path.rglob("*train.array_record*")
    examples = open_source("digits", "train", str(tmp_path)).examples
    away = file.rename(tmp_path / "away")
    with pytest.raises(UnreadableError, match=r"open\(\) failed: No such file or directory"):
        examples[7]
    # In its place something of which the system says what it says of a network disk that hangs.
    file.symlink_to(tmp_path / "name too long")
    (tmp_path / "name too long").symlink_to(file)
    monkeypatch.setattr("sret_jax.data.reading._LASTING", ())
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            file.unlink()
            away.rename(file)

    monkeypatch.setattr("time.sleep", sleep)
    assert examples[7] == open_source("digits", "train", str(digits_folder)).examples[7]
    assert pauses == [0.1, 1.0]


def test_a_dataset_may_have_more_files_than_a_process_usually_opens(digits_folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        open_source("digits", "train", str(digits_folder))
        allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert most == before[1]
        assert allowed == 65_536 or allowed == most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_digest_tells_other_data_apart(image_folder: Path, digits_folder: Path, tmp_path: Path) -> None:
    whole, again, part = (
        open_source("folder", split, str(image_folder)).digest() for split in ("train", "train", "train[:35]")
    )
    assert whole == again != part
    copied = shutil.copytree(image_folder, tmp_path / "images")
    assert open_source("folder", "train", str(copied)).digest() == whole
    (copied / "train" / "ant" / "ant_1.JPEG").rename(copied / "train" / "ant" / "ant_100.JPEG")
    assert open_source("folder", "train", str(copied)).digest() != whole
    parts = [open_source("digits", split, str(digits_folder)).digest() for split in ("train[:9]", "train[9:18]")]
    assert parts[0] != parts[1]
    classes = [open_source("synthetic", "train", num_classes=number).digest() for number in (3, 4)]
    assert len({whole, part, *classes}) == 4


def test_a_dataset_that_lacks_a_file_is_the_users_error(digits_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_folder / "digits", tmp_path / "digits")
    (file,) = tmp_path.rglob("*train.array_record*")
    file.unlink()
    for split in ["train", "train[:10]"]:
        with pytest.raises(UserError, match=f"'digits' lacks {file}. Expected all"):
            open_source("digits", split, str(tmp_path))
    assert len(open_source("digits", "test", str(tmp_path)).examples) == 360


def test_a_synthetic_example_depends_on_its_split_and_index_alone() -> None:
    train, again, test = (open_source("synthetic", split, image_size=16) for split in ["train", "train", "test"])
    for index in [0, 1, 9_999]:
        np.testing.assert_array_equal(train.examples[index]["image"], again.examples[index]["image"])
        assert train.examples[index]["label"] == again.examples[index]["label"]
        assert not np.array_equal(train.examples[index]["image"], test.examples[index]["image"])
    assert not np.array_equal(train.examples[0]["image"], train.examples[1]["image"])


def test_synthetic_examples_have_the_shape_length_and_classes_asked_for() -> None:
    source = open_source("synthetic", "train", image_size=24, num_classes=7, length=400)
    assert (source.num_classes, len(source.examples)) == (7, 400)
    examples = [source.examples[i] for i in range(400)]
    assert {example["label"] for example in examples} == set(range(7))
    pixels = np.stack([example["image"] for example in examples])
    assert pixels.shape == (400, 24, 24, 3) and pixels.dtype == np.uint8
    assert (pixels.min(), pixels.max()) == (0, 255)
    with pytest.raises(IndexError):
        source.examples[400]


class _Counted:
    """Examples of some images, that count how often each is read."""

    def __init__(self, *images: bytes | np.ndarray) -> None:
        self.images, self.reads = images, [0] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, object]:
        self.reads[index] += 1
        return {"image": self.images[index], "label": index, "key": str(index)}

    def keys(self) -> list[str]:
        return ["all"]


def _file(pixels: np.ndarray, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def test_small_images_are_read_and_decoded_once_and_others_as_ever() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    large, pixels = np.zeros((160, 160, 3), np.uint8), np.ones((8, 8, 1), np.uint8)
    counted = _Counted(_file(grey), _file(grey, "JPEG"), _file(large), b"no image", b"", pixels)
    kept = sources.keeping_decoded(Source(counted, 6, "some"))
    assert (kept.name, kept.digest()) == ("some", Source(counted, 6, "some").digest())
    seen = [[kept.examples[index] for index in range(len(kept.examples))] for _ in range(2)]
    assert counted.reads == [1, 2, 2, 2, 2, 2]
    for examples in seen:
        np.testing.assert_array_equal(examples[0]["image"], np.repeat(grey[..., None], 3, axis=2))
        assert [example["image"] for example in examples[1:5]] == list(counted.images[1:5])
        assert examples[5]["image"] is pixels
        assert [(example["label"], example["key"]) for example in examples] == [(i, str(i)) for i in range(6)]
    assert kept.examples.keys() == ["all"]
    assert not hasattr(kept.examples, "file_name")
    with pytest.raises(ValueError, match="read-only"):
        seen[0][0]["image"][0] = 1


def test_kept_images_go_to_other_processes() -> None:
    kept = sources.keeping_decoded(Source(_Counted(_file(np.zeros((8, 8), np.uint8))), 1, "one"))
    assert kept.examples[0]["image"].shape == (8, 8, 3)
    copied = pickle.loads(pickle.dumps(kept.examples))
    assert (len(copied), copied[0]["image"].shape, copied.keys()) == (1, (8, 8, 3), ["all"])


def test_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_MOST_KEPT_BYTES", 2 * 8 * 8 * 3)
    decoded: list[bool] = []

    def decode(encoded: bytes, most_bytes: int, background: Colour) -> np.ndarray | None:
        pixels = decode_small(encoded, most_bytes, background)
        decoded.append(pixels is not None)
        return pixels

    monkeypatch.setattr(sources, "decode_small", decode)
    counted = _Counted(*[_file(np.full((8, 8), value, np.uint8)) for value in range(4)])
    kept = sources.keeping_decoded(Source(counted, 4, "some"))
    for _ in range(3):
        for index in range(4):
            kept.examples[index]
    assert counted.reads == [1, 1, 3, 3]
    assert decoded == [True, True, *[False] * 6]  # what has no room is not decoded to see that
