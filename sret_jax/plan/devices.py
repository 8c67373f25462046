"""Devices that a program can be compiled for, of this machine or of a slice of TPUs elsewhere, and published rates."""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sret_jax.errors import UserError

LOCAL = "local"
EXAMPLES = f"v5e:2x2, v5e:16x16 or v5p:4x8x8, or {LOCAL} for this machine's devices, the only way for GPUs"

_TWO_AXES = ("2x2", "4x4", "4x8", "8x8", "8x16", "16x16")
_THREE_AXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_SLICES: Mapping[str, Sequence[str]] = {
    "v2": _TWO_AXES,
    "v3": (*_TWO_AXES, "16x32", "32x32"),
    "v4": _THREE_AXES,
    "v5e": ("1x1", "2x2", "2x4", *_TWO_AXES[1:]),
    "v5p": _THREE_AXES,
    "v6e": ("1x1", "2x2", "2x4", *_TWO_AXES[1:]),
    "tpu7x": _THREE_AXES,
}
"""Shapes that are rented out, of the generations that libtpu knows; it knows more shapes."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """The makers' figures of one chip, rates in units a second.

    Attributes:
      name: as its maker calls it.
      flops: floating-point operations, bfloat16, without sparsity; a multiply-add is two.
      memory_bytes: high-bandwidth memory.
      memory_rate: bytes read or written.
      network_rate: bytes that one chip can send to its neighbours, over all of its links together; half of what makers
        call bidirectional. None where the maker's documentation does not say.
      source: where the figures are from.
    """

    name: str
    flops: float
    memory_bytes: float
    memory_rate: float
    network_rate: float | None
    source: str


_GIB = 2**30
_GOOGLE = "docs.cloud.google.com/tpu/docs/"
_NVIDIA = "NVIDIA's data sheet of the "

CHIPS: Mapping[str, Chip] = {
    "TPU v4": Chip("TPU v4", 275e12, 32 * _GIB, 1200e9, None, _GOOGLE + "v4"),
    "TPU v5 lite": Chip("TPU v5e", 197e12, 16 * _GIB, 819e9, 200e9, _GOOGLE + "v5e"),
    "TPU v5": Chip("TPU v5p", 459e12, 95 * _GIB, 2765e9, 600e9, _GOOGLE + "v5p"),
    "TPU v6 lite": Chip("TPU v6e", 918e12, 32 * _GIB, 1638e9, 400e9, _GOOGLE + "tpu7x"),
    "TPU7x": Chip("TPU7x", 2307e12, 192 * _GIB, 7380e9, 600e9, _GOOGLE + "tpu7x"),
    "NVIDIA A100-SXM4-40GB": Chip("A100 SXM 40 GB", 312e12, 40e9, 1555e9, 300e9, _NVIDIA + "A100"),
    "NVIDIA A100-SXM4-80GB": Chip("A100 SXM 80 GB", 312e12, 80e9, 2039e9, 300e9, _NVIDIA + "A100"),
    "NVIDIA H100 80GB HBM3": Chip("H100 SXM", 989.4e12, 80e9, 3350e9, 450e9, _NVIDIA + "H100"),
    "NVIDIA H200": Chip("H200 SXM", 989.4e12, 141e9, 4800e9, 450e9, _NVIDIA + "H200"),
}
"""By the `device_kind` that JAX gives. The network is a slice's links between chips on TPUs, NVLink on GPUs."""

# So that libtpu, on a machine without a TPU, neither looks for one nor keeps other processes out.
_NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices that a program is compiled for.

    Attributes:
      topology: as the user calls it.
      devices: all of them, of all hosts.
      chip: published figures; None for a kind of device that is not in `CHIPS`.
      devices_per_chip: more than one where JAX shows a chip as several devices.
      memory_bytes: of a device, that a program may use; None where nothing says.
    """

    topology: str
    devices: Sequence[jax.Device]
    chip: Chip | None
    devices_per_chip: int
    memory_bytes: int | None


def check_topology(topology: str) -> None:
    """Refuse what cannot be the name of a topology, whatever the compiler knows.

    Raises:
      UserError: with names that are like it.
    """
    if topology != LOCAL and not re.fullmatch(r"\w+:[1-9]\d*(x[1-9]\d*){1,2}(_(un)?twisted)?", topology, re.ASCII):
        raise UserError(_no_such(topology, "it is no generation, colon and shape in chips"))


def _no_such(topology: str, reason: str) -> str:
    generation = re.split("[:=-]", topology.lower())[0]
    near = difflib.get_close_matches(generation, _SLICES, n=1, cutoff=0.65)
    names = [f"{name}:{shape}" for name in near for shape in _SLICES[name]]
    names = names or [f"{name}:{shape}" for name, shapes in _SLICES.items() for shape in shapes[:2]]
    return f"there is no topology {topology!r}: {reason}. Expected one such as {', '.join(names)}; or {LOCAL}"


def find_target(topology: str) -> Target:
    """The devices of a slice of TPUs, which need not be there, or those of this machine.

    For a slice, JAX then computes on the CPU for the rest of the process.

    Args:
      topology: generation and shape of a slice, such as "v5e:16x16", or "local".

    Raises:
      UserError: there is no such slice, or no compiler for it is installed.
    """
    check_topology(topology)
    if topology == LOCAL:
        devices: Sequence[jax.Device] = jax.devices()
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    else:
        devices = _slice_devices(topology)
        memory = _usable_memory(devices)
    chips = {tuple(getattr(device, "coords", [device.id])) for device in devices}
    return Target(topology, devices, CHIPS.get(devices[0].device_kind), len(devices) // len(chips), memory)


def _slice_devices(topology: str) -> Sequence[jax.Device]:
    os.environ.update({key: value for key, value in _NO_TPU_HERE.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")
    one_chip = re.fullmatch(r".*:1(x1)*", topology)
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if one_chip else {}  # else hosts of four
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # a chip is one device, as on the real machine
    try:
        return topologies.get_topology_desc(topology, "tpu", **options).devices
    except RuntimeError as error:
        if "not installed" in str(error):
            raise UserError(f"{topology} needs libtpu, the compiler for TPUs: pip install '.[tpu]'") from error
        reason = str(error).strip().split("\n")[0].removeprefix("INVALID_ARGUMENT: ")
        raise UserError(_no_such(topology, reason)) from error


def _usable_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes of a TPU that a program may use. Only the compiler's refusals tell how much it keeps for the system."""
    mesh = Mesh(devices, ("data",))
    size = len(devices) << 40
    far_too_large = jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    try:
        jax.jit(jnp.negative).lower(far_too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"available HBM \(([\d.]+)G\)", str(error)):
            return int(float(found[1]) * 2**30)
    return None
