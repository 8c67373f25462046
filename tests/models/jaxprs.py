"""What a traced program does: its primitive operations, each with how often it runs."""

from collections.abc import Callable, Iterator
from typing import Any

import jax


def operations(function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, int]]:
    """The equations of `function`'s jaxpr, and how often each runs: those in a scan, once for every step."""
    return list(_walk(jax.make_jaxpr(function)(*arguments).jaxpr, times=1))


def _walk(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
    for equation in jaxpr.eqns:
        inner = [p for p in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(p)]
        yield equation, times
        steps = equation.params["length"] if equation.primitive.name == "scan" else 1
        for body in inner:
            yield from _walk(getattr(body, "jaxpr", body), times * steps)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
