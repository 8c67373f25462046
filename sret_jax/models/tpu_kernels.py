"""What kernels for TPUs share: the sizes of the hardware, blocks of a batch, products, and a kernel on many devices."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from sret_jax.models.layers import largest_divisor, matmul_precision

LANES = 128  # of a TPU's registers, and the side of its matrix unit
ROWS = 16  # of bfloat16 in a register
VMEM_BYTES = 64 << 20  # of a chip's vector memory that a kernel may take, where there is as much

# Chips that have less vector memory, by JAX's `device_kind`.
_SMALLER_VECTOR_MEMORY = {kind: 16 << 20 for kind in ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite")}

# Of what a program holds of its images; everything is held twice, while the next images are on their way.
_BLOCK_BYTES = 2 << 20


_device_kind = contextvars.ContextVar[str | None]("device_kind", default=None)


@contextlib.contextmanager
def traced_for(device: jax.Device) -> Iterator[None]:
    """Tells what is traced in this context that it is compiled for such a device, which need not be there."""
    token = _device_kind.set(device.device_kind)
    try:
        yield
    finally:
        _device_kind.reset(token)


def vector_memory() -> int:
    """Bytes of vector memory that a kernel may take.

    They are those of the TPU of `traced_for`; without it, of this process's TPU; without one, of a v5e.
    """
    kind = _device_kind.get()
    if kind is None and jax.default_backend() == "tpu":
        kind = jax.local_devices()[0].device_kind
    return _SMALLER_VECTOR_MEMORY.get(kind or "", VMEM_BYTES)


def held_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Of an array on the chip, whose last axis fills whole registers there."""
    return math.prod(shape[:-1]) * -(-shape[-1] // LANES) * LANES * jnp.dtype(dtype).itemsize


def images_in_program(arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """How many images of some arrays (b, n, any) a program takes; a divisor of b."""
    each = sum(held_bytes(array.shape[1:], array.dtype) for array in arrays)
    return largest_divisor(arrays[0].shape[0], _BLOCK_BYTES // each)


def block_bytes(shapes: Sequence[Sequence[int]], dtype: Any) -> int:
    """The most that a program holds of arrays (b, *shape) of its images, all of them twice."""
    return 2 * max(_BLOCK_BYTES, sum(held_bytes(shape, dtype) for shape in shapes))


def parts_of_image(tokens: int, width: int, dtype: Any, arrays: int) -> int:
    """Into how many equal parts an image's tokens must be cut, so that a program can hold a part of each array."""
    return tokens // largest_divisor(tokens, _BLOCK_BYTES // (arrays * held_bytes((1, width), dtype)))


def image_block(array: jax.Array | jax.ShapeDtypeStruct, images: int) -> Any:
    """The part of an array (b, n, any) that a program holds: the images that are its turn."""
    from jax.experimental import pallas as pl

    return pl.BlockSpec((images, *array.shape[1:]), lambda i: (i, 0, 0))


def moved_bytes(arrays: Sequence[jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Of arrays that are read or written once."""
    return sum(array.size * array.dtype.itemsize for array in arrays)


def for_each_tile(start: int, count: int, size: int, do: Callable[[Any, int], None]) -> None:
    """`do(first, number)` for `count` rows from `start` on, `size` at a time, and what is left over.

    Where there are several, `start` and `size` must be multiples of `ROWS`.
    """
    from jax.experimental import pallas as pl

    whole, rest = divmod(count, size)
    if whole > 1:
        jax.lax.fori_loop(0, whole, lambda i, _: do(pl.multiple_of(start + i * size, ROWS), size), None)
    else:
        do(start, size)
    if rest:
        do(start + whole * size, rest)


def product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """A product of matrices over one axis of each, float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((contracted[0],), (contracted[1],)), ((), ())),
        precision=matmul_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def on_each_device(
    kernel: Callable[..., tuple[jax.Array, Any]], split: Sequence[jax.Array], whole: Sequence[jax.Array] = ()
) -> tuple[jax.Array, Any]:
    """`kernel(*split, *whole)`, where each device computes its part of the batch: XLA does not know how to split it.

    Args:
      kernel: returns an array of the batch, and arrays that are summed over the devices, in any tree.
      split: arrays whose first axis is the batch. The mesh comes with them. Which of its axes split them does not,
        where the compiler decides (`AxisType.Auto`): taken for granted are all whose product divides the batch, from
        the first on.
      whole: arrays of which every device needs all.
    """
    mesh = jax.typeof(split[0]).sharding.mesh
    free = [axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual]
    if not free:
        return kernel(*split, *whole)
    axes: list[str] = []
    left = split[0].shape[0]
    for axis in free:
        if left % mesh.shape[axis] == 0:
            axes.append(axis)
            left //= mesh.shape[axis]
    part, everything = PartitionSpec(tuple(axes)), PartitionSpec()

    def of_one_device(*arrays: jax.Array) -> tuple[jax.Array, Any]:
        out, sums = kernel(*arrays)
        return out, jax.lax.psum(sums, tuple(axes))

    return jax.shard_map(
        of_one_device,
        mesh=mesh,
        in_specs=(part,) * len(split) + (everything,) * len(whole),
        out_specs=(part, everything),
        axis_names=set(free),
        check_vma=False,
    )(*split, *whole)
