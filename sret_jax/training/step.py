"""One training step and one evaluation step: pure functions, jitted over a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sret_jax.data.augment import Augmentation, normalize
from sret_jax.data.targets import Targets
from sret_jax.models.compiler import compiler_options, known_options
from sret_jax.models.sret import SReT, init_variables, variable_shapes
from sret_jax.training.losses import target_loss, teacher_loss
from sret_jax.training.mesh import place, replicated, sharded, split_batch
from sret_jax.training.optimizer import Schedule
from sret_jax.training.teacher import Teacher, teacher_probabilities

_COMPILED_QUICKLY: dict[str, dict[str, Any]] = {"cpu": {"xla_backend_optimization_level": 0}}
"""For programs that run once, by platform: some forty draws take long to compile, and no time to run."""

# Classes that count as hits of the top-5 accuracy.
_TOP = 5

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a training step changes. Randomness is a function of the seed and `step`, so no key is kept."""

    step: jax.Array  # int32, steps done, with those skipped
    skipped: jax.Array  # int32, steps that changed nothing, because their loss or gradient was not finite
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: dict[str, Any] | None = None  # the moving average of `variables`, if one is kept

    @property
    def variables(self) -> dict[str, Any]:
        """As `model.apply` takes them."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def step_keys(seed: int, step: jax.Array | int) -> jax.Array:
    """Three keys: for the augmentation, the dropout and the permutations of the step after `step` others."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), step), 3)


def init_state(
    model: SReT, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """The state before the first step, the same on any mesh; `ema` is whether to keep a moving average."""
    return compile_init_state(model, optimizer, seed, mesh, ema=ema)()


def compile_init_state(
    model: SReT, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh, *, ema: bool = False
) -> Callable[[], TrainState]:
    """`init_state`, compiled, for whoever calls it later; until then, no device computes."""

    def init() -> TrainState:
        return _first_state(init_variables(model, jax.random.key(seed)), optimizer, ema)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, optimizer, mesh, ema=ema))
    options = known_options(_COMPILED_QUICKLY.get(mesh.devices.flat[0].platform, {}))
    compiled: Callable[[], TrainState] = (
        jax.jit(init, out_shardings=shardings, compiler_options=options).lower().compile()
    )
    return compiled


def abstract_state(
    model: SReT, optimizer: optax.GradientTransformation, mesh: Mesh, *, ema: bool = False
) -> TrainState:
    """What a state consists of, `jax.ShapeDtypeStruct`s with shardings: to restore one without making one."""
    state = jax.eval_shape(lambda variables: _first_state(variables, optimizer, ema), variable_shapes(model))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        sharded(mesh, state),
    )


def with_variables(state: TrainState, variables: Mapping[str, Any], mesh: Mesh) -> TrainState:
    """The state with other variables, where fine-tuning starts; a moving average begins with them too."""
    state = state.replace(params=variables["params"], batch_stats=variables["batch_stats"])
    changed = {"params": state.params, "batch_stats": state.batch_stats}
    if state.ema is not None:
        changed["ema"] = state.variables
    return state.replace(**place(changed, sharded(mesh, changed)))


