"""Soft labels in our packed form: all of them in a few ArrayRecord files, at random access by an image's key."""

import contextlib
import copy
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordReader
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sret_jax.data.reading import UnreadableError, read_patiently
from sret_jax.data.shards import locked, write_files
from sret_jax.data.soft_labels import (
    FolderLabels,
    LabelType,
    SoftLabels,
    SoftLabelSet,
    check_labels,
)
from sret_jax.errors import UserError
from sret_jax.files import expand_local, naming, replace

_VERSION = 1

# Written last: a folder that has it is complete. Under the last name it holds a hash of all the others.
_DESCRIPTION = "soft_labels.json"
_SELF = "sha256"
_INDEX = "index.npy"

# Lies in the folder: the hash of what it was made from.
_ORIGIN = "packed_from.sha256"

_INCOMPLETE = ".incomplete"

# One image in a group, so that reading one decodes no other. Compressing saves 10 to 20 % and 0.02 ms are lost.
_WRITER_OPTIONS = "group_size:1,zstd:3"

# uint16 holds their numbers.
_MOST_CLASSES = 2**16

# Kinds whose labels are the same numbers, and differ in what is made of them.
_ALIKE = ("marginal_smoothing", "marginal_renorm")

_AGAIN = "Expected what was packed: copy the folder again, or pack it again"


class PackedLabels:
    """Soft labels that `write_packed` wrote. As a `SoftLabelSet`, small to send to other processes.

    Attributes:
      label_type: of the labels.
      num_classes: that they are of.
      crops: of the image with the fewest, but for those that have none.
      notes: what whoever wrote them had to say of them.
    """

    def __init__(self, folder: Path, label_type: LabelType, num_classes: int) -> None:
        """Opens a folder.

        Args:
          folder: the packed form.
          label_type: that is expected. Smoothed and renormalised labels of the same `k` are the same numbers, so each
            may be read as the other.
          num_classes: that are expected.

        Raises:
          UserError: these labels are of another type or number of classes, or the folder is not what was packed.
        """
        description = _read_description(folder)
        self._folder = folder
        self.label_type = label_type
        self.num_classes = num_classes
        self.crops: int = description["crops"]
        self.notes: Mapping[str, Any] = description["notes"]
        held = LabelType.parse(description["label_type"])
        alike = held.kind in _ALIKE and label_type.kind in _ALIKE and held.k == label_type.k
        if label_type != held and not alike:
            raise UserError(
                f"{folder} holds soft labels of type {held.name}, expected {label_type.name}: give the type that they "
                "are of, or other labels"
            )
        if num_classes != description["num_classes"]:
            raise UserError(
                f"{folder} holds soft labels of {description['num_classes']} classes, expected {num_classes}: give "
                "labels of the dataset that is trained on"
            )
        lengths = [shard["images"] for shard in description["shards"]]
        self._paths = _shard_paths(folder, len(lengths))
        for path, shard in zip(self._paths, description["shards"], strict=True):
            _check_size(path, shard["bytes"])
        self._ends = np.cumsum(lengths)
        # With the lengths, for it would open every file to count its records.
        self._records = ArrayRecordDataSource(
            [f"{path}[0:{length}]" for path, length in zip(self._paths, lengths, strict=True)]
        )
        self._index_hash: str = description["index_sha256"]
        self._index: np.ndarray | None = None
        self._loaded_index()

    def __len__(self) -> int:
        return len(self._records)

    def keys(self) -> Iterator[str]:
        """The keys of all images, in the order in which they are stored; reads every record.

        Raises:
          UserError: a record cannot be read.
        """
        for position in range(len(self)):
            yield self._read(position)[0]

    def read(self, key: str, /) -> SoftLabels:
        """As `SoftLabelSet.read`."""
        hashes, positions = self._loaded_index()
        hashed = _hash(key)
        place = np.searchsorted(hashes, hashed)
        if place == len(hashes) or hashes[place] != hashed:
            raise UserError(
                f"{self._folder} lacks the image {key}: it has no soft labels. Expected those of every image of the "
                "dataset: give the folder that was made from this dataset, or make the labels of what is missing"
            )
        found, labels = self._read(int(positions[place]), f" of {key}")
        if found != key:
            path = self._path_of(int(positions[place]))
            raise UserError(f"{path} holds the soft labels of {found} in place of those of {key}. {_AGAIN}")
        return labels

    def missing(self, keys: Sequence[str], /) -> list[str]:
        """As `SoftLabelSet.missing`, by the hashes of keys."""
        hashes, _ = self._loaded_index()
        there = np.isin(_hashes(keys), hashes)
        return [key for key, is_there in zip(keys, there.tolist(), strict=True) if not is_there]

    def _read(self, position: int, whose: str = "") -> tuple[str, SoftLabels]:
        path = self._path_of(position)
        try:
            record = read_patiently(lambda: self._record(position), f"{path}, the soft labels{whose}")
            key, labels = _from_record(record, self.label_type, self.num_classes)
            check_labels(labels, self.num_classes)
        except (UnreadableError, ValueError) as error:
            raise UserError(f"{path} holds no soft labels{whose} that can be used: {error}. {_AGAIN}") from error
        return key, labels

    def _record(self, position: int) -> bytes:
        records = self._records
        try:
            return records[position]
        except RuntimeError:  # ArrayRecord's
            # It keeps a file that did not open as one that never will: a copy opens its files anew.
            self._records = copy.copy(records)
            raise

    def _path_of(self, position: int) -> Path:
        return self._paths[int(np.searchsorted(self._ends, position, side="right"))]

    def _loaded_index(self) -> np.ndarray:
        if self._index is None:
            self._index = _read_index(self._folder / _INDEX, self._index_hash, len(self._records))
        return self._index

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_index": None}  # 20 MB for ImageNet, which another process reads itself


