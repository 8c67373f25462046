"""Official tensor names and layouts <-> Flax variables, both ways. The tables are the mapping.

The original holds a block that is applied several times once for every application, under the same weights:
`transformers.S.blocks.I` counts applications and non-linear projection layers in turn, so that application r of the
distinct block b stands at I = 2 (b · recursions + r) and its NLL at I + 1. Here the distinct blocks of a stage are
stacked on a leading axis, its NLLs on two: block and application.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.errors import UserError
from sret_jax.models.sret import SReT, variable_shapes
from sret_jax.models.zoo import create_model, list_models
from sret_jax.weights.adapt import check_variables


class _Layout(NamedTuple):
    """Order of the official axes in our array, and the axes of size 1 that ours leaves out."""

    axes: tuple[int, ...]
    squeezed: tuple[int, ...] = ()

    def from_torch(self, array: np.ndarray) -> np.ndarray:
        return np.squeeze(array, self.squeezed).transpose(self.axes)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        return np.expand_dims(array.transpose(np.argsort(self.axes)), self.squeezed)


_SCALAR = _Layout(())
_VECTOR = _Layout((0,))
_LINEAR = _Layout((1, 0))  # (out, in) -> (in, out)
_CONV = _Layout((2, 3, 1, 0))  # (out, in / groups, h, w) -> (h, w, in / groups, out)
_POSITION = _Layout((1, 2, 0), squeezed=(0,))  # (1, c, h, w) -> (h, w, c)
_COEFFICIENT = _Layout((), squeezed=(0,))  # (1,) -> one element of (coefficients,)

_Table = tuple[tuple[str, str, _Layout], ...]


def _affine(official: str, ours: str, scale: str, layout: _Layout) -> _Table:
    return (f"{official}.weight", f"{ours}/{scale}", layout), (f"{official}.bias", f"{ours}/bias", _VECTOR)


def _norm(official: str, ours: str) -> _Table:
    return _affine(official, ours, "scale", _VECTOR)


def _linear(official: str, ours: str) -> _Table:
    return _affine(official, ours, "kernel", _LINEAR)


def _conv(official: str, ours: str) -> _Table:
    return _affine(official, ours, "kernel", _CONV)


def _coefficients(count: int) -> _Table:
    return tuple((f"coefficient{i + 1}.bias", f"coefficients/{i}", _COEFFICIENT) for i in range(count))


_BLOCK: _Table = (
    *_norm("norm1", "norm1"),
    *_linear("attn.qkv", "attn/qkv"),
    *_linear("attn.proj", "attn/proj"),
    *_norm("norm2", "norm2"),
    *_linear("mlp.fc1", "mlp/fc1"),
    *_linear("mlp.fc2", "mlp/fc2"),
    *_coefficients(4),
)
_NLL: _Table = (
    *_norm("norm1", "norm"),
    *_linear("mlp.fc1", "mlp/fc1"),
    *_linear("mlp.fc2", "mlp/fc2"),
    *_coefficients(2),
)
_PATCH_EMBED: _Table = tuple(
    row
    for i in (1, 2, 3)
    for row in (
        *_conv(f"patch_embed.conv{i}", f"params/stem/conv{i}"),
        *_norm(f"patch_embed.bn{i}", f"params/stem/bn{i}"),
        (f"patch_embed.bn{i}.running_mean", f"batch_stats/stem/bn{i}/mean", _VECTOR),
        (f"patch_embed.bn{i}.running_var", f"batch_stats/stem/bn{i}/var", _VECTOR),
        (f"patch_embed.bn{i}.num_batches_tracked", f"batch_stats/stem/bn{i}/batches", _SCALAR),
    )
)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an official tensor stands: in the variable at `path`, at `index` of its leading stacked axes."""

    path: tuple[str, ...]
    index: tuple[int, ...]
    layout: _Layout


def _places(model: SReT) -> Iterator[tuple[str, _Place]]:
    """Every official name in the original's order, with the place it maps to; shared tensors under every name."""
    yield "pos_embed", _place("params/pos_embed", (), _POSITION)
    for official, ours, layout in _PATCH_EMBED:
        yield official, _place(ours, (), layout)
    for s, (blocks, recursions) in enumerate(zip(model.blocks, model.recursions, strict=True)):
        root = f"params/stages_{s}/blocks"
        for b in range(blocks):
            for r in range(recursions):
                i = 2 * (b * recursions + r)
                for official, ours, layout in _BLOCK:
                    yield f"transformers.{s}.blocks.{i}.{official}", _place(f"{root}/block/{ours}", (b,), layout)
                for official, ours, layout in _NLL:
                    yield f"transformers.{s}.blocks.{i + 1}.{official}", _place(f"{root}/nlls/{ours}", (b, r), layout)
    for i in range(len(model.widths) - 1):
        for official, ours, layout in _conv(f"pools.{i}.conv", f"params/pools_{i}"):
            yield official, _place(ours, (), layout)
    for official, ours, layout in (*_norm("norm", "params/norm"), *_linear("head", "params/head")):
        if model.num_classes or not official.startswith("head"):
            yield official, _place(ours, (), layout)


def _place(ours: str, index: tuple[int, ...], layout: _Layout) -> _Place:
    *path, last = ours.split("/")
    if last.isdigit():  # an element of the vector of coefficients
        return _Place(tuple(path), (*index, int(last)), layout)
    return _Place((*path, last), index, layout)


