"""Writes files that `torch.load` reads, without PyTorch: the counterpart of `torch_file`.

The same arrays give the same bytes, whenever and wherever they are written.
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sret_jax.weights.torch_pickle import STORAGE_DTYPES

_STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_ALIGNMENT = 64  # of every entry's content, so that it can be mapped to memory
_LOCAL_HEADER_SIZE = 30
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's first day


def torch_file_content(state_dict: Mapping[str, np.ndarray]) -> bytes:
    """The content of a file in the layout of the official checkpoints, {"model": state dict}.

    `torch.load(path, weights_only=True)["model"]` gives the tensors. Arrays that are one and the same object become
    tensors of one storage, as a module that is registered under several names has them.

    Args:
      state_dict: {name: array}.

    Raises:
      KeyError: a dtype that PyTorch has no storage for.
    """
    return _archive(dict(state_dict), _described_state_dict)


def torch_list_content(arrays: Sequence[np.ndarray]) -> bytes:
    """The content of a file that `torch.load(path, weights_only=True)` reads as a list of tensors.

    Args:
      arrays: in the order of the list.

    Raises:
      KeyError: a dtype that PyTorch has no storage for.
    """
    return _archive({str(number): array for number, array in enumerate(arrays)}, _described_list)


_Described = Mapping[str, tuple[str, np.ndarray]]


def _archive(arrays: Mapping[str, np.ndarray], describe: Callable[[_Described], bytes]) -> bytes:
    """The zip archive; `describe` makes the pickle's one object of each array and the key of its numbers."""
    keys: dict[int, str] = {}
    entries: dict[str, bytes] = {"data.pkl": b"", "byteorder": b"little"}
    for array in arrays.values():
        if id(array) not in keys:
            keys[id(array)] = str(len(keys))
            entries[f"data/{keys[id(array)]}"] = array.tobytes()
    described = describe({name: (keys[id(array)], array) for name, array in arrays.items()})
    entries["data.pkl"] = pickle.PROTO + b"\x02" + described + pickle.STOP
    entries["version"] = b"3\n"

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo(f"archive/{name}", _EPOCH)
            start = file.tell() + _LOCAL_HEADER_SIZE + len(entry.filename) + 4
            padding = -start % _ALIGNMENT
            entry.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
            archive.writestr(entry, content)
    return file.getvalue()


def _described_state_dict(described: _Described) -> bytes:
    """{"model": OrderedDict of tensors}; it names PyTorch's functions without importing them."""
    items = b"".join(_text(name) + _tensor(key, array) for name, (key, array) in described.items())
    state_dict = _EMPTY_ORDERED_DICT + pickle.MARK + items + pickle.SETITEMS
    return pickle.EMPTY_DICT + _text("model") + state_dict + pickle.SETITEM


def _described_list(described: _Described) -> bytes:
    items = b"".join(_tensor(key, array) for key, array in described.values())
    return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS


def _tensor(key: str, array: np.ndarray) -> bytes:
    """A call of PyTorch's `_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, backward_hooks)`."""
    storage = _tuple(
        _text("storage"), _global(_STORAGE_NAMES[array.dtype]), _text(key), _text("cpu"), _whole(array.size)
    )
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    shape_and_strides = (_tuple(*map(_whole, lengths)) for lengths in (array.shape, strides))
    arguments = _tuple(storage + pickle.BINPERSID, _whole(0), *shape_and_strides, pickle.NEWFALSE, _EMPTY_ORDERED_DICT)
    return _global("torch._utils._rebuild_tensor_v2") + arguments + pickle.REDUCE


def _text(value: str) -> bytes:
    encoded = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded


def _whole(value: int) -> bytes:
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


_EMPTY_ORDERED_DICT = _global("collections.OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
