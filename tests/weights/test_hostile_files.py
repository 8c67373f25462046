"""Files from strangers: each ends in an error that can be read, soon and in little memory, and nothing else happens.

Where only what lies beside good weights is hostile, it ends in these weights.

The variants of `hostile.py` are loaded one after the other in a process of their own, `python test_hostile_files.py`.
The limits are enforced there: the system refuses memory beyond them, and an audit hook hears of everything that Python
runs, opens or changes.
"""

import collections
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from sret_jax.models.sret import variable_shapes
from sret_jax.weights.convert import convert
from sret_jax.weights.store import from_torch_weights
from sret_jax.weights.torch_file import load_torch_file
from sret_jax.weights.torch_weights import load_torch_weights
from tests.golden import golden
from tests.golden.cases import model_of
from tests.weights import hostile

ROOT = Path(__file__).parents[2]
# `tiny` is SReT-T but for these.
FIELDS = {"image_size": 64, "widths": (8, 16, 32), "mlp_ratio": 2.0, "num_classes": 10}

MOST_SECONDS = 2.0  # of the processor: the machine may be busy with something else
MOST_BYTES = 200 * 2**20  # above the file's size
LONGEST_LINE = 5_000
LONGEST_MESSAGE = 100_000
MOST_DEATHS = 5  # of the process, after which the test gives up

# What reading a file raises: its memory map, and our own bookkeeping of objects by identity.
READING = ("mmap.__new__", "builtins.id")


