"""Meshes with explicit axes (`jax.make_mesh`'s default), where shardings are part of arrays' types."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.core import lift
from flax.linen.transforms import lift_transform
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def on_auto_axes(apply: Callable[..., jax.Array], module: nn.Module, arrays: Any) -> jax.Array:
    """`apply(module, arrays)`, within which the compiler alone decides how arrays lie on a mesh.

    With explicit axes, JAX asks for the sharding of each ambiguous reshape or product instead. On a mesh without them
    nothing is different.

    Args:
      apply: a function of module and arrays, of which the result has a leading axis of the batch.
      module: may have variables that are split over the mesh in any way; its updated ones stay split as they were.
      arrays: a sequence, the batch first; others in any tree.

    Returns:
      The result, its leading axis split over the mesh as the batch's.
    """
    mesh = _explicit_mesh((arrays, module.variables))
    if mesh is None:
        return apply(module, *arrays)
    result: jax.Array = lift_transform(_on_auto_axes, apply, mesh)(module, *arrays)
    return result


def _explicit_mesh(tree: Any) -> AbstractMesh | None:
    """The mesh that the caller has set, else that of the arrays, if it has explicit axes."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))]
    mesh = next((mesh for mesh in meshes if not mesh.empty), None)
    return mesh if mesh is not None and AxisType.Explicit in mesh.axis_types else None


def _on_auto_axes(apply: Callable[..., jax.Array], mesh: AbstractMesh) -> Callable[..., jax.Array]:
    """The transformation that Linen lifts, as it does `jax.checkpoint`: variables and rngs become arguments."""

    def inner(scope_of: Any, packed: Any, variables: Any, rngs: Any, batch: jax.Array, *others: Any) -> Any:
        def body(variables: Any, rngs: Any, *arrays: Any) -> Any:
            scope = scope_of(variables, rngs)
            return apply(scope, *arrays), packed(scope)

        rows = PartitionSpec(*jax.typeof(batch).sharding.spec[:1])
        shardings = NamedSharding(mesh, rows), NamedSharding(mesh, PartitionSpec())
        output, updated = jax.sharding.auto_axes(body, out_sharding=shardings)(variables, rngs, batch, *others)
        before = {path: jax.typeof(leaf).sharding for path, leaf in jax.tree.leaves_with_path(variables)}
        return output, jax.tree.map_with_path(
            lambda path, leaf: jax.sharding.reshard(leaf, before[path]) if path in before else leaf, updated
        )

    packed: Callable[..., jax.Array] = lift.pack(inner, (True,), (True,), (True,), name="on_auto_axes")
    return packed
