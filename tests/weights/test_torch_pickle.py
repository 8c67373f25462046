"""Pickles read as data: every kind of value that PyTorch saves, and where the limits of what is read lie."""

import argparse
import array as array_module
import collections
import datetime
import decimal
import fractions
import functools
import io
import pathlib
import pickle
import pickletools
import random
import re
import struct
import uuid
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from sret_jax.errors import UserError
from sret_jax.weights.torch_file import load_torch_file
from sret_jax.weights.torch_pickle import Placeholder, RefusedError, Storage, Tensor, unpickle
from sret_jax.weights.torch_weights import load_torch_weights
from tests.golden import kinds
from tests.weights.forge import (
    ENCODE,
    FLOAT32,
    NAMESPACE,
    ORDERED_DICT,
    REBUILD,
    SCALAR,
    Code,
    Content,
    Described,
    Entry,
    again,
    array,
    built,
    call,
    item,
    kept,
    named,
    pickled,
    zipped,
)

ONE = Described("FloatStorage", "0", 6, 0, (2, 3), (3, 1))
NUMBERS = np.arange(6, dtype=np.float32)


def read(value: Any, protocol: int = 2) -> Any:
    contents, _ = unpickle(io.BytesIO(pickled(value, protocol)))
    return contents


def written(folder: Path, content: Content) -> Path:
    path = folder / "file.pth"
    path.write_bytes(b"".join(bytes(piece) for piece in content))
    return path


def of_numbers(value: Any) -> Content:
    """A file with this value, and six numbers under the key "0"."""
    return zipped([Entry("a/data.pkl", pickled(value)), Entry("a/data/0", NUMBERS.tobytes())])


def assert_same(found: Any, wanted: Any) -> None:
    """The same values of the same types, all the way down."""
    assert type(found) is type(wanted)
    if isinstance(wanted, argparse.Namespace):
        found, wanted = vars(found), vars(wanted)
    if isinstance(wanted, dict):
        assert [*found] == [*wanted]
        found, wanted = [*found.values()], [*wanted.values()]
    if isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, np.ndarray | np.generic):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted, strict=True)
    else:
        assert found == wanted


@pytest.mark.parametrize("file", kinds.FILES)
def test_every_kind_of_value_that_pytorch_saved_is_read(file: str) -> None:
    assert_same(load_torch_file(kinds.FOLDER / file), kinds.expected(file))


@pytest.mark.parametrize("file", kinds.FILES)
def test_tensors_are_views_of_the_file_as_they_were_views_of_each_other(file: str) -> None:
    read_tensors = load_torch_file(kinds.FOLDER / file)["tensors"]
    for name in ("row", "transposed", "every other", "axes swapped", "expanded", "parameter"):
        assert np.shares_memory(read_tensors[name], read_tensors["whole"]), name
        assert not read_tensors[name].flags.writeable
    assert not np.shares_memory(read_tensors["float16"], read_tensors["whole"])
    assert read_tensors["expanded"].strides == (0, 0)
    assert read_tensors["transposed"].strides == (4, 24)


def test_what_stood_there_twice_is_one_object() -> None:
    first, second = load_torch_file(kinds.FOLDER / "kinds.pth")["twice"]
    assert first is second


def test_arrays_may_have_numpy_1s_names_and_numpy_2s(tmp_path: Path) -> None:
    content = (kinds.FOLDER / "kinds_legacy.pth").read_bytes()
    assert content.count(b"numpy._core") == 2
    path = tmp_path / "numpy_1.pth"
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert_same(load_torch_file(path), kinds.expected(path.name))


def test_a_file_without_checksums_is_read_but_a_checksum_that_is_there_is_compared(tmp_path: Path) -> None:
    data, numbers = Entry("a/data.pkl", pickled([ONE]), crc=0), Entry("a/data/0", NUMBERS.tobytes(), crc=0)
    (found,) = load_torch_file(written(tmp_path, zipped([data, numbers])))
    np.testing.assert_array_equal(found, NUMBERS.reshape(2, 3))
    with pytest.raises(UserError, match="does not match its checksum"):
        load_torch_file(written(tmp_path, zipped([data, numbers, Entry("a/version", b"3\n")])))


