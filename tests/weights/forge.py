"""Puts files of PyTorch together from bytes: pickles opcode by opcode, and archives in which every field may lie.

Nothing is taken from PyTorch or from `sret_jax`, so that the reader is tested with what others write.
"""

import collections
import dataclasses
import io
import itertools
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

GOLDEN = Path(__file__).parents[1] / "golden"

# A file: pieces one behind the other. A number stands for so many zeros, which take no place on the disk.
Content = tuple[bytes | int, ...]


class Code(bytes):
    """Opcodes of a pickle; as a rule they leave one object on the stack."""


class Described(NamedTuple):
    """What a pickle says of a tensor; `_replace` makes it say what is not so."""

    kind: Any
    key: Any
    elements: Any
    offset: Any
    shape: Any
    strides: Any

    def storage(self) -> Code:
        kind = named("torch", self.kind) if type(self.kind) is str else self.kind
        return Code(item(("storage", kind, self.key, "cpu", self.elements)) + pickle.BINPERSID)

    def code(self) -> Code:
        return call(REBUILD, self.storage(), self.offset, self.shape, self.strides, False, call(ORDERED_DICT))


def item(value: Any) -> Code:
    """Opcodes for a value: text, numbers, containers, or opcodes themselves."""
    match value:
        case Code():
            return value
        case None:
            return Code(pickle.NONE)
        case bool():
            return Code(pickle.NEWTRUE if value else pickle.NEWFALSE)
        case int() if -(2**31) <= value < 2**31:
            return Code(pickle.BININT + struct.pack("<i", value))
        case int():
            encoded = pickle.encode_long(value)
            return Code(pickle.LONG4 + struct.pack("<i", len(encoded)) + encoded)
        case float():
            return Code(pickle.BINFLOAT + struct.pack(">d", value))
        case str():
            encoded = value.encode("utf-8", "surrogatepass")
            return Code(pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded)
        case bytes():
            return Code(pickle.BINBYTES + struct.pack("<I", len(value)) + value)
        case Described():
            return value.code()
        case tuple():
            return Code(pickle.MARK + b"".join(map(item, value)) + pickle.TUPLE)
        case list():
            return Code(pickle.EMPTY_LIST + pickle.MARK + b"".join(map(item, value)) + pickle.APPENDS)
        case dict():
            return Code(pickle.EMPTY_DICT + pickle.MARK + items(value) + pickle.SETITEMS)
    raise TypeError(value)


def items(values: Mapping[Any, Any]) -> bytes:
    return b"".join(item(key) + item(value) for key, value in values.items())


def named(module: str, attribute: str) -> Code:
    return Code(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())


def named_by_stack(module: Any, attribute: Any) -> Code:
    return Code(item(module) + item(attribute) + pickle.STACK_GLOBAL)


def call(function: Code, *arguments: Any) -> Code:
    return Code(function + item(arguments) + pickle.REDUCE)


def built(target: Code, state: Any) -> Code:
    return Code(target + item(state) + pickle.BUILD)


def kept(value: Any, place: int) -> Code:
    """A value that is put into the memo, too."""
    return Code(item(value) + pickle.BINPUT + bytes([place]))


def again(place: int) -> Code:
    return Code(pickle.BINGET + bytes([place]))


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.PROTO + bytes([protocol]) + item(value) + pickle.STOP


ORDERED_DICT = named("collections", "OrderedDict")
NAMESPACE_NAME = named("argparse", "Namespace")
NAMESPACE = Code(NAMESPACE_NAME + pickle.EMPTY_TUPLE + pickle.NEWOBJ)
NDARRAY = named("numpy", "ndarray")
RECONSTRUCT = named("numpy._core.multiarray", "_reconstruct")
SCALAR = named("numpy._core.multiarray", "scalar")
ENCODE = named("_codecs", "encode")
REBUILD = named("torch._utils", "_rebuild_tensor_v2")
FLOATS = named("torch", "FloatStorage")


def dtype(code: Any, order: Any = "<") -> Code:
    return built(call(named("numpy", "dtype"), code, False, True), (3, order, None, None, None, -1, -1, 0))


FLOAT32 = dtype("f4")
EMPTY_ARRAY = call(RECONSTRUCT, NDARRAY, (0,), b"b")


def array(shape: Any, kind: Any = FLOAT32, fortran: Any = False, data: Any = b"") -> Code:
    return built(EMPTY_ARRAY, (1, shape, kind, fortran, data))


class _Describe(pickle.Unpickler):
    """Reads a pickle of a state dict that is known to be good."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, shape, strides, *_: Described(*storage, offset, shape, strides)
        return name if module == "torch" else collections.OrderedDict

    def persistent_load(self, given: tuple[Any, ...]) -> tuple[Any, ...]:
        _, kind, key, _, elements, *_ = given
        return kind, key, elements


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a zip archive. What is None is as it should be; a number as content is so many zeros."""

    name: str | bytes
    content: bytes | int = b""
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None  # in the directory, like all that follows up to `comment`
    packed_size: int | None = None
    offset: int | None = None
    version: int = 20
    extra: bytes = b""
    comment: bytes = b""
    signature: bytes = b"PK\x03\x04"
    in_file: bool = True
    in_directory: bool = True

    def true_size(self) -> int:
        return self.content if isinstance(self.content, int) else len(self.content)

    def encoded_name(self) -> bytes:
        return self.name.encode() if isinstance(self.name, str) else self.name


