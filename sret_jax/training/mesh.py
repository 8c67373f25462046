"""The named mesh of devices, how arrays lie on it, and which part of them is this host's."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sret_jax.errors import UserError, brief

AXES = ("data", "fsdp")

# An array of fewer elements costs more to gather than it takes.
_LEAST_SHARDED = 1024

# Room for what one host tells the others, in bytes.
_MESSAGE_SIZE = 1 << 14


def make_mesh(axes: Mapping[str, int], batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of devices, by default all of all hosts.

    Args:
      axes: the sizes of "data" and, if wanted, "fsdp". A batch is split over both; parameters and what the optimizer
        keeps of them are split over "fsdp" and whole along "data". One size may be -1: whatever is left.
      batch_size: images in a step, over all devices.
      devices: other devices, such as those of a machine that is only planned.

    Raises:
      UserError: unknown axes, sizes that do not make the number of devices, or a batch that the devices cannot share.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if not {"data"} <= set(axes) <= set(AXES):
        raise UserError(
            f"the mesh has the axes {brief(sorted(axes))}. Expected 'data', or 'data' and 'fsdp': set config.mesh, "
            'such as {"data": -1, "fsdp": 4}'
        )
    given = brief(dict(axes))
    sizes = [axes.get(axis, 1) for axis in AXES]
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(f"config.mesh is {given}. Expected positive sizes, or -1 for one of them: what is left")
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -math.prod(sizes), 1)
    if math.prod(sizes) != count:
        raise UserError(
            f"config.mesh is {given}, but there are {count} devices: set sizes whose product is {count}, or one of "
            "them to -1"
        )
    if batch_size % count:
        nearest = sorted({max(batch_size // count, 1) * count, -(-batch_size // count) * count})
        raise UserError(
            f"the batch size is {batch_size}, which {count} devices cannot share equally: choose "
            f"{' or '.join(map(str, nearest))}"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: metrics, and parameters while they are computed with."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Split over the devices along the first axis: images and labels."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def sharded(mesh: Mesh, tree: Any) -> Any:
    """How parameters, and whatever has their shapes, are kept between steps.

    Each array is split over "fsdp" along its longest axis that can be; small ones are whole everywhere.

    Args:
      mesh: of `make_mesh`.
      tree: arrays, or `jax.ShapeDtypeStruct`s.

    Returns:
      A tree of `NamedSharding`s.
    """
    parts = mesh.shape["fsdp"]

    def sharding(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or leaf.size < _LEAST_SHARDED or not divisible:
            return replicated(mesh)
        longest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * longest, "fsdp"))

    return jax.tree.map(sharding, tree)


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Which rows of a global batch lie on this host's devices, ascending."""
    parts = split_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part for row in range(batch_size)[part[0]]})


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This host's part of a batch, its `local_rows`, becomes its part of global arrays."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def abstract_batch(
    mesh: Mesh, batch_size: int, image_size: int, *, mask: bool = False, soft_classes: int = 0
) -> dict[str, Any]:
    """What `put_batch` makes of a batch for training, or, with a mask, for evaluation: to compile for it before.

    With soft labels, `soft_classes` is how many classes each names.
    """

    def split(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=split_batch(mesh))

    batch = {"image": split((image_size, image_size, 3), np.uint8)}
    if soft_classes:
        batch["classes"] = split((soft_classes,), np.int32)
        batch["probabilities"] = split((soft_classes,), np.float16)
    else:
        batch["label"] = split((), np.int32)
    return {**batch, "mask": split((), np.bool_)} if mask else batch


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every host has become global arrays, in memory of their own."""

    def placed(array: Any, sharding: NamedSharding) -> jax.Array:
        whole = np.asarray(array)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index]))

    return jax.tree.map(placed, tree, shardings)


def on_first_host(do: Callable[[], Any]) -> Any:
    """Do something on the first host only, while the others wait.

    Args:
      do: returns what JSON can hold, up to 16 kB; may raise `UserError`.

    Returns:
      What it returned, on every host.

    Raises:
      UserError: what it raised, on every host.
    """
    if jax.process_count() == 1:
        return do()
    said = np.zeros(_MESSAGE_SIZE, np.uint8)
    if jax.process_index() == 0:
        try:
            outcome = {"returned": do()}
        except UserError as error:
            outcome = {"raised": str(error)[: _MESSAGE_SIZE // 8]}  # a character takes up to six bytes
        encoded = json.dumps(outcome).encode()
        said[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    heard = bytes(multihost_utils.broadcast_one_to_all(said)).rstrip(b"\0")
    outcome = json.loads(heard)
    if "raised" in outcome:
        raise UserError(outcome["raised"])
    return outcome["returned"]
