"""What a loss compares logits with: distributions over classes that are even, but for the few classes named."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

# Named classes that are added in one go; labels that name a thousand would make a large program.
_MOST_UNROLLED = 20


class Targets(NamedTuple):
    """A distribution for each row of a batch: `floor` for every class, and `excess` on top of it for those named.

    Attributes:
      classes: int32 (batch, k). A class may be named twice: the excesses add up.
      excess: float32 (batch, k).
      floor: float32 (batch,).
    """

    classes: Array
    excess: Array
    floor: Array

    def dense(self, num_classes: int) -> Array:
        """The same as float32 (batch, num_classes)."""
        every = jnp.arange(num_classes)[None]

        def add(dense: Array, named: tuple[Array, Array]) -> tuple[Array, None]:
            classes, excess = named
            return dense + jnp.where(classes[:, None] == every, excess[:, None], 0), None

        # Not a scatter, whose sums on a GPU would come in another order each time.
        dense = jnp.broadcast_to(self.floor[:, None], (len(self.floor), num_classes))
        unroll = min(self.classes.shape[1], _MOST_UNROLLED)
        return jax.lax.scan(add, dense, (self.classes.T, self.excess.T), unroll=unroll)[0]


def label_targets(labels: Array, num_classes: int, smoothing: float) -> Targets:
    """One-hot targets, smoothed: `smoothing` is spread evenly over all classes (Szegedy et al., 2016, section 7).

    Args:
      labels: int32 (batch,).
      num_classes: number of classes.
      smoothing: 0 to 1.
    """
    return Targets(
        labels[:, None],
        jnp.full((len(labels), 1), 1 - smoothing, jnp.float32),
        jnp.full(len(labels), smoothing / num_classes, jnp.float32),
    )


def soft_targets(classes: Array, probabilities: Array, kind: str, num_classes: int) -> Targets:
    """The distributions that soft labels stand for (FKD: Shen and Xing, ECCV 2022).

    Args:
      classes: int32 (batch, k), no class twice in a row.
      probabilities: float (batch, k), theirs.
      kind: `LabelType.kind` says what becomes of the rest. `smoothing` and `marginal_smoothing` spread it evenly over
        the other classes; `marginal_renorm` scales the probabilities to sum to 1; `hard` and `ori` have none.
      num_classes: number of classes.
    """
    probabilities = probabilities.astype(jnp.float32)
    total = jnp.sum(probabilities, axis=1, keepdims=True)
    if kind == "marginal_renorm":
        probabilities = probabilities / jnp.maximum(total, 1e-12)
    others = num_classes - classes.shape[1]
    rest = (1 - total) / others if kind.endswith("smoothing") and others else jnp.zeros_like(total)
    return Targets(classes, probabilities - rest, rest[:, 0])


def mix(targets: Targets, partners: Targets, weight: Array) -> Targets:
    """`weight` of the targets and `1 - weight` of their partners; weight is a scalar."""
    return Targets(
        jnp.concatenate([targets.classes, partners.classes], axis=1),
        jnp.concatenate([weight * targets.excess, (1 - weight) * partners.excess], axis=1),
        weight * targets.floor + (1 - weight) * partners.floor,
    )
