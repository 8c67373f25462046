"""What a traced program does: its primitive operations, each with how often it runs."""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax


def operations(function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, int]]:
    """The equations of `function`'s jaxpr, and how often each runs: those in a scan, once for every step."""
    return list(_walk(jax.make_jaxpr(function)(*arguments).jaxpr, times=1))


def kernel_work(found: list[tuple[Any, int]], transcendental: Collection[str]) -> tuple[list[Any], int, int]:
    """The Pallas calls among operations, and what their kernels compute: operations of products, and of functions.

    The kernels' grids must be alike. Products with a single number as their result are not the kernels'.
    """
    calls = [call for call, _ in found if call.primitive.name == "pallas_call"]
    (grid,) = {call.params["grid_mapping"].grid for call in calls}
    flops = transcendentals = 0
    for operation, times in found:
        size = math.prod(operation.outvars[0].aval.shape) if operation.outvars else 0
        if operation.primitive.name == "dot_general" and size > 1:
            ((contracted,), _), _ = operation.params["dimension_numbers"]
            flops += math.prod(grid) * times * 2 * size * operation.invars[0].aval.shape[contracted]
        if operation.primitive.name in transcendental:
            transcendentals += math.prod(grid) * times * size
    return calls, flops, transcendentals


def _walk(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    for equation in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(p)]
        yield equation, times
        steps = equation.params["length"] if equation.primitive.name == "scan" else 1
        for body in inner:
            yield from _walk(getattr(body, "jaxpr", body), times * steps)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
