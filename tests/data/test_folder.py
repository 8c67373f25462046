"""Tests of sret_jax.data.folder."""

import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from sret_jax.data.folder import FolderExamples, list_folder
from sret_jax.data.reading import UnreadableError
from sret_jax.errors import UserError


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def _listed(examples: FolderExamples) -> list[tuple[str, int]]:
    return [
        (os.path.relpath(examples.file_name(index), examples.folder), examples[index]["label"])
        for index in range(len(examples))
    ]


def test_the_images_are_all_that_lie_in_a_class_and_are_not_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _touch(tmp_path, "train/b/2.jpg", "train/b/10.JPEG", "train/a/z.Png", "train/B/1.webp", "train/b/more/0.jpg")
    _touch(tmp_path, *(f"train/b/deep/{number}.jpg" for number in range(40)))
    _touch(tmp_path, "train/readme.jpg", "elsewhere/1.tiff", "train/b/_.jpg")
    _touch(tmp_path, "train/b/._2.jpg", "train/b/.thumbs/2.jpg", "train/.cache/2.jpg", "train/@eaDir/b/2.jpg")
    (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
    examples = list_folder(str(tmp_path), "train")
    assert examples.class_names == ("B", "a", "b", "c")
    assert sorted(_listed(examples)) == [
        ("train/B/1.webp", 0),
        ("train/a/z.Png", 1),
        ("train/b/10.JPEG", 2),
        ("train/b/2.jpg", 2),
        ("train/b/_.jpg", 2),
        *((f"train/b/deep/{number}.jpg", 2) for number in sorted(range(40), key=str)),
        ("train/b/more/0.jpg", 2),
        ("train/c/1.tiff", 3),
    ]
    assert not caplog.messages


def test_files_that_are_no_images_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _touch(tmp_path, "train/a/1.jpg", "train/a/2.gif", "train/b/jpg", "train/b/2.jpg")
    assert len(list_folder(str(tmp_path), "train")) == 2
    (message,) = caplog.messages
    assert message.startswith(f"2 files in {tmp_path}/train are left out, such as train/a/2.gif: images are those")


def test_any_part_of_a_split_has_all_classes_and_others_keep_their_order_when_one_is_added(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"train/{name}/{number}.jpg" for name in "abcd" for number in range(100)))
    for part in ("train[:25%]", "train[40%:50%]", "train[-40:]"):
        counts = np.bincount(list_folder(str(tmp_path), part).labels, minlength=4)
        # Hypergeometric: of 40 of a class of a quarter, 10 are expected, with a standard deviation of 2.6.
        assert (abs(counts / counts.sum() - 0.25) < 0.2).all(), counts
    before = _listed(list_folder(str(tmp_path), "train"))
    _touch(tmp_path, "train/b/another.jpg")
    after = _listed(list_folder(str(tmp_path), "train"))
    assert [example for example in after if example != ("train/b/another.jpg", 1)] == before != sorted(before)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"])
def test_torchvisions_kinds_of_files_are_images_in_any_case(suffix: str, tmp_path: Path) -> None:
    _touch(tmp_path, f"train/a/1{suffix}", f"train/a/2{suffix.upper()}", f"train/a/3{suffix}.gz")
    assert len(list_folder(str(tmp_path), "train")) == 2


def test_an_example_is_the_untouched_bytes_of_its_file(image_folder: Path) -> None:
    examples = list_folder(str(image_folder), "train")
    assert len(examples) == 36
    for index in range(36):
        assert examples[index]["image"] == Path(examples.file_name(index)).read_bytes() != b""
    with pytest.raises(IndexError):
        examples[36]


def test_a_class_that_a_split_lacks_keeps_its_label(image_folder: Path) -> None:
    examples = list_folder(str(image_folder), "val")
    assert examples.class_names == ("ant", "bee", "cat")
    np.testing.assert_array_equal(examples.labels, [0, 0, 2, 2, 2, 2])


