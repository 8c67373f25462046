"""Reads the pickles inside PyTorch's files as data. Nothing that a pickle names is imported or called.

`pickletools.genops` of the standard library cuts the pickle into opcodes; the tables below say what each one means.
An opcode or a name that is not in them is refused, and so is what a writer of checkpoints never needs: keys that are
neither text nor small numbers (hashing nested tuples takes for ever, and so do numbers of one hash), or an opcode that
drops or repeats what it made. What a pickle may ask for is counted: time and memory grow with its length at most.
"""

import argparse
import dataclasses
import io
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np

from sret_jax.errors import UserError

STORAGE_DTYPES: Mapping[str, np.dtype] = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Float": np.float32,
        "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16,
        "Double": np.float64,
        "Long": np.int64,
        "Int": np.int32,
        "Short": np.int16,
        "Char": np.int8,
        "Byte": np.uint8,
        "Bool": np.bool_,
    }.items()
}

# What one pickle may ask for; a checkpoint of SReT-S with its optimizer has 60,000 opcodes, and opens 2,000 items.
_MOST_STEPS = 300_000  # or more in a longer pickle: PyTorch writes three bytes and more for each
_BYTES_OF_A_STEP = 3
_MOST_OPEN_ITEMS = 100_000
_MOST_NESTED = 1_000
_MOST_ENCODED_BYTES = 2**26
_MOST_ARGUMENTS = 10
_MOST_DIMENSIONS = 16
_MOST_BITS = 1024  # of a number; Python writes none of more than 4,300 digits
_DIFFERENT_HASHES = 2**61 - 1  # below it, every number has its own

_ByteOrder = Literal["<", ">", "="]
_BYTE_ORDERS: Mapping[str, _ByteOrder] = {"<": "<", ">": ">", "|": "=", "=": "="}


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A flat array that lies elsewhere in the file, under `key`."""

    key: str
    dtype: np.dtype
    elements: int


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Tensor:
    """A view of a storage; offset and strides count elements. Nothing of it has been checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(eq=False, slots=True)
class Array:
    """A NumPy array that the pickle holds itself."""

    value: np.ndarray | None = None


