"""A train step, compiled without data: its memory, its work, the least time it can take, the largest batch."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from sret_jax.errors import UserError
from sret_jax.models.cost import count_macs
from sret_jax.models.sret import SReT
from sret_jax.models.tpu_kernels import traced_for
from sret_jax.plan.collectives import Collectives, find_collectives
from sret_jax.plan.devices import Target
from sret_jax.plan.hlo import main_memory_bytes
from sret_jax.training.build import make_model, make_training, soft_classes
from sret_jax.training.mesh import abstract_batch, make_mesh


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as the compiler plans them.

    Attributes:
      arguments: the train state and the batch.
      outputs: the new state and the metrics.
      in_place: of the outputs, what takes the place of arguments.
      temporaries: all in between.
      code: the program itself.
    """

    arguments: int
    outputs: int
    in_place: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """What the device has to have."""
        return self.arguments + self.outputs - self.in_place + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of a train step. All figures but the batch's are of one device and one step.

    Attributes:
      batch_size: images, over all devices.
      memory: bytes.
      flops: floating-point operations, a multiply-add as two; what stands in a loop counts once.
      network_flops: 6 times the multiply-accumulates of the forward pass: convolutions and products alone, forward,
        and backward twice that.
      accessed_bytes: what operations read and write by the compiler's estimate, in whatever memory it lies.
      main_memory_bytes: what they read from the device's main memory and write to it, see `main_memory_bytes`.
      collectives: between the devices.
      compile_seconds: that tracing and compiling took.
    """

    batch_size: int
    memory: Memory
    flops: float
    network_flops: float
    accessed_bytes: float
    main_memory_bytes: int
    collectives: Sequence[Collectives]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least, for each of what it needs; None where the chip's rate is not published."""

    compute: float
    memory: float
    network: float | None

    @property
    def step(self) -> float:
        """As if all three went on at the same time, undisturbed."""
        return max(self.compute, self.memory, self.network or 0.0)

    @property
    def bound_by(self) -> str:
        """Which of the three takes longest."""
        return next(name for name, seconds in dataclasses.asdict(self).items() if seconds == self.step)


class TooLargeError(UserError):
    """A step that the devices have no memory for."""


def compile_step(config: ConfigDict, target: Target, epoch_steps: int, classes: int) -> Program:
    """Compile the train step of a config for devices of which none need be there.

    Args:
      config: as `configs/` makes them.
      target: the devices.
      epoch_steps: steps in an epoch; the learning rate's schedule has them as constants.
      classes: of the head.

    Raises:
      TooLargeError: the devices have too little memory for it.
      UserError: the config and the devices do not go together.
    """
    start = time.perf_counter()
    lowered, model = _lowered_step(config, target.devices, epoch_steps, classes)
    compiled = _compile(lowered, config.batch_size, target)
    seconds = time.perf_counter() - start
    program = describe(compiled, model, config.batch_size, len(target.devices), seconds)
    if target.memory_bytes and program.memory.total > target.memory_bytes:  # compilers for GPUs do not refuse
        needed = f"it needs {program.memory.total / 2**30:.2f} GiB"
        raise TooLargeError(_too_large(config.batch_size, target, needed))
    return program


def describe(compiled: Any, model: SReT, batch_size: int, device_count: int, compile_seconds: float) -> Program:
    """What the compiler says of a train step of `model` (`jax.stages.Compiled`), whose global batch is `batch_size`."""
    text = compiled.as_text()
    planned, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return Program(
        batch_size=batch_size,
        memory=Memory(
            arguments=planned.argument_size_in_bytes,
            outputs=planned.output_size_in_bytes,
            in_place=planned.alias_size_in_bytes,
            temporaries=planned.temp_size_in_bytes,
            code=planned.generated_code_size_in_bytes,
        ),
        flops=cost["flops"],
        network_flops=6 * count_macs(model) * batch_size / device_count,
        accessed_bytes=cost["bytes accessed"],
        main_memory_bytes=main_memory_bytes(text),
        collectives=find_collectives(text),
        compile_seconds=compile_seconds,
    )


