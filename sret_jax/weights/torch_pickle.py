"""Reads the pickles inside PyTorch's files as data. Nothing that a pickle names is imported or called.

`pickletools.genops` of the standard library cuts the pickle into opcodes; the tables below say what each one means.
Names that weights need stand for functions of ours. Every other name is a `Placeholder`, and so is whatever a pickle
makes of it: training codes keep objects of any class beside their weights. What a pickle may ask for is counted: time
and memory grow with its length at most. Only text and small numbers are hashed, because hashing nested tuples takes
for ever, and so do numbers of one hash.
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
# Bytes that are no weights: complex and quantised ones, and those whose dtype stands beside each tensor.
_BYTES: Mapping[str, np.dtype] = {
    "torch.storage.UntypedStorage": np.dtype("V1"),
    "torch.UntypedStorage": np.dtype("V1"),
    **{f"torch.{name}Storage": np.dtype("V1") for name in ("QInt8", "QUInt8", "QUInt4x2", "QUInt2x4")},
    "torch.QInt32Storage": np.dtype("V4"),
    "torch.ComplexFloatStorage": np.dtype("V8"),
    "torch.ComplexDoubleStorage": np.dtype("V16"),
}
_DTYPES: Mapping[str, np.dtype] = {
    f"torch.{name}": np.dtype(dtype)
    for name, dtype in {
        "uint16": np.uint16,
        "uint32": np.uint32,
        "uint64": np.uint64,
        "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
        "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
        "float8_e5m2": ml_dtypes.float8_e5m2,
        "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
        "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
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

_STORAGES = {**STORAGE_DTYPES, **_BYTES}
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
    """A view of a storage's bytes as numbers; offset and strides count them. Nothing of it has been checked."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclasses.dataclass(eq=False, slots=True)
class Array:
    """A NumPy array that the pickle holds itself."""

    value: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Placeholder:
    """Stands for what a pickle names, or makes by calling what it names. Nothing has been imported or called.

    Attributes:
      name: `module.attribute`.
      arguments: that it would have been called with; None for the name itself.
    """

    name: str
    arguments: Any = dataclasses.field(default=None, repr=False)  # they may be endless


class RefusedError(UserError):
    """The pickle is damaged, or holds what a checkpoint does not."""


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
      Dicts, lists, tuples, text, numbers and `argparse.Namespace`s, with `Tensor` and `Array` where there is one and a
      `Placeholder` for everything else; and every storage by its key. A dict's key that is neither text nor a small
      number is a `Placeholder` too.

    Raises:
      RefusedError: the pickle is damaged, or has an opcode that this module does not know.
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


def _pop(machine: _Machine, _: None) -> None:
    if machine.stack:
        machine.stack.pop()
    else:  # on a mark
        machine.since_mark()


def _pop_mark(machine: _Machine, _: None) -> None:
    machine.since_mark()


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is list:
        target.extend(items)
    elif type(target) is not Placeholder:
        raise TypeError("items for what is no list")