def _first_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )
    return state.replace(ema=state.variables) if ema else state


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What a student learns from beside the batch's targets. The defaults: nothing.

    Attributes:
      teachers: whose probabilities are averaged; empty where the targets say what the student is to learn.
      temperature: that the student's logits, and the teachers', are divided by.
      label_weight: part of the targets' loss in the loss; the rest is the teachers'.
    """

    teachers: tuple[Teacher, ...] = ()
    temperature: float = 1.0
    label_weight: float = 0.0


def make_train_step(
    model: SReT,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    augmentation: Augmentation,
    seed: int,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    ema_decay: float = 0.0,
    distillation: Distillation = Distillation(),
) -> Callable[..., tuple[TrainState, Metrics]]:
    """A jitted (state, batch) -> (state, metrics); the old state's memory is reused.

    The batch holds "image", uint8 (batch, height, width, 3), and what the augmentation makes targets of: "label", int32
    (batch,), or soft labels, "classes" and "probabilities"; split over the mesh. Metrics are float32 scalars over the
    global batch: loss, learning_rate, gradient_norm (before clipping), all of this step, and skipped, 1 if the loss or
    the gradient norm was not finite: then nothing but the count of steps has changed.

    With `accumulation`, the augmented batch is cut into so many parts, one behind the other, and the gradients are
    averaged: memory for activations is that of a part, and so is the batch that BatchNorm sees.

    With a positive `ema_decay` d the state keeps the average a = d a + (1 - d) v of all variables v, BatchNorm's
    statistics among them, as timm's ModelEma does.

    With teachers in `distillation` it is (state, batch, variables) -> (state, metrics), `variables` being what
    `place_teachers` makes of theirs, and the loss is label_weight · target_loss + (1 - label_weight) · teacher_loss.
    The teachers see the augmented images; the labels' loss knows no temperature.
    """
    teachers, temperature = distillation.teachers, distillation.temperature

    def loss_of(logits: jax.Array, targets: Targets, probabilities: jax.Array | None) -> jax.Array:
        if probabilities is None:
            return target_loss(logits, targets, temperature)
        taught, weight = teacher_loss(logits, probabilities, temperature), distillation.label_weight
        return weight * target_loss(logits, targets) + (1 - weight) * taught if weight else taught

    def loss_and_gradients(
        params: Any, batch_stats: Any, frozen: Any, images: jax.Array, targets: Targets, rngs: dict[str, jax.Array]
    ) -> tuple[tuple[jax.Array, Any], Any]:
        probabilities = teacher_probabilities(teachers, frozen, images, temperature) if teachers else None

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            # Gathered as a whole: without the constraint, XLA may choose to split the activations in odd ways.
            logits, updates = model.apply(
                {"params": jax.lax.with_sharding_constraint(params, whole), "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            return loss_of(logits, targets, probabilities), updates["batch_stats"]

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    def accumulated(
        params: Any, batch_stats: Any, frozen: Any, images: jax.Array, targets: Targets, rngs: dict[str, jax.Array]
    ) -> tuple[tuple[jax.Array, Any], Any]:
        def add(carry: tuple[Any, Any, Any], part: tuple[Any, ...]) -> tuple[tuple[Any, Any, Any], None]:
            loss_sum, gradient_sum, batch_stats = carry
            number, images, targets = part
            part_rngs = {name: jax.random.fold_in(rng, number) for name, rng in rngs.items()}
            (loss, batch_stats), gradients = loss_and_gradients(params, batch_stats, frozen, images, targets, part_rngs)
            return (loss_sum + loss, jax.tree.map(jnp.add, gradient_sum, gradients), batch_stats), None

        def parts(array: jax.Array) -> jax.Array:
            # Neighbours go to different parts, so that every part lies on all devices as the batch does.
            return array.reshape(-1, accumulation, *array.shape[1:]).swapaxes(0, 1)

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params), batch_stats)
        parts_of_all = (jnp.arange(accumulation), parts(images), jax.tree.map(parts, targets))
        (loss, gradients, batch_stats), _ = jax.lax.scan(add, zeros, parts_of_all)
        return (loss / accumulation, batch_stats), jax.tree.map(lambda g: g / accumulation, gradients)

    def train_step(state: TrainState, batch: Batch, frozen: Any = ()) -> tuple[TrainState, Metrics]:
        augment_key, dropout_key, permutation_key = step_keys(seed, state.step)
        images, targets = augmentation(augment_key, batch, model.num_classes)
        rngs = {"dropout": dropout_key, "permutation": permutation_key}
        differentiate = loss_and_gradients if accumulation == 1 else accumulated
        frozen = jax.lax.with_sharding_constraint(frozen, whole)
        (loss, batch_stats), gradients = differentiate(state.params, state.batch_stats, frozen, images, targets, rngs)

        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        stepped = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)
        if ema_decay:
            stepped = stepped.replace(ema=jax.tree.map(_averaged, state.ema, stepped.variables))

        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step - state.skipped),
            "gradient_norm": gradient_norm,
            "skipped": 1.0 - finite,
        }
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
        return kept.replace(step=state.step + 1, skipped=state.skipped + ~finite), metrics

    def _averaged(average: jax.Array, value: jax.Array) -> jax.Array:
        counts = jnp.issubdtype(value.dtype, jnp.integer)
        return value if counts else average + (1 - ema_decay) * (value - average)

    whole = replicated(mesh)
    placed = sharded(mesh, abstract_state(model, optimizer, mesh, ema=bool(ema_decay)))
    arguments = (placed, split_batch(mesh), *([None] if teachers else []))
    return jax.jit(
        train_step,
        in_shardings=arguments,
        out_shardings=(placed, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform, train=True),
    )


def make_eval_step(model: SReT, mesh: Mesh) -> Callable[[Mapping[str, Any], Batch], Metrics]:
    """A jitted (variables, batch) -> sums over the batch's examples, those with a False "mask" left out.

    The sums, float32 scalars: loss (cross-entropy with the hard label), accuracy (label ranked first), top5_accuracy
    (among the first five, where there are more than five classes), examples. Divide the others by examples.
    """

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> Metrics:
        variables = jax.lax.with_sharding_constraint(variables, whole)
        logits = cast(jax.Array, model.apply(variables, normalize(batch["image"])))
        labels, mask = batch["label"], batch["mask"]
        _, ranked = jax.lax.top_k(logits, min(_TOP, model.num_classes))
        hits = ranked == labels[:, None]
        per_example = {
            "loss": optax.softmax_cross_entropy_with_integer_labels(logits, labels),
            "accuracy": hits[:, 0],
            "examples": jnp.ones_like(labels),
        }
        if model.num_classes > _TOP:  # else it would be 100 %, whatever the network says
            per_example["top5_accuracy"] = hits.any(axis=1)
        return {name: jnp.where(mask, value, 0).sum(dtype=jnp.float32) for name, value in per_example.items()}

    whole = replicated(mesh)
    return jax.jit(
        eval_step,
        in_shardings=(None, split_batch(mesh)),
        out_shardings=whole,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