def open_soft_labels(path: str, label_type: str, num_classes: int) -> SoftLabelSet:
    """Opens soft labels in our packed form or in the authors' layout.

    Args:
      path: the folder in which `soft_labels.json` is, or `train/<class>/<image>.tar`.
      label_type: by its name, as `LabelType.parse` takes it.
      num_classes: that the labels are of.

    Raises:
      UserError: there are none in the folder, they are of another type or number of classes, or not complete.
    """
    wanted = LabelType.parse(label_type)
    wanted.size(num_classes)
    folder = Path(os.path.abspath(expand_local(path)))
    with naming(folder):
        if (folder / _DESCRIPTION).exists():
            return PackedLabels(folder, wanted, num_classes)
        for left in (folder, folder.with_name(folder.name + _INCOMPLETE)):
            if (left / _ORIGIN).exists():
                raise UserError(
                    f"{left} holds soft labels that are not complete: their packing was interrupted, or goes on. Wait "
                    "for it, or run the same command again, which goes on where it was"
                )
        if _holds_label_files(folder):
            return FolderLabels(str(folder), wanted, num_classes)
        raise UserError(
            f"{folder} {'holds no soft labels' if folder.is_dir() else 'is not a folder'}. Expected one with "
            f"{_DESCRIPTION}, as in our packed form, or with train/<class>/<image>.tar, as the authors have "
            f"them: {_instead(folder)}"
        )


def write_packed(
    out: Path,
    parts: Sequence[Callable[[], Iterable[tuple[str, SoftLabels]]]],
    *,
    label_type: LabelType,
    num_classes: int,
    notes: Mapping[str, str | int | float],
    origin: str,
    workers: int,
    advance: Callable[[int, int], object],
) -> None:
    """Writes soft labels in our packed form, numbers in float16.

    The folder appears under its name when it is complete and every record has been read back. Before that it lies
    beside it as `<out>.incomplete`, where the next call goes on with the files that are missing. The result is the
    same, byte for byte, however often this was interrupted and for any number of workers.

    Args:
      out: the folder. Nothing is done where it is complete already.
      parts: of each file a function that gives keys and labels and can be sent to another process; each time the same.
      label_type: of the labels.
      num_classes: that they are of.
      notes: on the labels, which `PackedLabels.notes` will hold: the teacher, the temperature, and so on.
      origin: a text that differs where the parts give something else, in other words a hash of what they read.
      workers: processes; each writes one file at a time.
      advance: called with how many more files are complete, and how many there will be.

    Raises:
      UserError: labels cannot be used or are of another type, two of the images have the same key, there are too many
        classes, something else is in the place of `out`, another process writes it, or it cannot be written.
    """
    if num_classes > _MOST_CLASSES:
        raise UserError(f"{num_classes} classes are too many for packed soft labels. Expected at most {_MOST_CLASSES}")
    label_type.size(num_classes)
    out = Path(os.path.abspath(out))
    incomplete = out.with_name(out.name + _INCOMPLETE)
    identity = [_VERSION, label_type.name, num_classes, len(parts), sorted(notes.items()), origin]
    origin_hash = hashlib.sha256(json.dumps(identity).encode()).hexdigest() + "\n"
    with locked(out.with_name(f".{out.name}.lock"), out):
        _refuse_others(out, incomplete, origin_hash)
        if out.exists():
            return
        with naming(incomplete):
            incomplete.mkdir(exist_ok=True)
        replace(incomplete / _ORIGIN, origin_hash)
        paths = _shard_paths(incomplete, len(parts))
        files = {
            path: functools.partial(_records, part, label_type, num_classes)
            for path, part in zip(paths, parts, strict=True)
        }
        write_files(files, _WRITER_OPTIONS, workers, lambda _: advance(1, len(parts)))
        _write_index(incomplete, paths, label_type, num_classes, notes)
        os.sync()  # or a power cut could leave the name without the content
        with naming(out):
            os.replace(incomplete, out)


