"""From an image file to the classes that a model sees in it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.data.augment import normalize
from sret_jax.data.decode import central_crop
from sret_jax.data.image_file import WHITE, Colour
from sret_jax.errors import UserError
from sret_jax.files import expand
from sret_jax.models.compiler import compiler_options
from sret_jax.models.sret import SReT


def classify(
    path: str | os.PathLike[str],
    model: SReT,
    variables: Mapping[str, Any],
    top: int = 5,
    background: Colour = WHITE,
) -> list[tuple[int, float]]:
    """The most probable classes of an image, which is cropped and normalised as in evaluation.

    Args:
      path: of the image: JPEG, PNG, WebP, BMP, TIFF, PPM or PGM.
      model: the network.
      variables: as `load_variables` gives them.
      top: how many classes, at most.
      background: RGB, 0 to 255, that the image shows where it is transparent; as the model was trained with.

    Returns:
      (class, probability), the most probable first. Classes count from 0; ImageNet's are in the order of their WordNet
      ids.

    Raises:
      UserError: the image cannot be read, or the model has no classes.
    """
    if not model.num_classes:
        raise UserError("the model has no head, and so no classes: create it with the number of its weights' classes")
    try:
        image = central_crop(Path(expand(path)).read_bytes(), model.image_size, background=background)
    except Exception as error:  # what is raised for broken bytes depends on the format and the damage
        raise UserError(f"{os.fspath(path)} cannot be read as an image: {error}") from error
    apply = jax.jit(model.apply, compiler_options=compiler_options())
    logits = apply(variables, normalize(jnp.asarray(image[None])))
    probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits[0]), min(top, model.num_classes))
    return [(int(c), float(p)) for c, p in zip(classes, probabilities, strict=True)]
