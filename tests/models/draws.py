"""Variables and images for tests, drawn with NumPy: nothing needs compiling."""

from typing import Any

import jax
import numpy as np

import sret_jax


def random_variables(model: sret_jax.SReT, seed: int = 0) -> dict[str, Any]:
    """Variables of `model` drawn with NumPy: no coefficient is 1, no bias 0."""
    random = np.random.RandomState(seed)
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        z = random.standard_normal(leaf.shape)
        names = [key.key for key in path]
        if names[-1] == "batches":
            return np.array(3, leaf.dtype)
        if names[-1] in ("scale", "var", "coefficients"):
            z = np.exp(0.2 * z)
        elif names[-1] == "kernel":
            spatial = 9 if "stem" in names or "pools" in names[-2] else 1
            z /= np.sqrt(spatial * leaf.shape[-2])
        else:
            z *= 0.2
        return z.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_images(model: sret_jax.SReT, batch: int, seed: int = 1) -> np.ndarray:
    """Standard normal images, float32 (batch, image_size, image_size, 3)."""
    shape = (batch, model.image_size, model.image_size, 3)
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)
