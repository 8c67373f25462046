"""Reads the files that `torch.save` writes, without PyTorch and without running anything that they hold.

Two containers are known: the zip archive that PyTorch writes since version 1.6, and the run of pickles before that.
Both hold a pickle of the object, which `torch_pickle` reads as data, and the numbers of its tensors behind it. These
are taken from a memory map, when they are asked for, and in an archive compared with its checksums.
"""

import argparse
import contextlib
import io
import math
import mmap
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, cast

import numpy as np
from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import local_copy, naming
from sret_jax.weights.torch_pickle import Array, Placeholder, RefusedError, Storage, Tensor, shown, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_BIG_ENDIAN = "its numbers are big-endian: load it where it was made, and save it on a machine that is little-endian"
_EMPTY = "it is empty, expected a file that torch.save wrote"
_INT64 = struct.Struct("<q")
_LOCAL_HEADER = struct.Struct("<4s22xHH")

# What a file may ask for; a checkpoint of SReT-S with its optimizer has a pickle of 0.2 MB, a directory of 0.1 MB, and
# 510 weights.
_LONGEST_PICKLE = 2**24
_LONGEST_DIRECTORY = 2**22
_LARGEST_EMPTY = 2**48  # NumPy multiplies the sizes beside those that are 0
_MOST_NESTED = 100

_Plain = str | bytes | bytearray | int | float | np.generic | Placeholder | None


def load_torch_file(path: epath.PathLike) -> Any:
    """What `torch.save` wrote, with NumPy arrays for tensors.

    The arrays are read-only views of the file, which must stay as it is while they are used; copy what is to stay. A
    tensor in bfloat16 has the dtype of that name of `ml_dtypes`.

    Args:
      path: a file, which is mapped to memory; one behind `gs://`, `s3://` or the like is fetched first.

    Returns:
      Dicts, lists, tuples, text, numbers, `argparse.Namespace`s and arrays, and for everything else a `Placeholder`,
      which says what the file names there.

    Raises:
      UserError: no file that `torch.save` wrote, a damaged one, or one that asks for something to be executed.
    """
    contents, reader = open_torch_file(path)
    with naming_file(path):
        return _with_arrays(contents, reader.array, {}, 0)


def load_torch_content(content: bytes, name: epath.PathLike) -> Any:
    """What `torch.save` wrote, from a small file's content.

    Args:
      content: of the file.
      name: of the file, for errors.

    Returns:
      As `load_torch_file`; the arrays are views of a copy.

    Raises:
      UserError: as `load_torch_file`.
    """
    with naming_file(name):
        if not content:
            raise RefusedError(_EMPTY)
        stream = _Mapped(-1, len(content))
        stream[:] = content
        contents, reader = _open_stream(stream)
        return _with_arrays(contents, reader.array, {}, 0)


def open_torch_file(path: epath.PathLike) -> tuple[Any, "Reader"]:
    """What a file describes, with tensors as `Tensor` or `Array`, and what reads them.

    Args:
      path: as in `load_torch_file`.

    Raises:
      UserError: as in `load_torch_file`.
    """
    with local_copy(path) as file, naming(file), naming_file(path):
        if file.is_dir():
            raise RefusedError("it is a folder, expected a file that torch.save wrote")
        with file.open("rb") as opened:
            if not opened.read(1):
                raise RefusedError(_EMPTY)
            stream = _Mapped(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return _open_stream(stream)


class Span(NamedTuple):
    """Where a storage lies in the file; `crc` is its checksum, None where there is none."""

    start: int
    size: int
    crc: int | None


class Reader:
    """The numbers of one file's tensors."""

    def __init__(self, buffer: memoryview, locate: Callable[[str], Span | None]) -> None:
        """`locate` says where the storage of a key lies; None is nowhere."""
        self._buffer = buffer
        self._locate = locate
        self._checked: dict[str, np.ndarray] = {}
        self.size = len(buffer)

    def array(self, described: Tensor | Array) -> np.ndarray:
        """The tensor's numbers, a read-only view of the file.

        Raises:
          RefusedError: it does not lie within its storage, or the storage is damaged.
        """
        if isinstance(described, Array):
            if described.value is None:
                raise RefusedError("it holds a NumPy array without numbers")
            return described.value
        if described.dtype.type is np.void:
            raise RefusedError(f"a tensor of shape {described.shape} is complex, quantised or of no type")
        dtype, offset, shape, strides = described.dtype, described.offset, described.shape, described.strides
        content = self._content(described.storage)
        if len(shape) != len(strides):
            raise RefusedError(f"a tensor of shape {shape} has {len(strides)} strides")
        numbers = math.prod(shape)
        if math.prod(size or 1 for size in shape) > (self.size if numbers else _LARGEST_EMPTY):
            raise RefusedError(f"a tensor of shape {shape} has more numbers than the file has bytes")
        if not numbers:
            return np.zeros(shape, dtype)
        elements, itemsize = len(content) // dtype.itemsize, dtype.itemsize
        if offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) >= elements:
            raise RefusedError(f"a tensor of shape {shape} does not lie within its {elements} numbers")
        return np.ndarray(shape, dtype, content, offset * itemsize, [stride * itemsize for stride in strides])

    def _content(self, storage: Storage) -> np.ndarray:
        name, size = shown(storage.key), storage.elements * storage.dtype.itemsize
        if storage.key not in self._checked:
            span = self._locate(storage.key)
            if span is None or span.size != size:
                found = "no numbers" if span is None else f"{span.size} bytes"
                raise RefusedError(f"the tensor {name!r} has {found}, expected {size} bytes")
            content = self._buffer[span.start : span.start + size]
            if span.crc is not None and zlib.crc32(content) != span.crc:
                raise RefusedError(f"the numbers of the tensor {name!r} are damaged: they do not match their checksum")
            self._checked[storage.key] = np.frombuffer(content, np.uint8)
        return self._checked[storage.key]


