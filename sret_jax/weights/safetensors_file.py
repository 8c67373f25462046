"""Reads `.safetensors` files: what tensors there are, before any is read, and their numbers as views of the file."""

import json
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from sret_jax.files import DamagedError
from sret_jax.weights.torch_file import Reader, Span
from sret_jax.weights.torch_pickle import Placeholder, Storage, Tensor, shown

_LENGTH = struct.Struct("<Q")
# The header of SReT-S under its official names has 60 kB.
_LONGEST_HEADER = 2**23
_MOST_DIMENSIONS = 16

_DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}


class SafetensorsFile(NamedTuple):
    """What a file holds.

    Attributes:
      tensors: by name; a `Placeholder` for one of a dtype that weights do not have.
      metadata: text by text.
      reader: gives the numbers of the tensors.
    """

    tensors: dict[str, Tensor | Placeholder]
    metadata: dict[str, str]
    reader: Reader


def open_safetensors(path: Path) -> SafetensorsFile:
    """A `.safetensors` file whose header has been checked, and no tensor read.

    Raises:
      DamagedError: it is no such file, or a damaged one.
    """
    import safetensors

    with path.open("rb") as file:
        start = file.read(_LENGTH.size)
        (length,) = _LENGTH.unpack(start.ljust(_LENGTH.size))
        if len(start) < _LENGTH.size or length > _LONGEST_HEADER:
            raise DamagedError(f"it is no safetensors file, or its header is longer than {_LONGEST_HEADER:,} bytes")
        try:
            with safetensors.safe_open(path, framework="numpy"):  # compares the header with the file
                header = json.loads(file.read(length), object_pairs_hook=_without_repetition)
        except safetensors.SafetensorError as error:
            raise DamagedError(shown(str(error))) from error
        stream = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__", {})
    tensors = {name: _described(name, entry) for name, entry in header.items()}
    data = _LENGTH.size + length
    spans = {
        name: Span(data + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0], None)
        for name, entry in header.items()
    }
    return SafetensorsFile(tensors, metadata, Reader(memoryview(stream), spans.get))


def _described(name: str, entry: dict[str, Any]) -> Tensor | Placeholder:
    dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
    if dtype is None:
        return Placeholder(entry["dtype"])
    if len(shape) > _MOST_DIMENSIONS:
        raise DamagedError(f"its tensor {shown(name)} has {len(shape)} axes")
    strides = [1]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    begin, end = entry["data_offsets"]
    storage = Storage(name, dtype, (end - begin) // dtype.itemsize)
    return Tensor(storage, dtype, 0, shape, tuple(reversed(strides[: len(shape)])))


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise DamagedError("a name stands twice in its header")
    return made