def test_text_of_python_2_is_read_as_latin1() -> None:
    short, long = Code(b"U\x02a\xe9"), Code(b"T" + struct.pack("<i", 3) + b"b\xff\n")
    assert read([short, long]) == ["aé", "bÿ\n"]


def test_what_pickles_of_our_own_hold_is_what_the_standard_library_reads() -> None:
    values = [
        kinds.plain()[name] for name in ("text", "nothing", "truth", "numbers", "tuples", "keys", "nested", "twice")
    ]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        for value in (*values, values):
            contents, storages = unpickle(io.BytesIO(pickle.dumps(value, protocol)))
            assert_same(contents, value)
            assert not storages


def test_a_namespace_and_an_ordered_dict_keep_no_state_but_attributes() -> None:
    assert vars(read(built(NAMESPACE, {"__class__": "a", "__dict__": {}}))) == {"__class__": "a", "__dict__": {}}
    # PyTorch puts the versions of modules there.
    items = Code(call(ORDERED_DICT) + b"(" + item("a") + item(1) + b"u")
    assert read(built(items, {"_metadata": {"": {"version": 1}}})) == {"a": 1}


def test_tensors_are_described_and_a_parameter_is_its_tensor() -> None:
    parameter = call(named("torch._utils", "_rebuild_parameter"), ONE, True, call(ORDERED_DICT))
    first_version = call(named("torch._utils", "_rebuild_tensor"), ONE.storage(), 1, (5,), (1,))
    (one, other, old), storages = unpickle(io.BytesIO(pickled([ONE, parameter, first_version])))
    assert isinstance(one, Tensor)
    assert (one.offset, one.shape, one.strides) == (0, (2, 3), (3, 1))
    assert (old.offset, old.shape, old.strides) == (1, (5,), (1,))
    assert one.storage is other.storage is old.storage is storages["0"]
    assert (one.storage.key, one.storage.dtype, one.storage.elements) == ("0", np.float32, 6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Float", np.float32),
        ("Half", np.float16),
        ("BFloat16", ml_dtypes.bfloat16),
        ("Double", np.float64),
        ("Long", np.int64),
        ("Int", np.int32),
        ("Short", np.int16),
        ("Char", np.int8),
        ("Byte", np.uint8),
        ("Bool", np.bool_),
    ],
)
def test_storages_have_the_dtype_of_their_name(name: str, dtype: type) -> None:
    storage = read(ONE._replace(kind=f"{name}Storage").storage())
    assert isinstance(storage, Storage)
    assert storage.dtype == np.dtype(dtype)


def test_the_stream_stands_behind_the_pickle() -> None:
    stream = io.BytesIO(pickled([1]) + pickled("b") + b"rest")
    assert [unpickle(stream)[0], unpickle(stream)[0], stream.read()] == [[1], "b", b"rest"]


def test_arrays_and_numbers_of_numpy_have_the_byte_order_that_they_say() -> None:
    big = built(call(named("numpy", "dtype"), "i4", False, True), (3, ">", None, None, None, -1, -1, 0))
    data = call(ENCODE, "\x00\x00\x01\x00", "latin1")
    assert read(call(SCALAR, big, data)) == 256
    assert read(array((1,), big, data=data)).value.tolist() == [256]
    assert read(call(SCALAR, FLOAT32, NUMBERS[5:].tobytes())) == 5
    fortran = read(array((2, 3), fortran=True, data=NUMBERS.tobytes())).value
    np.testing.assert_array_equal(fortran, NUMBERS.reshape(3, 2).T)


@pytest.mark.parametrize("loaded", ["namespace", "dict"])
def test_what_a_file_says_of_itself_is_noted_whatever_its_arguments_are_kept_in(tmp_path: Path, loaded: str) -> None:
    args = {"model": "SReT_T", "lr": 0.1, "betas": (0.9, 0.99)}
    value = {"model": {"a": ONE}, "args": built(NAMESPACE, args) if loaded == "namespace" else args, "epoch": 3}
    weights = load_torch_weights(written(tmp_path, of_numbers(value)))
    assert weights.notes == {"epoch": 3, "args.model": "SReT_T", "args.lr": 0.1}


