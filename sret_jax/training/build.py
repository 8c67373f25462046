"""What a config describes: data, network, optimizer, the train step and the state that it starts from."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.augment import Augmentation
from sret_jax.data.packed_labels import open_soft_labels
from sret_jax.data.passes import ONE_CROP, Passes, fkd_passes
from sret_jax.data.pipeline import Batch, train_batches
from sret_jax.data.soft_labels import LabelType, SoftLabelSet, check_complete
from sret_jax.data.sources import Source, keeping_decoded, open_source
from sret_jax.errors import UserError, options_named
from sret_jax.models.sret import SReT
from sret_jax.models.zoo import create_model
from sret_jax.training.config import base_config
from sret_jax.training.optimizer import Schedule, adamw, warmup_constant, warmup_cosine
from sret_jax.training.step import (
    Distillation,
    TrainState,
    abstract_state,
    compile_init_state,
    make_train_step,
    with_variables,
)
from sret_jax.training.teacher import Teacher, load_teachers
from sret_jax.weights.store import load_variables

# Devices count steps in 32 bits.
_MOST_STEPS = 2**31 - 1


def open_split(config: ConfigDict, split: str) -> Source:
    """A split of the data that the config names.

    Raises:
      UserError: it cannot be opened, or has one class: whatever a network says of it is right.
    """
    data = config.data
    image_size = config.model.image_size or create_model(config.model.name).image_size
    source = open_source(data.source, split, data.path, image_size=image_size, length=data.synthetic_examples)
    if source.num_classes < 2:
        raise UserError(
            f"{source.name} has one class, {source.class_names[0]!r}: there is nothing to learn, for every answer is "
            "right. Expected two classes or more; in a folder of images these are the sub-folders of train, so that "
            "they must not lie deeper"
        )
    return keeping_decoded(dataclasses.replace(source, background=data.background))


def open_labels(config: ConfigDict, source: Source) -> SoftLabelSet | None:
    """The soft labels that the config names, of every image of the training split; None if it names none.

    Raises:
      UserError: they cannot be read, are of another type, dataset or temperature, or some are missing.
    """
    if not config.distill.soft_labels:
        return None
    with _naming("config.distill.soft_labels"):
        labels = open_soft_labels(config.distill.soft_labels, config.distill.label_type, source.num_classes)
        check_complete(labels, source, config.distill.num_crops)
        temperature = labels.notes.get("temperature", config.distill.temperature)
        if temperature != config.distill.temperature:
            raise UserError(
                f"they are of temperature {temperature}, but config.distill.temperature is "
                f"{config.distill.temperature}. Expected the same for teacher and student: set it to {temperature}, or "
                "give other labels"
            )
    return labels


def make_teachers(config: ConfigDict, model: SReT) -> tuple[Teacher, ...]:
    """The teachers that the config names, for a student; none if it names none."""
    distill = config.distill
    if not distill.teacher:
        return ()
    with _naming("config.distill.teacher"):
        return load_teachers(
            distill.teacher,
            num_classes=model.num_classes,
            image_size=distill.image_size,
            default_image_size=model.image_size,
            mean=distill.mean,
            std=distill.std,
            dtype=distill.dtype,
        )


def make_passes(config: ConfigDict) -> Passes:
    """How often the run goes over its images, and with how many crops of each."""
    if not config.distill.soft_labels:
        return ONE_CROP
    return fkd_passes(config.epochs, config.distill.num_crops, config.optimizer.warmup_epochs)


def soft_classes(config: ConfigDict, num_classes: int) -> int:
    """Classes that each soft label of a batch names; 0 where batches hold labels."""
    return LabelType.parse(config.distill.label_type).size(num_classes) if config.distill.soft_labels else 0


def make_augmentation(config: ConfigDict) -> Augmentation:
    """What happens to a batch on the device."""
    soft_labels = LabelType.parse(config.distill.label_type).kind if config.distill.soft_labels else ""
    return Augmentation(**config.augment, soft_labels=soft_labels)


def training_loss_of(config: ConfigDict) -> str:
    """In words, what makes the training loss another one than the test loss; empty if nothing does."""
    data, augment, distill, plain = config.data, config.augment, config.distill, base_config()
    changes_images = (
        any(data[key] != plain.data[key] for key in ("crop_area", "crop_aspect", "rand_augment"))
        or any((augment.flip, augment.erasing))
        or distill.soft_labels  # which are of crops
    )
    done = {
        "augmentation": changes_images,
        "mixup": augment.mixup or augment.cutmix,
        "soft targets": augment.label_smoothing or distill.soft_labels or distill.teacher,
    }
    words = ", ".join(word for word, is_done in done.items() if is_done)
    return f"with {words}" if words else ""


def make_model(config: ConfigDict, num_classes: int) -> SReT:
    """The network that the config names, with its overrides and the dataset's classes."""
    fields = {key: value for key, value in config.model.items() if key != "name" and value is not None}
    return create_model(config.model.name, num_classes=num_classes, **fields)


