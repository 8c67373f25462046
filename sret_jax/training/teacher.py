"""Networks that a student learns from: ours from their weights, any other from a function, and what they say."""

import contextlib
import hashlib
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun
from jax.extend.core.primitives import jit_p
from jax.sharding import Mesh

from sret_jax.data.augment import MEAN, STD
from sret_jax.errors import UserError
from sret_jax.files import expand, naming_remote
from sret_jax.models.sret import SReT
from sret_jax.models.zoo import create_model
from sret_jax.training.mesh import place, sharded
from sret_jax.weights.adapt import adapt
from sret_jax.weights.store import from_torch_weights, read
from sret_jax.weights.torch_names import fitting_models, shapes_of
from sret_jax.weights.torch_weights import TorchWeights, check_names

_DTYPES = ("float32", "bfloat16")

# `gs://bucket/weights` is neither.
_FUNCTION = re.compile(r"(\w+(?:\.\w+)*):(\w+)")
_OF_MODEL = re.compile(r"([^/\\:=]+)=(.+)")

# Bytes of a constant in a compiled program that do no harm.
_MOST_CONSTANT = 1 << 20

Function = Callable[[jax.Array], jax.Array]
Apply = Callable[[Any, jax.Array], Any]

# What a jitted part has as its parameter where it is inlined; newer versions of JAX have several ways.
_INLINE = jax.Inline.JAX_EARLY if hasattr(jax, "Inline") else True


class Teacher(NamedTuple):
    """A network that does not change.

    Attributes:
      name: as the user gave it.
      apply: a pure function from variables and images, float32 (batch, image_size, image_size, 3), normalised with
        `mean` and `std`, to logits (batch, num_classes), as in evaluation: the same image always gives the same.
      variables: a tree of NumPy arrays.
      image_size: height and width in pixels of the images that it sees.
      mean: that its images are normalised with, of RGB values in 0..1.
      std: likewise.
      num_classes: of the logits.
      eval_crop_ratio: part of an image's shorter side that its own run evaluated it on; 0 if it is of no run.
    """

    name: str
    apply: Apply
    variables: Any
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    eval_crop_ratio: float = 0.0

    def digest(self) -> str:
        """64 letters that tell apart teachers of other weights or inputs; of a function, the name stands for itself."""
        function = self.name if _FUNCTION.fullmatch(self.name) else ""
        digest = hashlib.sha256(repr((function, self.image_size, self.mean, self.std, self.num_classes)).encode())
        for leaf in jax.tree.leaves(self.variables):
            array = np.asarray(leaf)
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        return digest.hexdigest()


def load_teachers(
    spec: str,
    *,
    num_classes: int,
    default_image_size: int,
    image_size: int = 0,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    dtype: str = "float32",
) -> tuple[Teacher, ...]:
    """The teachers that a user names.

    Args:
      spec: one teacher, or several separated by commas, each of them
        - a path that `load_variables` reads. If neither the files say which model they are of, nor do their tensors
          fit one published network alone, `MODEL=PATH` says it;
        - `MODULE:FUNCTION`: called without arguments, it returns a function, which JAX can trace, from images to
          logits, as `Teacher.apply`. The arrays that this function draws on become the teacher's variables; as NumPy
          arrays, they take no memory of a device beside these.
      num_classes: that all of them must have.
      default_image_size: that functions see if `image_size` is 0.
      image_size: that all teachers see; 0 is a model's own. The position embedding is resized, with a `UserWarning`.
      mean: that the images of functions are normalised with; models of ours have their own.
      std: likewise.
      dtype: `float32` or `bfloat16`. With the latter, parameters are kept in bfloat16; a model computes in it. A
        function is given bfloat16 images, and computes in what it makes of them: the arrays that it draws on are cast
        back to their dtype before they are used.

    Raises:
      UserError: a teacher cannot be loaded, or gives other logits; the message names it.
    """
    names = [name.strip() for name in spec.split(",")]
    if not all(names):
        raise UserError(
            f"the teachers are {spec!r}, of which one has no name. Expected a path, MODEL=PATH or MODULE:FUNCTION, or "
            "several of them with commas between them"
        )
    if dtype not in _DTYPES:
        raise UserError(f"the teachers' dtype is {dtype!r}. Expected {' or '.join(_DTYPES)}")
    teachers = []
    for name in names:
        with _naming(name):
            if _FUNCTION.fullmatch(name):
                size = image_size or default_image_size
                apply, variables = _load_function(name, size, num_classes, jnp.dtype(dtype))
                teacher = Teacher(name, apply, variables, size, tuple(mean), tuple(std), num_classes)
            else:
                model, variables, crop_ratio = _load_model(name, image_size, num_classes, jnp.dtype(dtype))
                size = model.image_size
                teacher = Teacher(name, model.apply, variables, size, MEAN, STD, num_classes, crop_ratio)
        teachers.append(teacher)
    return tuple(teachers)