def test_a_key_that_is_neither_text_nor_a_small_number_is_not_hashed() -> None:
    keys = [2**61 - 2, -(2**61) + 2, 2**61 - 1, (1, 2), b"a", "text", 1.5, None]
    found = read(item(dict.fromkeys(keys, 0)))
    assert list(found)[:2] + list(found)[5:] == [2**61 - 2, -(2**61) + 2, "text", 1.5, None]
    assert [(key.name, key.arguments) for key in list(found)[2:5]] == [
        ("builtins.int", (2**61 - 1,)),
        ("builtins.tuple", ((1, 2),)),
        ("builtins.bytes", (b"a",)),
    ]


ANY_NAME = named("posix", "system")


@pytest.mark.parametrize(
    ("code", "name"),
    [
        pytest.param(ANY_NAME, "posix.system", id="GLOBAL"),
        pytest.param(Code(item("posix") + item("system") + b"\x93"), "posix.system", id="STACK_GLOBAL"),
        pytest.param(call(ANY_NAME, "echo"), "posix.system", id="REDUCE"),
        pytest.param(Code(ANY_NAME + item(("echo",)) + pickle.NEWOBJ), "posix.system", id="NEWOBJ"),
        pytest.param(
            Code(ANY_NAME + item(("echo",)) + item({"a": 1}) + pickle.NEWOBJ_EX), "posix.system", id="NEWOBJ_EX"
        ),
        pytest.param(built(call(ANY_NAME, "echo"), {"a": 1}), "posix.system", id="BUILD"),
        pytest.param(built(call(ANY_NAME), (None, {"a": 1})), "posix.system", id="BUILD of slots"),
        pytest.param(Code(b"(" + item("echo") + pickle.INST + b"posix\nsystem\n"), "posix.system", id="INST"),
        pytest.param(Code(b"(" + ANY_NAME + item("echo") + pickle.OBJ), "posix.system", id="OBJ"),
        pytest.param(call(call(ANY_NAME, "echo"), "again"), "posix.system", id="a call of what was made"),
        pytest.param(Code(item("an id") + pickle.BINPERSID), "a persistent object", id="BINPERSID"),
        pytest.param(Code(pickle.EXT1 + b"\x07"), "the extension 7", id="EXT1"),
        pytest.param(Code(pickle.EXT2 + b"\x07\x00"), "the extension 7", id="EXT2"),
        pytest.param(Code(pickle.EXT4 + b"\x07\x00\x00\x00"), "the extension 7", id="EXT4"),
        pytest.param(
            Code(pickle.EMPTY_SET + b"(" + item("a") + item((1, 2)) + pickle.ADDITEMS), "builtins.set", id="set"
        ),
        pytest.param(Code(b"(" + item("a") + pickle.FROZENSET), "builtins.frozenset", id="FROZENSET"),
        pytest.param(Code(pickle.NEXT_BUFFER + pickle.READONLY_BUFFER), "a buffer beside the pickle", id="NEXT_BUFFER"),
        pytest.param(Code(call(ANY_NAME) + item("a") + item(1) + pickle.SETITEM), "posix.system", id="SETITEM"),
        pytest.param(Code(call(ANY_NAME) + b"(" + item("a") + item(1) + b"u"), "posix.system", id="SETITEMS"),
        pytest.param(Code(call(ANY_NAME) + item("a") + pickle.APPEND), "posix.system", id="APPEND"),
        pytest.param(Code(call(ANY_NAME) + b"(" + item("a") + pickle.APPENDS), "posix.system", id="APPENDS"),
        pytest.param(Code(item("dropped") + pickle.POP + ANY_NAME), "posix.system", id="POP"),
        pytest.param(Code(b"(" + item("dropped") + pickle.POP_MARK + ANY_NAME), "posix.system", id="POP_MARK"),
        pytest.param(array((1,), call(named("numpy", "dtype"), "O8"), data=[None]), None, id="an array of objects"),
    ],
)
def test_whatever_a_name_is_used_for_it_is_a_placeholder_and_the_weights_beside_it_are_right(
    code: Code, name: str | None, tmp_path: Path
) -> None:
    found = read(code, protocol=5)
    assert name is None or (type(found) is Placeholder and found.name == name)
    content = of_numbers({"anything": code, "model": {"a": ONE}})
    loaded = load_torch_file(written(tmp_path, content))
    assert type(loaded["anything"]) is Placeholder
    np.testing.assert_array_equal(loaded["model"]["a"], NUMBERS.reshape(2, 3))
    weights = load_torch_weights(tmp_path / "file.pth")
    np.testing.assert_array_equal(weights.state_dict["a"], NUMBERS.reshape(2, 3))


