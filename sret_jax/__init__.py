"""The Sliced Recursive Transformer (SReT, ECCV 2022) in JAX and Flax."""

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
