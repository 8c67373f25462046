"""AdamW with the original's decay groups, and the learning rate schedule: a warm-up, then a cosine or a constant."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array | int], jax.Array]


def warmup_cosine(
    peak: float, *, steps: int, warmup_steps: int, initial: float = 1e-6, final: float = 1e-5
) -> Schedule:
    """Learning rate by step: linear from `initial` to `peak`, then a cosine to `final`.

    As in DeiT (timm's cosine scheduler), the cosine counts from the start of training, not from the end of the
    warm-up: final + (peak − final)(1 + cos(π t / steps)) / 2. It is evaluated at every step, where DeiT keeps each
    epoch's first value for the whole epoch.
    """

    def schedule(step: jax.Array | int) -> jax.Array:
        t = jnp.asarray(step, jnp.float32)
        warmup = initial + (peak - initial) * t / max(warmup_steps, 1)
        cosine = final + (peak - final) * 0.5 * (1 + jnp.cos(math.pi * jnp.minimum(t / steps, 1)))
        return jnp.where(t < warmup_steps, warmup, cosine)

    return schedule


def warmup_constant(peak: float, *, warmup_steps: int, initial: float = 1e-6) -> Schedule:
    """Learning rate by step: linear from `initial` to `peak`, which then stays, as DeiT fine-tunes."""
    return warmup_cosine(peak, steps=1, warmup_steps=warmup_steps, initial=initial, final=peak)


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: the kernels of convolutions and linear layers.

    Biases, norms, residual coefficients and the position embedding are left alone. Decided by name: a scan's stacking
    adds axes, so the number of axes says nothing.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def adamw(
    learning_rate: Schedule | float,
    *,
    weight_decay: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW as PyTorch's, decaying only `decay_mask`'s parameters.

    With a positive `clip_norm`, gradients whose norm over all parameters is larger are scaled down to it before.
    """
    optimizer = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer
