"""Saves and loads variables, and tells what they are of: from a conversion, a training run or PyTorch, near or far."""

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from sret_jax.errors import UserError
from sret_jax.files import (
    DamagedError,
    check_seal,
    expand,
    is_sealed,
    local_copy,
    naming,
    naming_orbax,
    naming_remote,
    read_json,
    reserve,
    seal,
    write_whole,
)
from sret_jax.models.sret import PER_STAGE, SReT
from sret_jax.models.zoo import create_model
from sret_jax.weights.adapt import adapt
from sret_jax.weights.runs import run_identity, saved_steps
from sret_jax.weights.safetensors_file import open_safetensors
from sret_jax.weights.torch_names import file_model, fitting_models, from_torch_state_dict, shapes_of
from sret_jax.weights.torch_pickle import Tensor, shown
from sret_jax.weights.torch_weights import TorchWeights, check_names, load_torch_weights, weights_of_safetensors

# The fields that decide on the variables and on what they compute.
_DESCRIBED = ("image_size", *PER_STAGE, "mlp_ratio", "nll_ratio", "num_classes")
_NAMES_SHOWN = 10
_MOST_STAGES = 32
# How far arrays are compressed: those of trained networks lose a tenth.
_MOST_COMPRESSION = 16
_MOST_CLAIMED = 2**27
_MOST_NESTED = 20


class Stored(NamedTuple):
    """What was stored.

    Attributes:
      variables: {"params", "batch_stats"}, NumPy arrays.
      model: what the variables are of; None where that is not kept with them.
      name: of the model, as `create_model` knows it, perhaps with other fields; "" where it is not known.
      eval_crop_ratio: part of the shorter side that evaluation kept in the run that they are of; 0 where there is none.
    """

    variables: dict[str, Any]
    model: SReT | None = None
    name: str = ""
    eval_crop_ratio: float = 0.0


def save_variables(
    path: epath.PathLike,
    variables: Mapping[str, Any],
    model: SReT | None = None,
    *,
    name: str = "",
    overwrite: bool = False,
) -> None:
    """Save variables so that `load_variables` gives the same, bit for bit.

    Nothing incomplete ever stands under `path`.

    Args:
      path: a name that ends in `.safetensors` gives one file, any other a folder, which Orbax writes. It may be remote:
        `gs://…`, `s3://…`.
      variables: {"params", "batch_stats"}, or any other tree of dicts of arrays.
      model: what they are of; its fields are kept with the variables.
      name: of the model, as `create_model` knows it; kept too.
      overwrite: whether a file, or a folder that this function wrote, is replaced.

    Raises:
      UserError: something is there already, or it cannot be written.
    """
    path = expand(path)
    refuse_existing(path, overwrite=overwrite)
    arrays = jax.tree.map(np.asarray, dict(variables))
    fields = {field: getattr(model, field) for field in _DESCRIBED} if model else {}
    kept = {"model": name, "fields": json.dumps(fields)}
    write = _write_safetensors if _is_safetensors(path) else _write_folder
    write_whole(path, lambda new: write(new, arrays, kept))


def load_variables(
    path: epath.PathLike, model: SReT | None = None, *, ema: bool = False, fresh_head: bool = False
) -> dict[str, Any]:
    """Variables from whatever holds them.

    Args:
      path: a folder or `.safetensors` file that `save_variables` or `convert_torch_weights.py` wrote; the workdir of a
        training run, whose last checkpoint is taken, or one of its checkpoints, `WORKDIR/checkpoints/STEP`; a file of
        PyTorch, in any layout that `load_torch_weights` knows. It may be remote: `gs://…`, `s3://…`.
      model: what the variables are for. If its `image_size` is another, the position embedding is resized, with a
        `UserWarning`. Not given, they are as they were stored.
      ema: whether to take the weights' moving average, of a file of PyTorch or a training run, instead of the weights.
      fresh_head: whether a head of another number of classes is replaced by a fresh one, with a `UserWarning`.

    Returns:
      {"params", "batch_stats"}, as `model.apply` takes them. A `UserWarning` names weights that are not finite.

    Raises:
      UserError: there is no such file, or it is damaged, of another model, or of another number of classes.
    """
    found = read(path, model, ema=ema)
    variables = from_torch_weights(found, model) if isinstance(found, TorchWeights) else found.variables
    if model is not None:
        variables = adapt(variables, model, fresh_head=fresh_head)
    return jax.device_put(variables)


def from_torch_weights(weights: TorchWeights, model: SReT | None = None) -> dict[str, Any]:
    """Variables of the image size and number of classes that the weights are of, whatever the model's are.

    Args:
      weights: as `load_torch_weights` gives them.
      model: the network that they belong to; a published one by default.

    Raises:
      UserError: no model is given and none is known that fits, or the given one does not.
    """
    check_names(weights)
    shapes = shapes_of(weights.state_dict)
    if model is None:
        names = fitting_models(shapes)
        if not names:
            raise UserError(f"{weights.path} holds the weights of no published network: give the model that it is of")
        model = create_model(names[0])  # the others have the same variables
    _warn_of_non_finite(weights.state_dict.items())
    try:
        return from_torch_state_dict(weights.state_dict, file_model(shapes, model))
    except UserError as error:
        names = fitting_models(shapes)
        hint = f"\nThey are those of {' or '.join(names)}" if names else ""
        raise UserError(f"{weights.path}: {error}{hint}") from error