def place_teachers(teachers: Sequence[Teacher], mesh: Mesh) -> tuple[Any, ...]:
    """The variables of each teacher on the devices, split over "fsdp" as a student's parameters are between steps."""
    return tuple(place(teacher.variables, sharded(mesh, teacher.variables)) for teacher in teachers)


def teacher_probabilities(
    teachers: Sequence[Teacher], variables: Sequence[Any], images: jax.Array, temperature: float
) -> jax.Array:
    """The mean of the teachers' distributions (Shen and Savvides, 2020), through which no gradient flows.

    Args:
      teachers: of `load_teachers`.
      variables: of each teacher, whole: inside a step over a mesh, constrain those of `place_teachers` before.
      images: float32 (batch, height, width, 3), normalised as `augment.normalize` does. Each teacher sees them in its
        own size (bicubic, without aliasing) and normalisation.
      temperature: that logits are divided by.

    Returns:
      float32 (batch, classes), a distribution in each row.
    """
    # Stopped here, and not behind the teachers, nothing in them needs to have a derivative.
    variables, images = jax.lax.stop_gradient((tuple(variables), images))
    total = jnp.zeros(())
    for teacher, own in zip(teachers, variables, strict=True):
        logits = teacher.apply(own, _as_seen_by(teacher, images))
        total += jax.nn.softmax(logits.astype(jnp.float32) / temperature)
    return total / len(teachers)


def _as_seen_by(teacher: Teacher, images: jax.Array) -> jax.Array:
    size = (teacher.image_size, teacher.image_size)
    if images.shape[1:3] != size:
        images = jax.image.resize(images, (images.shape[0], *size, images.shape[3]), "bicubic", antialias=True)
    if (teacher.mean, teacher.std) != (MEAN, STD):
        mean, std, own_mean, own_std = (np.array(x, np.float32) for x in (MEAN, STD, teacher.mean, teacher.std))
        images = (images * std + mean - own_mean) / own_std
    return images


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Let errors say which teacher they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the teacher {name} cannot be used: {error}") from error


def _load_model(name: str, image_size: int, num_classes: int, dtype: np.dtype) -> tuple[SReT, Any, float]:
    """A network of ours as it is to compute, its variables, and `Teacher.eval_crop_ratio`."""
    described = _OF_MODEL.fullmatch(name)
    path = expand(described[2] if described else name)
    model = create_model(described[1]) if described else None
    crop_ratio = 0.0
    with naming_remote(path):
        there = epath.Path(path).exists()
    if not there:
        raise UserError(f"there is no file or folder {path}. Expected a path, MODEL=PATH or MODULE:FUNCTION")
    stored = read(path, model)
    if isinstance(stored, TorchWeights):
        check_names(stored)
        model = model or _only_network(stored)
        variables = from_torch_weights(stored, model)
    else:
        model, variables, crop_ratio = model or stored.model, stored.variables, stored.eval_crop_ratio
    if model is None:
        raise UserError("nothing says which model its variables are of: give MODEL=PATH, such as sret_s=PATH")
    head = variables.get("params", {}).get("head")
    classes = 0 if head is None else np.shape(head["bias"])[0]
    if classes != num_classes:
        raise UserError(
            f"it has {classes or 'no'} classes, the data {num_classes}: give one that learned from this data"
        )
    model = model.copy(num_classes=num_classes, image_size=image_size or model.image_size, dtype=dtype)
    variables = jax.tree.map(np.asarray, adapt(variables, model))
    # BatchNorm's statistics take little memory.
    stored_params = jax.tree.map(lambda leaf: _stored(leaf, dtype), variables["params"])
    return model, {**variables, "params": stored_params}, crop_ratio


