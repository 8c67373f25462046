"""Datasets that TFDS has prepared: what their files say, read as data.

TFDS's own reader imports the classes that `features.json` names, so that a dataset could run code. Nothing is imported
or called here that a file names.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NoReturn

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import json_format
from tensorflow_datasets.core import naming as tfds_naming
from tensorflow_datasets.core.proto import dataset_info_pb2
from tensorflow_datasets.core.utils import version as tfds_version

from sret_jax.errors import UserError
from sret_jax.files import naming_remote

# Lies in a dataset that we packed: hashes of the files that say what is in it, as `sha256sum` writes them.
CHECKSUMS = "metadata.sha256"

_INFO, _FEATURES = "dataset_info.json", "features.json"

# Of a file of metadata. TFDS's own for ImageNet have a few kB.
_MOST_BYTES = 4 << 20

_MOST_CLASSES = 1_000_000
_MOST_FILES = 100_000

_FORMAT = "array_record"
_IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
_LABEL = "tensorflow_datasets.core.features.class_label_feature.ClassLabel"

# What the names of a dataset's files are made of; nothing else of Python's formats is allowed there.
_PLACEHOLDERS = re.compile(r"\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\}")

_AGAIN = "Expected what TFDS or sret_jax.data.pack wrote: copy or prepare the dataset again"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a prepared dataset says of itself.

    Attributes:
      folder: its own, in which `dataset_info.json` is.
      features: names of what an example holds.
      file_format: TFDS's name of the format of its files.
      class_names: in the order of the labels; () where `image` is no image or `label` no class.
      splits: by their names, with the paths of their files.
    """

    folder: epath.Path
    features: tuple[str, ...]
    file_format: str
    class_names: tuple[str, ...]
    splits: Mapping[str, tfds.core.SplitInfo]


def find_prepared(name: str, data_dir: str) -> epath.Path | None:
    """The folder of a dataset below TFDS's folder, by TFDS's rules; None if there is none.

    Args:
      name: `dataset`, `dataset:1.0.0`, `dataset:1.*.*`, `dataset/config` or `dataset/config:1.0.0`. Without a version
        it is the highest that is there, without a config that which the dataset's folder names as its default.
      data_dir: TFDS's folder.
    """
    try:
        dataset, parts = tfds_naming.parse_builder_name_kwargs(name)
    except ValueError:
        return None
    if dataset.namespace or parts.keys() - {"config", "version"}:
        return None
    with naming_remote(data_dir):
        folder = epath.Path(data_dir, dataset.name)
    config = parts.get("config") or _default_config(folder)
    if config:
        folder /= str(config)
    with naming_remote(folder):
        versions = [
            version
            for version in tfds_version.list_all_versions(folder)
            if not parts.get("version") or version.match(parts["version"])
        ]
        found = folder / str(versions[-1]) if versions else None
        return found if found and (found / _INFO).exists() else None


def read_prepared(folder: epath.PathLike) -> Prepared:
    """Reads what a dataset says of itself; nothing of it is taken on trust.

    Raises:
      UserError: a file is missing, damaged, or names something outside of TFDS or of the dataset's folder.
    """
    folder = epath.Path(folder)
    _check_checksums(folder)
    info = _read_info(folder / _INFO)
    features = _read_features(folder / _FEATURES)
    class_names: tuple[str, ...] = ()
    if _class_of(features.get("image")) == _IMAGE and _class_of(features.get("label")) == _LABEL:
        class_names = _class_names(folder, features["label"])
    formats = [info.file_format or "tfrecord", *info.alternative_file_formats]
    file_format = _FORMAT if _FORMAT in formats else formats[0]
    return Prepared(folder, tuple(sorted(features)), file_format, class_names, _splits(folder, info, file_format))


def checksums(folder: epath.PathLike) -> str:
    """The content of `CHECKSUMS` for a dataset whose other files of metadata are there."""
    names = sorted(path.name for path in epath.Path(folder).iterdir() if path.suffix in (".json", ".txt"))
    return "".join(f"{_sha256(epath.Path(folder, name))}  {name}\n" for name in names)


def _check_checksums(folder: epath.Path) -> None:
    path = folder / CHECKSUMS
    with naming_remote(path):
        if not path.exists():  # TFDS writes none
            return
    lines = _read(path).decode("ascii", "replace").splitlines()
    for line in lines:
        digest, _, name = line.partition("  ")
        if not re.fullmatch(r"[0-9a-f]{64}", digest) or not re.fullmatch(r"[\w-][\w.-]*", name):
            _refuse(path, "is damaged")
        if _sha256(folder / name) != digest:
            _refuse(folder / name, f"is not what was written: its hash is not that in {CHECKSUMS}")


def _sha256(path: epath.Path) -> str:
    return hashlib.sha256(_read(path)).hexdigest()


def _read(path: epath.Path) -> bytes:
    with naming_remote(path), path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        _refuse(path, f"has more than {_MOST_BYTES >> 20} MiB")
    return content


def _read_json(path: epath.Path) -> dict[str, Any]:
    content = _read(path)
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"is no JSON ({str(error)[:100]})", error)
    if not isinstance(parsed, dict):
        _refuse(path, f"holds a {type(parsed).__name__}, expected an object")
    for name in _named_classes(parsed):
        if not re.fullmatch(r"tensorflow_datasets(\.\w+)+", name, re.ASCII):
            raise UserError(
                f"{path} names the class {name[:200]!r}, which is not TFDS's own. Expected names that begin with "
                "tensorflow_datasets: a dataset must not say which code is run. Do not trust this dataset, or prepare "
                "it again with features of TFDS alone"
            )
    return parsed