def read(path: epath.PathLike, model: SReT | None = None, *, ema: bool = False) -> Stored | TorchWeights:
    """What a file or folder holds: variables, or weights under their official names.

    A `UserWarning` names variables that are not finite.

    Args:
      path: as in `load_variables`.
      model: what the weights are for, as in `load_torch_weights`.
      ema: whether to take the moving average, which training runs and state dicts may hold.

    Raises:
      UserError: there is none, or it is damaged.
    """
    with local_copy(path) as local:
        try:
            if local.is_dir():
                stored: Stored | TorchWeights = _read_folder(local, ema=ema)
            elif _is_safetensors(path):
                stored = _read_safetensors(local, model, ema=ema)
            else:
                stored = load_torch_weights(local, model, ema=ema)
        except DamagedError as error:
            raise UserError(f"{local} is damaged ({error}): convert it again, or take another") from error
        if isinstance(stored, TorchWeights):
            return stored._replace(path=os.fspath(path))
        if ema and stored.variables.keys() == {"ema"}:
            stored = stored._replace(variables=stored.variables["ema"])
        elif ema:
            raise UserError(
                f"{local} holds no moving average of weights: load the weights themselves, without ema=True"
            )
    _warn_of_non_finite(flatten_dict(stored.variables, sep="/").items())
    return stored


def refuse_existing(path: epath.PathLike, *, overwrite: bool) -> None:
    """Refuse a path where something is that may not be replaced.

    Raises:
      UserError: something is there, and `overwrite` is off or it is a folder that `save_variables` did not write.
    """
    with naming_remote(path):
        place = epath.Path(expand(path))
        there, strange = place.exists(), place.is_dir() and not (place / "variables").exists()
    if there and not overwrite:
        raise UserError(f"{os.fspath(path)} exists: give another name, or overwrite=True")
    if strange:
        raise UserError(
            f"{os.fspath(path)} is a folder of something else, which is never overwritten: give another name"
        )


def _is_safetensors(path: epath.PathLike) -> bool:
    return os.fspath(path).endswith(".safetensors")


def _write_safetensors(path: Path, arrays: Mapping[str, Any], kept: dict[str, str]) -> None:
    import safetensors.numpy

    # The library writes the memory of an array as it lies, whatever its strides.
    flat = {name: np.array(array, order="C") for name, array in flatten_dict(arrays, sep="/").items()}
    path.write_bytes(safetensors.numpy.save(flat, kept))


def _read_safetensors(path: Path, model: SReT | None, *, ema: bool) -> Stored | TorchWeights:
    with naming(path):
        file = open_safetensors(path)
    if "fields" not in file.metadata and not any(name.startswith("params/") for name in file.tensors):
        return weights_of_safetensors(path, file, model, ema=ema)
    tensors = {name: tensor for name, tensor in file.tensors.items() if isinstance(tensor, Tensor)}
    for name in file.tensors.keys() - tensors.keys():
        raise DamagedError(f"its variable {shown(name)} is of a type that is not known")
    described = _model_and_name(file.metadata, {name: tensor.shape for name, tensor in tensors.items()})
    variables = _tree({name: np.array(file.reader.array(tensor)) for name, tensor in tensors.items()})
    return Stored(variables, *described)


