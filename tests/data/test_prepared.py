"""Tests of sret_jax.data.prepared and of the datasets that `open_source` reads with it."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sret_jax.data.pack import pack
from sret_jax.data.prepared import CHECKSUMS
from sret_jax.data.reading import UnreadableError
from sret_jax.data.sources import Source, open_source
from sret_jax.errors import UserError

_CLASS_NAME = "downloads.tiny.payload.Text"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset of nine images in three classes, in a folder of TFDS datasets; not to be changed."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1)):
        for name in ("ant", "bee", "cat"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(256, size=(6, 6, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    pack(str(folder), str(out), name="tiny")
    return out


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """Its own folder, as TFDS would have written it: without checksums."""
    copy = shutil.copytree(tiny / "tiny" / "1.0.0", tmp_path / "tfds" / "tiny" / "1.0.0")
    (copy / CHECKSUMS).unlink()
    return copy


def change(file: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def contents(source: Source) -> tuple[Any, ...]:
    examples = [source.examples[index] for index in range(len(source.examples))]
    return source.class_names, [(example["image"], example["label"], example["key"]) for example in examples]


def present_form(folder: Path) -> None:
    features = folder / "features.json"
    change(features, lambda f: f["featuresDict"]["features"].update(note={"pythonClassName": _CLASS_NAME, "text": {}}))


def within_another_feature(folder: Path) -> None:
    inner = {"pythonClassName": _CLASS_NAME, "text": {}}
    outer = {"pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence"}
    outer |= {"sequence": {"feature": inner, "length": "-1"}}
    change(folder / "features.json", lambda f: f["featuresDict"]["features"].update(notes=outer))


def form_before_tfds_4_5(folder: Path) -> None:
    classes = {"image": "image_feature.Image", "label": "class_label_feature.ClassLabel"}
    content: dict[str, Any] = {
        name: {"type": f"tensorflow_datasets.core.features.{kind}", "content": {"num_classes": 3}}
        for name, kind in classes.items()
    }
    content["note"] = {"type": _CLASS_NAME, "content": {}}
    dictionary = {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "content": content}
    (folder / "features.json").write_text(json.dumps(dictionary))


def of_the_whole(folder: Path) -> None:
    change(folder / "features.json", lambda f: f.update(pythonClassName=_CLASS_NAME))


def in_the_info(folder: Path) -> None:
    features = {"pythonClassName": _CLASS_NAME, "text": {}}
    change(folder / "dataset_info.json", lambda info: info.update(features=features))


@pytest.mark.parametrize(
    "name_code", [present_form, within_another_feature, form_before_tfds_4_5, of_the_whole, in_the_info]
)
def test_a_dataset_that_names_code_is_refused_and_nothing_is_imported(
    name_code: Callable[[Path], None], copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = tmp_path / "downloads" / "tiny" / "payload.py"
    payload.parent.mkdir(parents=True)
    payload.write_text(
        "import pathlib, tensorflow_datasets as tfds\n"
        f"pathlib.Path({str(tmp_path / 'executed')!r}).touch()\n"
        "class Text(tfds.features.Text): ...\n"
    )
    name_code(copied)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ["tiny", str(copied)]:
        with pytest.raises(UserError, match=rf"json names the class '{_CLASS_NAME}'.*must not say which code is run"):
            open_source(name, "train", str(tmp_path / "tfds"))
    assert not (tmp_path / "executed").exists()
    assert not [module for module in sys.modules if module.startswith("downloads")]


def test_a_datasets_own_module_is_not_imported(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    (tmp_path / "tiny.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    change(copied / "dataset_info.json", lambda info: info.update(moduleName="evil"))
    assert len(open_source("tiny", "train", str(tmp_path / "tfds")).examples) == 6
    for name in ["evil:tiny", "evil.tiny", "tiny/evil=1"]:
        with pytest.raises(UserError, match="no dataset"):
            open_source(name, "train", str(tmp_path / "tfds"))


def _old_features(inner: Callable[[str, dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    prefix = "tensorflow_datasets.core.features."
    content = {
        "image": {"type": prefix + "image_feature.Image", "content": {"shape": [None, None, 3], "dtype": "uint8"}},
        "label": {"type": prefix + "class_label_feature.ClassLabel", **inner("num_classes", {"num_classes": 3})},
        "file_name": {"type": prefix + "text_feature.Text", "content": {}},
    }
    return {"type": prefix + "features_dict.FeaturesDict", "content": content}


@pytest.mark.parametrize(
    "features",
    [
        _old_features(lambda _, content: {"content": content}),
        _old_features(lambda _, __: {"content": {"numClasses": "3"}, "proto_cls": "tensorflow_datasets.ClassLabel"}),
        _old_features(lambda _, __: {"content": '{"numClasses": "3"}', "proto_cls": "tensorflow_datasets.ClassLabel"}),
    ],
    ids=["json", "proto", "proto as text"],
)
def test_older_forms_of_features_are_read_as_tfds_reads_them(
    features: dict[str, Any], copied: Path, tmp_path: Path
) -> None:
    expected = contents(open_source(str(copied), "train"))
    features["content"]["image"]["content"]["encoding_format"] = None
    (copied / "features.json").write_text(json.dumps(features))
    assert tfds.builder_from_directory(copied).info.features["label"].num_classes == 3
    assert contents(open_source(str(copied), "train")) == expected


_DAMAGES: dict[str, tuple[str, Callable[[Any], object] | bytes | None]] = {
    "is no JSON": ("features.json", b'{"featuresDict"'),
    "is no JSON (": ("dataset_info.json", b"[" * 200_000),
    "holds a list": ("features.json", b"[1]"),
    "has more than 4 MiB": ("dataset_info.json", b" " * (4 << 20) + b"{}"),
    "does not say what an example holds": ("features.json", lambda f: f.update(featuresDict=[1])),
    "speaks of 4": (
        "features.json",
        lambda f: f["featuresDict"]["features"]["label"].update(classLabel={"numClasses": 4}),
    ),
    "there are -3 classes": (
        "features.json",
        lambda f: f["featuresDict"]["features"]["label"].update(classLabel={"numClasses": "-3"}),
    ),
    "there are 999999999 classes": (
        "features.json",
        lambda f: f["featuresDict"]["features"]["label"].update(classLabel={"numClasses": "999999999"}),
    ),
    "there are None classes": ("features.json", lambda f: f["featuresDict"]["features"]["label"].pop("classLabel")),
    "cannot read or write": ("features.json", None),
    "dataset_info.json is damaged": ("dataset_info.json", lambda i: i.update(splits=7)),
    "dataset_info.json is damaged (": ("dataset_info.json", lambda i: i["splits"][0].update(shardLengths=["many"])),
    "has -6 images": ("dataset_info.json", lambda i: i["splits"][0].update(shardLengths=["-6"])),
    "has no split with images": ("dataset_info.json", lambda i: i.pop("splits")),
    "or is there twice": ("dataset_info.json", lambda i: i["splits"].append(i["splits"][0])),
    "has a split '../x'": ("dataset_info.json", lambda i: i["splits"][0].update(name="../x")),
    "names the dataset '../../x'": ("dataset_info.json", lambda i: i.update(name="../../x")),
    "outside of its folder": (
        "dataset_info.json",
        lambda i: i["splits"][0].update(filepathTemplate="../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"),
    ),
    "are outside of its folder": (
        "dataset_info.json",
        lambda i: i["splits"][0].update(filepathTemplate="/etc/{SPLIT}"),
    ),
    "calls its files": ("dataset_info.json", lambda i: i["splits"][0].update(filepathTemplate="{SPLIT:>999999999}")),
    "holds 6 images, but dataset_info.json says 5": (
        "dataset_info.json",
        lambda i: i["splits"][0].update(shardLengths=["5"]),
    ),
    "is not UTF-8": ("label.labels.txt", b"ant\n\xff\ncat\n"),
    "has 2 different names of classes": ("label.labels.txt", b"ant\nant\ncat\n"),
    "has 3 different names of classes": ("label.labels.txt", b"ant\nant\nbee\ncat\n"),
    "cannot be read": ("tiny-train.array_record-00000-of-00001", b"no records"),
}


@pytest.mark.parametrize("message", _DAMAGES)
def test_damaged_or_hostile_metadata_is_refused_in_one_line(
    message: str, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    name, damage = _DAMAGES[message]
    if damage is None:
        (copied / name).unlink()
    elif isinstance(damage, bytes):
        (copied / name).write_bytes(damage)
    else:
        change(copied / name, damage)
    with pytest.raises(UserError) as raised:
        open_source(str(copied), "train")
    assert message in str(raised.value) and str(copied) in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_no_changed_byte_of_a_packed_dataset_is_used_in_silence(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    sound = {split: contents(open_source("tiny", split, str(tiny))) for split in ("train", "validation")}
    folder = shutil.copytree(tiny / "tiny" / "1.0.0", tmp_path / "tiny" / "1.0.0")
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    generator, noticed = random.Random(0), 0
    for file in files * 30:
        content = file.read_bytes()
        place = generator.choice([place for place, byte in enumerate(content) if byte])  # most of a small file is zeros
        changed = bytes([content[place] ^ generator.randrange(1, 256)])
        file.write_bytes(content[:place] + changed + content[place + 1 :])
        for split, expected in sound.items():
            try:
                assert contents(open_source("tiny", split, str(tmp_path))) == expected, (file.name, place, changed)
            except (UserError, UnreadableError):
                noticed += 1
        file.write_bytes(content)
    assert noticed > 100


@pytest.mark.parametrize(("is_there", "other"), [("val", "validation"), ("validation", "val")])
def test_val_and_validation_are_one_split_in_every_form_of_a_dataset(is_there: str, other: str, tmp_path: Path) -> None:
    for split, count in (("train", 3), (is_there, 5)):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "images" / split / name / f"{number}.png")
    pack(str(tmp_path / "images"), str(tmp_path / "tfds"), name="both")
    for split in ("{}", "{}[2:7]", "train+{}[:50%]"):
        folder = [open_source("folder", split.format(name), str(tmp_path / "images")) for name in (is_there, other)]
        packed = [open_source("both", split.format(name), str(tmp_path / "tfds")) for name in (is_there, other)]
        assert contents(folder[0]) == contents(folder[1]) == contents(packed[0]) == contents(packed[1])
        assert folder[0].digest() == folder[1].digest() and packed[0].digest() == packed[1].digest()
    assert len(open_source("both", "all", str(tmp_path / "tfds")).examples) == 16


def test_the_version_and_the_config_are_chosen_as_tfds_chooses_them(tiny: Path, tmp_path: Path) -> None:
    for below in ["1.0.0", "1.2.0", "1.10.0"]:
        shutil.copytree(tiny / "tiny" / "1.0.0", tmp_path / "tiny" / below)
    (tmp_path / "tiny" / "1.2.0" / "label.labels.txt").write_text("x\ny\nz\n")
    (tmp_path / "tiny" / "1.2.0" / CHECKSUMS).unlink()
    for name, first in [("tiny", "ant"), ("tiny:1.2.0", "x"), ("tiny:1.*.*", "ant"), ("tiny:1.2.*", "x")]:
        assert open_source(name, "train", str(tmp_path)).class_names[0] == first
    with pytest.raises(UserError, match="no dataset 'tiny:2"):
        open_source("tiny:2.0.0", "train", str(tmp_path))
    for config in ["half", "whole"]:
        shutil.copytree(tiny / "tiny" / "1.0.0", tmp_path / "other" / config / "1.0.0")
    with pytest.raises(UserError, match="no dataset 'other'"):
        open_source("other", "train", str(tmp_path))
    assert len(open_source("other/half", "train", str(tmp_path)).examples) == 6
    (tmp_path / "other" / ".config").mkdir()
    (tmp_path / "other" / ".config" / "metadata.json").write_text('{"default_config_name": "whole"}')
    assert len(open_source("other", "train", str(tmp_path)).examples) == 6
    (tmp_path / "other" / ".config" / "metadata.json").write_text('{"default_config_name": "../tiny"}')
    with pytest.raises(UserError, match=r"names the config '../tiny'"):
        open_source("other", "train", str(tmp_path))


def test_a_part_without_images_is_the_users_error(tiny: Path) -> None:
    for split in ["train[:0]", "train[5:2]"]:
        with pytest.raises(UserError, match="has no image in its split"):
            open_source("tiny", split, str(tiny))