def _named_classes(parsed: Any) -> Iterator[str]:
    """Every name of a class in JSON, at any depth: of TFDS's present form and of that before TFDS 4.5."""
    waiting = [parsed]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            for key in ("pythonClassName", "python_class_name", "type"):
                if isinstance(value.get(key), str) and (key != "type" or "content" in value):
                    yield value[key]
            waiting += value.values()


def _read_info(path: epath.Path) -> dataset_info_pb2.DatasetInfo:
    content = _read_json(path)
    try:
        info = json_format.ParseDict(content, dataset_info_pb2.DatasetInfo())
    except Exception as error:  # which one depends on the damage
        _refuse(path, f"is damaged ({str(error).splitlines()[0][:200]})", error)
    if not re.fullmatch(r"\w[\w.-]{0,199}", info.name):
        _refuse(path, f"names the dataset {info.name[:100]!r}, which is no name")
    return info


def _splits(
    folder: epath.Path, info: dataset_info_pb2.DatasetInfo, file_format: str
) -> Mapping[str, tfds.core.SplitInfo]:
    splits = {}
    for split in info.splits:
        if not re.fullmatch(r"[^\W_][\w-]{0,199}", split.name) or split.name in splits:
            _refuse(folder / _INFO, f"has a split {split.name[:100]!r}, which is no name or is there twice")
        if any(length < 0 for length in split.shard_lengths):
            _refuse(folder / _INFO, f"says that a file of the split {split.name} has {min(split.shard_lengths)} images")
        if len(split.shard_lengths) > _MOST_FILES:
            _refuse(folder / _INFO, f"says that the split {split.name} has {len(split.shard_lengths)} files")
        template = split.filepath_template or tfds_naming.DEFAULT_FILENAME_TEMPLATE
        if len(template) > 1000 or re.search(r"[{}]", _PLACEHOLDERS.sub("", template)):
            _refuse(folder / _INFO, f"calls its files {template[:100]!r}")
        found = tfds.core.SplitInfo(
            name=split.name,
            shard_lengths=list(split.shard_lengths),
            num_bytes=0,  # nothing is made of it
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder,
                template=template,
                dataset_name=info.name,
                split=split.name,
                filetype_suffix=file_format,
            ),
        )
        if found.num_shards:
            first = found.filename_template.relative_filepath(shard_index=0, num_shards=found.num_shards)
            if ".." in PurePosixPath(first).parts or PurePosixPath(first).is_absolute() or "\0" in first:
                _refuse(folder / _INFO, f"calls its files {template[:100]!r}, which are outside of its folder")
        splits[split.name] = found
    if not any(split.num_examples for split in splits.values()):
        _refuse(folder / _INFO, "has no split with images")
    return splits


def _read_features(path: epath.Path) -> dict[str, Any]:
    """What an example holds: names and, of each, what TFDS wrote."""
    content = _read_json(path)
    # TFDS's present form, and that before TFDS 4.5.
    found = _content(content, "featuresDict", "features_dict")
    found = found.get("features", found) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not all(isinstance(feature, dict) for feature in found.values()):
        _refuse(path, "does not say what an example holds")
    return found


def _class_of(feature: Mapping[str, Any] | None) -> str:
    if feature is None:
        return ""
    return str(feature.get("pythonClassName") or feature.get("python_class_name") or feature.get("type"))


def _content(feature: Mapping[str, Any], *names: str) -> Any:
    """What TFDS wrote of a feature beside its class: under one of these names, in `content`, or as JSON in JSON."""
    for name in (*names, "content", "jsonFeature", "json_feature"):
        if name in feature:
            content = feature[name]
            break
    else:
        return None
    if isinstance(content, dict) and name.startswith("json"):
        content = content.get("json")
    try:
        return json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return None


def _class_names(folder: epath.Path, label: Mapping[str, Any]) -> tuple[str, ...]:
    content = _content(label, "classLabel", "class_label")
    number = content.get("numClasses", content.get("num_classes")) if isinstance(content, dict) else None
    if not re.fullmatch(r"\d{1,9}", str(number)) or not 1 <= int(str(number)) <= _MOST_CLASSES:
        _refuse(folder / _FEATURES, f"says that there are {str(number)[:100]} classes")
    count = int(str(number))
    path = folder / "label.labels.txt"
    with naming_remote(path):
        if not path.exists():
            return tuple(map(str, range(count)))
    try:
        lines = _read(path).decode().split("\n")
    except UnicodeDecodeError as error:
        _refuse(path, f"is not UTF-8 ({error.reason})", error)
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != count or len(set(names)) != count:
        _refuse(path, f"has {len(set(names))} different names of classes, and {_FEATURES} speaks of {count}")
    return names


def _default_config(folder: epath.Path) -> str:
    path = folder / ".config" / "metadata.json"
    name = _read_json(path).get("default_config_name") if path.exists() else None
    if name is not None and (not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name)):
        _refuse(path, f"names the config {str(name)[:100]!r}, which is no name")
    return name or ""


def _refuse(path: epath.PathLike, problem: str, cause: Exception | None = None) -> NoReturn:
    raise UserError(f"{epath.Path(path)} {problem}. {_AGAIN}") from cause
