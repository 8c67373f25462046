"""The story of a run, top to bottom: from a config to a checkpoint."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.augment import Augmentation
from sret_jax.data.pipeline import Batch, eval_batches, steps_per_epoch, train_batches
from sret_jax.data.sources import Source, open_source
from sret_jax.errors import UserError
from sret_jax.models.cost import count_macs, count_params
from sret_jax.models.sret import SReT
from sret_jax.models.zoo import create_model
from sret_jax.training.checkpoints import Checkpoints
from sret_jax.training.config import check_config, identity
from sret_jax.training.mesh import make_mesh, put_batch
from sret_jax.training.optimizer import Schedule, adamw, warmup_cosine
from sret_jax.training.report import Report
from sret_jax.training.step import (
    Metrics,
    TrainState,
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
)

Evaluate = Callable[[TrainState], dict[str, float]]


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Train as the config says, or go on where the workdir's last checkpoint stands.

    The result depends on the config alone: a run that was killed and started again, however often, ends with the same
    parameters, bit for bit, as one that was not (on the same kind and number of devices).

    Args:
      config: as `configs/` makes them; `sret_jax.training.config.base_config` explains every key.
      workdir: the run's folder, for checkpoints, metrics and the picture of the learning curves.

    Returns:
      The last evaluation: accuracy, top5_accuracy, loss, examples.

    Raises:
      UserError: what a user can mend; the message says how.
    """
    check_config(config)
    mesh = make_mesh(config.mesh, config.batch_size)
    train_source, eval_source = open_sources(config)
    model = make_model(config, train_source.num_classes)
    epoch_steps = steps_per_epoch(train_source, config.batch_size)
    total_steps = epoch_steps * config.epochs
    schedule, optimizer = make_optimizer(config, epoch_steps)
    train_step = make_train_step(model, optimizer, schedule, Augmentation(**config.augment), config.seed, mesh)
    evaluate = make_evaluation(config, model, eval_source, mesh)
    what_decides = {
        **identity(config),
        "training images": len(train_source.examples),
        "test images": len(eval_source.examples),
        "classes": model.num_classes,
    }

    with Checkpoints(workdir, keep=config.checkpoint.keep, identity=what_decides) as checkpoints:
        damaged: list[str] = []
        restored = checkpoints.restore_latest(abstract_state(model, optimizer, mesh), damaged.append)
        state, evaluation = restored or (init_state(model, optimizer, config.seed, mesh), {})
        first_step = int(state.step)
        report = Report(
            workdir,
            total_steps=total_steps,
            first_step=first_step,
            steps_per_epoch=epoch_steps,
            batch_size=config.batch_size,
            active=jax.process_index() == 0,
        )
        with report:
            report.start(**_facts(config, model, mesh, train_source, eval_source))
            for message in damaged:
                report.message(message)
            if first_step == total_steps:
                report.message("this run is finished: nothing is left to train")

            batches = training_batches(config, model, train_source, first_step)
            recent = _RecentMetrics()
            for step in range(first_step + 1, total_steps + 1):
                state, metrics = train_step(state, put_batch(next(batches), mesh))
                recent.add(step, metrics)
                report.progress(step)
                epoch, steps_into_epoch = divmod(step, epoch_steps)
                if steps_into_epoch == 0 or step % config.log_every_steps == 0:
                    report.train(step, recent.take_mean(checkpoints))
                if steps_into_epoch == 0:
                    evaluation = evaluate(state)
                    report.evaluation(step, evaluation)
                    check_finite(step, evaluation, checkpoints)
                    if epoch % config.checkpoint.every_epochs == 0 or epoch == config.epochs:
                        checkpoints.save(step, state, evaluation)

            report.finish(accuracy=evaluation["accuracy"], checkpoint=checkpoints.path(total_steps))
    return evaluation


def open_sources(config: ConfigDict) -> tuple[Source, Source]:
    """The training and the evaluation split."""
    data = config.data
    image_size = config.model.image_size or create_model(config.model.name).image_size
    train_source, eval_source = (
        open_source(data.source, split, data.path, image_size=image_size, length=data.synthetic_examples)
        for split in (data.train_split, data.eval_split)
    )
    return train_source, eval_source


def make_model(config: ConfigDict, num_classes: int) -> SReT:
    """The network that the config names, with its overrides and the dataset's classes."""
    fields = {key: value for key, value in config.model.items() if key != "name" and value is not None}
    return create_model(config.model.name, num_classes=num_classes, **fields)