def _lookup(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def prefix_of(name: str) -> str | None:
    """What stands before the official name that a tensor's name ends in, "" for nothing; None if it ends in none."""
    official = _official_forms()
    parts = name.rsplit(".", _LONGEST_NAME)
    for i in range(len(parts)):
        if ".".join("#" if part.isdecimal() else part for part in parts[i:]) in official:
            return name[: len(name) - len(".".join(parts[i:]))]
    return None


_LONGEST_NAME = 7  # in parts


@functools.cache
def _official_forms() -> frozenset[str]:
    """The official names, with # for the number of a stage, block or pooling."""
    return frozenset(re.sub(r"(?<=\.)\d+(?=\.)", "#", name) for name, _ in _places(SReT()))


def shapes_of(state_dict: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays by name."""
    return {name: np.shape(array) for name, array in state_dict.items()}


def file_model(shapes: Mapping[str, tuple[int, ...]], model: SReT) -> SReT:
    """`model` with the image size and the number of classes that an official state dict of these shapes is of."""
    position, head = shapes.get("pos_embed", ()), shapes.get("head.bias", ())
    fields: dict[str, Any] = {"num_classes": head[0] if len(head) == 1 else 0}
    if len(position) == 4 and position[2] == position[3] and position[2:] != 2 * (model.grid_sizes[0],):
        # Which places a stage's tokens are sliced at decides on no tensor, and need not fit another image size.
        fields |= {"image_size": 8 * position[2], "slices": ((1, 1),) * len(model.widths)}
    return model.copy(**fields)


def fitting_models(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The published models that have tensors of these names and shapes, whatever the number of classes.

    Models that differ in slices alone, or in how they were trained, cannot be told apart.
    """
    models = {name: create_model(name) for name in list_models()}
    return [
        name
        for name, model in models.items()
        if shapes.get("pos_embed", ())[2:] == 2 * (model.grid_sizes[0],) and fits(shapes, model)
    ]


def fits(shapes: Mapping[str, tuple[int, ...]], model: SReT) -> bool:
    """Whether a network has tensors of these names and shapes, at another image size or number of classes perhaps."""
    try:
        model = file_model(shapes, model)
    except UserError:  # there is no network of such a size
        return False
    # These shapes decide on all others, and need no tracing of the model.
    expected: dict[str, tuple[int, ...]] = {"pos_embed": (1, model.widths[0], model.grid_sizes[0], model.grid_sizes[0])}
    for s, width in enumerate(model.widths):
        for part, ratio in ((0, model.mlp_ratio), (1, model.nll_ratio)):
            expected[f"transformers.{s}.blocks.{part}.mlp.fc1.weight"] = (int(width * ratio), width)
    names = {name for name, _ in _places(model)}
    return names == set(shapes) and all(shapes[name] == shape for name, shape in expected.items())


def from_torch_state_dict(state_dict: Mapping[str, np.ndarray], model: SReT) -> dict[str, Any]:
    """Variables of `model` from an official state dict.

    Args:
      state_dict: every official name and its array, in PyTorch's layout; any floating dtype.
      model: the network that the weights belong to.

    Returns:
      {"params", "batch_stats"}: float32 arrays, and the int32 count of batches that BatchNorm has seen.

    Raises:
      UserError: missing, unexpected, misshapen or mistyped tensors, or copies of a shared tensor that differ; all of
        them are listed.
    """
    places = dict(_places(model))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(model))
    problems = [f"missing: {name}" for name in places if name not in state_dict]
    problems += [f"unexpected: {name}" for name in state_dict if name not in places]

    filled: dict[tuple[tuple[str, ...], tuple[int, ...]], str] = {}
    for name, place in places.items():
        if name not in state_dict:
            continue
        target, array = _lookup(variables, place.path), np.asarray(state_dict[name])
        expected = place.layout.to_torch(target[place.index]).shape
        if expected == () and array.shape == (1,):  # as load_state_dict takes it: PyTorch before 0.4 had no scalars
            array = array[0]
        if array.shape != expected:
            problems.append(f"misshapen: {name} is {array.shape}, expected {expected}")
            continue
        is_count = np.issubdtype(target.dtype, np.integer)
        if not (jnp.issubdtype(array.dtype, jnp.floating) or (is_count and array.dtype.kind in "iu")):
            problems.append(
                f"mistyped: {name} is {array.dtype}, expected {'whole' if is_count else 'floating'} numbers"
            )
            continue
        value = place.layout.from_torch(array)
        if is_count:  # which may be infinite in a file of halves
            value = np.clip(np.where(np.isfinite(value), value, 0).astype(np.int64), 0, np.iinfo(target.dtype).max)
        value = value.astype(target.dtype)
        first = filled.setdefault((place.path, place.index), name)
        if first == name:
            target[place.index] = value
        elif not np.array_equal(target[place.index], value, equal_nan=True):
            problems.append(f"differing: {first} and {name} are one shared tensor")

    if problems:
        raise UserError(
            f"the state dict does not fit the model in {len(problems)} tensors; check the model's name and fields:\n  "
            + "\n  ".join(problems)
        )
    return jax.device_put(variables)


def to_torch_state_dict(variables: Mapping[str, Any], model: SReT) -> dict[str, np.ndarray]:
    """The official state dict of `variables`: every official name, in PyTorch's layout.

    A shared tensor is one array, under each of its names. Any tree of the variables' structure works, so gradients take
    official names too; collections that are not there are left out.

    Raises:
      UserError: variables of another model.
    """
    check_variables(variables, model)
    arrays = jax.tree.map(np.asarray, dict(variables))
    made: dict[tuple[tuple[str, ...], tuple[int, ...]], np.ndarray] = {}
    state_dict = {}
    for name, place in _places(model):
        if place.path[0] in arrays:
            if (place.path, place.index) not in made:
                array = place.layout.to_torch(_lookup(arrays, place.path)[place.index])
                dtype = np.int64 if array.dtype == np.int32 else array.dtype
                made[place.path, place.index] = np.array(array, dtype, order="C")
            state_dict[name] = made[place.path, place.index]
    return state_dict