def _or(said: int | None, true: int) -> int:
    return true if said is None else said


def zipped(entries: Iterable[Entry], **end: Any) -> Content:
    """An archive; `end` holds what its last record says: count, size, offset, comment, comment_size, disk, zip64."""
    pieces: list[bytes | int] = []
    at, described = 0, []
    for entry in entries:
        name, true_size = entry.encoded_name(), entry.true_size()
        crc = _or(entry.crc, 0 if isinstance(entry.content, int) else zlib.crc32(entry.content))
        size, packed_size = _or(entry.size, true_size), _or(entry.packed_size, true_size)
        common = (entry.version, entry.flags | 0x800, entry.method, 0, 33, crc)
        if entry.in_directory:
            lengths = (len(name), len(entry.extra), len(entry.comment))
            said = (entry.version, *common, packed_size, size, *lengths, 0, 0, 0, _or(entry.offset, at))
            header = b"PK\x01\x02" + struct.pack("<6H3I5H2I", *said)
            described.append(header + name + entry.extra + entry.comment)
        if entry.in_file:
            header = struct.pack("<5H3I2H", *common, true_size, true_size, len(name), 0)
            pieces += [entry.signature + header + name, entry.content]
            at += 30 + len(name) + true_size
    comment, disk = end.get("comment", b""), end.get("disk", 0)
    directory, count = b"".join(described), _or(end.get("count"), len(described))
    counts = (count, count, _or(end.get("size"), len(directory)), _or(end.get("offset"), at))
    last = b"PK\x05\x06" + struct.pack("<4H2IH", disk, disk, *counts, _or(end.get("comment_size"), len(comment)))
    return (*pieces, directory, end.get("zip64", b""), last + comment)


def zip64_end(count: int, size: int, offset: int, record_at: int) -> bytes:
    """The two records of zip64 before an archive's last one."""
    record = b"PK\x06\x06" + struct.pack("<Q2H2I4Q", 44, 45, 45, 0, 0, count, count, size, offset)
    return record + b"PK\x06\x07" + struct.pack("<IQI", 0, record_at, 1)


# A file in PyTorch's own archive, and what is in it.
PLAIN = (GOLDEN / "tiny_plain.pth").read_bytes()
PLAIN_ARCHIVE = zipfile.ZipFile(io.BytesIO(PLAIN))
CONTENTS = {entry.filename: PLAIN_ARCHIVE.read(entry) for entry in PLAIN_ARCHIVE.infolist()}
PICKLE = CONTENTS["tiny_plain/data.pkl"]
STATE_DICT = Code(PICKLE.removeprefix(b"\x80\x02").removesuffix(b"."))
WEIGHTS: Mapping[str, Described] = _Describe(io.BytesIO(PICKLE)).load()
_CODES = {name: tensor.code() for name, tensor in WEIGHTS.items()}
STORAGES = [Entry(name, content) for name, content in CONTENTS.items() if "/data/" in name]
OTHERS = [Entry("tiny_plain/byteorder", b"little"), Entry("tiny_plain/version", b"3\n")]

# The same in the format before PyTorch 1.6: magic number, version, system, object, keys, and the tensors' numbers.
LEGACY = (GOLDEN / "tiny_legacy.pth").read_bytes()
_stream = io.BytesIO(LEGACY)
LEGACY_STARTS = [0]
for _ in range(5):
    collections.deque(pickletools.genops(_stream), 0)
    LEGACY_STARTS.append(_stream.tell())
LEGACY_PARTS = [LEGACY[start:end] for start, end in itertools.pairwise([*LEGACY_STARTS, len(LEGACY)])]
LEGACY_KEYS: list[str] = pickle.loads(LEGACY_PARTS[4])
LEGACY_WEIGHTS: Mapping[str, Described] = _Describe(io.BytesIO(LEGACY_PARTS[3])).load()


def archive(data_pkl: bytes, *more: Entry, without: Iterable[str] = ()) -> Content:
    """A file of PyTorch with this pickle, and the tensors of `tiny`."""
    entries = [entry for entry in [*OTHERS, *STORAGES] if entry.name not in without]
    return zipped([Entry("tiny_plain/data.pkl", data_pkl), *entries, *more])


def weights(changes: Mapping[Any, Any]) -> Code:
    """The state dict of `tiny` with other tensors under these names; None leaves one out."""
    described = {name: value for name, value in {**_CODES, **changes}.items() if value is not None}
    return Code(call(ORDERED_DICT) + pickle.MARK + items(described) + pickle.SETITEMS)


def legacy(changes: Mapping[int, bytes]) -> Content:
    """A file in the old format with other parts."""
    return tuple(changes.get(i, part) for i, part in enumerate(LEGACY_PARTS))


def place_of(name: str) -> int:
    """Where the content of an entry of `PLAIN` begins."""
    header = PLAIN_ARCHIVE.getinfo(name).header_offset
    return header + 30 + sum(struct.unpack("<2H", PLAIN[header + 26 : header + 30]))