def test_parts_of_splits_are_those_of_the_whole_list(tmp_path: Path) -> None:
    _touch(tmp_path, *(f"train/{name}/{number}.jpg" for name in "abc" for number in range(100, 150)))
    _touch(tmp_path, *(f"val/{name}/{number}.jpg" for name in "abc" for number in range(5)))
    train, val = (_listed(list_folder(str(tmp_path), split)) for split in ["train", "val"])
    assert (len(train), len(val)) == (150, 15)
    for split, expected in {
        "validation": val,
        "train[:99%]": train[:148],
        "train[99%:]": train[148:],
        "train[20:30]": train[20:30],
        "train[-4:]": train[-4:],
        "train[:10%]+val[12:]": train[:15] + val[12:],
        "validation+train": val + train,
    }.items():
        assert _listed(list_folder(str(tmp_path), split)) == expected, split


def test_a_split_of_another_name_is_listed_under_its_own(tmp_path: Path) -> None:
    _touch(tmp_path, "train/a/1.jpg", "real-val/a/2.jpg", "validation/a/3.jpg", "val/a/4.jpg")
    for split, file in [("real-val", "2"), ("validation", "3"), ("val", "4")]:
        assert _listed(list_folder(str(tmp_path), split)) == [(f"{split}/a/{file}.jpg", 0)]


def test_only_the_splits_asked_for_are_listed(tmp_path: Path) -> None:
    _touch(tmp_path, "train/a/1.jpg", "val/unknown/1.jpg")
    assert len(list_folder(str(tmp_path), "train[:1]")) == 1


def test_a_file_that_vanished_is_unreadable(tmp_path: Path) -> None:
    _touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg")
    examples = list_folder(str(tmp_path), "train")
    (vanished,) = np.flatnonzero(examples.labels == 1)
    (tmp_path / "train/b/2.jpg").unlink()
    assert examples[1 - vanished] == {"image": b"train/a/1.jpg", "label": 0, "key": "train/a/1"}
    with pytest.raises(UnreadableError, match=r"^No such file or directory$"):
        examples[vanished]
    assert examples.file_name(vanished) == str(tmp_path / "train/b/2.jpg")


def test_names_need_not_be_text(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    path = os.fsencode(tmp_path) + b"/train/a/\xff\xfe.jpg"
    with open(path, "wb") as file:
        file.write(b"content")
    examples = list_folder(str(tmp_path), "train")
    assert examples[0]["image"] == b"content"
    assert os.fsencode(examples.file_name(0)) == path


def test_examples_are_sent_in_little_more_than_their_names(tmp_path: Path) -> None:
    names = [f"train/n{number % 20:08d}/n{number % 20:08d}_{number:06d}.JPEG" for number in range(2000)]
    _touch(tmp_path, *names)
    examples = list_folder(str(tmp_path), "train")
    sent = pickle.dumps(examples)
    assert len(sent) < sum(map(len, names)) + 4 * len(names) + 2000
    assert _listed(pickle.loads(sent)) == _listed(examples)


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train/a/1.jpg", "val/a/1.jpg"], "test", r"no split 'test'.*\['train', 'val', 'validation'\]"),
        (["train/a/1.jpg", "test/a/1.jpg"], "validation", r"no split 'validation'.*\['test', 'train'\]"),
        (["train/a/1.jpg"], "train[:2]", r"no split 'train\[:2\]'.*incompatible with 1 examples"),
        (["train/a/1.jpg"], "train[:", r"no split 'train\[:'"),
        (["train/a/1.jpg"], "train[1:]", r"no image in .*'train\[1:\]'.*\.jpeg"),
        (
            ["train/a/1.jpg", "train/b/1.txt", "train/c/1.txt"],
            "train[:1]",
            r"/train/b holds no image, nor do 1 others of its kind\. Expected some of each of the 3 classes",
        ),
        (["train/a/1.txt"], "train", r"no image in .*'train'.*train/<class>/<image>.*\.jpeg"),
        (["train/a/1.jpg", "val/1.jpg"], "val", r"no image in .*'val'.*val/<class>/<image>"),
        (
            ["train/a/1.jpg", "val/b/1.jpg"],
            "val",
            r"/val/b is not a class: train has no sub-folder 'b'\. Expected the 1",
        ),
        (["train/a/1.jpg", "val/b/1.jpg", "val/c/1.jpg"], "val", r"/val/b is not a class.*nor 1 others of val"),
        (["val/a/1.jpg", "test/a/1.jpg"], "val", r"has the sub-folders \['test', 'val'\]. Expected train/<class>"),
        (["1.jpg"], "train", r"has the sub-folders \[\]. Expected train/<class>"),
    ],
)
def test_what_is_no_split_of_a_folder_of_images_is_the_users_error(
    files: list[str], split: str, message: str, tmp_path: Path
) -> None:
    _touch(tmp_path, *files)
    with pytest.raises(UserError, match=message):
        list_folder(str(tmp_path), split)