def test_what_training_codes_keep_beside_weights_does_no_harm(tmp_path: Path) -> None:
    extras = pickle.dumps(
        {
            "milestones": collections.Counter([10, 20, 10]),
            "history": collections.defaultdict(list, a=[1]),
            "skip": {"pos_embed", ("a", 1)},
            "frozen": frozenset({1}),
            "path": pathlib.PurePosixPath("/data/out"),
            "date": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
            "complex": 1j,
            "slice": slice(1, 2),
            "bytearray": bytearray(b"abc"),
            "by tuple": {(1, 2): 3},
            "enum": re.RegexFlag.IGNORECASE,
            "random": random.Random(0).getstate(),
            "generator": np.random.default_rng(0),
            "strings": np.array(["a", "bc"]),
            "objects": np.array([None, "a"], object),
            "records": np.zeros(2, [("a", "f4")]),
            "times": np.datetime64("2024-01-01"),
            "decimal": decimal.Decimal("0.1"),
            "fraction": fractions.Fraction(1, 3),
            "deque": collections.deque([1, 2], maxlen=3),
            "partial": functools.partial(print, 1),
            "function": print,
            "class": dict,
            "error": ValueError("a"),
            "array": array_module.array("d", [1.0]),
            "uuid": uuid.UUID(int=1),
            "in itself": (lambda cycle: cycle.append((cycle,)) or cycle)(Keeper()),
        },
        protocol=2,
    )
    for protocol in (2, 3, 4, 5):
        extras_code = Code(pickle.dumps(pickle.loads(extras), protocol)[2:-1])
        if protocol >= 4:  # no frame: the pickle goes on behind it
            extras_code = Code(pickletools.optimize(extras_code.join([b"\x80" + bytes([protocol]), b"."]))[2:-1])
        content = of_numbers({"beside": extras_code, "model": {"a": ONE}})
        weights = load_torch_weights(written(tmp_path, content))
        np.testing.assert_array_equal(weights.state_dict["a"], NUMBERS.reshape(2, 3), err_msg=str(protocol))


class Keeper(list):
    """A list that is pickled as an object, which may stand in itself."""


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"model": {"a": call(named("torch._utils", "_rebuild_qtensor"), ONE.storage())}}, "_rebuild_qtensor"),
        ({"model": {"b": ONE, "a": call(named("os", "system"), "echo")}}, "a (os.system)"),
        ({"model": {"b": ONE, "a": ONE._replace(kind="NewStorage")}}, "a (torch.NewStorage)"),
        ({"model": call(named("models.sret", "SReT"))}, "model is a 'models.sret.SReT'"),
        (call(named("models.sret", "SReT")), "it holds a 'models.sret.SReT'"),
    ],
)
def test_a_placeholder_where_a_weight_is_needed_is_an_error_that_names_it(
    value: Any, name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(name)) as error:
        load_torch_weights(written(tmp_path, of_numbers(value)))
    assert "\n" not in str(error.value)


def test_what_pytorch_makes_of_tensors_by_other_functions_is_read(tmp_path: Path) -> None:
    def made(function: str, *arguments: Any) -> Code:
        module, _, name = function.rpartition(".")
        return call(named(module, name), *arguments)

    tensor = named("torch._utils", "_rebuild_tensor_v2")
    arguments = (ONE.storage(), 0, (2, 3), (3, 1), False, call(ORDERED_DICT))
    bytes_ = Described(named("torch.storage", "UntypedStorage"), "1", 4, 0, (2, 2), (2, 1))
    value = {
        "attributes": made("torch._tensor._rebuild_from_type_v2", tensor, named("a", "B"), arguments, {"a": 1}),
        "with state": made("torch._utils._rebuild_parameter_with_state", ONE, True, call(ORDERED_DICT), {"a": 1}),
        "of a device": made("torch._utils._rebuild_device_tensor_from_cpu_tensor", ONE, None, "xla"),
        "old": made("torch.nn.parameter.Parameter", ONE),
        "bytes": made(
            "torch._utils._rebuild_tensor_v3", bytes_.storage(), 0, (2, 2), (2, 1), False, call(ORDERED_DICT),
            named("torch", "float8_e4m3fn"),
        ),
    }  # fmt: skip
    fp8 = np.array([[1, 2], [-0.5, 448]], ml_dtypes.float8_e4m3fn)
    entries = [Entry("a/data.pkl", pickled(value)), Entry("a/data/0", NUMBERS.tobytes())]
    found = load_torch_file(written(tmp_path, zipped([*entries, Entry("a/data/1", fp8.tobytes())])))
    for name in ("attributes", "with state", "of a device", "old"):
        np.testing.assert_array_equal(found[name], NUMBERS.reshape(2, 3), err_msg=name)
    assert found["bytes"].dtype == fp8.dtype
    np.testing.assert_array_equal(found["bytes"], fp8)


