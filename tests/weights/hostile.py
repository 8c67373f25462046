"""Damaged and hostile variants of real files of PyTorch: the same ones, under the same names, in every run.

A family is a function that yields variants. A command that one of them gets executed leaves a file called `executed`.
What stands beside good weights is inert: they load, whatever a pickle there asks for.
"""

import bz2
import dataclasses
import gzip
import io
import itertools
import lzma
import pickle
import pickletools
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tests.weights.forge import (
    CONTENTS,
    EMPTY_ARRAY,
    ENCODE,
    FLOAT32,
    FLOATS,
    GOLDEN,
    LEGACY,
    LEGACY_KEYS,
    LEGACY_PARTS,
    LEGACY_STARTS,
    LEGACY_WEIGHTS,
    NAMESPACE,
    NAMESPACE_NAME,
    NDARRAY,
    ORDERED_DICT,
    OTHERS,
    PICKLE,
    PLAIN,
    PLAIN_ARCHIVE,
    REBUILD,
    SCALAR,
    STATE_DICT,
    STORAGES,
    WEIGHTS,
    Code,
    Content,
    Described,
    Entry,
    again,
    archive,
    array,
    built,
    call,
    dtype,
    item,
    kept,
    legacy,
    named,
    named_by_stack,
    pickled,
    place_of,
    weights,
    zip64_end,
    zipped,
)

COMMAND = "echo > executed"
SYSTEM = call(named("os", "system"), COMMAND)