@contextlib.contextmanager
def naming_file(path: epath.PathLike) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except RefusedError as error:
        raise UserError(f"{os.fspath(path)} cannot be loaded: {error}") from error


def _open_stream(stream: mmap.mmap) -> tuple[Any, Reader]:
    if stream[:4] == b"PK\x03\x04":
        return _open_archive(stream)
    if stream[:1] == pickle.PROTO:
        return _open_legacy(stream)
    raise RefusedError(f"{_guess(stream[:512])}, expected a file that torch.save wrote")


class _Mapped(mmap.mmap):
    """A file in memory; zipfile reads a directory as long as it is said to be at once."""

    def read(self, size: int | None = None, /) -> bytes:
        if size is not None and size > _LONGEST_DIRECTORY:
            raise ValueError("its directory is too long")
        return super().read(size)


def _guess(start: bytes) -> str:
    """What a file is that is no checkpoint, by its first bytes."""
    if start[257:262] == b"ustar":
        return "it is a tar archive, perhaps of PyTorch before 0.1.10: save it with a newer one"
    if start[:2] == b"\x1f\x8b":
        return "it is compressed with gzip: unpack it first"
    if start.lstrip()[:1] == b"<":
        return "it is a web page, perhaps of a download that failed"
    if start[8:10] == b'{"':
        return "it is a safetensors file: give it a name that ends in .safetensors"
    return "it is of no known kind, or its beginning is damaged"


def _open_archive(stream: mmap.mmap) -> tuple[Any, Reader]:
    """The zip archive that PyTorch writes since 1.6: ROOT/data.pkl, and ROOT/data/KEY for each storage."""
    entries = _archive_entries(stream)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        kind = "a TorchScript program" if any(name.endswith("/constants.pkl") for name in entries) else "a zip archive"
        names = ", ".join(shown(name) for name in list(entries)[:5])
        raise RefusedError(f"it is {kind} with {names or 'nothing in it'}, expected one that torch.save wrote")

    def content(name: str) -> bytes:
        start, size, crc = entries[name].span(stream)
        if size > _LONGEST_PICKLE:
            raise RefusedError(f"its {shown(name)} has {size} bytes, expected no more than {_LONGEST_PICKLE}")
        found = stream[start : start + size]
        if crc is not None and zlib.crc32(found) != crc:
            raise RefusedError(f"its {shown(name)} is damaged: it does not match its checksum")
        return found

    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries and content(f"{root}byteorder") != b"little":
        raise RefusedError(_BIG_ENDIAN)
    contents, _ = unpickle(io.BytesIO(content(pickles[0])))

    def locate(key: str) -> Span | None:
        entry = entries.get(f"{root}data/{key}")
        return entry and entry.span(stream)

    return contents, Reader(memoryview(stream), locate)