def test_an_ordered_dict_may_be_made_of_pairs() -> None:
    assert read(call(ORDERED_DICT, [("a", 1), ["b", 2]])) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("most", "more"),
    [
        pytest.param(Code(b"N\x85" + b"\x94" * 250_000), Code(b"N\x85" + b"\x94" * 500_000), id="opcodes"),
        pytest.param(Code(b"(" + b"N" * 99_000 + b"t"), Code(b"(" + b"N" * 101_000 + b"t"), id="open items"),
        pytest.param(Code(b"](" * 990 + b"e" * 990), Code(b"](" * 1010 + b"e" * 1010), id="open marks"),
        pytest.param(2**1024 - 1, 2**1024, id="digits"),
        pytest.param(
            ONE._replace(shape=(1,) * 16, strides=(1,) * 16),
            ONE._replace(shape=(1,) * 17, strides=(1,) * 17),
            id="axes",
        ),
        pytest.param(
            Code(kept("a" * 2**22, 0) + b"](" + call(ENCODE, again(0), "latin1") * 16 + b"e\x86"),
            Code(kept("a" * 2**22, 0) + b"](" + call(ENCODE, again(0), "latin1") * 17 + b"e\x86"),
            id="encoded bytes",
        ),
        pytest.param(
            Code(kept(dict.fromkeys(map(str, range(50_000))), 0) + NAMESPACE + again(0) + b"b\x86"),
            Code(kept(dict.fromkeys(map(str, range(50_000))), 0) + (NAMESPACE + again(0) + b"b\x86") * 50),
            id="attributes",
        ),
        pytest.param(
            call(REBUILD, ONE.storage(), 0, (1,), (1,), False, *[None] * 5),
            call(REBUILD, ONE.storage(), 0, (1,), (1,), False, *[None] * 6),
            id="arguments",
        ),
    ],
)
def test_a_pickle_is_read_up_to_its_limits_and_refused_beyond(most: Any, more: Any) -> None:
    read(most)
    with pytest.raises(RefusedError):
        read(more)


def test_containers_are_read_to_a_depth_of_a_hundred(tmp_path: Path) -> None:
    def nested(depth: int) -> Content:
        return of_numbers(Code(b"]" * depth + b"a" * (depth - 1)))

    load_torch_file(written(tmp_path, nested(100)))
    with pytest.raises(UserError, match="nested too deeply"):
        load_torch_file(written(tmp_path, nested(103)))


def test_a_tensor_may_repeat_numbers_but_no_more_often_than_the_file_has_bytes(tmp_path: Path) -> None:
    def repeated(times: int) -> Content:
        return of_numbers({"a": ONE._replace(offset=2, shape=(times, 2), strides=(0, 1))})

    path = written(tmp_path, repeated(100))
    assert load_torch_file(path)["a"].tolist() == [[2, 3]] * 100
    assert load_torch_weights(path).state_dict["a"].tolist() == [[2, 3]] * 100
    with pytest.raises(UserError, match="more numbers than the file has bytes"):
        load_torch_file(written(tmp_path, repeated(1000)))


def test_weights_may_lie_one_over_the_other_but_not_too_often(tmp_path: Path) -> None:
    def shared(names: int) -> Content:
        numbers = Described("FloatStorage", "1", 2**16, 0, (2**16,), (1,))
        value = dict.fromkeys(map(str, range(names)), numbers)
        return zipped([Entry("a/data.pkl", pickled(value)), Entry("a/data/1", bytes(2**18))])

    assert len(load_torch_weights(written(tmp_path, shared(30))).state_dict) == 30
    with pytest.raises(UserError, match="one over the other"):
        load_torch_weights(written(tmp_path, shared(1000)))