# How a variant is loaded: as a network's weights, or everything that it holds.
Loaded = Literal["weights", "everything"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A file, and what is wrong with it."""

    name: str
    content: Content
    loaded: Loaded = "weights"
    may_be_harmless: bool = False  # then the undamaged weights are a right answer, too
    is_inert: bool = False  # then they are the only right answer; or that everything is read

    def write(self, path: Path) -> int:
        """Write the file; returns its size."""
        with path.open("wb") as file:
            for piece in self.content:
                if isinstance(piece, int):
                    file.seek(piece, io.SEEK_CUR)
                else:
                    file.write(piece)
            return file.truncate()


Variants = Iterator[Variant]


def beside(value: Code, protocol: int = 2) -> Content:
    """A checkpoint whose weights are in order and which holds something else, too, before or behind them."""
    described = {"optimizer": value, "model": STATE_DICT}
    if zlib.crc32(value) % 5 == 0:
        described = dict(reversed(described.items()))
    return archive(pickled(described, protocol))


def cut_archives() -> Variants:
    starts = [entry.header_offset for entry in PLAIN_ARCHIVE.infolist()]
    directory, size = PLAIN_ARCHIVE.start_dir, len(PLAIN)
    for name, place in {
        "behind its first byte": 1,
        "in its first signature": 3,
        "behind its first signature": 4,
        "in its first header": 20,
        "in its first name": 35,
        "in its pickle": place_of("tiny_plain/data.pkl") + 1000,
        "before its second entry": starts[1],
        "between two tensors": starts[len(starts) // 2],
        "in a tensor's header": starts[100] + 17,
        "in a tensor": place_of("tiny_plain/data/200") + 5,
        "before its last entry": starts[-1],
        "before its directory": directory,
        "in its directory's first signature": directory + 2,
        "in its directory's first entry": directory + 46,
        "in the middle of its directory": (directory + size) // 2,
        "before its zip64 record": size - 98,
        "in its zip64 record": size - 60,
        "before its zip64 locator": size - 42,
        "in its zip64 locator": size - 30,
        "before its last record": size - 22,
        "in its last record": size - 10,
        "before its last byte": size - 1,
    }.items():
        yield Variant(f"cut {name}", (PLAIN[:place],))
    for file in ("tiny_plain.pth", "tiny_deit.pth", "tiny_fkd.pth.tar", "tiny_half.pth"):
        content = (GOLDEN / file).read_bytes()
        for eighths in range(1, 8):
            yield Variant(f"{file} cut after {eighths} eighths", (content[: len(content) * eighths // 8],))
    for name, start, end in (
        ("its first byte", 0, 1),
        ("its first entry", 0, starts[1]),
        ("a byte of its pickle", 5000, 5001),
        ("a tensor", starts[50], starts[51]),
        ("half of the file", size // 4, 3 * size // 4),
        ("its directory's first entry", directory, directory + 65),
        ("its directory's first signature", directory, directory + 4),
    ):
        yield Variant(f"{name} is missing", (PLAIN[:start] + PLAIN[end:],))
        yield Variant(f"{name} is zeros", (PLAIN[:start] + bytes(end - start) + PLAIN[end:],))
        # What stands before an archive is no part of it.
        yield Variant(f"{name} stands there twice", (PLAIN[:end] + PLAIN[start:],), may_be_harmless=start == 0)


def cut_old_files() -> Variants:
    size, tensors = len(LEGACY), LEGACY_STARTS[5]
    places = {f"in part {i}": (a + b) // 2 for i, (a, b) in enumerate(itertools.pairwise(LEGACY_STARTS))}
    places |= {f"before part {i}": place for i, place in enumerate(LEGACY_STARTS[1:6], 1)}
    places |= {
        "in its first count": tensors + 3,
        "behind its first count": tensors + 8,
        "in its first tensor": tensors + 50,
        "before its last number": size - 4,
        "before its last byte": size - 1,
    }
    places |= {f"after {i} of 7 parts": size * i // 7 for i in range(1, 7)}
    for name, place in places.items():
        yield Variant(f"cut {name}", (LEGACY[:place],))
    for name, start, end in (
        ("its magic number", 0, LEGACY_STARTS[1]),
        ("its version", LEGACY_STARTS[1], LEGACY_STARTS[2]),
        ("its list of tensors", LEGACY_STARTS[4], LEGACY_STARTS[5]),
        ("a byte of its list of tensors", LEGACY_STARTS[4] + 30, LEGACY_STARTS[4] + 31),
        ("its first count", tensors, tensors + 8),
        ("a byte of a tensor", tensors + 70, tensors + 71),
        ("half of its tensors", tensors + 1000, size - 2000),
    ):
        yield Variant(f"{name} is missing", (LEGACY[:start] + LEGACY[end:],))
        yield Variant(f"{name} stands there twice", (LEGACY[:end] + LEGACY[start:],))
    yield Variant("a byte follows", (LEGACY, b"\0"))
    yield Variant("a megabyte follows", (LEGACY, 2**20))
    yield Variant("it stands there twice", (LEGACY, LEGACY))


def _flip(where: str, content: bytes, place: int, draw: random.Random) -> Variant:
    bit = draw.randrange(8)
    flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
    return Variant(f"bit {bit} of byte {place}, in {where}", (flipped,), may_be_harmless=True)


def flipped_archives() -> Variants:
    draw = random.Random(1)
    entries, directory, size = PLAIN_ARCHIVE.infolist(), PLAIN_ARCHIVE.start_dir, len(PLAIN)
    for _ in range(15):
        yield _flip("its pickle", PLAIN, place_of("tiny_plain/data.pkl") + draw.randrange(len(PICKLE)), draw)
    for entry in draw.sample(STORAGES, 30):
        name = str(entry.name)
        yield _flip(name, PLAIN, place_of(name) + draw.randrange(entry.true_size()), draw)
    for _ in range(40):
        yield _flip("its directory", PLAIN, draw.randrange(directory, size - 98), draw)
    for info in draw.sample(entries, 20):
        yield _flip("a header", PLAIN, info.header_offset + draw.randrange(30), draw)
    for place in range(size - 98, size, 7):
        yield _flip("its last records", PLAIN, place, draw)


def flipped_old_files() -> Variants:
    """Where damage can be noticed: this format has no checksums."""
    draw = random.Random(2)
    for part in (0, 1, 2, 4):
        for _ in range(8):
            yield _flip(f"part {part}", LEGACY, draw.randrange(LEGACY_STARTS[part], LEGACY_STARTS[part + 1]), draw)
    for name in draw.sample(sorted(WEIGHTS), 10):
        yield _flip(f"the name {name}", LEGACY, LEGACY.index(item(name)) + 5 + draw.randrange(len(name)), draw)
    sizes = {tensor.key: tensor.elements * (8 if tensor.kind[0] == "L" else 4) for tensor in LEGACY_WEIGHTS.values()}
    starts = itertools.accumulate((8 + sizes[key] for key in LEGACY_KEYS), initial=LEGACY_STARTS[5])
    for start in itertools.islice(starts, 0, len(LEGACY_KEYS), 25):
        yield _flip("a count", LEGACY, start + draw.randrange(8), draw)


def tensors() -> Variants:
    """A tensor of the network is described otherwise."""
    name = "transformers.1.blocks.0.attn.qkv.weight"
    good = WEIGHTS[name]
    rows, columns = good.shape
    last = rows * columns - 1
    ones = Code(b"(" + b"K\x01" * 50_000 + b"t")
    changes: dict[str, dict[str, Any]] = {
        "transposed": {"shape": (columns, rows)},
        "flat": {"shape": (rows * columns,), "strides": (1,)},
        "of rank 3": {"shape": (1, rows, columns), "strides": (1, columns, 1)},
        "of rank 0": {"shape": (), "strides": ()},
        "of rank 15": {"shape": (1,) * 15, "strides": (1,) * 15},
        "of rank 65": {"shape": (1,) * 65, "strides": (1,) * 65},
        "of rank 50,000": {"shape": ones, "strides": ones},
        "without numbers": {"shape": (0, columns)},
        "without numbers, and huge": {"shape": (0, 2**40, 2**40), "strides": (1, 1, 1)},
        "a row longer": {"shape": (rows + 1, columns)},
        "a row shorter": {"shape": (rows - 1, columns)},
        "a column longer": {"shape": (rows, columns + 1)},
        "of negative rows": {"shape": (-rows, columns)},
        "of negative rows and columns": {"shape": (-rows, -columns)},
        "of 2^31 rows": {"shape": (2**31, columns)},
        "of 2^47 rows": {"shape": (2**47, columns)},
        "of 2^47 rows that are one": {"shape": (2**47, columns), "strides": (0, 1)},
        "of 2^80 numbers that are one": {"shape": (2**40, 2**40), "strides": (0, 0)},
        "of 2^27 numbers that are one": {"shape": (2**27,), "strides": (0,)},
        "of 2^48 rows": {"shape": (2**48, columns)},
        "of 2^63 rows": {"shape": (2**63, columns)},
        "of as many rows as there are, modulo 2^64": {"shape": (2**64 + rows, columns)},
        "of 2^8000 rows": {"shape": (2**8000, columns)},
        "of a fraction of rows": {"shape": (float(rows), columns)},
        "of infinite rows": {"shape": (float("inf"), columns)},
        "of True rows": {"shape": (True, columns)},
        "of text": {"shape": (str(rows), columns)},
        "of None": {"shape": (None, columns)},
        "of nested sizes": {"shape": ((rows, columns),)},
        "of a list of sizes": {"shape": [rows, columns]},
        "of a size": {"shape": rows},
        "of a dict of sizes": {"shape": {rows: 0, columns: 0}},
        "of no shape": {"shape": None},
        "of one stride": {"strides": (1,)},
        "of three strides": {"strides": (columns, 1, 1)},
        "of no strides": {"strides": None},
        "of a negative stride": {"strides": (-columns, 1)},
        "of negative strides, from its end": {"strides": (-columns, -1), "offset": last},
        "of a longer stride": {"strides": (columns + 1, 1)},
        "of a stride of 2^47": {"strides": (2**47, 1)},
        "of a stride of 2^61": {"strides": (2**61, 1)},
        "of the right strides, modulo 2^64": {"strides": (2**64 + columns, 1)},
        "of strides of text": {"strides": ("1", "1")},
        "a number later": {"offset": 1},
        "at its storage's last number": {"offset": last},
        "behind its storage": {"offset": last + 1},
        "at -1": {"offset": -1},
        "at 2^47": {"offset": 2**47},
        "at 2^62": {"offset": 2**62},
        "at 2^64": {"offset": 2**64},
        "at no place": {"offset": None},
        "at a fraction": {"offset": 0.0},
        "at text": {"offset": "0"},
    }
    for what, change in changes.items():
        yield Variant(f"a tensor {what}", archive(pickled(weights({name: good._replace(**change)}))))
    storage, shape, strides = good.storage(), good.shape, good.strides
    arguments: dict[str, Any] = {
        "nothing": (),
        "a storage": (storage,),
        "a storage without strides": (storage, 0, shape),
        "None": (None, 0, shape, strides),
        "a tensor": (good, 0, shape, strides),
        "a key": (good.key, 0, shape, strides),
        "a dict": (call(ORDERED_DICT), 0, shape, strides),
        "a storage's name": (FLOATS, 0, shape, strides),
        "a list of arguments": [storage, 0, shape, strides],
        "a dict of arguments": {"storage": storage},
        "text as arguments": "abcd",
        "a storage as arguments": storage,
    }
    for what, given in arguments.items():
        rebuilt = Code(REBUILD + item(given) + pickle.REDUCE)
        yield Variant(f"a tensor made of {what}", archive(pickled(weights({name: rebuilt}))))


def storages() -> Variants:
    """The pickle, the archive and the counts of an old file do not say the same of a storage."""
    name = "transformers.1.blocks.0.attn.qkv.weight"
    good = WEIGHTS[name]
    same = [other for other, described in WEIGHTS.items() if described.key == good.key]
    for what, change in {
        "one number more": {"elements": good.elements + 1},
        "one number less": {"elements": good.elements - 1},
        "no numbers": {"elements": 0},
        "-1 numbers": {"elements": -1},
        "2^47 numbers": {"elements": 2**47},
        "2^62 numbers": {"elements": 2**62},
        "as many numbers as there are, modulo 2^64": {"elements": 2**64 + good.elements},
        "numbers counted by text": {"elements": str(good.elements)},
        "numbers counted by a fraction": {"elements": float(good.elements)},
        "numbers counted by None": {"elements": None},
        "doubles": {"kind": "DoubleStorage"},
        "halves": {"kind": "HalfStorage"},
        "bytes": {"kind": "ByteStorage"},
        "complex numbers": {"kind": "ComplexFloatStorage"},
        "quantised numbers": {"kind": "QInt8Storage"},
        "4-bit numbers": {"kind": "QUInt4x2Storage"},
        "no type": {"kind": named("torch.storage", "UntypedStorage")},
        "a type that is text": {"kind": item("FloatStorage")},
        "a type that is a function": {"kind": REBUILD},
        "a type that is a tuple": {"kind": item(("torch", "FloatStorage"))},
        "an unknown key": {"key": "350"},
        "a key that is a number": {"key": int(good.key)},
        "a key that is empty": {"key": ""},
        "a key that leaves its folder": {"key": "../data.pkl"},
        "a key that is a path": {"key": "/etc/passwd"},
        "a key of control characters": {"key": "\x1b[2J\x00\n"},
        "an endless key": {"key": "9" * 2**20},
    }.items():
        changed = dict.fromkeys(same, good._replace(**change))
        yield Variant(f"a storage of {what}", archive(pickled(weights(changed))))
    yield Variant("a storage of two types", archive(pickled(weights({name: good._replace(kind="IntStorage")}))))
    yield Variant("a storage of two sizes", archive(pickled(weights({name: good._replace(elements=1)}))))

    entry = f"tiny_plain/data/{good.key}"
    true = CONTENTS[entry]
    for what, changed_entry in {
        "a number less in the archive": Entry(entry, true[:-4]),
        "a byte less in the archive": Entry(entry, true[:-1]),
        "a byte more in the archive": Entry(entry, true + b"\0"),
        "nothing in the archive": Entry(entry, b""),
        "twice as much in the archive": Entry(entry, true * 2),
        "a megabyte in the archive": Entry(entry, bytes(2**20)),
        "other numbers": Entry(entry, bytes(len(true)), crc=zlib.crc32(true)),
        "numbers that are shifted": Entry(entry, true[1:] + true[:1], crc=zlib.crc32(true)),
    }.items():
        content = archive(pickled(STATE_DICT), changed_entry, without=[entry])
        yield Variant(f"a storage with {what}", content)
    yield Variant("a storage that is missing", archive(pickled(STATE_DICT), without=[entry]))
    half = [f"tiny_plain/data/{key}" for key in range(175)]
    yield Variant("half of the storages are missing", archive(pickled(STATE_DICT), without=half))

    (count,) = struct.unpack("<q", LEGACY_PARTS[5][:8])
    for said in (0, 1, -1, count - 1, count + 1, count + 2**32, 2**31, 2**47, 2**62, -(2**63)):
        numbers = struct.pack("<q", said) + LEGACY_PARTS[5][8:]
        yield Variant(f"an old file with {said} of {count} numbers", legacy({5: numbers}))
    keys: dict[str, Any] = {
        "no keys": [],
        "a key less": LEGACY_KEYS[:-1],
        "a key more": [*LEGACY_KEYS, "0"],
        "a key twice": [*LEGACY_KEYS, LEGACY_KEYS[0]],
        "keys in another order": LEGACY_KEYS[::-1],
        "keys that are numbers": list(map(int, LEGACY_KEYS)),
        "keys that are lists": [[key] for key in LEGACY_KEYS],
        "a key of 6,000 digits": [2**20_000],
        "keys in a dict": dict.fromkeys(LEGACY_KEYS),
        "keys in a tuple": tuple(LEGACY_KEYS),
        "keys in a text": "".join(LEGACY_KEYS),
        "None instead of keys": None,
    }
    for what, listed in keys.items():
        yield Variant(f"an old file with {what}", legacy({4: pickled(listed)}))
    systems: dict[str, Any] = {
        "of a big-endian machine": {"protocol_version": 1001, "little_endian": False, "type_sizes": {}},
        "that says nothing of its machine": {},
        "whose machine is a list": [],
        "whose machine is None": None,
        "whose machine is a tensor": good,
    }
    for what, system in systems.items():
        yield Variant(f"an old file {what}", legacy({2: pickled(system)}))
    for version in (0, 1000, -1001, 2**4000, 1001.5, "1001", None, [1001], good):
        shown = str(version)[:20]
        yield Variant(f"an old file of version {shown}", legacy({1: pickled(version)}))


# Functions that would do harm, or that no checkpoint of weights needs.
FUNCTIONS = """
os.system posix.system nt.system os.popen os.execvp os.spawnlp os.remove os.mkdir os._exit os.putenv os.fork
subprocess.Popen subprocess.run subprocess.check_output subprocess.getoutput pty.spawn
builtins.eval builtins.exec builtins.compile builtins.getattr builtins.setattr builtins.__import__ builtins.open
builtins.print builtins.breakpoint builtins.globals builtins.list builtins.set builtins.bytearray builtins.complex
__builtin__.eval __builtin__.execfile __builtin__.bytearray __main__.executed
runpy._run_code runpy.run_path runpy.run_module importlib.import_module code.interact pdb.run timeit.timeit cProfile.run
socket.create_connection urllib.request.urlopen webbrowser.open shutil.rmtree shutil.copy pathlib.Path io.open
tempfile.mkdtemp pickle.loads _pickle.loads marshal.loads types.FunctionType types.CodeType
functools.partial functools.reduce operator.attrgetter operator.methodcaller operator.itemgetter itertools.repeat
ctypes.CDLL ctypes.string_at sys.exit sys.setrecursionlimit signal.raise_signal atexit.register threading.Thread
asyncio.run multiprocessing.util.spawnv_passfds logging.config.fileConfig
copyreg._reconstructor copyreg.add_extension copy_reg._reconstructor
collections.defaultdict collections.namedtuple collections.Counter
numpy.load numpy.fromfile numpy.memmap numpy.zeros numpy.testing._private.utils.runstring
numpy.f2py.crackfortran.getlincoef numpy.lib.npyio.savez
jax.pure_callback jax.numpy.load sret_jax.load_variables sret_jax.weights.torch_pickle.unpickle
torch.load torch.save torch.device torch.tensor torch.jit.load torch.hub.load torch.hub.load_state_dict_from_url
torch.utils.cpp_extension.load_inline torch.storage._load_from_bytes torch._utils._rebuild_sparse_tensor
torch._utils._rebuild_qtensor torch._utils._rebuild_meta_tensor_no_storage torch._tensor._rebuild_from_type_v2
torch._dynamo.optimize torch.nn.modules.linear.Linear torchvision.models.resnet.resnet18 timm.models.create_model
"""

# What could be taken for a name that is allowed.
ALIKE = [
    ("collections", "OrderedDict.fromkeys"),
    ("collections", "OrderedDict.__init__.__globals__"),
    ("argparse", "Namespace.__init__.__globals__"),
    ("argparse", "_sys.modules"),
    ("argparse", "_os.system"),
    ("numpy", "ndarray.tofile"),
    ("numpy", "dtype.__class__"),
    ("_codecs", "encode.__self__"),
    ("_codecs", "decode"),
    ("codecs", "encode"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch._utils", "os.system"),
    ("torch._utils", "_rebuild_tensor_v9"),
    ("torch", "FloatStorage.from_file"),
    ("torch", "_utils"),
    ("torch.os", "system"),
    ("Collections", "OrderedDict"),
    ("collections", "ordereddict"),
    ("COLLECTIONS", "ORDEREDDICT"),
    ("collections", "OrderedDict "),
    (" collections", "OrderedDict"),
    ("collections\t", "OrderedDict"),
    ("collections\n", "OrderedDict"),
    ("collections\0", "OrderedDict"),
    ("collections.", "OrderedDict"),
    ("collections", ".OrderedDict"),
    ("", "collections.OrderedDict"),
    ("collections.OrderedDict", ""),
    ("", ""),
    (".", "."),
    ("ｃollections", "OrderedDict"),  # NFKC makes it the same
    ("сollections", "OrderedDict"),  # its first letter is Cyrillic
    ("collections", "OrderedDict\u200b"),
    ("collections", "Ordered\u00adDict"),
    ("collections", "\u202etciDderedrO"),
    ("torch", "ﬂoatStorage"),
    ("os", "\x1b]0;title\x07\x1b[2J"),
    ("os", "s" * 2**20),
    ("o" * 2**20, "system"),
]


def calls() -> Variants:
    """Every way that a pickle has to call something, and every name that it could call."""
    for i, function in enumerate(FUNCTIONS.split()):
        module, _, attribute = function.rpartition(".")
        by_name, by_stack = named(module, attribute), named_by_stack(module, attribute)
        code = call(by_stack if i % 2 else by_name, COMMAND)
        inert = function != "torch._tensor._rebuild_from_type_v2"  # which is known, and takes more arguments
        yield Variant(f"a call of {function}", beside(code, protocol=4), is_inert=inert)
    for module, attribute in ALIKE:
        code = call(named_by_stack(module, attribute))
        yield Variant(f"a call of {module!a:.40}, {attribute!a:.40}", beside(code, protocol=4), is_inert=True)
    refused = {
        "NEWOBJ of text",
        "REDUCE of text",
        "REDUCE without arguments",
        "REDUCE of what was made",
        "REDUCE of a tensor",
        *(f"a name of {what}" for what in ("numbers", "tuples", "bytes", "names", "None", "one part")),
        "GLOBAL beyond ASCII",
        "GLOBAL without an end",
        "encoding of what latin1 lacks",
        "a parameter of text",
        "a parameter of nothing",
    }
    system, command = named("os", "system"), item(COMMAND)
    arguments = item((COMMAND,))
    for what, opcodes in {
        "INST": b"(" + command + pickle.INST + b"os\nsystem\n",
        "OBJ": b"(" + system + command + pickle.OBJ,
        "NEWOBJ": system + arguments + pickle.NEWOBJ,
        "NEWOBJ_EX": system + arguments + b"}" + pickle.NEWOBJ_EX,
        "INST of a name that is allowed": b"(" + pickle.INST + b"collections\nOrderedDict\n",
        "OBJ of a name that is allowed": b"(" + ORDERED_DICT + pickle.OBJ,
        "NEWOBJ of a name that is allowed": ORDERED_DICT + b")" + pickle.NEWOBJ,
        "NEWOBJ_EX of a name that is allowed": NAMESPACE_NAME + b")}" + pickle.NEWOBJ_EX,
        "NEWOBJ with arguments": NAMESPACE_NAME + arguments + pickle.NEWOBJ,
        "NEWOBJ of text": item("argparse.Namespace") + b")" + pickle.NEWOBJ,
        "REDUCE of text": item("os.system") + arguments + pickle.REDUCE,
        "REDUCE of a storage's name": FLOATS + item((2**40,)) + pickle.REDUCE,
        "REDUCE of a class": NDARRAY + item(((2**40,),)) + pickle.REDUCE,
        "REDUCE of a class that BUILD knows": NAMESPACE_NAME + b")" + pickle.REDUCE,
        "REDUCE without arguments": REBUILD + b")" + pickle.REDUCE,
        "REDUCE with too many arguments": ORDERED_DICT + item(([("a", 1)],)) + pickle.REDUCE,
        "REDUCE without a tuple": ORDERED_DICT + b"]" + pickle.REDUCE,
        "REDUCE of what was made": call(ORDERED_DICT) + b")" + pickle.REDUCE,
        "REDUCE of a tensor": item(WEIGHTS["pos_embed"]) + b")" + pickle.REDUCE,
        "EXT1": pickle.EXT1 + b"\x01",
        "EXT2": pickle.EXT2 + b"\x01\x02",
        "EXT4": pickle.EXT4 + b"\x01\x02\x03\x04",
        "a name of numbers": named_by_stack(1, 2),
        "a name of tuples": named_by_stack(("os",), ("system",)),
        "a name of bytes": named_by_stack(b"collections", b"OrderedDict"),
        "a name of names": named_by_stack(ORDERED_DICT, "OrderedDict"),
        "a name of None": named_by_stack(None, "system"),
        "a name of one part": item("os") + pickle.STACK_GLOBAL,
        "GLOBAL of one line": pickle.GLOBAL + b"os.system\n\n",
        "GLOBAL with a space": pickle.GLOBAL + b"os system\nsystem\n",
        "GLOBAL with escapes": pickle.GLOBAL + b"\\x6fs\nsyst\\145m\n",
        "GLOBAL beyond ASCII": pickle.GLOBAL + "collectionſ\nOrderedDict\n".encode(),
        "GLOBAL without an end": pickle.GLOBAL + b"os",
        "encoding to text": call(ENCODE, "a", "rot13"),
        "encoding as a domain": call(ENCODE, "a" * 10_000, "punycode"),
        "encoding of nothing": call(ENCODE),
        "encoding of what latin1 lacks": call(ENCODE, "\u0100", "latin1"),
        "encoding with a handler of errors": call(ENCODE, "\u0100", "latin1", "ignore"),
        "bytes of a size": call(named("__builtin__", "bytes"), 2**40),
        "a parameter of text": call(named("torch._utils", "_rebuild_parameter"), "text", True, None),
        "a parameter of nothing": call(named("torch._utils", "_rebuild_parameter")),
    }.items():
        yield Variant(f"a call by {what}", beside(Code(opcodes), protocol=4), is_inert=what not in refused)
    for part, what in ((1, "version"), (2, "machine"), (3, "object"), (4, "list of keys")):
        yield Variant(f"a call where an old file has its {what}", legacy({part: pickled(SYSTEM)}))
    tensor = WEIGHTS["pos_embed"]
    hooks = call(REBUILD, tensor.storage(), 0, tensor.shape, tensor.strides, False, SYSTEM)
    for what, code in {
        "as the whole": SYSTEM,
        "among the weights": weights({"evil": SYSTEM}),
        "as a key": Code(b"}" + SYSTEM + b"Ns"),
        "as the weights' state": built(STATE_DICT, SYSTEM),
        "as a tensor's shape": weights({"pos_embed": tensor._replace(shape=SYSTEM)}),
        "as a tensor's hooks": weights({"pos_embed": hooks}),
        "as a storage's type": weights({"pos_embed": tensor._replace(kind=SYSTEM)}),
    }.items():
        inert = what in ("as the weights' state", "as a tensor's hooks")
        yield Variant(f"a call {what}", archive(pickled(code)), is_inert=inert)


_ARGUMENTS = {
    "decimalnl_short": b"1\n",
    "decimalnl_long": b"1L\n",
    "stringnl": b"'a'\n",
    "stringnl_noescape": b"a\n",
    "stringnl_noescape_pair": b"os\nsystem\n",
    "unicodestringnl": b"a\n",
    "floatnl": b"1.0\n",
    "uint1": b"\1",
    "uint2": b"\1\0",
    "uint4": b"\1\0\0\0",
    "int4": b"\1\0\0\0",
    "uint8": b"\1" + bytes(7),
    "float8": bytes(8),
    **dict.fromkeys(("long1", "string1", "bytes1", "unicodestring1"), b"\1a"),
    **dict.fromkeys(("long4", "string4", "bytes4", "unicodestring4"), b"\1\0\0\0a"),
    **dict.fromkeys(("bytes8", "bytearray8", "unicodestring8"), b"\1\0\0\0\0\0\0\0a"),
}


def opcodes() -> Variants:
    """Every opcode where checkpoints have none, those of text, and bytes that are no opcode."""
    changes_nothing = ("BINPUT", "LONG_BINPUT", "MEMOIZE", "PROTO", "FRAME")
    for opcode in pickletools.opcodes:
        code = opcode.code.encode("latin1")
        whole = code + (_ARGUMENTS[opcode.arg.name] if opcode.arg else b"")
        yield Variant(f"{opcode.name} instead of the weights", archive(b"\x80\x05" + whole + b"."))
        if opcode.arg:
            yield Variant(f"{opcode.name} without its argument", archive(b"\x80\x05" + code))
        if opcode.name in changes_nothing:
            behind = archive(b"\x80\x05" + STATE_DICT + whole + b".")
            yield Variant(f"{opcode.name} behind the weights", behind, may_be_harmless=True)
    for byte in b"\xff\x00\x01\x99\xfe!zZ":
        yield Variant(f"the unknown opcode {byte:#x}", archive(bytes([0x80, 2, byte]) + STATE_DICT + b"."))
    for what, text in {
        "a decimal of 5,000 digits": b"I" + b"9" * 5000 + b"\n",
        "a decimal of a million digits": b"I" + b"9" * 2**20 + b"\n",
        "a long decimal of a million digits": b"L" + b"9" * 2**20 + b"L\n",
        "a float of a million letters": b"F" + b"x" * 2**20 + b"\n",
        "a string of one quote": b"S'" + b"x" * 2**20 + b"\n",
        "True": b"I01\n",
        "text": b"V" + b"\\u0041" * 1000 + b"\n",
        "text beyond Unicode": b"V\\U7fffffff\n",
        "a persistent object": b"P" + b"storage" * 1000 + b"\n",
        "a dict": b"(dp0\nS'a'\np1\nI1\ns",
        "a list": b"(lp0\nI1\na",
        "an object": b"c__builtin__\nobject\np0\n(tRp1\n",
        "a command": b"cposix\nsystem\np0\n(S'" + COMMAND.encode() + b"'\np1\ntp2\nRp3\n",
    }.items():
        yield Variant(f"opcodes of text: {what}", archive(text + b"."))
        yield Variant(f"opcodes of text in an old file: {what}", legacy({3: text + b"."}))
    for what, whole in {
        "empty": b"",
        "of its protocol alone": b"\x80\x02",
        "without an end": b"\x80\x02" + STATE_DICT,
        "of two objects": b"\x80\x02" + STATE_DICT + STATE_DICT + b".",
        "with an open mark": b"\x80\x02(" + STATE_DICT + b".",
        "that is prose": b"hello, world",
        "that is JSON": b'{"model": {}}',
    }.items():
        yield Variant(f"a pickle {what}", archive(whole))


def masquerades() -> Variants:
    """Objects used as what they are not: state for what has none, attributes that stand for our own, odd tuples."""
    inert = {
        *("state for a name", "state for a class", "a list as a dict's state", "a pair as a dict's state"),
        *("__class__", "__dict__", "__reduce__", "a namespace as a dtype", "a namespace as a storage's type"),
        *("an array without a dtype", "an array of objects", "a dtype of objects", "a dtype of records"),
        *("a dtype by fields", "a dtype by a list", "a dtype of many", "a dtype of times", "a dtype of text"),
        "a dtype of complex numbers",
        *(f"a key that is {what}" for what in ("a list", "a tuple", "bytes", "a tensor", "a name")),
    }
    tensor = WEIGHTS["pos_embed"]
    for what, code in {
        "state for a list": built(item([]), {}),
        "state for text": built(item("a"), {}),
        "state for None": built(item(None), {}),
        "state for a number": built(item(1), {}),
        "state for a tuple": built(item(()), {}),
        "state for a tensor": built(tensor.code(), {"offset": 2**40}),
        "state for a storage": built(tensor.storage(), {"elements": 2**40}),
        "state for a name": built(ORDERED_DICT, {"text": "os.system"}),
        "state for a class": built(NAMESPACE_NAME, {"__init__": 1}),
        "a list as a dict's state": built(call(ORDERED_DICT), []),
        "a pair as a dict's state": built(call(ORDERED_DICT), (None, {"a": 1})),
        "a pair as a namespace's state": built(NAMESPACE, (None, {"__class__": "a"})),
        "a list as a namespace's state": built(NAMESPACE, [("a", 1)]),
        "attributes without a name": built(NAMESPACE, {1: 1}),
        "an attribute None": built(NAMESPACE, {None: 1}),
        "__setstate__": built(built(NAMESPACE, {"__setstate__": named("os", "system")}), COMMAND),
        "__class__": built(NAMESPACE, {"__class__": named("subprocess", "Popen")}),
        "__dict__": built(NAMESPACE, {"__dict__": named("os", "environ")}),
        "__reduce__": built(NAMESPACE, {"__reduce__": named("os", "system")}),
        "a namespace that is called": call(built(NAMESPACE, {"text": "os.system"}), COMMAND),
        "a namespace called as what is allowed": call(built(NAMESPACE, {"text": "collections.OrderedDict"})),
        "a namespace made new": Code(built(NAMESPACE, {"text": "argparse.Namespace"}) + b")" + pickle.NEWOBJ),
        "a namespace as a dtype": array((1,), built(NAMESPACE, {"numpy": 1}), data=bytes(4)),
        "a namespace as a storage": call(REBUILD, built(NAMESPACE, {"key": "0"}), 0, (1,), (1,)),
        "a namespace as a storage's type": tensor._replace(
            kind=built(NAMESPACE, {"text": "torch.FloatStorage"}), key="new"
        ).storage(),
        "a dict that is called": call(item({"text": "collections.OrderedDict"})),
        "an array with too little state": built(EMPTY_ARRAY, (1, (1,), FLOAT32)),
        "an array with too much state": built(EMPTY_ARRAY, (1, (1,), FLOAT32, False, bytes(4), 0)),
        "an array without a dtype": array((1,), None, data=bytes(4)),
        "an array of too few bytes": array((3,), data=bytes(4)),
        "an array of half a number": array((1,), data=bytes(5)),
        "an array of text": array((1,), data="abcd"),
        "an array of a list": array((1,), data=[1]),
        "an array of a negative size": array((-1,), data=bytes(4)),
        "an array of 2^80 numbers": array((2**40, 2**40), data=bytes(4)),
        "an array without numbers, and huge": array((0, 2**40, 2**40)),
        "an array of rank 65": array((1,) * 65, data=bytes(4)),
        "an array of objects": array((1,), call(named("numpy", "dtype"), "O8"), data=[None]),
        "a dtype of objects": dtype("O"),
        "a dtype of records": dtype("V8"),
        "a dtype by fields": dtype([("a", "f4")]),
        "a dtype by a list": dtype(["f4"] * 1000),
        "a dtype of many": dtype("f4," * 100_000),
        "a dtype of times": dtype("M8[ns]"),
        "a dtype of text": dtype("U1000000000"),
        "a dtype of complex numbers": dtype("c8"),
        "a dtype of 1-byte fractions": call(SCALAR, dtype("f1"), b"a"),
        "a dtype of an unknown order": dtype("f4", "!"),
        "a dtype whose order is a list": dtype("f4", []),
        "a dtype without an order": built(call(named("numpy", "dtype"), "f4"), ()),
        "a number made of two": call(SCALAR, FLOAT32, bytes(8)),
        "a number made of none": call(SCALAR, FLOAT32, b""),
        "a number made of text": call(SCALAR, FLOAT32, "abcd"),
        "a number without a dtype": call(SCALAR, "f4", bytes(4)),
        "an item for text": Code(item("a") + b"Na"),
        "items for a tuple": Code(b")(Ne"),
        "items for a namespace": Code(NAMESPACE + b"(Ne"),
        "a key for a list": Code(b"]" + item("a") + b"Ns"),
        "a key for a namespace": Code(NAMESPACE + item("a") + b"Ns"),
        "a key without a value": Code(b"}(" + item("a") + b"u"),
        "a key that is a list": item({(): 1}).replace(b")", b"]"),
        "a key that is a tuple": item({(1, 2): 1}),
        "a key that is bytes": item({b"a": 1}),
        "a key that is a tensor": Code(b"}" + item(tensor) + b"Ns"),
        "a key that is a name": Code(b"}" + ORDERED_DICT + b"Ns"),
    }.items():
        yield Variant(what, beside(Code(code)), is_inert=what in inert)
    for what, code in {
        "a storage": tensor.storage(),
        "an array without numbers": EMPTY_ARRAY,
        "a name": ORDERED_DICT,
        "a dtype": FLOAT32,
        "a tensor beyond its storage": tensor._replace(offset=1).code(),
        "a tensor without its storage": tensor._replace(key="none").code(),
        "a tensor of one stride": tensor._replace(strides=(1,)).code(),
        "a tensor that is larger than the file": tensor._replace(shape=(2**47,), strides=(0,)).code(),
    }.items():
        inert = {"an array without numbers", "a name"}
        yield Variant(f"beside the weights, {what}", beside(code), loaded="everything", is_inert=what in inert)
    persistent: dict[str, Any] = {
        "None": None,
        "text": "storage",
        "a number": 0,
        "an empty tuple": (),
        "a list": ["storage", FLOATS, "0", "cpu", 1],
        "a tuple that is too short": ("storage", FLOATS, "0", "cpu"),
        "a tuple that is too long": ("storage", FLOATS, "0", "cpu", 1, None, None),
        "a tuple of text": ("s", "t", "o", "r", "a"),
        "a word of five letters": "stora",
        "a dict of five keys": dict.fromkeys("stora"),
        "a module": ("module", FLOATS, "model.py", "class Model: pass"),
        "a view": ("storage", FLOATS, "0", "cpu", 1, ("view", 0, 1)),
        "a command": ("storage", named("os", "system"), "0", "cpu", 1),
        "another word": ("tensor", FLOATS, "0", "cpu", 1),
        "a storage": tensor.storage(),
    }
    for what, given in persistent.items():
        yield Variant(f"a persistent object of {what}", beside(Code(item(given) + pickle.BINPERSID)), is_inert=True)


def nested() -> Variants:
    """Containers in containers, hundreds to hundreds of thousands deep, or in themselves."""
    in_itself = Code(b"]q\x00h\x00a")
    dict_in_itself = Code(b"}q\x00" + item("a") + b"h\x00s")
    deep = Code(b"]" * 50_000 + b"a" * 49_999)
    for what, code in {
        "lists, 400": b"]" * 400 + b"a" * 399,
        "lists, 50,000": deep,
        "lists, 200,000": b"]" * 200_000 + b"a" * 199_999,
        "lists by marks, 500": b"](" * 500 + b"e" * 500,
        "lists by marks, 100,000": b"](" * 100_000 + b"e" * 100_000,
        "tuples, 500": b")" + b"\x85" * 500,
        "tuples, 200,000": b")" + b"\x85" * 200_000,
        "pairs, 500": b")" + b"q\x00h\x00\x86" * 500,
        "triples, 50,000": b")" + b"q\x00h\x00h\x00\x87" * 50_000,
        "dicts, 500": (b"}" + item("a")) * 500 + b"N" + b"s" * 500,
        "dicts, 40,000": (b"}" + item("a")) * 40_000 + b"N" + b"s" * 40_000,
        "namespaces, 500": (NAMESPACE + b"}" + item("a")) * 500 + b"N" + b"sb" * 500,
        "namespaces, 20,000": (NAMESPACE + b"}" + item("a")) * 20_000 + b"N" + b"sb" * 20_000,
        "marks, 2,000": b"(" * 2_000,
        "marks, 1,000,000": b"(" * 1_000_000,
        "marks that are closed": b"(" * 900 + b"t" * 900,
        "a list in itself": in_itself,
        "a list in itself, twice": b"]q\x00(h\x00h\x00e",
        "a dict in itself": dict_in_itself,
        "a namespace in itself": NAMESPACE + b"q\x00}" + item("a") + b"h\x00sb",
        "a tuple in its list": b"]q\x00h\x00\x85q\x01a",
    }.items():
        yield Variant(f"nested {what}", beside(Code(code)), loaded="everything")
        among_weights = {"pos_embed": Code(code), "patch_embed.conv1.weight": WEIGHTS["patch_embed.conv1.weight"]}
        yield Variant(f"nested as a weight: {what}", archive(pickled(among_weights)))
    for what, shape in (("deep", Code(b")" + b"\x85" * 50_000)), ("in itself", in_itself)):
        changed = WEIGHTS["pos_embed"]._replace(shape=shape)
        yield Variant(f"nested: a shape {what}", archive(pickled({"pos_embed": changed})))
    yield Variant("nested: an old file's version in itself", legacy({1: pickled(in_itself)}))
    yield Variant("nested: an old file's machine in itself", legacy({2: pickled(dict_in_itself)}))
    yield Variant("nested: an old file's keys in themselves", legacy({4: pickled(in_itself)}))
    yield Variant("nested: an old file's keys, deep", legacy({4: pickled(deep)}))


def repeated() -> Variants:
    """A few bytes that stand for a great deal: what is made once, and named again and again."""
    tensor = WEIGHTS["pos_embed"]
    doubled = Code(b")" + b"q\xc8h\xc8\x86" * 200)  # t = (t', t'), 200 times over: whatever walks through it never ends
    by_attribute = built(NAMESPACE, {"text": doubled})
    for what, code in {
        "a key": b"}" + doubled + b"Ns",
        "a pair as a key": b"}" + doubled + b"N\x86Ns",
        "a module": named_by_stack(doubled, "a"),
        "a function": call(doubled),
        "a namespace's function": call(by_attribute),
        "a namespace's class": by_attribute + b")" + pickle.NEWOBJ,
        "a persistent object": doubled + pickle.BINPERSID,
        "a storage's type": tensor._replace(kind=doubled).storage(),
        "a storage's type by a namespace": tensor._replace(kind=by_attribute).storage(),
        "a storage's key": tensor._replace(key=doubled).storage(),
        "a storage's size": tensor._replace(elements=doubled).storage(),
        "a tensor's shape": tensor._replace(shape=doubled).code(),
        "a tensor's offset": tensor._replace(offset=doubled).code(),
        "a tensor's storage": call(REBUILD, doubled, 0, (1,), (1,)),
        "a dtype": dtype(doubled),
        "a dtype's order": dtype("f4", doubled),
        "an encoding": call(ENCODE, "a", doubled),
        "a namespace's state": built(NAMESPACE, doubled),
        "an array's shape": array(doubled, data=bytes(4)),
        "an array's numbers": array((1,), data=doubled),
    }.items():
        inert = what in ("a key", "a pair as a key", "a persistent object", "a dtype", "an encoding")
        inert = inert or what.startswith("a storage's type")
        yield Variant(f"a tuple of 2^200 as {what}", beside(Code(code)), is_inert=inert)
    lists = Code(b"(" + b"]q\xc8" + b"](h\xc8h\xc8eq\xc8" * 90 + b"t")
    for what, content in {
        "as a weight": archive(pickled(weights({"pos_embed": doubled}))),
        "as the whole": archive(pickled(doubled)),
        "as lists": archive(pickled(lists)),
        "as an old file's version": legacy({1: pickled(doubled)}),
        "as an old file's machine": legacy({2: pickled(doubled)}),
        "as an old file's keys": legacy({4: pickled(doubled)}),
        "as an old file's key": legacy({4: pickled([doubled])}),
    }.items():
        yield Variant(f"a tuple of 2^200 {what}", content)

    arguments = (tensor.storage(), 0, (1,), (1,))
    persistent = ("storage", FLOATS, "0", "cpu", tensor.elements)
    more = (None,) * 90_000
    shape = (1,) * 60
    # Each of them is refused where it is, or has no weights beside it: none may take long before that.
    for what, opcodes in {
        "a call of 90,000 arguments": kept(REBUILD, 0) + kept((*arguments, *more), 1) + b"R" + b"h\0h\1R\x86" * 3000,
        "a storage of 90,000 words": kept((*persistent, *more), 0) + b"Q" + b"h\0Q\x86" * 3000,
        "a state of 40,000 attributes": kept(dict.fromkeys(map(str, range(40_000))), 0)
        + (NAMESPACE + b"h\0b\x86") * 3000,
        "a shape of 60 sizes": kept((tensor.storage(), 0, shape, shape), 0) + (REBUILD + b"h\0R\x86") * 3000,
        "a tensor": kept(REBUILD, 0) + kept((*arguments[:2], (1,) * 8, (1,) * 8), 1) + b"](" + b"h\0h\1R" * 95_000,
        "a tuple of 90,000": kept(more, 0) + b"](" + b"h\0" * 90_000,
        "a text of a megabyte, encoded": kept("a" * 2**20, 0) + call(ENCODE, again(0), "latin1") * 1000,
        "a text of 16 kilobytes, encoded": kept("é" * 2**14, 0) + call(ENCODE, again(0), "latin1") * 9000,
        "an array": kept(EMPTY_ARRAY, 0) + kept((1, (1,), FLOAT32, False, bytes(4)), 1) + b"h\0h\1b\x86" * 50_000,
    }.items():
        yield Variant(f"again and again: {what}", archive(b"\x80\x02" + opcodes + b"."))


def lengths() -> Variants:
    """Lengths, numbers and places in the memo that are beyond all bounds."""
    u32, u64, i32 = (struct.Struct(f"<{code}").pack for code in "IQi")
    for what, code in {
        "text of 2^60 bytes": b"\x8d" + u64(2**60) + b"abc",
        "text of 2^64 - 1 bytes": b"\x8d" + u64(2**64 - 1) + b"abc",
        "text of 2^32 - 1 bytes": b"X" + u32(2**32 - 1) + b"abc",
        "text of 255 bytes": b"\x8c\xffabc",
        "text that is none": b"\x8c\x01\xff",
        "bytes of 2^60": b"\x8e" + u64(2**60) + b"abc",
        "bytes of 2^64 - 1": b"\x8e" + u64(2**64 - 1),
        "bytes of 2^32 - 1": b"B" + u32(2**32 - 1) + b"abc",
        "bytes of 255": b"C\xffabc",
        "a byte array of 2^60": b"\x96" + u64(2**60) + b"abc",
        "a string of 2^31 - 1 bytes": b"T" + i32(2**31 - 1) + b"abc",
        "a string of -1 bytes": b"T" + i32(-1) + b"abc",
        "a string of 255 bytes": b"U\xffabc",
        "a number of 2^31 - 1 bytes": b"\x8b" + i32(2**31 - 1) + b"abc",
        "a number of -1 bytes": b"\x8b" + i32(-1) + b"abc",
        "a number of 255 bytes": b"\x8a\xffabc",
        "a place 2^31 in the memo": b"Nj" + u32(2**31),
        "a place 2^32 - 1 in the memo": b"Nj" + u32(2**32 - 1),
        "a place in the memo that is empty": b"h\xff",
        "a decimal place in the memo": b"Np99999999999999999999\n",
        "a negative place in the memo": b"Np-1\n",
        "a name that has no line": b"c" + b"a" * 2**20,
    }.items():
        yield Variant(f"length: {what}", beside(Code(code), protocol=4))
        yield Variant(f"length, in an old file: {what}", legacy({3: b"\x80\x04" + code}))
    for size in (2**60, 2**64 - 1):
        content = archive(b"\x80\x04\x95" + u64(size) + STATE_DICT + b".")
        yield Variant(f"length: a frame of {size} bytes", content, may_be_harmless=True)

    tensor = WEIGHTS["pos_embed"]
    huge = 2**20_000
    for what, value in {
        "as a key": {huge: 1},
        "as a weight's name": weights({huge: tensor}),
        "as a size": weights({"pos_embed": tensor._replace(shape=(huge,))}),
        "as a weight": weights({"pos_embed": huge}),
        "as the whole": huge,
        "as the epoch": {"model": STATE_DICT, "epoch": huge},
        "as the architecture": {"model": STATE_DICT, "arch": huge},
    }.items():
        yield Variant(f"length: a number of 6,000 digits {what}", archive(pickled(value)))
    of_one_hash = b"".join(item((2**61 - 1) * i) + b"N" for i in range(30_000))
    yield Variant("length: 30,000 keys of one hash", beside(Code(b"}(" + of_one_hash + b"u")), is_inert=True)
    long = {"a" * 2**20: tensor, "\x1b[31m" * 2**18: tensor, "\n" * 2**20: tensor, "\U0001f600" * 2**18: tensor}
    odd = {"\x1b]0;title\x07": tensor, "a\nb": tensor, "\ud800": tensor, "\u202e": tensor}
    for what, names in (("of a million letters", long), ("that cannot be printed", odd)):
        yield Variant(f"length: names {what}", archive(pickled(dict.fromkeys(names, 1))))
        yield Variant(f"length: names of weights {what}", archive(pickled(names)))
        yield Variant(f"length: names {what} among the weights", archive(pickled(weights(names))))

    size = 2**26
    wide = "\U0001f600".encode()  # it makes the whole text four bytes a letter
    for what, before, after in (
        ("text", b"X" + u32(size + len(wide)) + wide, b""),
        ("a line of a float", b"F", b"\n"),
        ("a line of a string", b"S'", b"\n"),
        ("bytes", b"B" + u32(size), b""),
        ("a number", b"\x8b" + i32(size), b""),
    ):
        before, after = b"\x80\x02" + before, after + b"."
        yield Variant(f"length: an old file of {what} of 64 MB", (*LEGACY_PARTS[:3], before, size, after))
        crc = zlib.crc32(after, zlib.crc32(bytes(size), zlib.crc32(before)))
        total = len(before) + size + len(after)
        header, _, *rest = zipped([Entry("a/data.pkl", total, crc=crc)])
        yield Variant(f"length: an archive of {what} of 64 MB", (header, before, size, after, *rest))
    text = b"\x80\x02X" + u32(400 * 2**20)
    yield Variant("length: an old file of text of 400 MB", (*LEGACY_PARTS[:3], text, 400 * 2**20))
    yield Variant("length: an archive's pickle of 400 MB", zipped([Entry("a/data.pkl", 400 * 2**20)]))
    order = Entry("a/byteorder", 400 * 2**20)
    yield Variant("length: a byte order of 400 MB", zipped([Entry("a/data.pkl", pickled(STATE_DICT)), order]))


def floods() -> Variants:
    """Files that are full of cheap opcodes, entries or tensors; none is much larger than a real one."""
    array_name, namespace = kept(EMPTY_ARRAY, 0), kept(NAMESPACE_NAME, 0)
    for what, code in {
        "None": b"N" * 1_000_000,
        "None in lists": (b"](" + b"N" * 50_000 + b"e\x86") * 12,
        "empty lists": (b"](" + b"]" * 50_000 + b"e\x86") * 12,
        "empty dicts in the memo": (b"](" + b"}\x94" * 50_000 + b"e\x86") * 12,
        "places in the memo": b"N" + b"\x94" * 1_000_000,
        "namespaces": namespace + b"](" + b"h\0)\x81" * 90_000 + b"e",
        "namespaces with an attribute": namespace + b"](" + (b"h\0)\x81}" + item("a") + b"Nsb") * 30_000 + b"e",
        "arrays": array_name + b"](" + EMPTY_ARRAY * 30_000 + b"e",
        "frames": (b"\x95" + bytes(8)) * 150_000,
        "protocols": b"\x80\x02" * 600_000,
        "marks that are closed": b"(t\x85" * 400_000,
        "pairs": b"N" + b"N\x86" * 600_000,
    }.items():
        whole = b"\x80\x04}" + item("optimizer") + code + b"s."
        yield Variant(f"a flood of {what}", archive(whole), loaded="everything")
        if what == "None in lists":
            yield Variant(f"a flood of {what} in an old file", legacy({3: whole}))
    names = b"".join(item(str(i)) + again(0) for i in range(60_000))
    tensor = kept(WEIGHTS["pos_embed"], 0)
    yield Variant("a flood of 60,000 names", archive(pickled(Code(b"}(" + item("a") + tensor + names + b"u"))))
    large = kept(Described("FloatStorage", "large", 2**20, 0, (2**20,), (1,)), 0)
    names = b"".join(item(str(i)) + again(0) for i in range(3_000))
    content = pickled(Code(b"}(" + item("a") + large + names + b"u"))
    yield Variant("a flood of 3,000 names of 4 MB", archive(content, Entry("tiny_plain/data/large", bytes(2**22))))
    entry = b"PK\x01\x02" + bytes(42)
    for count in (90_000, 300_000):
        last = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 65535, 65535, 46 * count, 4, 0)
        yield Variant(f"a flood of {count} entries", (b"PK\x03\x04", entry * count, last))
    empty = [Entry(f"a/data/{i}") for i in range(45_000)]
    yield Variant("a flood of 45,000 empty tensors", zipped([Entry("a/data.pkl", b"."), *empty]))


def bombs() -> Variants:
    """What is packed, encrypted, or lies over something else."""
    data, pickle_name, tensor_name = pickled(STATE_DICT), "tiny_plain/data.pkl", "tiny_plain/data/0"
    whole = {pickle_name: data, **{name: content for name, content in CONTENTS.items() if "/data/" in name}}

    def with_entry(entry: Entry) -> Content:
        rest = [Entry(name, content) for name, content in whole.items() if name != entry.name]
        return zipped([entry, *OTHERS, *rest])

    def deflated(content: bytes) -> bytes:
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packer.compress(content) + packer.flush()

    zeros = bytes(10**7)
    for what, method, content in (
        ("deflate", 8, deflated(zeros)),
        ("deflate64", 9, deflated(zeros)),
        ("bzip2", 12, bz2.compress(zeros)),
        ("lzma", 14, lzma.compress(zeros, lzma.FORMAT_ALONE)),
        ("zstandard", 93, b"\x28\xb5\x2f\xfd" + bytes(100)),
        ("an unknown method", 77, bytes(100)),
    ):
        for name in (pickle_name, tensor_name):
            bomb = Entry(name, content, method, crc=zlib.crc32(zeros), size=len(zeros))
            yield Variant(f"{name} packed by {what}", with_entry(bomb))
    honest = Entry(pickle_name, deflated(data), 8, crc=zlib.crc32(data), size=len(data))
    yield Variant("a pickle that is packed", with_entry(honest))
    for what, flags in (("encrypted", 1), ("encrypted strongly", 0x41), ("with a hidden header", 0x2001)):
        for name in (pickle_name, tensor_name):
            yield Variant(f"{name} {what}", with_entry(Entry(name, whole[name], flags=flags)))
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a/data.pkl", zeros)
    yield Variant("zips within a zip", zipped([Entry(f"{i}.zip", inner.getvalue()) for i in range(16)]))
    yield Variant("a zip as the pickle", archive(inner.getvalue()))

    # As in D. Fifield's bomb, many entries of the directory point at the same content, or at parts of it.
    kernel = Entry(pickle_name, data)
    over = [Entry(f"tiny_plain/data/{i}", data, offset=0, in_file=False) for i in range(350)]
    yield Variant("every tensor lies over the pickle", zipped([kernel, *over]))
    first = Entry(tensor_name, bytes(2**20))
    over = [Entry(f"tiny_plain/data/{i}", bytes(2**20), offset=0, in_file=False) for i in range(1, 1000)]
    yield Variant("1,000 tensors lie one over the other", zipped([first, *over, kernel]))
    second = Entry("tiny_plain/data/1", bytes(100))
    quoted = b"".join(piece for piece in zipped([second])[:2] if isinstance(piece, bytes))
    quoting = Entry(tensor_name, bytes(100) + quoted + bytes(5000))
    inside = dataclasses.replace(second, offset=30 + len(tensor_name) + 100, in_file=False)
    yield Variant("a tensor quotes another's header", zipped([quoting, inside, kernel]))
    for what, size in (("into the next", 120), ("into the directory", 400), ("beyond the end", 2**31)):
        long = Entry(tensor_name, bytes(100), size=size, packed_size=size)
        yield Variant(f"a tensor reaches {what}", zipped([kernel, long, second] if size == 120 else [kernel, long]))


def entries() -> Variants:
    """Names, sizes, places and counts in an archive."""
    data = pickled(STATE_DICT)
    one, rest = Entry("tiny_plain/data.pkl", data), [*OTHERS, *STORAGES]
    for what, name in {
        "of a parent": "../../x/data.pkl",
        "of a parent alone": "../data.pkl",
        "of the root": "/etc/x",
        "of the root, with a pickle": "/etc/data.pkl",
        "of a drive": "C:\\x\\data.pkl",
        "of a share": "\\\\host\\x\\data.pkl",
        "of backslashes": "tiny_plain\\data.pkl",
        "of the home": "~/data.pkl",
        "with a NUL": b"x/data.pkl\0/y",
        "of NUL alone": b"\0",
        "of escape sequences": "\x1b]0;title\x07\x1b[2J/y.pkl",
        "of lines": "a\nb\r\nc/d",
        "that runs backwards": "\u202elkp.atad/x",
        "of emoji": "😀/😀.pkl",
        "that is no text": b"\xff\xfe/data.pkl",
        "of 65,000 letters": "x" * 65_000 + "/y.pkl",
        "of 10,000 folders": "x/" * 10_000 + "data.pkl",
        "that is empty": "",
        "of a folder": "tiny_plain/data.pkl/",
        "with spaces": " tiny_plain / data.pkl",
        "in capitals": "TINY_PLAIN/DATA.PKL",
        "without a folder": "data.pkl",
        "in a deeper folder": "tiny_plain/y/data.pkl",
        "that looks alike": "tiny_plain/dаta.pkl",  # its second letter is Cyrillic
        "of a device": "tiny_plain/CON",
    }.items():
        yield Variant(f"a pickle under a name {what}", zipped([Entry(name, data), *rest]))
    again_by_nul = dataclasses.replace(STORAGES[0], name=f"{STORAGES[0].name}\0a")
    for what, listed in {
        "two pickles": [one, Entry("other/data.pkl", data), *rest],
        "the pickle twice": [one, one, *rest],
        "the pickle twice, once a command": [one, Entry(one.name, pickled(SYSTEM)), *rest],
        "a tensor twice": [one, *rest, STORAGES[0]],
        "a tensor twice, by NUL": [one, *rest, again_by_nul],
        "no pickle": rest,
        "nothing but a pickle": [one],
        "a pickle, and tensors elsewhere": [Entry("elsewhere/data.pkl", data), *rest],
        "no entry": [],
        "a program": [Entry("m/code/m.py", b"pass"), Entry("m/constants.pkl", pickled(())), Entry("m/data.pkl", data)],
        "a program alone": [Entry("m/constants.pkl", pickled(())), Entry("m/code/m.py", b"pass")],
        "pictures": [Entry(f"images/{i}.jpg", b"\xff\xd8\xff\xe0" + bytes(1000)) for i in range(50)],
        "a big-endian machine": [one, Entry("tiny_plain/byteorder", b"big"), *STORAGES],
        "an unknown byte order": [one, Entry("tiny_plain/byteorder", b"\xff" * 1000), *STORAGES],
        "a package of Python": [Entry("torch/__init__.py"), Entry("torch-2.0.dist-info/RECORD")],
        "a document": [Entry("[Content_Types].xml", b"<Types/>"), Entry("word/document.xml", b"<w/>")],
        "a checkpoint in parts": [Entry("checkpoint/.metadata", data), Entry("checkpoint/__0_0.distcp", data)],
    }.items():
        yield Variant(f"an archive of {what}", zipped(listed))
    none = 2**32 - 1  # says that the number stands in a field of zip64
    sizes = {"size": none, "packed_size": none}
    changes: dict[str, dict[str, Any]] = {
        "no signature": {"signature": b"PK\x03\x05"},
        "the directory's signature": {"signature": b"PK\x01\x02"},
        "a header at another place": {"offset": 7},
        "a header beyond the end": {"offset": 2**31},
        "a header at the last byte that there can be": {"offset": none},
        "another checksum": {"crc": 12345},
        "a checksum of 0": {"crc": 0},
        "a longer size": {"size": len(data) + 1},
        "a shorter size": {"size": len(data) - 1},
        "longer sizes": {"size": len(data) + 1, "packed_size": len(data) + 1},
        "shorter sizes": {"size": len(data) - 1, "packed_size": len(data) - 1},
        "no sizes": {"size": 0, "packed_size": 0},
        "huge sizes": sizes,
        "sizes in a zip64 field that is empty": {**sizes, "extra": struct.pack("<2H", 1, 0)},
        "sizes in a zip64 field that is cut": {**sizes, "extra": struct.pack("<2HI", 1, 4, 1)},
        "sizes of 2^62 by zip64": {**sizes, "extra": struct.pack("<2H2Q", 1, 16, 2**62, 2**62)},
        "sizes of 2^64 - 1 by zip64": {**sizes, "extra": struct.pack("<2H2Q", 1, 16, 2**64 - 1, 2**64 - 1)},
        "a place of 2^62 by zip64": {"offset": none, "extra": struct.pack("<2HQ", 1, 8, 2**62)},
        "a place of 2^64 - 1 by zip64": {"offset": none, "extra": struct.pack("<2HQ", 1, 8, 2**64 - 1)},
        "a field that is longer than the directory": {"extra": struct.pack("<2H", 1, 65535)},
        "a version of zip that is to come": {"version": 255},
        "an entry in the directory alone": {"in_file": False},
    }
    for what, change in changes.items():
        yield Variant(f"a pickle with {what}", zipped([dataclasses.replace(one, **change), *rest]))
    yield Variant("no directory", zipped(dataclasses.replace(entry, in_directory=False) for entry in [one, *rest]))
    ends: dict[str, dict[str, Any]] = {
        "0 bytes of directory": {"size": 0},
        "2^31 bytes of directory": {"size": 2**31},
        "2^32 - 1 bytes of directory": {"size": none},
        "a directory that is too short": {"size": 10_000},
        "a directory at 0": {"offset": 0},
        "a directory at 2^31": {"offset": 2**31},
        "a directory at 2^32 - 1": {"offset": none},
        "another end in its comment": {"comment": b"PK\x05\x06" + bytes(18)},
        "2^62 bytes of directory by zip64": {"offset": none, "zip64": zip64_end(1, 2**62, 0, 0)},
        "a directory at 2^62 by zip64": {"offset": none, "zip64": zip64_end(1, 46, 2**62, 0)},
        "a directory at 2^64 - 1 by zip64": {"offset": none, "zip64": zip64_end(1, 46, 2**64 - 1, 2**64 - 1)},
        "a zip64 record elsewhere": {"offset": none, "zip64": zip64_end(1, 46, 0, 2**40)},
        "another disk": {"offset": none, "zip64": b"PK\x06\x07" + struct.pack("<IQI", 7, 0, 9)},
    }
    for what, end in ends.items():
        yield Variant(f"an archive with {what}", zipped([one, *rest], **end))
    for length, said in ((1000, 10), (10, 1000)):
        content = zipped([one, *rest], comment=b"x" * length, comment_size=said)
        yield Variant(f"an archive with a comment of {length} bytes that says {said}", content, may_be_harmless=True)
    good = zipped([one, *rest])
    yield Variant("a program of Windows before the archive", (b"MZ" + bytes(1000), *good))
    yield Variant("a command before the archive", (b"#!/bin/sh\n" + COMMAND.encode(), *good))
    yield Variant("a beginning, and all else beyond it", (b"PK\x03\x04", *zipped([one, *rest], offset=1000)))
    yield Variant("a beginning and an end", (b"PK\x03\x04" + bytes(26), b"PK\x05\x06" + bytes(18)))


def other_files() -> Variants:
    """Files of other kinds, given by mistake or left by a download."""
    draw = random.Random(3)
    arrays, tarred = io.BytesIO(), io.BytesIO()
    np.savez(arrays, pos_embed=np.zeros(4))
    with tarfile.open(fileobj=tarred, mode="w") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            tar.addfile(tarfile.TarInfo(name))
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for what, content in {
        "an empty file": b"",
        "one byte": b"P",
        "two bytes": b"PK",
        "the first bytes of a zip": b"PK\x03\x04",
        "the last bytes of a zip": b"PK\x05\x06" + bytes(18),
        "the first bytes of an old file": LEGACY_PARTS[0],
        "a web page": b"<!DOCTYPE html><html><title>Quota exceeded</title></html>",
        "a web page behind an empty line": b"\r\n  <html></html>",
        "an answer in JSON": b'{"error": "not found"}',
        "a pointer to a large file": b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        + b"0" * 64
        + b"\nsize 1\n",
        "a checkpoint in gzip": gzip.compress(PLAIN, mtime=0),
        "a checkpoint in bzip2": bz2.compress(PLAIN[:10_000]),
        "a checkpoint in xz": lzma.compress(PLAIN[:10_000]),
        "a tar archive": tarred.getvalue(),
        "a safetensors file": struct.pack("<Q", len(header)) + header + bytes(4),
        "a pickle": pickle.dumps({"model": {}}),
        "a pickle of a command": pickled(SYSTEM),
        "a pickle of a command, as text": b"cos\nsystem\n(S'" + COMMAND.encode() + b"'\ntR.",
        "arrays of NumPy": arrays.getvalue(),
        "an array of NumPy": b"\x93NUMPY\x01\x00\x46\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n",
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(1000),
        "an ONNX file": b"\x08\x07\x12\x07pytorch" + bytes(1000),
        "a GGUF file": b"GGUF\x03\x00\x00\x00" + bytes(1000),
        "a picture": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(1000),
        "a program": b"\x7fELF\x02\x01\x01" + bytes(1000),
        "a program in Python": b"import os\nos.system('echo > executed')\n",
        "random bytes": draw.randbytes(100_000),
        "the first bytes of a zip, and random ones": b"PK\x03\x04" + draw.randbytes(100_000),
        "the first bytes of an old file, and random ones": LEGACY_PARTS[0] + draw.randbytes(100_000),
        "random bytes between the ends of a zip": b"PK\x03\x04" + draw.randbytes(100_000) + PLAIN[-98:],
        "zeros": bytes(100_000),
        "a file that runs backwards": PLAIN[::-1],
        "a file that went through a text encoding": PLAIN.decode("latin1").encode(),
        "a file with the line ends of Windows": PLAIN.replace(b"\n", b"\r\n"),
    }.items():
        yield Variant(what, (content,))


def other_contents() -> Variants:
    """What PyTorch may have written, of something else."""
    tensor = WEIGHTS["pos_embed"]
    norm = "transformers.0.blocks.{}.norm{}.weight"
    wider = WEIGHTS["transformers.1.blocks.0.norm1.weight"]
    resnet = {f"layer{i}.{j}.conv1.weight": tensor for i in range(1, 5) for j in range(2)}
    head = ("head.weight", "head.bias")
    for what, value in {
        "a list": [tensor],
        "a tuple": (tensor,),
        "a tensor": tensor,
        "a storage": tensor.storage(),
        "None": None,
        "text": "model",
        "a number": 1.5,
        "an empty dict": {},
        "a dict of numbers": {"epoch": 1, "best": 2.0},
        "a dict of dicts": {"model": {"model": {"a": tensor}}},
        "an optimizer": {"state": {}, "param_groups": []},
        "a namespace": built(NAMESPACE, {"model": STATE_DICT}),
        "weights in a list": {"model": [tensor]},
        "weights in a namespace": {"model": built(NAMESPACE, {"pos_embed": tensor})},
        "a weight by number": weights({1: tensor}),
        "a weight by None": weights({None: tensor}),
        "a weight that is text": weights({"pos_embed": "text"}),
        "a weight that is a dict": weights({"pos_embed": {}}),
        "a weight that is a number": weights({"pos_embed": 1.0}),
        "a weight that is a storage": weights({"pos_embed": tensor.storage()}),
        "a weight that is an array without numbers": weights({"pos_embed": EMPTY_ARRAY}),
        "a weight less": weights({"pos_embed": None}),
        "half of the weights": weights(dict.fromkeys([name for name in list(WEIGHTS)[::2] if name not in head])),
        "a weight more": weights({"extra": tensor}),
        "a weight of a longer name": weights({"pos_embed": None, "pos_embed2": tensor}),
        "a weight of a name in capitals": weights({"pos_embed": None, "POS_EMBED": tensor}),
        "a weight of a name with a space": weights({"pos_embed": None, "pos_embed ": tensor}),
        "a weight of a name with a prefix": weights({"pos_embed": None, "module.pos_embed": tensor}),
        "a weight of another shape": weights({norm.format(0, 1): wider}),
        "a shared weight that differs": weights({norm.format(2, 1): WEIGHTS[norm.format(0, 2)]}),
        "a shared weight of another shape": weights({norm.format(2, 1): wider}),
        "a position embedding of rank 1": weights({"pos_embed": wider}),
        "a position embedding that is no square": weights({"pos_embed": tensor._replace(shape=(1, 8, 4, 16))}),
        "ResNet": {"state_dict": resnet},
        "ResNet, beside the weights": weights(resnet),
        "a whole model": Code(named("models.sret", "SReT") + b")" + pickle.NEWOBJ),
        "a whole model with its source": Code(item(("module", FLOATS, "a.py", "class A")) + pickle.BINPERSID),
        "a sparse tensor": weights({"pos_embed": call(named("torch._utils", "_rebuild_sparse_tensor"), 0, (1,))}),
        "a quantised tensor": weights({"pos_embed": call(named("torch._utils", "_rebuild_qtensor"), tensor.storage())}),
        "a tensor of no device": weights({"pos_embed": call(named("torch._utils", "_rebuild_meta_tensor_no_storage"))}),
        "a tensor of version 3": weights({"pos_embed": call(named("torch._utils", "_rebuild_tensor_v3"))}),
    }.items():
        yield Variant(f"a file of {what}", archive(pickled(value)))
        if what in ("a list", "a tensor", "None", "an empty dict", "ResNet", "a whole model"):
            yield Variant(f"an old file of {what}", legacy({3: pickled(value)}))


FAMILIES: Mapping[str, Callable[[], Variants]] = {
    family.__name__.replace("_", " "): family
    for family in (
        cut_archives,
        cut_old_files,
        flipped_archives,
        flipped_old_files,
        tensors,
        storages,
        calls,
        opcodes,
        masquerades,
        nested,
        repeated,
        lengths,
        floods,
        bombs,
        entries,
        other_files,
        other_contents,
    )
}