def test_a_folder_that_cannot_be_listed_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot list .*/nowhere: No such file"):
        list_folder(str(tmp_path / "nowhere"), "train")


@pytest.mark.parametrize("target", ["train/a", "train", ".", "train/a/b"])
def test_folders_linked_in_a_circle_are_the_users_error(target: str, tmp_path: Path) -> None:
    _touch(tmp_path, "train/a/b/1.jpg")
    (tmp_path / "train/a/b/loop").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match="train/a/b/loop is a symbolic link to a folder around it"):
        list_folder(str(tmp_path), "train")


def test_a_class_in_another_unicode_form_is_named_so_that_the_difference_is_seen(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    _touch(tmp_path, f"train/{composed}/1.jpg", "train/tea/1.jpg", f"val/{apart}/1.jpg", "val/tea/1.jpg")
    with pytest.raises(UserError) as raised:
        list_folder(str(tmp_path), "val")
    for part in (
        r"it is called 'cafe\u0301'",
        r"train has 'caf\xe9'",
        "another Unicode form",
        "convmv -r -f utf8 -t utf8 --nfc",
    ):
        assert part in str(raised.value)


def test_two_classes_that_look_the_same_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    _touch(tmp_path, *(f"train/{name}/1.jpg" for name in [*names, "tea"]))
    assert len(list_folder(str(tmp_path), "train").class_names) == 3
    (message,) = caplog.messages
    assert r"two classes that look the same, 'cafe\u0301' and 'caf\xe9'" in message


def test_classes_that_are_numbers_are_ordered_as_text_and_it_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _touch(tmp_path, *(f"{split}/{number}/1.jpg" for split in ("train", "val") for number in range(12)))
    for split in ("train", "val"):
        assert list_folder(str(tmp_path), split).class_names == tuple(sorted(map(str, range(12))))  # as ImageFolder
    (message,) = caplog.messages
    assert "labels follow the order of their names as text" in message and "label 2 is the class 10, not 2" in message


@pytest.mark.parametrize("names", [["0", "1", "9"], ["00", "01", "10"], ["1", "10", "2b"]])
def test_other_classes_have_no_order_to_speak_of(
    names: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _touch(tmp_path, *(f"train/{name}/1.jpg" for name in names))
    list_folder(str(tmp_path), "train")
    assert not caplog.messages


def test_classes_that_lie_a_folder_too_deep_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _touch(tmp_path, *(f"{split}/images/{name}/1.jpg" for split in ("train", "val") for name in "abcd"))
    for split in ("train", "val"):
        assert list_folder(str(tmp_path), split).class_names == ("images",)
    (message,) = caplog.messages
    assert f"{tmp_path}/train has one sub-folder, images" in message and "(a, b, c, …) look like the classes" in message


def test_images_without_folders_of_classes_are_named(tmp_path: Path) -> None:
    _touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/2.JPEG", "val/1.JPEG", "val/readme")
    with pytest.raises(UserError, match=r"no image in .*'val'.*val/1.JPEG and 1 others are in no class's folder: move"):
        list_folder(str(tmp_path), "val")
