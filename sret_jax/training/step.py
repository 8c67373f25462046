"""One training step and one evaluation step: pure functions, jitted over a mesh."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sret_jax.data.augment import Augmentation, normalize
from sret_jax.models.sret import SReT
from sret_jax.training.mesh import replicated, split_batch
from sret_jax.training.optimizer import Schedule

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a training step changes. Randomness is a function of the seed and `step`, so no key is kept."""

    step: jax.Array  # int32, steps done
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """As `model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def step_keys(seed: int, step: jax.Array | int) -> jax.Array:
    """Three keys: for the augmentation, the dropout and the permutations of the step after `step` others."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)


def init_state(model: SReT, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh) -> TrainState:
    """The state before the first step, the same on every device."""
    return jax.jit(_initializer(model, optimizer, seed), out_shardings=replicated(mesh))()


def abstract_state(model: SReT, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """What a state consists of, `jax.ShapeDtypeStruct`s with shardings: to restore one without making one."""

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh))

    return jax.tree.map(placed, jax.eval_shape(_initializer(model, optimizer, seed=0)))


def _initializer(model: SReT, optimizer: optax.GradientTransformation, seed: int) -> Callable[[], TrainState]:
    def init() -> TrainState:
        images = jnp.zeros((1, model.image_size, model.image_size, 3))
        variables = model.init(jax.random.key(seed), images)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables["params"],
            batch_stats=variables["batch_stats"],
            opt_state=optimizer.init(variables["params"]),
        )

    return init


def make_train_step(
    model: SReT,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    augmentation: Augmentation,
    seed: int,
    mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    The batch holds "image", uint8 (batch, height, width, 3), and "label", int32 (batch,), split over the mesh. Metrics
    are float32 scalars over the global batch: loss, learning_rate and gradient_norm, all of this step.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        augment_key, dropout_key, permutation_key = step_keys(seed, state.step)
        images, targets = augmentation(augment_key, batch, model.num_classes)

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key, "permutation": permutation_key},
            )
            return optax.softmax_cross_entropy(logits, targets).mean(), updates["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "gradient_norm": optax.tree.norm(grads),
        }
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    whole = replicated(mesh)
    return jax.jit(train_step, in_shardings=(whole, split_batch(mesh)), out_shardings=(whole, whole), donate_argnums=0)


def make_eval_step(model: SReT, mesh: Mesh) -> Callable[[Mapping[str, Any], Batch], Metrics]:
    """A jitted (variables, batch) -> sums over the batch's examples, those with a False "mask" left out.

    The sums, float32 scalars: loss (cross-entropy with the hard label), accuracy (label ranked first), top5_accuracy
    (among the first five), examples. Divide the others by examples.
    """

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> Metrics:
        logits = cast(jax.Array, model.apply(variables, normalize(batch["image"])))
        labels, mask = batch["label"], batch["mask"]
        _, ranked = jax.lax.top_k(logits, min(5, model.num_classes))
        hits = ranked == labels[:, None]
        per_example = {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": hits[:, 0],
            "top5_accuracy": hits.any(axis=1),
            "examples": jnp.ones_like(labels),
        }
        return {name: jnp.where(mask, value, 0).sum(dtype=jnp.float32) for name, value in per_example.items()}

    whole = replicated(mesh)
    return jax.jit(eval_step, in_shardings=(whole, split_batch(mesh)), out_shardings=whole)
