"""Cross-entropy with distributions, given in few numbers or by a teacher."""

import jax
import optax

from sret_jax.data.targets import Targets


def target_loss(logits: jax.Array, targets: Targets, temperature: float = 1.0) -> jax.Array:
    """Mean over the batch of −Σ target · log softmax(logits / temperature).

    Args:
      logits: float32 (batch, classes).
      targets: of labels, or of soft labels that a teacher gave at this temperature.
      temperature: above 0.

    Returns:
      A float32 scalar.
    """
    return teacher_loss(logits, targets.dense(logits.shape[-1]), temperature)


def teacher_loss(logits: jax.Array, probabilities: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Mean over the batch of −Σ probability · log softmax(logits / temperature), the loss that SReT is distilled with.

    No label takes part, and no factor makes up for the temperature, as in the authors' `kd_loss.py` (SReT: Shen et al.,
    ECCV 2022; MEAL V2: Shen and Savvides, 2020).

    Args:
      logits: of the student, float32 (batch, classes).
      probabilities: softmax(teacher's logits / temperature), float32 (batch, classes).
      temperature: above 0.

    Returns:
      A float32 scalar.
    """
    return optax.softmax_cross_entropy(logits / temperature, probabilities).mean()
