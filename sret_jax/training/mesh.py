"""The named mesh of devices, and how arrays lie on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sret_jax.errors import UserError

BATCH_AXIS = "data"


def make_mesh(axes: Mapping[str, int], batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, of all hosts.

    Args:
      axes: the size of the axis "data", over which a batch is split; -1 is the number of devices.
      batch_size: images in a step, over all devices.
      devices: those of the mesh; None takes all that JAX finds.

    Raises:
      UserError: unknown axes, a size that is not the number of devices, or a batch that the devices cannot share.
    """
    count = jax.device_count() if devices is None else len(devices)
    if set(axes) != {BATCH_AXIS}:
        raise UserError(f"the mesh has the axes {sorted(axes)}, expected {BATCH_AXIS!r}: set config.mesh.data")
    size = count if axes[BATCH_AXIS] == -1 else axes[BATCH_AXIS]
    if size != count:
        raise UserError(f"config.mesh.data is {size}, but there are {count} devices: set it to -1 or {count}")
    if batch_size % count:
        nearest = sorted({max(batch_size // count, 1) * count, -(-batch_size // count) * count})
        raise UserError(
            f"the batch size is {batch_size}, which {count} devices cannot share equally: choose "
            f"{' or '.join(map(str, nearest))}"
        )
    return jax.make_mesh((size,), (BATCH_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: parameters, optimizer state, metrics."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Split over the devices along the first axis: images and labels."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This host's part of a batch becomes its part of global arrays."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
