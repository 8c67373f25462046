"""The Sliced Recursive Transformer (SReT, ECCV 2022) in JAX and Flax."""

TYPE_CHECKING = False  # type checkers take it for true; the one in `typing` takes long to import
if TYPE_CHECKING:
    from sret_jax.errors import UserError
    from sret_jax.models.compiler import compiler_options
    from sret_jax.models.cost import count_macs, count_params
    from sret_jax.models.sret import SReT
    from sret_jax.models.zoo import create_model, list_models
    from sret_jax.weights.store import load_variables, save_variables
    from sret_jax.weights.torch_file import load_torch_file
    from sret_jax.weights.torch_names import from_torch_state_dict, to_torch_state_dict

__all__ = [
    "SReT",
    "UserError",
    "compiler_options",
    "count_macs",
    "count_params",
    "create_model",
    "from_torch_state_dict",
    "list_models",
    "load_torch_file",
    "load_variables",
    "save_variables",
    "to_torch_state_dict",
]

# The modules of these names, each imported when a name of it is first used: until a program has imported
# `sret_jax.interrupts`, Ctrl-C ends it with a traceback, so nothing else is imported here.
_WHERE = {
    "compiler_options": "sret_jax.models.compiler",
    "count_macs": "sret_jax.models.cost",
    "count_params": "sret_jax.models.cost",
    "create_model": "sret_jax.models.zoo",
    "from_torch_state_dict": "sret_jax.weights.torch_names",
    "list_models": "sret_jax.models.zoo",
    "load_torch_file": "sret_jax.weights.torch_file",
    "load_variables": "sret_jax.weights.store",
    "save_variables": "sret_jax.weights.store",
    "SReT": "sret_jax.models.sret",
    "to_torch_state_dict": "sret_jax.weights.torch_names",
    "UserError": "sret_jax.errors",
}


def __getattr__(name: str) -> object:
    import importlib

    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