def _tree(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Nested dicts of arrays under names such as `params/norm/bias`."""
    for name in flat:
        parts = name.split("/")
        if len(parts) > _MOST_NESTED or any("/".join(parts[:end]) in flat for end in range(1, len(parts))):
            raise DamagedError(f"its name {shown(name)} lies within another, or too deep")
    return unflatten_dict(flat, sep="/")


def _write_folder(path: Path, arrays: Mapping[str, Any], kept: dict[str, str]) -> None:
    import orbax.checkpoint as ocp

    items = ocp.args.Composite(variables=ocp.args.StandardSave(dict(arrays)), model=ocp.args.JsonSave(kept))
    with naming_orbax(path):
        reserve(path.with_name(path.name + ".space"), sum(array.nbytes for array in jax.tree.leaves(arrays)))
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(path, items)
        seal(path)


def _read_folder(path: Path, *, ema: bool) -> Stored:
    """A folder that `save_variables` wrote, a checkpoint of a training run, or its workdir."""
    if (path / "checkpoints").is_dir():
        return _read_workdir(path, ema=ema)
    if (path / "state").is_dir():
        if not is_sealed(path):
            raise DamagedError("it has no checksums")
        check_seal(path)
        return _restore(path / "state", ("ema",) if ema else ("params", "batch_stats"))
    if (path / "variables").is_dir():
        if not is_sealed(path):
            raise DamagedError("it was not written to its end")
        check_seal(path)
        return _restore(path / "variables", kept=read_json(path / "model" / "metadata"))
    raise UserError(f"{path} holds no variables: expected a converted folder, or the workdir of a training run")


def _read_workdir(path: Path, *, ema: bool) -> Stored:
    steps = saved_steps(path)
    if not steps:
        raise UserError(f"{path} has no checkpoint yet: wait for the first one")
    latest, *older = (path / "checkpoints" / str(step) for step in steps)
    try:
        variables = _read_folder(latest, ema=ema).variables
    except DamagedError as error:
        others = f"; the one before is {older[0]}" if older else ""
        raise UserError(f"{latest} is damaged ({error}){others}") from error
    keys = run_identity(path)
    try:
        fields = {field: keys.get(f"config.model.{field}") for field in _DESCRIBED}
        given = {field: value for field, value in fields.items() if value is not None}
        name = keys["config.model.name"]
        model = create_model(name, **{**given, "num_classes": keys["classes"]})
        if not 0 <= (eval_crop_ratio := float(keys.get("config.data.eval_crop_ratio", 0))) <= 1:
            raise ValueError(f"config.data.eval_crop_ratio is {eval_crop_ratio}")
    except (TypeError, ValueError, LookupError) as error:  # UserError is a ValueError
        raise UserError(
            f"{path / 'config.json'} describes no model ({error}): put it back, or give {latest}"
        ) from error
    return Stored(variables, model, name, eval_crop_ratio)


def _model_and_name(kept: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[SReT | None, str]:
    """The model that a file describes, and its name; its fields must be those of variables of these shapes."""
    try:
        fields, name = json.loads(kept.get("fields", "{}")), kept.get("model", "")
        if not fields:
            return None, shown(name)
        _check_fields(fields, shapes)
        return SReT(**fields), shown(name)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise DamagedError(f"what it says of its model is not understood: {shown(str(error))}") from error


def _check_fields(fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a model's fields with its variables, before anything is made that is as large as they say.

    Raises:
      ValueError: they do not agree; or other errors, if the fields are not of the types that they should be.
    """
    if not fields.keys() <= set(_DESCRIBED):
        raise ValueError(f"it has the fields {', '.join(fields)}")
    widths, blocks, recursions = (fields[name] for name in ("widths", "blocks", "recursions"))
    if not len(widths) == len(blocks) == len(recursions) <= _MOST_STAGES:
        raise ValueError(f"it has {len(widths)} stages")
    size, classes = fields["image_size"] // 8, fields["num_classes"]
    expected: dict[str, tuple[int, ...]] = {"params/pos_embed": (size, size, widths[0])}
    if classes:
        expected["params/head/bias"] = (classes,)
    for s, (width, count, times) in enumerate(zip(widths, blocks, recursions, strict=True)):
        stage = f"params/stages_{s}/blocks"
        expected[f"{stage}/block/norm1/scale"] = (count, width)
        expected[f"{stage}/block/mlp/fc1/bias"] = (count, int(width * fields["mlp_ratio"]))
        expected[f"{stage}/nlls/mlp/fc1/bias"] = (count, times, int(width * fields["nll_ratio"]))
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise ValueError(f"{name} is {shapes.get(name, 'missing')}, it says {shape}")


def _restore(folder: Path, names: Sequence[str] | None = None, kept: Any = None) -> Stored:
    """What Orbax wrote, or those of these parts that are there; no device is needed.

    `kept` is what stands beside the variables of their model.
    """
    import orbax.checkpoint as ocp

    with naming_orbax(folder):
        try:
            handler = ocp.PyTreeCheckpointHandler()
            tree = {
                name: part
                for name, part in handler.metadata(folder.absolute()).tree.items()
                if part is not None and (names is None or name in names)
            }
            shapes = {name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}
            described = _model_and_name(kept or {}, shapes)
            _check_claims(folder, tree)
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            args = ocp.args.PyTreeRestore(item=tree, restore_args=numpy, partial_restore=True)
            return Stored(handler.restore(folder.absolute(), args=args), *described)
        except (OSError, DamagedError):
            raise
        except Exception as error:  # whatever Orbax and TensorStore raise for what damage there is
            raise DamagedError(shown(str(error).strip().split("\n")[0])) from error


def _check_claims(folder: Path, tree: Any) -> None:
    """Refuse arrays that are far larger than their files, which compression allows, before they are allocated."""
    sizes = [
        math.prod(shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        for shape in (leaf.shape, leaf.storage.chunk_shape if leaf.storage else leaf.shape)
    ]
    most = max(_MOST_CLAIMED, _MOST_COMPRESSION * sum(file.stat().st_size for file in folder.rglob("*")))
    if sum(sizes) > 2 * most:
        raise DamagedError(f"its arrays are said to have {sum(sizes) // 2:,} bytes, expected no more than {most:,}")


def _warn_of_non_finite(arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    names = [name for name, array in arrays if not np.isfinite(array).all()]
    if names:
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        warnings.warn(
            f"{len(names)} tensors hold NaN or infinity: {', '.join(names[:_NAMES_SHOWN])}{more}", stacklevel=4
        )
