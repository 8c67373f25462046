"""The text of a compiled program, as `compiled.as_text()` gives it: its instructions and the arrays that they move."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{\n((?:  .*\n)*)", re.MULTILINE)
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = (.+?) ([a-z][a-z0-9-]*)\((.*?)\)(.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b((?:pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\](?:\{[^}]*\})?)")
_OPERAND = re.compile(r"%([\w.-]+)")
_OTHER_MEMORY = re.compile(r"S\(\d+\)")
_BODY = re.compile(r"body=%?([\w.-]+)")

# They name memory, and move nothing.
_NAMES = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"})
_NAMING_CALL = re.compile(r'custom_call_target="(?:ConcatBitcast|AllocateBuffer|Assume\w*)"')


class Instruction(NamedTuple):
    """One line: `name = shape operation(operands), attributes`."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    attributes: str


class Computation(NamedTuple):
    """The entry of a program, a loop's body, or what a fusion or a reduction calls."""

    name: str
    is_entry: bool
    instructions: list[Instruction]


def computations(program: str) -> Iterator[Computation]:
    """All computations of a program."""
    for entry, name, body in _COMPUTATION.findall(program):
        instructions = [
            Instruction(instruction, shape, operation, tuple(_OPERAND.findall(operands)), attributes)
            for instruction, shape, operation, operands, attributes in _INSTRUCTION.findall(body)
        ]
        yield Computation(name, bool(entry), instructions)


def array_bytes(shape: str) -> int:
    """Of an array's shape, or of all in a tuple's, such as `(f32[8]{0:T(8)S(1)}, bf16[4])`."""
    return sum(size for size, _ in _arrays(shape))


def main_memory_bytes(program: str) -> int:
    """What a program's instructions read from a device's main memory and write to it; those in a loop count once.

    An operand or result counts whole, unless its layout puts it into another memory: TPUs have one on the chip, to
    which the compiler copies ahead of time and in parts what the next instructions need.
    """
    parts = list(computations(program))
    loops = set(_BODY.findall(program))
    instructions = {instruction.name: instruction for part in parts for instruction in part.instructions}

    def main(names: Iterable[str]) -> int:
        return sum(size for name in names for size, in_main in _arrays(instructions[name].shape) if in_main)

    total = 0
    for part in parts:
        if not part.is_entry and part.name not in loops:
            continue
        for name, shape, operation, operands, attributes in part.instructions:
            if operation in _NAMES or operation.endswith("-start") or _NAMING_CALL.search(attributes):
                continue
            if operation.endswith("-done"):  # a copy reads as much of its source as it writes
                source = instructions[operands[0]].operands
                total += min(main(source), array_bytes(shape)) + main([name])
            else:
                total += main(operands) + main([name])
    return total


def _arrays(shape: str) -> list[tuple[int, bool]]:
    """Bytes of each array, and whether it lies in main memory."""
    return [
        (math.prod(map(int, filter(None, lengths.split(",")))) * int(bits or 8) // 8, not _OTHER_MEMORY.search(array))
        for array, bits, lengths in _ARRAY.findall(shape)
    ]