def least_seconds(program: Program, target: Target) -> Bounds | None:
    """What a step takes at the chip's published rates; None for a chip without published figures."""
    if target.chip is None:
        return None
    chip, share = target.chip, target.devices_per_chip
    sent = sum(collectives.sent_bytes for collectives in program.collectives)
    return Bounds(
        compute=program.flops * share / chip.flops,
        memory=program.main_memory_bytes * share / chip.memory_rate,
        network=sent * share / chip.network_rate if chip.network_rate else None,
    )


def guess_largest_batch(program: Program, target: Target) -> int | None:
    """About the largest batch that fits, if temporaries grow in proportion to it; None if nothing says what fits.

    Rather less than the truth: a part of the temporaries does not grow.
    """
    if target.memory_bytes is None:
        return None
    memory, devices = program.memory, len(target.devices)
    left = target.memory_bytes - (memory.total - memory.temporaries)
    return program.batch_size * left // memory.temporaries // devices * devices


def find_largest_batch(
    needed: Callable[[int], int | None], available: int, start: int, unit: int
) -> tuple[int | None, int]:
    """The largest batch that fits, among `unit` times 1, 2, 3, 4, 6, 8, 12 and so on, and the next, which does not.

    Memory is nearly an affine function of the batch, so the two largest batches known to fit say where to look next.

    Args:
      needed: bytes of memory that a batch takes on a device, None if it does not fit; slow, so asked few times.
      available: bytes of memory of a device.
      start: the first batch to ask for.
      unit: what every batch has to be a multiple of: devices that share it, times the parts that it is computed in.

    Returns:
      The two batches; the first is None if not even one unit fits.
    """
    sizes = [unit, *sorted(unit * factor << power for factor in (2, 3) for power in range(30))]
    fitting: dict[int, int] = {}
    low, high = -1, len(sizes)
    ask = max((i for i, size in enumerate(sizes) if size <= start), default=0)
    while low + 1 < high:
        if (memory := needed(sizes[ask])) is None:
            high = ask
        else:
            low, fitting[sizes[ask]] = ask, memory
        (smaller, less), (larger, more) = ([(0, 0)] * 2 + sorted(fitting.items()))[-2:]
        reach = larger + (available - more) * (larger - smaller) // max(more - less, 1)
        ask = max((i for i, size in enumerate(sizes) if size <= reach), default=0)
        ask = min(max(ask, low + 1), high - 1)
    return (sizes[low] if low >= 0 else None), sizes[high]


def _lowered_step(
    config: ConfigDict, devices: Sequence[jax.Device], epoch_steps: int, classes: int
) -> tuple[Any, SReT]:
    """The train step of a config, traced for a mesh of these devices, and its model."""
    model = make_model(_for_platform(config, devices[0].platform), classes)
    mesh = make_mesh(config.mesh, config.batch_size, devices)
    with traced_for(devices[0]):
        step, state = make_training(config, model, epoch_steps, mesh)
        batch = abstract_batch(
            mesh, config.batch_size, model.image_size, soft_classes=soft_classes(config, model.num_classes)
        )
        return step.lower(state, batch), model


def _for_platform(config: ConfigDict, platform: str) -> ConfigDict:
    """The config with the network as it is written for such devices; left alone, it is written for JAX's default."""
    config = config.copy_and_resolve_references()
    config.model.platform = config.model.platform or platform
    return config


def _compile(lowered: Any, batch_size: int, target: Target) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).strip().split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise TooLargeError(_too_large(batch_size, target, reason)) from error


def _too_large(batch_size: int, target: Target, reason: str) -> str:
    return (
        f"a batch of {batch_size:,}, {batch_size // len(target.devices):,} images a device, does not fit on "
        f"{target.topology}: {reason.rstrip('.')}. Choose a smaller config.batch_size, or set config.model.remat"
    )