def make_optimizer(config: ConfigDict, epoch_steps: int) -> tuple[Schedule, optax.GradientTransformation]:
    """The learning rate schedule, and AdamW under it."""
    settings = config.optimizer
    schedule = warmup_cosine(
        settings.learning_rate * config.batch_size / 512,
        steps=config.epochs * epoch_steps,
        warmup_steps=round(settings.warmup_epochs * epoch_steps),
        initial=settings.initial_learning_rate,
        final=settings.final_learning_rate,
    )
    optimizer = adamw(schedule, weight_decay=settings.weight_decay, b1=settings.b1, b2=settings.b2, eps=settings.eps)
    return schedule, optimizer


def training_batches(config: ConfigDict, model: SReT, source: Source, first_step: int) -> Iterator[Batch]:
    """This host's part of every training batch from `first_step` on."""
    return train_batches(
        source,
        batch_size=config.batch_size,
        image_size=model.image_size,
        seed=config.seed,
        first_batch=first_step,
        crop_area=config.data.crop_area,
        crop_aspect=config.data.crop_aspect,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def make_evaluation(config: ConfigDict, model: SReT, source: Source, mesh: Mesh) -> Evaluate:
    """A function from a state to its metrics over the whole source, every example counted once."""
    eval_step = make_eval_step(model, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        batches = eval_batches(
            source,
            batch_size=config.batch_size,
            image_size=model.image_size,
            crop_ratio=config.data.eval_crop_ratio,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=config.data.threads,
        )
        sums = [eval_step(state.variables, put_batch(batch, mesh)) for batch in batches]
        totals = {name: float(np.sum([s[name] for s in jax.device_get(sums)])) for name in sums[0]}
        examples = totals.pop("examples")
        return {**{name: total / examples for name, total in totals.items()}, "examples": examples}

    return evaluate


class _RecentMetrics:
    """Metrics of the steps since the last look at them; until then they stay on the device, and nothing waits."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, Metrics]] = []

    def add(self, step: int, metrics: Metrics) -> None:
        self._pending.append((step, metrics))

    def take_mean(self, checkpoints: Checkpoints) -> dict[str, float]:
        """The mean loss and gradient norm, and the last learning rate, of the steps since the last call.

        Raises:
          UserError: one of the steps diverged.
        """
        pending, self._pending = jax.device_get(self._pending), []
        for step, metrics in pending:
            check_finite(step, metrics, checkpoints)
        means = {name: float(np.mean([metrics[name] for _, metrics in pending])) for name in pending[0][1]}
        return {**means, "learning_rate": float(pending[-1][1]["learning_rate"])}


def check_finite(step: int, metrics: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    """Refuse metrics of a step, of training or evaluation, that are not finite.

    Raises:
      UserError: with the step, and the checkpoint before it.
    """
    if not np.isfinite(list(metrics.values())).all():
        good = checkpoints.latest_step()
        raise UserError(
            f"training diverged at step {step}: {', '.join(f'{name} {value}' for name, value in metrics.items())}; "
            + (f"the last good checkpoint is {checkpoints.path(good)}" if good else "there is no checkpoint before it")
            + ". Lower config.optimizer.learning_rate or lengthen config.optimizer.warmup_epochs, in a new workdir"
        )


def _facts(config: ConfigDict, model: SReT, mesh: Mesh, train_source: Source, eval_source: Source) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    named = create_model(config.model.name)
    changes = [
        f"{field} {getattr(model, field)}"
        for field in ("widths", "heads", "blocks", "recursions", "slices", "mlp_ratio", "nll_ratio", "drop_path_rate")
        if getattr(model, field) != getattr(named, field)
    ]
    return {
        "model": config.model.name + (", changed" if changes else ""),
        "images": f"{model.image_size} × {model.image_size} pixels, {model.num_classes} classes",
        "parameters": count_params(model),
        "MACs_per_image": count_macs(model),
        "compute": f"{mesh.devices.size} × {device.device_kind}, {jax.numpy.dtype(model.dtype).name}",
        "training_images": f"{train_source.name}: {len(train_source.examples):,}",
        "test_images": f"{eval_source.name}: {len(eval_source.examples):,}",
        "seed": config.seed,
        **({"changed": ", ".join(changes)} if changes else {}),
    }