def _shard_paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"soft_labels.array_record-{number:05d}-of-{count:05d}" for number in range(count)]


def _refuse_others(out: Path, incomplete: Path, origin: str) -> None:
    """Refuses to add to what was not packed from the same labels."""
    ours = {out: [origin], incomplete: [origin, ""]}  # the second where a kill came before it was written
    for folder, expected in ours.items():
        with naming(folder):
            found = (folder / _ORIGIN).read_text("ascii", "replace") if (folder / _ORIGIN).exists() else ""
            if folder.exists() and found not in expected:
                raise UserError(
                    f"{folder} is something else, or was packed from other soft labels. Expected nothing, or what an "
                    "interrupted packing of the same labels left: give another name, or delete it"
                )


def _records(
    part: Callable[[], Iterable[tuple[str, SoftLabels]]], label_type: LabelType, num_classes: int
) -> Iterator[bytes]:
    for key, labels in part():
        try:
            record = _to_record(key, labels, label_type, num_classes)
        except ValueError as error:
            raise UserError(f"the soft labels of {key} cannot be packed: {error}") from error
        yield record


def _to_record(key: str, labels: SoftLabels, label_type: LabelType, num_classes: int) -> bytes:
    """A safetensors blob of one image's labels; the same labels give the same bytes."""
    crops, k = len(labels.boxes), label_type.size(num_classes)
    shapes, expected = [part.shape for part in labels], [(crops, 4), (crops,), (crops, k), (crops, k)]
    if shapes != expected:
        raise ValueError(f"they have the shapes {shapes}, expected {expected} for {label_type.name}")
    rounded = labels._replace(
        boxes=labels.boxes.astype(np.float16), probabilities=labels.probabilities.astype(np.float16)
    )
    check_labels(rounded, num_classes)
    contents = {
        "key": np.frombuffer(_encoded(key), np.uint8),
        "boxes": rounded.boxes,
        "flips": np.packbits(labels.flips),
    }
    if label_type.kind == "ori":
        contents["probabilities"] = np.zeros_like(rounded.probabilities)
        np.put_along_axis(contents["probabilities"], labels.classes, rounded.probabilities, axis=1)
    else:
        contents |= {"classes": labels.classes.astype(np.uint16), "probabilities": rounded.probabilities}
    return save({name: np.ascontiguousarray(array) for name, array in contents.items()})


def _from_record(record: bytes, label_type: LabelType, num_classes: int) -> tuple[str, SoftLabels]:
    """Key and labels of one image, not checked."""
    try:
        contents = load(record)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    found = {name: (array.dtype.name, array.shape) for name, array in contents.items()}
    crops = math.prod(found.get("boxes", ("", ()))[1][:1])
    labelled = (crops, label_type.size(num_classes))
    expected = {
        "key": ("uint8", found.get("key", ("", ()))[1]),
        "boxes": ("float16", (crops, 4)),
        "flips": ("uint8", (math.ceil(crops / 8),)),
        "classes": ("uint16", labelled),
        "probabilities": ("float16", labelled),
    }
    if label_type.kind == "ori":
        del expected["classes"]
        contents["classes"] = np.tile(np.arange(num_classes), (crops, 1))
    if found != expected:
        raise ValueError(f"a record holds {found}, expected {expected}")
    flips = np.unpackbits(contents["flips"], count=crops).astype(bool)
    labels = SoftLabels(contents["boxes"], flips, contents["classes"].astype(np.int32), contents["probabilities"])
    return contents["key"].tobytes().decode("utf-8", "surrogateescape"), labels