def make_optimizer(config: ConfigDict, epoch_steps: int) -> tuple[Schedule, optax.GradientTransformation]:
    """The learning rate schedule, and AdamW under it."""
    settings = config.optimizer
    steps = max(config.epochs, settings.warmup_epochs) * epoch_steps
    if steps > _MOST_STEPS:
        longest = "epochs" if config.epochs >= settings.warmup_epochs else "optimizer.warmup_epochs"
        raise UserError(
            f"config.{longest} is {max(config.epochs, settings.warmup_epochs):,}, which makes {steps:,} steps. "
            f"Expected at most {_MOST_STEPS:,}"
        )
    peak = settings.learning_rate * config.batch_size / 512
    warmup_steps = round(settings.warmup_epochs * epoch_steps)
    if settings.schedule == "constant":
        schedule = warmup_constant(peak, warmup_steps=warmup_steps, initial=settings.initial_learning_rate)
    else:
        schedule = warmup_cosine(
            peak,
            steps=config.epochs * epoch_steps,
            warmup_steps=warmup_steps,
            initial=settings.initial_learning_rate,
            final=settings.final_learning_rate,
        )
    optimizer = adamw(
        schedule,
        weight_decay=settings.weight_decay,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        clip_norm=settings.clip_norm,
    )
    return schedule, optimizer


def make_training(
    config: ConfigDict, model: SReT, epoch_steps: int, mesh: Mesh, teachers: tuple[Teacher, ...] = ()
) -> tuple[Any, TrainState]:
    """The jitted train step, and what its state consists of, as `abstract_state` gives it."""
    if config.batch_size % (config.accumulation * mesh.devices.size):
        raise UserError(
            f"config.accumulation is {config.accumulation}: {mesh.devices.size} devices cannot share so many parts of "
            f"{config.batch_size} images. Expected a batch size that their product, "
            f"{config.accumulation * mesh.devices.size}, divides"
        )
    schedule, optimizer = make_optimizer(config, epoch_steps)
    train_step = make_train_step(
        model,
        optimizer,
        schedule,
        make_augmentation(config),
        config.seed,
        mesh,
        accumulation=config.accumulation,
        ema_decay=config.ema_decay,
        distillation=Distillation(teachers, config.distill.temperature, config.distill.label_weight),
    )
    return train_step, abstract_state(model, optimizer, mesh, ema=bool(config.ema_decay))


def initial_weights(config: ConfigDict, model: SReT, say: Callable[[str], None]) -> Mapping[str, Any] | None:
    """The variables that `config.init_from` names; None if it names none.

    Args:
      config: as for `train`.
      model: the network. A head of another number of classes is replaced, the position embedding resized.
      say: called with a line for a person, for each change that the weights needed.

    Raises:
      UserError: the weights cannot be read or are of another network.
    """
    if not config.init_from:
        return None
    with warnings_to(say), options_named({"ema=True": "config.init_ema"}):
        return load_variables(config.init_from, model, ema=config.init_ema, fresh_head=True)


def compile_initial_state(
    config: ConfigDict, model: SReT, epoch_steps: int, mesh: Mesh, weights: Mapping[str, Any] | None
) -> Callable[[], TrainState]:
    """A function that makes the state before the first step, compiled: with these weights, or random ones for None.

    `epoch_steps` is as `steps_per_epoch` says, `weights` as `initial_weights`.
    """
    _, optimizer = make_optimizer(config, epoch_steps)
    init = compile_init_state(model, optimizer, config.seed, mesh, ema=bool(config.ema_decay))
    return init if weights is None else lambda: with_variables(init(), weights, mesh)


def training_batches(
    config: ConfigDict,
    model: SReT,
    source: Source,
    first_step: int,
    rows: list[int] | None = None,
    labels: SoftLabelSet | None = None,
) -> Iterator[Batch]:
    """Every training batch from `first_step` on, or these rows of each; `labels` as `open_labels` gives them."""
    return train_batches(
        source,
        batch_size=config.batch_size,
        image_size=model.image_size,
        seed=config.seed,
        first_batch=first_step,
        rows=rows,
        crop_area=config.data.crop_area,
        crop_aspect=config.data.crop_aspect,
        repeats=config.data.repeats,
        rand_augment=config.data.rand_augment,
        soft_labels=labels,
        bicubic=config.distill.interpolation == "bicubic",
        passes=make_passes(config),
        max_broken=config.data.max_broken,
        num_threads=config.data.threads,
        num_workers=config.data.workers,
    )


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Let errors say which key they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


@contextlib.contextmanager
def warnings_to(say: Callable[[str], object]) -> Iterator[None]:
    """Give what is warned of to a function, line by line, once the context ends."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        say(str(warning.message))