class Guard:
    """Runs one thing at a time within the limits."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._heard: list[str] | None = None
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._heard is None or event in READING:
            return
        if event == "open" and str(arguments[0]) == self._path and arguments[2] & os.O_ACCMODE == os.O_RDONLY:
            return
        self._heard.append(f"{event}{arguments!r}"[:200])

    def run(self, action: Callable[[], Any], file_size: int) -> tuple[Any, dict[str, Any]]:
        """What the action returns or raises, and what was seen of it."""
        gc.collect()
        room = _in_kilobytes("VmSize") + (MOST_BYTES + file_size) // 1024
        heard: list[str] = []
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the most since now
        before = _in_kilobytes("VmHWM")
        resource.setrlimit(resource.RLIMIT_AS, (room * 1024, resource.RLIM_INFINITY))
        start = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(start + 4 * MOST_SECONDS), resource.RLIM_INFINITY))
        self._heard = heard
        try:
            ended = action()
        except BaseException as error:  # whatever it is, the test is to name it
            ended = error
        self._heard = None
        seconds = time.process_time() - start
        resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return ended, {"heard": heard, "seconds": seconds, "kilobytes": _in_kilobytes("VmHWM") - before}


def _in_kilobytes(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def load_all(folder: Path, start: int) -> None:
    """Load the variants from number `start` on. Prints a line of JSON before and behind each."""
    path, converted = folder / "variant.pth", folder / "converted.safetensors"
    model = model_of(golden.load("tiny").config)
    warnings.simplefilter("ignore")  # damage makes numbers that are not finite, which are worth a warning

    def load(loaded: str) -> Any:
        if loaded == "everything":
            return load_torch_file(path)
        if loaded == "variables":
            return from_torch_weights(load_torch_weights(path), model)
        return convert(path, converted, name="sret_t", fields=FIELDS, say=lambda line: None)

    # What is imported and traced once, and takes more than a file.
    path.write_bytes(hostile.PLAIN)
    load("weights")
    converted.unlink()
    load("everything")
    undamaged = load("variables")
    variable_shapes(model.copy(num_classes=0))
    b"a".decode("raw_unicode_escape")

    guard = Guard(path)
    gc.freeze()
    ended, _ = guard.run(lambda: bytes(MOST_BYTES + 2**24), 0)
    assert isinstance(ended, MemoryError)
    _, seen = guard.run(lambda: compile("1", "", "eval"), 0)
    assert "compile" in seen["heard"][0]
    _, seen = guard.run(lambda: converted.open("a").close() or converted.unlink(), 0)
    assert ["open" in seen["heard"][0], "os.remove" in seen["heard"][1]] == [True, True]

    for i, (family, variant) in enumerate(_variants()):
        if i < start:
            continue
        file_size = variant.write(path)
        told = {"family": family, "name": variant.name, "may_be_harmless": variant.may_be_harmless}
        told["is_inert"] = variant.is_inert
        loaded = variant.loaded
        if variant.may_be_harmless or (variant.is_inert and loaded == "weights"):
            loaded = "variables"
        told["right"] = "undamaged" if loaded == "variables" else "loaded"
        del variant
        print(json.dumps(told), flush=True)
        ended, seen = guard.run(lambda loaded=loaded: load(loaded), file_size)
        if isinstance(ended, BaseException):
            told |= {"ended": type(ended).__name__, "message": str(ended)[: 2 * LONGEST_MESSAGE]}
        elif loaded == "variables" and jax.tree.all(jax.tree.map(np.array_equal, ended, undamaged)):
            told |= {"ended": "undamaged"}
        else:
            told |= {"ended": "loaded"}
        del ended
        left = sorted(set(os.listdir(folder)) - {path.name})
        print(json.dumps({**told, **seen, "left": left, "file_size": file_size}), flush=True)
        for name in left:
            (folder / name).unlink()


def _variants() -> Iterator[tuple[str, hostile.Variant]]:
    for family, variants in hostile.FAMILIES.items():
        for variant in variants():
            yield family, variant


def results(folder: Path) -> list[dict[str, Any]]:
    """What became of every variant. One that ends the process is told of, and the rest loaded by another."""
    told: list[dict[str, Any]] = []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    for _ in range(MOST_DEATHS):
        command = [sys.executable, __file__, str(folder), str(len(told))]
        process = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        lines = [json.loads(line) for line in process.stdout.splitlines()]
        told += [line for line in lines if "ended" in line]
        if process.returncode == 0:
            return told
        assert lines and "ended" not in lines[-1], f"loading the variants ended with {process.returncode}"
        told.append({**lines[-1], "ended": f"the process, by {signal.Signals(-process.returncode).name}"})
    return told


def faults(told: dict[str, Any], path: Path) -> Iterator[str]:
    """What must not be, of what became of a variant."""
    harmless = (told["may_be_harmless"] or told["is_inert"]) and told["ended"] == told["right"]
    if not harmless and (told["is_inert"] or told["ended"] != "UserError"):
        yield f"ended in {told['ended']}: {told.get('message', '')[:200]}"
    if told["ended"] == "UserError":
        lines = told["message"].split("\n")
        if str(path) not in told["message"]:
            yield f"the message does not name the file: {told['message'][:200]}"
        if not all(line.isprintable() for line in lines):
            yield "the message cannot be printed"
        if max(map(len, lines)) > LONGEST_LINE or len(told["message"]) > LONGEST_MESSAGE:
            yield f"the message is {len(told['message'])} letters long"
    if told.get("seconds", 0) > MOST_SECONDS:
        yield f"took {told['seconds']:.1f} s"
    if told.get("heard"):
        yield f"did {told['heard'][:3]}"
    if told.get("left"):
        yield f"left {told['left']}"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux enforces the limit on memory")
def test_every_damaged_or_hostile_file_ends_in_an_error_that_can_be_read_and_does_nothing_else(tmp_path):
    told = results(tmp_path)
    wrong = [
        f"{one['family']}: {one['name']}: {fault}" for one in told for fault in faults(one, tmp_path / "variant.pth")
    ]
    assert not wrong, f"{len(wrong)} faults:\n" + "\n".join(wrong)
    refused = collections.Counter(one["family"] for one in told if one["ended"] == "UserError")
    assert refused.total() >= 300
    assert refused.keys() == hostile.FAMILIES.keys()
    assert sum(one["is_inert"] for one in told) >= 200


if __name__ == "__main__":
    load_all(Path(sys.argv[1]), int(sys.argv[2]))
