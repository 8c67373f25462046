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
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple, cast

import numpy as np
from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import local_copy, naming
from sret_jax.weights.torch_pickle import Array, RefusedError, Storage, Tensor, shown, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_BIG_ENDIAN = "its numbers are big-endian: load it where it was made, and save it on a machine that is little-endian"
_INT64 = struct.Struct("<q")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MOST_NESTED = 100

# Where training codes keep the weights: DeiT's, FKD's and timm's, and the averages beside them.
_WEIGHTS = ("model", "state_dict")
_AVERAGES = ("model_ema", "state_dict_ema", "ema")
_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile


class TorchWeights(NamedTuple):
    """The weights in a file, and what the file says of them.

    Attributes:
      path: the file.
      state_dict: {name: array}, names without wrappers' prefixes; views of the file.
      layout: under which key the weights stood, "" if the file is a plain state dict.
      notes: other entries of the file that are text or numbers, e.g. "epoch", "arch" or "args.model".
    """

    path: str
    state_dict: dict[str, np.ndarray]
    layout: str
    notes: dict[str, Any]


def load_torch_file(path: epath.PathLike) -> Any:
    """What `torch.save` wrote, with NumPy arrays for tensors.

    The arrays are read-only views of the file, which must stay as it is while they are used; copy what is to stay. A
    tensor in bfloat16 has the dtype of that name of `ml_dtypes`.

    Args:
      path: a file, which is mapped to memory; one behind `gs://`, `s3://` or the like is fetched first.

    Returns:
      Dicts, lists, tuples, text, numbers, `argparse.Namespace`s and arrays. Whatever else the file asks for is refused.

    Raises:
      UserError: no file that `torch.save` wrote, a damaged one, or one that asks for something to be executed.
    """
    contents, reader = _open(path)
    with _of_file(path):
        return _with_arrays(contents, reader.array, {}, 0)


def load_torch_weights(path: epath.PathLike, *, ema: bool = False) -> TorchWeights:
    """The weights in a file of PyTorch, in any layout that training codes write; nothing else of it is read.

    Args:
      path: as in `load_torch_file`.
      ema: whether to take the weights' moving average instead of the weights.

    Raises:
      UserError: as in `load_torch_file`, or the file holds no weights.
    """
    contents, reader = _open(path)
    with _of_file(path):
        key, weights = _find_weights(contents, ema)
        for wrapper in _WRAPPERS * 2:
            if all(name.startswith(wrapper) for name in weights):
                weights = {name.removeprefix(wrapper): value for name, value in weights.items()}
        state_dict = {name: reader.array(value) for name, value in weights.items()}
    return TorchWeights(os.fspath(path), state_dict, key, _notes(contents) if key else {})


def _find_weights(contents: Any, ema: bool) -> tuple[str, dict[str, Tensor | Array]]:
    """The key of the weights, "" for a plain state dict, and the weights."""
    if not isinstance(contents, dict):
        raise RefusedError(f"it holds a {type(contents).__name__}, expected a dict of weights")
    for key in _AVERAGES if ema else (*_WEIGHTS, ""):
        candidate = contents.get(key) if key else contents
        if isinstance(candidate, dict) and any(isinstance(value, Tensor | Array) for value in candidate.values()):
            strange = [name for name, value in candidate.items() if not isinstance(value, Tensor | Array)]
            strange += [name for name in candidate if not isinstance(name, str)]
            if strange:
                names = ", ".join(shown(str(name)) for name in strange[:10])
                raise RefusedError(f"among its weights are {len(strange)} entries that are no tensors: {names}")
            return key, candidate
    wanted = "moving average" if ema else "weights"
    keys = ", ".join(shown(str(key)) for key in list(contents)[:20])
    raise RefusedError(
        f"it holds no {wanted}: its entries are {keys or 'none'}; expected one of "
        + ", ".join(_AVERAGES if ema else (*_WEIGHTS, "tensors by name"))
    )


def _notes(contents: dict[Any, Any]) -> dict[str, Any]:
    notes = {f"args.{key}": value for key, value in vars(contents.get("args", argparse.Namespace())).items()}
    return {
        str(key): shown(value) if isinstance(value, str) else value
        for key, value in {**contents, **notes}.items()
        if isinstance(value, str | int | float)
    }