def _write_index(
    folder: Path,
    paths: list[Path],
    label_type: LabelType,
    num_classes: int,
    notes: Mapping[str, str | int | float],
) -> None:
    """Adds what makes a folder of shards complete: index and description."""
    keys, crops, shards = list[str](), list[int](), list[dict[str, int]]()
    for path in paths:
        before = len(keys)
        for key, labels in _read_shard(path, label_type, num_classes):
            keys.append(key)
            crops.append(len(labels.boxes))
        shards.append({"images": len(keys) - before, "bytes": path.stat().st_size})
    if not keys:
        raise UserError(f"there are no soft labels to pack into {folder}. Expected those of an image or more")
    hashes = _hashes(keys)
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]):
        first, second = (keys[position] for position in order[place : place + 2])
        raise UserError(
            f"{folder} holds the soft labels of {first} twice. Expected those of each image once: delete {folder}, and "
            "give the labels of each image once"
            if first == second
            else f"the images {first} and {second} cannot be told apart by their hashes: rename one of them"
        )
    index = io.BytesIO()
    np.save(index, np.stack([hashes[order], order.astype(np.uint64)]))
    replace(folder / _INDEX, index.getvalue())
    description = {
        "version": _VERSION,
        "label_type": label_type.name,
        "num_classes": num_classes,
        "images": len(keys),
        "crops": min(filter(None, crops), default=0),
        "shards": shards,
        "index_sha256": hashlib.sha256(index.getvalue()).hexdigest(),
        "notes": dict(sorted(notes.items())),
    }
    description[_SELF] = _description_hash(description)
    replace(folder / _DESCRIPTION, json.dumps(description, indent=1) + "\n")


def _read_shard(path: Path, label_type: LabelType, num_classes: int) -> Iterator[tuple[str, SoftLabels]]:
    try:
        with contextlib.closing(ArrayRecordReader(str(path))) as reader:
            for _ in range(reader.num_records()):
                yield _from_record(reader.read(), label_type, num_classes)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path} is no longer what was written: {error}. Expected a sound disk: delete this file and run the same "
            "command again, which writes it anew"
        ) from error


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / _DESCRIPTION
    with naming(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        description = json.loads(text)
        version = description["version"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{path} is not what was written. {_AGAIN}") from None
    if version != _VERSION:
        raise UserError(
            f"{path} is of version {str(version)[:100]}, expected {_VERSION}: read it with the version of this library "
            "that wrote it, or pack the labels again"
        )
    if not _is_description(description):
        raise UserError(f"{path} is not what was written. {_AGAIN}")
    return description


def _is_description(found: dict[str, Any]) -> bool:
    types: dict[str, type] = dict.fromkeys(("label_type", "index_sha256"), str)
    types |= dict.fromkeys(("version", "num_classes", "images", "crops"), int)
    types |= {"shards": list, "notes": dict}
    # Before there was a hash, nothing else was there either.
    if found.keys() - {_SELF} != types.keys() or found.get(_SELF) not in (None, _description_hash(found)):
        return False
    try:
        LabelType.parse(found["label_type"])
        counts = [shard[name] for name in ("images", "bytes") for shard in found["shards"]]
    except (KeyError, TypeError, UserError):
        return False
    return (
        all(type(found[name]) is kind for name, kind in types.items())
        and all(type(count) is int and count > 0 for count in counts)
        and found["images"] == sum(counts[: len(counts) // 2]) < 2**62
        and all(isinstance(note, str | int | float) for note in found["notes"].values())
    )


def _description_hash(description: Mapping[str, Any]) -> str:
    others = {name: value for name, value in description.items() if name != _SELF}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _read_index(path: Path, sha256: str, images: int) -> np.ndarray:
    """Hashes of keys, sorted, and the positions of their records: uint64 (2, images)."""
    try:
        content = read_patiently(path.read_bytes, str(path))
    except UnreadableError as error:
        raise UserError(f"{path} cannot be read: {error}. {_AGAIN}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{path} is not what was written. {_AGAIN}")
    index = np.load(io.BytesIO(content))
    if index.dtype != np.uint64 or index.shape != (2, images):
        raise UserError(f"{path} is an index of other files: {index.dtype} {index.shape}. {_AGAIN}")
    return index


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes, expected {size}"
        raise UserError(f"{path} {state}. {_AGAIN}")


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8


def _hash(key: str) -> np.uint64:
    return _hashes([key])[0]


def _hashes(keys: Iterable[str]) -> np.ndarray:
    digests = [hashlib.blake2b(_encoded(key), digest_size=8).digest() for key in keys]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _holds_label_files(folder: Path) -> bool:
    return any(name.endswith(".tar") for _, _, names in os.walk(folder / "train", followlinks=True) for name in names)


def _instead(folder: Path) -> str:
    """What to give in place of a folder: one that lies up to two levels higher, or one deeper."""
    for other in [*folder.parents[:2], *(sorted(folder.iterdir()) if folder.is_dir() else [])]:
        if (other / _DESCRIPTION).exists() or _holds_label_files(other):
            return f"give {other}"
    return "check the path"