class _Entry(NamedTuple):
    """An entry of a zip archive: where its header starts, where the next one does, what the directory says of it."""

    start: int
    end: int
    info: zipfile.ZipInfo
    has_checksum: bool

    def span(self, stream: mmap.mmap) -> Span:
        """Where the content lies. Only this reads from the entry: the pages of those that are not needed stay out."""
        name = shown(self.info.filename)
        header = stream[self.start : self.start + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise RefusedError(f"its entry {name} is damaged")
        start = self.start + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)[1:])
        if start + self.info.file_size > self.end:
            raise RefusedError(f"its entry {name} reaches into another")
        return Span(start, self.info.file_size, self.info.CRC if self.has_checksum else None)


def _archive_entries(stream: mmap.mmap) -> dict[str, _Entry]:
    """Every entry of a zip archive, which must be stored without compression, one behind the other."""
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], stream))
    # What zipfile raises for the directory of a damaged archive.
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as error:
        raise RefusedError(f"it is a zip archive that is damaged or cut short ({shown(str(error))})") from error
    entries: dict[str, _Entry] = {}
    end = archive.start_dir
    has_checksums = any(info.CRC for info in archive.infolist())  # PyTorch can be told to write zeros
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset, reverse=True):
        name, start = shown(info.filename), info.header_offset
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise RefusedError(f"its entry {name} is compressed or encrypted, as torch.save never does: save it again")
        if start < 0 or start + _LOCAL_HEADER.size + info.file_size > end or info.filename in entries:
            raise RefusedError(f"its entry {name} reaches into another, or stands there twice")
        entries[info.filename] = _Entry(start, end, info, has_checksums)
        end = start
    return entries


def _open_legacy(stream: mmap.mmap) -> tuple[Any, Reader]:
    """The format before 1.6: pickles of a magic number, a version, the system, the object and the keys; the numbers."""
    pickles = io.BytesIO(stream[:_LONGEST_PICKLE])
    magic, _ = unpickle(pickles)
    if magic != _LEGACY_MAGIC:
        raise RefusedError("it is a pickle, expected a file that torch.save wrote")
    (version, _), (system, _) = (unpickle(pickles) for _ in range(2))
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise RefusedError("it is of a version of PyTorch's old format that is not known: save it with a newer PyTorch")
    if system.get("little_endian") is not True:
        raise RefusedError(_BIG_ENDIAN)
    contents, storages = unpickle(pickles)
    keys, _ = unpickle(pickles)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise RefusedError("its tensors and its list of them are not the same: it is damaged")
    spans, at = {}, pickles.tell()
    for key in keys:
        size = storages[key].elements * storages[key].dtype.itemsize
        (elements,) = _INT64.unpack(stream[at : at + _INT64.size].ljust(_INT64.size))
        at += _INT64.size
        if elements != storages[key].elements or at + size > len(stream):
            raise RefusedError("it is damaged or cut short: the numbers of its tensors are not all there")
        spans[key] = Span(at, size, None)
        at += size
    if at != len(stream):
        raise RefusedError("it is damaged: something follows its last tensor")
    return contents, Reader(memoryview(stream), spans.get)


def _with_arrays(node: Any, array: Callable[[Tensor | Array], np.ndarray], done: dict[int, Any], depth: int) -> Any:
    """The tree with arrays for what describes them. What stands in it several times is made once."""
    if id(node) in done:
        return done[id(node)]
    if depth > _MOST_NESTED:
        raise RefusedError("what it holds is nested too deeply, or in itself")
    made = node

    def inside(value: Any) -> Any:
        return _with_arrays(value, array, done, depth + 1)

    if isinstance(node, Array) and node.value is None:
        made = Placeholder("numpy.ndarray", ())
    elif isinstance(node, Tensor) and node.dtype.type is np.void:
        made = Placeholder("torch.Tensor", ())
    elif isinstance(node, Tensor | Array):
        made = array(node)
    elif isinstance(node, dict):
        made = {key: inside(value) for key, value in node.items()}
    elif isinstance(node, list):
        made = [inside(value) for value in node]
    elif isinstance(node, tuple):
        made = tuple(inside(value) for value in node)
    elif isinstance(node, argparse.Namespace):
        made = argparse.Namespace()
        vars(made).update({key: inside(value) for key, value in vars(node).items()})
    elif not isinstance(node, _Plain):
        raise RefusedError(
            f"it holds what is part of no checkpoint by itself, a {type(node).__name__.strip('_').lower()}"
        )
    done[id(node)] = made
    return made
