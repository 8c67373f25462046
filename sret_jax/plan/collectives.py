"""The collective operations of a compiled program, read from its text."""

import dataclasses
import math
import re
from collections import Counter

from sret_jax.plan.hlo import array_bytes, computations

_TIMES_SENT = {
    "all-reduce": 2.0,  # a reduce-scatter and an all-gather
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
    "collective-permute": 1.0,
}

_PARTITIONS = re.compile(r"^HloModule .*num_partitions=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """All collectives of one kind and one size of group in a program.

    Attributes:
      kind: "all-reduce", "all-gather", "reduce-scatter", "all-to-all" or "collective-permute".
      count: how many instructions; what stands in a loop counts once.
      group: how many devices take part in each, `group` of them at a time.
      bytes: of all of them together, on one device: what is reduced or exchanged, gathered arrays whole.
    """

    kind: str
    count: int
    group: int
    bytes: int

    @property
    def sent_bytes(self) -> float:
        """The least that each device has to send, whatever the algorithm (Chan et al., 2007)."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return _TIMES_SENT[self.kind] * share * self.bytes


def find_collectives(program: str) -> list[Collectives]:
    """The collectives in the text of a compiled program, as `compiled.as_text()` gives it, the largest first.

    An asynchronous one counts once, whether it has a start and an end or is cut into pieces that run beside other
    operations. So does what the TPU compiler writes as an all-reduce of which each device keeps its part.
    """
    header = _PARTITIONS.search(program)
    devices = int(header[1]) if header else 1
    parts = list(computations(program))
    sizes = {instruction.name: array_bytes(instruction.shape) for part in parts for instruction in part.instructions}
    total: Counter[tuple[str, int]] = Counter()
    count: Counter[tuple[str, int]] = Counter()
    seen = set()
    for part in parts:
        for instruction in part.instructions:
            kind = instruction.operation.removesuffix("-start")
            if kind not in _TIMES_SENT:
                continue
            if part.name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            group = _group_size(instruction.attributes, devices)
            size = sum(sizes[operand] for operand in instruction.operands)
            channel = _CHANNEL.search(instruction.attributes)
            piece = (kind, group, size, channel and channel[1])
            if not part.is_entry and piece in seen:
                continue
            seen.add(piece)
            count[kind, group] += 1
            total[kind, group] += size * group if kind == "all-gather" else size
    found = [Collectives(kind, count[kind, group], group, total[kind, group]) for kind, group in count]
    return sorted(found, key=lambda collectives: -collectives.sent_bytes)


def _group_size(attributes: str, devices: int) -> int:
    """Devices in each of the groups that `replica_groups` names, in any of the compiler's three ways to write them."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", attributes):
        lengths = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # with a length, a part of an axis
        return math.prod(int(part or lengths[axis]) for axis, part in axes)
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(tiled[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    return devices  # no groups, or an empty list: all devices
