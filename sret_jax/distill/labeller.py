"""The teachers on the devices: from crops to what is kept of their probabilities."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sret_jax.data.augment import normalize
from sret_jax.data.soft_labels import LabelType
from sret_jax.models.compiler import compiler_options
from sret_jax.training.compiling import compiling
from sret_jax.training.mesh import replicated, split_batch
from sret_jax.training.teacher import Teacher, place_teachers, teacher_probabilities

# How many batches the host is ahead of the devices.
_BATCHES_AHEAD = 2


class Labeller:
    """From crops to what is kept of the teachers' probabilities.

    Attributes:
      image_size: height and width of the crops, pixels: those of the teacher that sees the largest.
      batch_size: crops in a batch.
      k: classes that a label names.
    """

    def __init__(
        self,
        teachers: tuple[Teacher, ...],
        mesh: Mesh,
        batch_size: int,
        label_type: LabelType,
        temperature: float,
        say: Callable[[str], object],
    ) -> None:
        self.image_size = max(teacher.image_size for teacher in teachers)
        self.batch_size = batch_size
        self.num_classes = teachers[0].num_classes
        self.k = label_type.size(self.num_classes)
        self._split = split_batch(mesh)
        self._variables = place_teachers(teachers, mesh)
        whole = replicated(mesh)

        def probabilities(variables: Any, images: jax.Array) -> jax.Array:
            variables = jax.lax.with_sharding_constraint(variables, whole)
            return teacher_probabilities(teachers, variables, normalize(images), temperature)

        def labels(variables: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
            every = probabilities(variables, images)
            if label_type.kind == "ori":
                classes = jax.lax.broadcasted_iota(np.int32, every.shape, 1)
                return classes, every
            kept, classes = jax.lax.top_k(every, self.k)
            return classes, jnp.ones_like(kept) if label_type.kind == "hard" else kept

        def hits(variables: Any, images: jax.Array, labels: jax.Array, mask: jax.Array) -> jax.Array:
            return ((probabilities(variables, images).argmax(axis=1) == labels) & mask).sum()

        options = compiler_options(mesh.devices.flat[0].platform)
        self._functions = {
            "the labelling step": jax.jit(labels, compiler_options=options),
            "the evaluation step": jax.jit(hits, compiler_options=options),
        }
        self._programs: dict[str, jax.stages.Compiled] = {}
        self._say = say
        self._waiting: list[np.ndarray] = []
        self._results: list[tuple[jax.Array, jax.Array]] = []

    def add(self, crops: np.ndarray) -> None:
        """Hands in crops, uint8 (any, image_size, image_size, 3): batches are computed as soon as they are full."""
        self._waiting.append(crops)
        if sum(map(len, self._waiting)) >= self.batch_size:
            joined = np.concatenate(self._waiting)
            full = len(joined) // self.batch_size * self.batch_size
            for start in range(0, full, self.batch_size):
                self._send(joined[start : start + self.batch_size])
            self._waiting = [joined[full:]]

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Classes int32 and probabilities float32, (crops, k), of all crops since it was called last.

        They are computed in batches of their own, the last filled up: what came before has no part in them.
        """
        left = sum(map(len, self._waiting))
        count = len(self._results) * self.batch_size + left
        if left:
            rest = np.concatenate(self._waiting)
            self._send(np.pad(rest, ((0, self.batch_size - left), (0, 0), (0, 0), (0, 0))))
        classes, probabilities = (np.concatenate(parts)[:count] for parts in zip(*self._results, strict=True))
        self._waiting, self._results = [], []
        return classes, probabilities

    def _send(self, crops: np.ndarray) -> None:
        self._results.append(self._run("the labelling step", jax.device_put(crops, self._split)))
        if len(self._results) > _BATCHES_AHEAD:
            jax.block_until_ready(self._results[-1 - _BATCHES_AHEAD])

    def hits(self, batch: Mapping[str, np.ndarray]) -> int:
        """How many examples of a batch the teacher is right about."""
        arrays = (jax.device_put(batch[name], self._split) for name in ("image", "label", "mask"))
        return int(self._run("the evaluation step", *arrays))

    def _run(self, step: str, *arrays: jax.Array) -> Any:
        """A step, which is compiled the first time."""
        if step not in self._programs:
            with compiling(step, self._say):
                self._programs[step] = self._functions[step].lower(self._variables, *arrays).compile()
        return self._programs[step](self._variables, *arrays)
