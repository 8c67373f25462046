"""Variables of one network fitted to another: position embeddings of other resolutions, other heads."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.errors import UserError
from sret_jax.models.layers import Dense
from sret_jax.models.sret import SReT, variable_shapes

# PyTorch's; the bicubic of jax.image.resize has -0.5.
_BICUBIC_A = -0.75


def adapt(variables: Mapping[str, Any], model: SReT, *, fresh_head: bool = False) -> dict[str, Any]:
    """The variables as `model` needs them.

    The position embedding is resized if the model's `image_size` is another. The head is left out if the model has
    none. If it has another number of classes, and only then, `fresh_head` gives it a new one, drawn from
    `jax.random.key(0)` as at initialisation. Each of these is told as a `UserWarning`.

    Args:
      variables: {"params", "batch_stats"} of a network that otherwise is the same.
      model: the network wanted.
      fresh_head: whether the head may be replaced.

    Raises:
      UserError: the head has another number of classes without `fresh_head`, or other variables differ; all are named.
    """
    expected = variable_shapes(model)
    for collection in expected:
        if not isinstance(variables.get(collection), Mapping):
            raise UserError(f"the variables have no {collection}, expected {' and '.join(expected)}: save all of them")
    params = dict(variables["params"])
    found, wanted = np.shape(params.get("pos_embed", ())), expected["params"]["pos_embed"].shape
    if found != wanted and len(found) == 3 and found[0] == found[1] > 0 and found[2] == wanted[2]:
        params["pos_embed"] = resize_position_embedding(params["pos_embed"], wanted[0])
        warnings.warn(
            f"the position embedding was resized from {8 * found[0]} to {model.image_size} pixels", stacklevel=3
        )
    head = params.get("head")
    classes = len(head["bias"]) if isinstance(head, Mapping) and np.ndim(head.get("bias", ())) else 0
    if classes and not model.num_classes:
        del params["head"]
        warnings.warn(f"the head of {classes} classes was left out: the model has none", stacklevel=3)
    elif classes != model.num_classes:
        if not fresh_head:
            raise UserError(
                f"the weights are of {classes or 'no'} classes, the model has {model.num_classes}: create it with "
                f"num_classes={classes}, or have a fresh head trained: fresh_head=True"
            )
        params["head"] = _fresh_head(model)
        warnings.warn(f"the head of {model.num_classes} classes is fresh: it must be trained", stacklevel=3)
    adapted = {**{name: variables[name] for name in expected}, "params": params}
    check_variables(adapted, model)
    return jax.tree.map_with_path(_of_dtype, adapted, {name: expected[name] for name in adapted})


def _of_dtype(path: Any, leaf: Any, expected: jax.ShapeDtypeStruct) -> Any:
    if leaf.dtype == expected.dtype:
        return leaf
    if not (jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.issubdtype(expected.dtype, jnp.floating)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise UserError(f"{name} is {leaf.dtype}, expected {expected.dtype}: save the weights of such a network")
    return leaf.astype(expected.dtype)


def check_variables(variables: Mapping[str, Any], model: SReT) -> None:
    """Refuse variables that are not of the model; collections that are not there do not matter.

    Raises:
      UserError: with every name where the shapes differ.
    """
    expected = variable_shapes(model)
    problems = []
    for collection, tree in variables.items():
        found, wanted = (
            {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}
            for leaves in (jax.tree.leaves_with_path(tree), jax.tree.leaves_with_path(expected.get(collection, {})))
        )
        problems += [
            f"{collection}/{name} is {found.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
            for name in sorted(found.keys() | wanted.keys())
            if found.get(name) != wanted.get(name)
        ]
    if problems:
        raise UserError("the variables do not belong to the model:\n  " + "\n  ".join(problems))


def resize_position_embedding(embedding: np.ndarray, size: int) -> np.ndarray:
    """A position embedding for another image size, as DeiT's and SReT's fine-tuning resizes it.

    That is PyTorch's `interpolate(mode="bicubic", align_corners=False)`: cubic convolution (Keys, 1981) with
    a = -0.75, without a filter against aliasing, the border repeated.

    Args:
      embedding: (height, width, channels).
      size: the new height and width.

    Returns:
      float32 (size, size, channels).
    """
    rows, columns = (_cubic_convolution(length, size) for length in embedding.shape[:2])
    resized = np.einsum("ih,jw,hwc->ijc", rows, columns, np.asarray(embedding, np.float64), optimize=True)
    return resized.astype(np.float32)


def _cubic_convolution(length: int, size: int) -> np.ndarray:
    """What each of `length` samples gives to each of `size` new ones, (size, length)."""
    # In float32, as PyTorch: where a place is large, its rounding is seen in the fifth digit of the result.
    places = np.float32(length / size) * (np.arange(size, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    matrix = np.zeros((size, length))
    for tap in (-1, 0, 1, 2):
        samples = np.floor(places).astype(int) + tap
        distance = np.abs(places - samples)
        near = ((_BICUBIC_A + 2) * distance - (_BICUBIC_A + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * _BICUBIC_A - 4 * _BICUBIC_A
        weight = np.where(distance <= 1, near, far)
        np.add.at(matrix, (np.arange(size), np.clip(samples, 0, length - 1)), weight)
    return matrix


def _fresh_head(model: SReT) -> Any:
    width = model.widths[-1]
    head = Dense(width, model.num_classes)
    return head.init(jax.random.key(0), jnp.zeros((1, width)))["params"]