class _Span(NamedTuple):
    """Where a storage lies in the file; `crc` is its checksum, None where there is none."""

    start: int
    size: int
    crc: int | None


class _Reader:
    """The numbers of one file's tensors."""

    def __init__(self, buffer: memoryview, spans: Mapping[str, _Span]) -> None:
        self._buffer = buffer
        self._spans = spans
        self._checked: dict[str, np.ndarray] = {}

    def array(self, described: Tensor | Array) -> np.ndarray:
        """The tensor's numbers, a read-only view of the file.

        Raises:
          RefusedError: it does not lie within its storage, or the storage is damaged.
        """
        if isinstance(described, Array):
            if described.value is None:
                raise RefusedError("it holds a NumPy array without numbers")
            return described.value
        storage, offset, shape, strides = described.storage, described.offset, described.shape, described.strides
        content = self._content(storage)
        if len(shape) != len(strides):
            raise RefusedError(f"a tensor of shape {shape} has {len(strides)} strides")
        if not math.prod(shape):
            return np.zeros(shape, storage.dtype)
        if offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) >= storage.elements:
            raise RefusedError(f"a tensor of shape {shape} does not lie within its {storage.elements} numbers")
        itemsize = storage.dtype.itemsize
        return np.ndarray(shape, storage.dtype, content, offset * itemsize, [stride * itemsize for stride in strides])

    def _content(self, storage: Storage) -> np.ndarray:
        name, size = shown(storage.key), storage.elements * storage.dtype.itemsize
        span = self._spans.get(storage.key)
        if span is None or span.size != size:
            found = "no numbers" if span is None else f"{span.size} bytes"
            raise RefusedError(f"the tensor {name!r} has {found}, expected {size} bytes")
        if storage.key not in self._checked:
            content = self._buffer[span.start : span.start + size]
            if span.crc is not None and zlib.crc32(content) != span.crc:
                raise RefusedError(f"the numbers of the tensor {name!r} are damaged: they do not match their checksum")
            self._checked[storage.key] = np.frombuffer(content, np.uint8)
        return self._checked[storage.key]


@contextlib.contextmanager
def _of_file(path: epath.PathLike) -> Iterator[None]:
    """Errors that name the file."""
    try:
        yield
    except RefusedError as error:
        raise UserError(f"{os.fspath(path)} cannot be loaded: {error}") from error


def _open(path: epath.PathLike) -> tuple[Any, _Reader]:
    """What a file describes, with tensors as `Tensor`, and what reads them."""
    with local_copy(path) as file, naming(file), _of_file(path):
        if file.is_dir():
            raise RefusedError("it is a folder, expected a file that torch.save wrote")
        with file.open("rb") as opened:
            if not opened.read(1):
                raise RefusedError("it is empty, expected a file that torch.save wrote")
            stream = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if stream[:4] == b"PK\x03\x04":
            return _open_archive(stream)
        if stream[:1] == pickle.PROTO:
            return _open_legacy(stream)
        raise RefusedError(f"{_guess(stream[:512])}, expected a file that torch.save wrote")


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


def _open_archive(stream: mmap.mmap) -> tuple[Any, _Reader]:
    """The zip archive that PyTorch writes since 1.6: ROOT/data.pkl, and ROOT/data/KEY for each storage."""
    entries = _archive_entries(stream)
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        kind = "a TorchScript program" if any(name.endswith("/constants.pkl") for name in entries) else "a zip archive"
        names = ", ".join(shown(name) for name in list(entries)[:5])
        raise RefusedError(f"it is {kind} with {names or 'nothing in it'}, expected one that torch.save wrote")

    def content(name: str) -> bytes:
        start, size, crc = entries[name]
        found = stream[start : start + size]
        if crc is not None and zlib.crc32(found) != crc:
            raise RefusedError(f"its {shown(name)} is damaged: it does not match its checksum")
        return found

    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in entries and content(f"{root}byteorder") != b"little":
        raise RefusedError(_BIG_ENDIAN)
    contents, _ = unpickle(io.BytesIO(content(pickles[0])))
    prefix = f"{root}data/"
    spans = {name.removeprefix(prefix): span for name, span in entries.items() if name.startswith(prefix)}
    return contents, _Reader(memoryview(stream), spans)