class RefusedError(UserError):
    """The pickle is damaged, or holds what a checkpoint does not."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """A global that the pickle names, `module.attribute`; it stays a name."""

    text: str


@dataclasses.dataclass(eq=False, slots=True)
class _Dtype:
    """A NumPy dtype while it is rebuilt."""

    code: str
    order: _ByteOrder = "="

    def numpy(self) -> np.dtype:
        return np.dtype(self.code).newbyteorder(self.order)


def unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """What the next pickle of a stream describes; the stream then stands behind it.

    Returns:
      Dicts, lists, tuples, text, numbers and `argparse.Namespace`s, with `Tensor` and `Array` where there is one; and
      every storage by its key.

    Raises:
      RefusedError: the pickle is damaged, or has an opcode or a name that this module does not know.
    """
    machine = _Machine(max(_MOST_STEPS, len(stream.getbuffer()) // _BYTES_OF_A_STEP))
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            machine.count_steps(1)
            handler = _OPCODES.get(opcode.name)
            if handler is None:
                raise RefusedError(f"its pickle has the opcode {opcode.name}, which checkpoints do not need")
            handler(machine, argument)
        return machine.result(), machine.storages
    except RefusedError:
        raise
    # What a damaged pickle does to the machine: too few items, items of another type, numbers out of range.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RefusedError(f"its pickle is damaged ({shown(str(error))})") from error


def shown(text: str) -> str:
    """Text from a file, fit to be printed: no control characters, not endless."""
    start = text[:200] if text[:200].isprintable() else ascii(text[:200])
    return start[:200] + "…" * (len(text) > 200)


class _Machine:
    """The stack, the stacks below the open marks, and the memo."""

    def __init__(self, most_steps: int) -> None:
        self.most_steps = most_steps
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.steps = 0
        self.encoded_bytes = 0

    def count_steps(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.most_steps or len(self.stack) > _MOST_OPEN_ITEMS:
            raise RefusedError("its pickle asks for more than a checkpoint needs")

    def mark(self) -> None:
        if len(self.below) >= _MOST_NESTED:
            raise RefusedError("its pickle is nested too deeply")
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def last(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError("an item is missing")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        return items

    def result(self) -> Any:
        if len(self.stack) != 1 or self.below:
            raise IndexError("items are left over")
        return self.stack.pop()


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _push_number(machine: _Machine, value: int) -> None:
    if value.bit_length() > _MOST_BITS:
        raise RefusedError("it holds a number of more digits than a checkpoint needs")
    machine.stack.append(value)


def _memoize(machine: _Machine, key: int) -> None:
    machine.memo[key] = machine.stack[-1]


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise TypeError("items for what is no list")
    target.extend(items)


def _set(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict:
        raise TypeError("keys for what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | None):
            raise RefusedError(f"it holds a dict with a key of type {type(key).__name__}, expected text or numbers")
        if isinstance(key, int) and abs(key) >= _DIFFERENT_HASHES:
            raise RefusedError("it holds a dict with a key that is a huge number")
        target[key] = value


def _stack_global(machine: _Machine, _: None) -> None:
    module, attribute = machine.last(2)
    _global(machine, f"{module} {attribute}" if type(module) is type(attribute) is str else "")


def _global(machine: _Machine, argument: str) -> None:
    name = argument.replace(" ", ".", 1)
    if name not in _CALLS and name not in STORAGE_DTYPES:
        raise RefusedError(
            f"it asks for {shown(name)!r}, which no checkpoint of weights needs: nothing of it has been executed. Do "
            "not trust this file, or take the weights out of it, where it was made, with "
            'torch.save({"model": model.state_dict()}, path)'
        )
    machine.stack.append(_Name(name))


def _persistent(machine: _Machine, _: None) -> None:
    (given,) = machine.last(1)
    if type(given) is tuple and given[:1] == ("module",):
        raise RefusedError("it holds a whole pickled model, expected weights: torch.save(model.state_dict(), path)")
    kind, name, key, _, elements, *view = given if type(given) is tuple and len(given) <= 6 else [None] * 5
    if kind != "storage" or type(key) is not str or any(view):
        raise RefusedError("its tensors are stored in a way that PyTorch has left behind: save it with a newer one")
    storage = Storage(key, STORAGE_DTYPES[_text(name)], _count(elements))
    known = machine.storages.setdefault(key, storage)
    if (known.dtype, known.elements) != (storage.dtype, storage.elements):
        raise RefusedError(f"the tensor {shown(key)!r} is said to be of two kinds")
    machine.stack.append(known)


def _reduce(machine: _Machine, _: None) -> None:
    name, arguments = machine.last(2)
    call = _CALLS[_text(name)]
    if call is None or type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
        raise TypeError(f"a call of {name.text}")
    made = call(*arguments)
    if type(made) is bytes:  # of a text that the pickle holds once and may name again and again
        machine.encoded_bytes += len(made)
        if machine.encoded_bytes > _MOST_ENCODED_BYTES:
            raise RefusedError("its pickle asks for more than a checkpoint needs")
    machine.stack.append(made)


def _new_object(machine: _Machine, _: None) -> None:
    name, arguments = machine.last(2)
    if _text(name) != "argparse.Namespace" or arguments != ():
        raise TypeError(f"a new {name.text}")
    machine.stack.append(argparse.Namespace())


def _build(machine: _Machine, _: None) -> None:
    (state,) = machine.last(1)
    target = machine.stack[-1]
    if isinstance(target, argparse.Namespace):
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise TypeError("attributes without a name")
        machine.count_steps(len(state))
        vars(target).update(state)
    elif isinstance(target, _Dtype):
        if type(state) is not tuple or type(state[1]) is not str:
            raise TypeError("a byte order that is no text")
        target.order = _BYTE_ORDERS[state[1]]
    elif isinstance(target, Array):
        _, shape, dtype, fortran, data = state
        order: Literal["F", "C"] = "F" if fortran is True else "C"
        target.value = np.frombuffer(data, dtype.numpy()).reshape(_counts(shape), order=order)
    elif type(target) is not dict or type(state) is not dict:  # a state dict's _metadata says nothing of weights
        raise TypeError("state for what has none")


def _text(name: Any) -> str:
    if type(name) is not _Name:
        raise TypeError(f"{type(name).__name__} instead of a name")
    return name.text


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise RefusedError("it holds a tensor with a size, offset or stride that is no count")
    return value


def _counts(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > _MOST_DIMENSIONS:
        raise RefusedError("it holds a tensor without a shape")
    for value in values:
        _count(value)
    return values


def _tensor(storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Tensor:
    if type(storage) is not Storage:
        raise TypeError("a tensor without storage")
    return Tensor(storage, _count(offset), _counts(shape), _counts(strides))


def _parameter(data: Tensor, *_: Any) -> Tensor:
    if type(data) is not Tensor:
        raise TypeError("a parameter that is no tensor")
    return data


def _ordered_dict() -> dict[Any, Any]:
    return {}


def _dtype(code: str, *_: Any) -> _Dtype:
    if not re.fullmatch("[biuf][1248]", code):
        raise RefusedError(f"it holds a NumPy array of dtype {shown(code)}, expected numbers")
    return _Dtype(code)


def _numpy_scalar(dtype: _Dtype, data: bytes) -> Any:
    (value,) = np.frombuffer(data, dtype.numpy())
    return value


def _empty_bytes() -> bytes:
    return b""


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError("bytes in an encoding other than latin1")
    return text.encode("latin1")


# Every name that a pickle may use, and our function that stands for it; None is no function.
_CALLS: Mapping[str, Callable[..., Any] | None] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "collections.OrderedDict": _ordered_dict,
    "argparse.Namespace": None,
    "numpy.ndarray": None,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _empty_bytes,  # what protocol 2 makes of them
    **{
        f"numpy.{core}.multiarray.{name}": call
        for core in ("core", "_core")
        for name, call in {"_reconstruct": lambda *_: Array(), "scalar": _numpy_scalar}.items()
    },
}

_OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), _push),
    **dict.fromkeys(("LONG1", "LONG4"), _push_number),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: _push(machine, machine.last(1)),
    "TUPLE2": lambda machine, _: _push(machine, machine.last(2)),
    "TUPLE3": lambda machine, _: _push(machine, machine.last(3)),
    "APPEND": lambda machine, _: _append(machine, list(machine.last(1))),
    "APPENDS": lambda machine, _: _append(machine, machine.since_mark()),
    "SETITEM": lambda machine, _: _set(machine, list(machine.last(2))),
    "SETITEMS": lambda machine, _: _set(machine, machine.since_mark()),
    "BINPUT": _memoize,
    "LONG_BINPUT": _memoize,
    "MEMOIZE": lambda machine, _: _memoize(machine, len(machine.memo)),
    "BINGET": lambda machine, key: _push(machine, machine.memo[key]),
    "LONG_BINGET": lambda machine, key: _push(machine, machine.memo[key]),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "BINPERSID": _persistent,
    "REDUCE": _reduce,
    "NEWOBJ": _new_object,
    "BUILD": _build,
}