def _set(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    pairs = zip(items[::2], items[1::2], strict=True)
    if type(target) is dict:
        for key, value in pairs:
            target[_key(key)] = value
    elif type(target) is not Placeholder:
        raise TypeError("keys for what is no dict")


def _key(value: Any) -> Any:
    """A key of a dict as it can be hashed: by identity, but for text and small numbers."""
    if type(value) is Placeholder or (
        isinstance(value, str | int | float | None) and not (isinstance(value, int) and abs(value) >= _DIFFERENT_HASHES)
    ):
        return value
    return Placeholder(f"builtins.{type(value).__name__}", (value,))


def _add(machine: _Machine, items: list[Any]) -> None:
    if type(machine.stack[-1]) is not Placeholder:
        raise TypeError("items for what is no set")


def _stack_global(machine: _Machine, _: None) -> None:
    module, attribute = machine.last(2)
    if not type(module) is type(attribute) is str:
        raise TypeError("a name that is no text")
    machine.stack.append(Placeholder(f"{module}.{attribute}"))


def _global(machine: _Machine, argument: str) -> None:
    machine.stack.append(_named(argument))


def _named(argument: str) -> Placeholder:
    """The name in an argument of `pickletools`, which puts a space between its parts.

    Pickles of PyTorch's protocol write ASCII there; whether `pickletools` reads more depends on its version.
    """
    if not argument.isascii():
        raise RefusedError(f"its pickle is damaged (a name that is not ASCII: {shown(argument)})")
    return Placeholder(argument.replace(" ", ".", 1))


def _persistent(machine: _Machine, _: None) -> None:
    (given,) = machine.last(1)
    kind, name, key, _, elements, *view = given if type(given) is tuple and len(given) in (5, 6) else [None] * 5
    dtype = _STORAGES.get(name.name) if type(name) is Placeholder and name.arguments is None else None
    if type(kind) is not str or kind != "storage" or dtype is None or any(view):
        machine.stack.append(Placeholder("a persistent object", given))
        return
    if type(key) is not str:
        raise TypeError("a storage without a key")
    storage = Storage(key, dtype, _count(elements))
    known = machine.storages.setdefault(key, storage)
    if (known.dtype, known.elements) != (storage.dtype, storage.elements):
        raise RefusedError(f"the tensor {shown(key)!r} is said to be of two kinds")
    machine.stack.append(known)


def _call(machine: _Machine, function: Any, arguments: Any) -> None:
    """Make what a call of a name gives: our function's result, or a placeholder."""
    if type(function) is not Placeholder:
        raise TypeError(f"a call of a {type(function).__name__}")
    call = _CALLS.get(function.name) if function.arguments is None else None
    if call is None or type(arguments) is not tuple:
        machine.stack.append(Placeholder(function.name, arguments))
        return
    if len(arguments) > _MOST_ARGUMENTS:
        raise TypeError(f"a call of {function.name} with {len(arguments)} arguments")
    machine.stack.append(call(machine, *arguments))


def _reduce(machine: _Machine, _: None) -> None:
    _call(machine, *machine.last(2))


def _new_object_with_keywords(machine: _Machine, _: None) -> None:
    name, arguments, keywords = machine.last(3)
    _call(machine, name, arguments if keywords == {} else (arguments, keywords))


def _old_object(machine: _Machine, _: None) -> None:
    name, *arguments = machine.since_mark()
    _call(machine, name, tuple(arguments))


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
        if type(dtype) is _Dtype:
            target.value = _numpy_array(data, dtype, shape, "F" if fortran is True else "C")
    # A dict's state says nothing of weights: PyTorch keeps the versions of modules there.
    elif type(target) is not Placeholder and type(target) is not dict:
        raise TypeError("state for what has none")


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


def _tensor(
    machine: _Machine, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Tensor | Placeholder:
    if type(storage) is Placeholder:
        kind = storage.arguments[1] if type(storage.arguments) is tuple and len(storage.arguments) > 1 else None
        return Placeholder(kind.name if type(kind) is Placeholder else storage.name, ())
    if type(storage) is not Storage:
        raise TypeError("a tensor without storage")
    return Tensor(storage, storage.dtype, _count(offset), _counts(shape), _counts(strides))


def _tensor_of_bytes(machine: _Machine, *arguments: Any) -> Tensor | Placeholder:
    *described, _, _, dtype = arguments[:7]
    tensor = _tensor(machine, *described)
    if type(tensor) is not Tensor or type(dtype) is not Placeholder:
        return Placeholder("torch._utils._rebuild_tensor_v3", ())
    known = _DTYPES.get(dtype.name)
    return Placeholder(dtype.name, ()) if known is None else dataclasses.replace(tensor, dtype=known)


def _tensor_itself(machine: _Machine, data: Tensor, *_: Any) -> Tensor | Placeholder:
    if type(data) is not Tensor and type(data) is not Placeholder:
        raise TypeError("a parameter that is no tensor")
    return data


def _tensor_with_attributes(machine: _Machine, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of a class of its own, or with attributes: what the function that it names makes."""
    name = function.name if type(function) is Placeholder and function.arguments is None else ""
    if name not in _TENSOR_CALLS or type(arguments) is not tuple or len(arguments) > _MOST_ARGUMENTS:
        return Placeholder(name or "torch._tensor._rebuild_from_type_v2", ())
    return _TENSOR_CALLS[name](machine, *arguments)


def _dict(machine: _Machine, items: Any = ()) -> dict[Any, Any] | Placeholder:
    """A dict, of pairs if there are any."""
    machine.count_steps(len(items))
    pairs = list(items.items()) if type(items) is dict else items
    if type(pairs) not in (list, tuple) or not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs):
        raise TypeError("a dict that is not made of pairs")
    return {_key(key): value for key, value in pairs}


def _namespace(machine: _Machine, *arguments: Any) -> argparse.Namespace | Placeholder:
    return Placeholder("argparse.Namespace", arguments) if arguments else argparse.Namespace()


def _dtype(machine: _Machine, code: Any, *_: Any) -> _Dtype | Placeholder:
    if type(code) is str and re.fullmatch("[biuf][1248]", code):
        return _Dtype(code)
    return Placeholder("numpy.dtype", (code,))


def _numpy_scalar(machine: _Machine, dtype: Any, data: Any) -> Any:
    if type(dtype) is Placeholder:
        return dtype
    (value,) = np.frombuffer(data, dtype.numpy())
    return value


def _numpy_array(data: Any, dtype: _Dtype, shape: Any, order: Literal["F", "C"]) -> np.ndarray:
    return np.frombuffer(data, dtype.numpy()).reshape(_counts(shape), order=order)


def _empty_array(machine: _Machine, *_: Any) -> Array:
    return Array()


def _array_of_buffer(machine: _Machine, data: Any, dtype: Any, shape: Any, order: Any) -> Array:
    return Array(_numpy_array(data, dtype, shape, "F" if order == "F" else "C") if type(dtype) is _Dtype else None)


def _bytes(machine: _Machine, *arguments: Any) -> bytes | Placeholder:
    return Placeholder("builtins.bytes", arguments) if arguments else b""


def _encode(machine: _Machine, *arguments: Any) -> bytes | Placeholder:
    """Bytes, as protocol 2 writes them."""
    text, encoding = arguments if len(arguments) == 2 else (None, None)
    if type(text) is not str or type(encoding) is not str or encoding != "latin1":
        return Placeholder("_codecs.encode", arguments)
    made = text.encode("latin1")
    machine.encoded_bytes += len(made)  # of a text that the pickle holds once and may name again and again
    if machine.encoded_bytes > _MOST_ENCODED_BYTES:
        raise RefusedError("its pickle asks for more than a checkpoint needs")
    return made


# What weights are made of: names that a pickle may call, and our functions that stand for them.
_TENSOR_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _tensor_itself,
    "torch._utils._rebuild_parameter_with_state": _tensor_itself,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _tensor_itself,
    "torch.nn.parameter.Parameter": _tensor_itself,
}
_CALLS: Mapping[str, Callable[..., Any]] = {
    **_TENSOR_CALLS,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    "collections.OrderedDict": _dict,
    "argparse.Namespace": _namespace,
    "numpy.dtype": _dtype,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _bytes,  # what protocol 2 makes of them
    **{
        f"numpy.{core}.{name}": call
        for core in ("core", "_core")
        for name, call in {
            "multiarray._reconstruct": _empty_array,
            "multiarray.scalar": _numpy_scalar,
            "numeric._frombuffer": _array_of_buffer,
        }.items()
    },
}

_SET = Placeholder("builtins.set", ())  # it does not keep its items

_OPCODES: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), _push),
    **dict.fromkeys(("LONG1", "LONG4"), _push_number),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"), _push),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _push),
    **dict.fromkeys(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"), lambda machine, _: None),
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_SET": lambda machine, _: machine.stack.append(_SET),
    "FROZENSET": lambda machine, _: _push(machine, Placeholder("builtins.frozenset", tuple(machine.since_mark()))),
    "NEXT_BUFFER": lambda machine, _: machine.stack.append(Placeholder("a buffer beside the pickle", ())),
    "MARK": lambda machine, _: machine.mark(),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: _push(machine, machine.last(1)),
    "TUPLE2": lambda machine, _: _push(machine, machine.last(2)),
    "TUPLE3": lambda machine, _: _push(machine, machine.last(3)),
    "APPEND": lambda machine, _: _append(machine, list(machine.last(1))),
    "APPENDS": lambda machine, _: _append(machine, machine.since_mark()),
    "ADDITEMS": lambda machine, _: _add(machine, machine.since_mark()),
    "SETITEM": lambda machine, _: _set(machine, list(machine.last(2))),
    "SETITEMS": lambda machine, _: _set(machine, machine.since_mark()),
    "BINPUT": _memoize,
    "LONG_BINPUT": _memoize,
    "MEMOIZE": lambda machine, _: _memoize(machine, len(machine.memo)),
    "BINGET": lambda machine, key: _push(machine, machine.memo[key]),
    "LONG_BINGET": lambda machine, key: _push(machine, machine.memo[key]),
    "POP": _pop,
    "POP_MARK": _pop_mark,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    **dict.fromkeys(
        ("EXT1", "EXT2", "EXT4"), lambda machine, code: _push(machine, Placeholder(f"the extension {code}"))
    ),
    "BINPERSID": _persistent,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_object_with_keywords,
    "INST": lambda machine, argument: _call(machine, _named(argument), tuple(machine.since_mark())),
    "OBJ": _old_object,
    "BUILD": _build,
}