def _archive_entries(stream: mmap.mmap) -> dict[str, _Span]:
    """Every entry of a zip archive, which must be stored without compression, one behind the other."""
    try:
        archive = zipfile.ZipFile(cast(IO[bytes], stream))
    # What zipfile raises for the directory of a damaged archive.
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error) as error:
        raise RefusedError(f"it is a zip archive that is damaged or cut short ({shown(str(error))})") from error
    spans: dict[str, _Span] = {}
    end = archive.start_dir
    has_checksums = any(entry.CRC for entry in archive.infolist())  # PyTorch can be told to write zeros
    for entry in sorted(archive.infolist(), key=lambda entry: entry.header_offset, reverse=True):
        name = shown(entry.filename)
        header = stream[entry.header_offset : entry.header_offset + _LOCAL_HEADER.size]
        if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise RefusedError(f"its entry {name} is damaged")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise RefusedError(
                f"its entry {name} is compressed or encrypted, which torch.save never does: save it again"
            )
        start = entry.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header)[1:])
        if start + entry.file_size > end or entry.filename in spans:
            raise RefusedError(f"its entry {name} overlaps another, or stands there twice")
        end = entry.header_offset
        spans[entry.filename] = _Span(start, entry.file_size, entry.CRC if has_checksums else None)
    return spans


def _open_legacy(stream: mmap.mmap) -> tuple[Any, _Reader]:
    """The format before 1.6: pickles of a magic number, a version, the system, the object and the keys; the numbers."""
    magic, _ = unpickle(cast(IO[bytes], stream))
    if magic != _LEGACY_MAGIC:
        raise RefusedError("it is a pickle, expected a file that torch.save wrote")
    (version, _), (system, _) = (unpickle(cast(IO[bytes], stream)) for _ in range(2))
    if version != _LEGACY_VERSION or not isinstance(system, dict):
        raise RefusedError("it is of a version of PyTorch's old format that is not known: save it with a newer PyTorch")
    if system.get("little_endian") is not True:
        raise RefusedError(_BIG_ENDIAN)
    contents, storages = unpickle(cast(IO[bytes], stream))
    keys, _ = unpickle(cast(IO[bytes], stream))
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise RefusedError("its tensors and its list of them are not the same: it is damaged")
    spans, at = {}, stream.tell()
    for key in keys:
        size = storages[key].elements * storages[key].dtype.itemsize
        (elements,) = _INT64.unpack(stream[at : at + _INT64.size].ljust(_INT64.size))
        at += _INT64.size
        if elements != storages[key].elements or at + size > len(stream):
            raise RefusedError("it is damaged or cut short: the numbers of its tensors are not all there")
        spans[key] = _Span(at, size, None)
        at += size
    if at != len(stream):
        raise RefusedError("it is damaged: something follows its last tensor")
    return contents, _Reader(memoryview(stream), spans)


def _with_arrays(node: Any, array: Callable[[Tensor | Array], np.ndarray], done: dict[int, Any], depth: int) -> Any:
    """The tree with arrays for what describes them. What stands in it several times is made once."""
    if id(node) in done:
        return done[id(node)]
    if depth > _MOST_NESTED:
        raise RefusedError("what it holds is nested too deeply, or in itself")
    made = node

    def inside(value: Any) -> Any:
        return _with_arrays(value, array, done, depth + 1)

    if isinstance(node, Tensor | Array):
        made = array(node)
    elif isinstance(node, Storage):
        raise RefusedError("it holds a storage without a tensor")
    elif isinstance(node, dict):
        made = {key: inside(value) for key, value in node.items()}
    elif isinstance(node, list):
        made = [inside(value) for value in node]
    elif isinstance(node, tuple):
        made = tuple(inside(value) for value in node)
    elif isinstance(node, argparse.Namespace):
        made = argparse.Namespace()
        vars(made).update({key: inside(value) for key, value in vars(node).items()})
    done[id(node)] = made
    return made
