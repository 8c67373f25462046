"""The story of a conversion, top to bottom: from PyTorch's file to ours, or back."""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from sret_jax.errors import UserError, options_named
from sret_jax.files import write_whole
from sret_jax.models.cost import count_params
from sret_jax.models.sret import PER_STAGE, SReT
from sret_jax.models.zoo import canonical_name, create_model
from sret_jax.weights.adapt import adapt
from sret_jax.weights.store import (
    Stored,
    from_torch_weights,
    read,
    refuse_existing,
    save_variables,
)
from sret_jax.weights.torch_names import fitting_models, shapes_of, to_torch_state_dict
from sret_jax.weights.torch_weights import TorchWeights, check_names
from sret_jax.weights.torch_writer import torch_file_content

_OFFICIAL = ".pth"
_NOTES = ("args.model", "arch", "epoch")
_SHAPE = (*PER_STAGE, "mlp_ratio", "nll_ratio")


@options_named({"fresh_head=True": "--num-classes", "ema=True": "--ema", "overwrite=True": "--overwrite"})
def convert(
    source: epath.PathLike,
    destination: epath.PathLike,
    *,
    name: str = "",
    fields: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
    ema: bool = False,
    reverse: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> SReT:
    """Read weights, check them, write them, and compare what was written.

    Args:
      source: anything that `load_variables` reads.
      destination: as in `save_variables`; with `reverse`, a name that ends in `.pth`.
      name: of the model; may be left out if the source says or decides it.
      fields: of the model that differ from the named one's, e.g. `{"image_size": 256}`.
      num_classes: that the head is to have, fresh if the source has others; the model's own by default.
      ema: whether to take the weights' moving average, from a file of PyTorch or a training run.
      reverse: whether to write the official layout of PyTorch, instead of ours.
      overwrite: whether a destination that exists is replaced.
      say: called with each line for a person.

    Returns:
      The model that the written variables are of.

    Raises:
      UserError: as `load_variables` and `save_variables`, or nothing says which model it is.
    """
    if reverse != os.fspath(destination).endswith(_OFFICIAL):
        raise UserError(
            f"{os.fspath(destination)}: --reverse writes files that end in {_OFFICIAL}, and nothing else writes those"
        )
    refuse_existing(destination, overwrite=overwrite)
    fields = dict(fields or {})

    stored = read(source, create_model(name, **fields) if name else None, ema=ema)
    if isinstance(stored, TorchWeights):
        say(f"read     {_facts(stored)}")
        check_names(stored)
        name = name or _only_fitting(stored)
        stored = Stored(from_torch_weights(stored, create_model(name, **fields)))
    else:
        say(f"read     {os.fspath(source)}: {len(jax.tree.leaves(stored.variables))} arrays")
    name, model = _model(stored, name, fields if num_classes is None else {**fields, "num_classes": num_classes})
    variables = adapt(stored.variables, model, fresh_head=num_classes is not None)
    named = create_model(name)
    changed = any(getattr(model, field) != getattr(named, field) for field in _SHAPE)
    say(
        f"model    {name}{', changed' if changed else ''}: {count_params(model):,} parameters, "
        f"{model.image_size} × {model.image_size} pixels, {model.num_classes} classes"
    )

    if reverse:
        written: dict[str, Any] = to_torch_state_dict(variables, model)
        content = torch_file_content(written)
        write_whole(destination, lambda new: new.write_bytes(content))
    else:
        written = jax.tree.map(np.asarray, variables)
        save_variables(destination, written, model, name=name, overwrite=overwrite)
    with warnings.catch_warnings(action="ignore"):  # they have been given
        found = read(destination)
    _compare(written, found.state_dict if isinstance(found, TorchWeights) else found.variables, destination)
    size = sum(array.nbytes for array in {id(array): array for array in jax.tree.leaves(written)}.values())
    say(f"wrote    {os.fspath(destination)}: {size / 1e6:.1f} MB, read again and found equal")
    return model


def _facts(weights: TorchWeights) -> str:
    dtypes = {array.dtype.name for array in weights.state_dict.values()} - {"int64"}
    where = f' under "{weights.layout}"' if weights.layout else ""
    notes = "".join(f", {key} {weights.notes[key]}" for key in _NOTES if key in weights.notes)
    return f"{weights.path}: {len(weights.state_dict)} tensors of {' and '.join(sorted(dtypes))}{where}{notes}"


def _only_fitting(weights: TorchWeights) -> str:
    """The one published model that has these tensors."""
    names = fitting_models(shapes_of(weights.state_dict))
    if len(names) == 1:
        return names[0]
    said = "".join(f"; the file says {key} {weights.notes[key]}" for key in _NOTES[:2] if key in weights.notes)
    if not names:
        raise UserError(
            f"the tensors of {weights.path} fit no published model at its own image size: give --model{said}"
        )
    raise UserError(
        f"the tensors of {weights.path} fit {', '.join(names)}, which differ in slices or training alone: choose one "
        f"with --model{said}"
    )


def _model(stored: Stored, name: str, fields: Mapping[str, Any]) -> tuple[str, SReT]:
    """The model of the name given, or else the stored one, with its name."""
    if name:
        return canonical_name(name), create_model(name, **fields)
    if stored.model is None:
        raise UserError("nothing says which model these variables are of: give --model")
    return stored.name, stored.model.copy(**fields)


def _compare(written: Any, found: Any, destination: epath.PathLike) -> None:
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), written, found)
    if not jax.tree.all(same):
        raise UserError(f"{os.fspath(destination)} does not give back what was written: look after that disk")