def _only_network(weights: TorchWeights) -> SReT:
    """The published network that has these tensors; how it was trained does not matter."""
    names = fitting_models(shapes_of(weights.state_dict))
    networks = {create_model(name) for name in names}
    if not networks:
        raise UserError(
            "its tensors fit no published model at its own image size: give MODEL=PATH, or convert it with "
            "convert_torch_weights.py, which takes other fields"
        )
    if len(networks) > 1:
        raise UserError(
            f"its tensors fit {', '.join(names)}, which differ in slices: choose one, as in {names[0]}={weights.path}"
        )
    return networks.pop()


def _load_function(name: str, image_size: int, num_classes: int, dtype: np.dtype) -> tuple[Apply, Any]:
    """`Teacher.apply` of a function, and the arrays that it draws on."""
    function = _make_function(*name.split(":"))
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), dtype)
    closed = _trace(function, images)
    logits = [(aval.shape, jnp.issubdtype(aval.dtype, jnp.floating)) for aval in closed.out_avals]
    if logits != [((2, num_classes), True)]:
        raise UserError(
            f"for images {images.dtype} {images.shape} it returns "
            f"{' and '.join(f'{aval.dtype} {aval.shape}' for aval in closed.out_avals) or 'nothing'}. Expected logits, "
            f"one array of floating-point numbers (2, {num_classes}): the data has {num_classes} classes"
        )
    # Random keys stay in the program. All others are kept, so that nothing else ever gets the id of one.
    drawn_on = [const for const in closed.consts if not jnp.issubdtype(const.dtype, jax.dtypes.extended)]
    places = {id(const): place for place, const in enumerate(drawn_on)}

    def apply(variables: Sequence[jax.Array], images: jax.Array) -> jax.Array:
        # Traced anew, because a jaxpr is of one batch size.
        images = images.astype(dtype)
        with _naming(name):
            closed = _trace(function, jax.ShapeDtypeStruct(images.shape, dtype))
            _refuse_large(const for const in closed.consts if id(const) not in places)
        consts = [
            variables[places[id(const)]].astype(const.dtype) if id(const) in places else const
            for const in closed.consts
        ]
        return jaxpr_as_fun(closed.replace(consts=consts))(images)[0]

    return apply, tuple(_stored(np.asarray(const), dtype) for const in drawn_on)


def _make_function(module: str, attribute: str) -> Function:
    try:
        function = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"{type(error).__name__}: {error}. Expected MODULE:FUNCTION, a module that Python can import and a "
            "function in it that, without arguments, returns a function from images to logits"
        ) from error
    if not callable(function):
        raise UserError(f"it returns {function!r:.100}. Expected a function from images to logits")
    return function


def _trace(function: Function, images: jax.ShapeDtypeStruct) -> ClosedJaxpr:
    """What the function does with such images; the arrays that it draws on are `consts`."""
    try:
        closed = jax.make_jaxpr(function)(images)
    except Exception as error:  # whatever the user's code raises
        raise UserError(
            f"for images {images.dtype} {images.shape} its function raises {type(error).__name__}: {error}"
        ) from error
    # A jitted part has constants of its own until it is inlined.
    while any(equation.primitive is jit_p for equation in closed.eqns):
        equations = [
            equation.replace(params={**equation.params, "inline": _INLINE}) if equation.primitive is jit_p else equation
            for equation in closed.eqns
        ]
        inlined = closed.replace(jaxpr=closed.jaxpr.replace(eqns=equations))
        closed = jax.make_jaxpr(jaxpr_as_fun(inlined))(images)
    _refuse_large(_inner_constants(closed.jaxpr))
    return closed


def _refuse_large(constants: Iterable[Any]) -> None:
    for const in constants:
        if const.nbytes > _MOST_CONSTANT:
            raise UserError(
                f"its function draws on an array {const.dtype} {const.shape} that would become part of the compiled "
                "program. Expected arrays that are made once, outside of the function, and handed over as arguments to "
                "what is jitted within loops and branches"
            )


def _inner_constants(jaxpr: Any) -> Iterator[Any]:
    """The constants of jitted parts that are within loops, branches and the like."""
    for equation in jaxpr.eqns:
        for parameter in jax.tree.leaves(list(equation.params.values())):
            if isinstance(parameter, ClosedJaxpr):
                yield from parameter.consts
            if isinstance(parameter, ClosedJaxpr | Jaxpr):
                yield from _inner_constants(parameter)


def _stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return array.astype(dtype, copy=False) if jnp.issubdtype(array.dtype, jnp.floating) else array
