"""The story of a run, top to bottom: from a config to a checkpoint."""

import itertools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.pipeline import steps_per_epoch
from sret_jax.data.soft_labels import SoftLabelSet, labels_digest
from sret_jax.data.sources import Source
from sret_jax.data.workers import end_if_imported_by_worker
from sret_jax.files import expand_local
from sret_jax.models.cost import count_macs, count_params
from sret_jax.models.sret import SReT
from sret_jax.models.zoo import create_model
from sret_jax.training.build import (
    compile_initial_state,
    initial_weights,
    make_model,
    make_passes,
    make_teachers,
    make_training,
    open_labels,
    open_split,
    soft_classes,
    training_batches,
    training_loss_of,
    warnings_to,
)
from sret_jax.training.checkpoints import Checkpoints
from sret_jax.training.config import base_config, check_config, identity
from sret_jax.training.distributed import check_agreement, check_hosts, compile_everywhere, tree_digest
from sret_jax.training.evaluation import Evaluation, evaluate_state
from sret_jax.training.mesh import abstract_batch, local_rows, make_mesh, put_batch
from sret_jax.training.preemption import Preemption
from sret_jax.training.profile import Profile
from sret_jax.training.report import Report
from sret_jax.training.step_metrics import StepMetrics, check_finite, memory_used
from sret_jax.training.teacher import Teacher, place_teachers


def train(config: ConfigDict, workdir: str) -> dict[str, float]:
    """Train as the config says, or go on where the workdir's last checkpoint stands.

    The result depends on the config alone: a run that was killed and started again, however often, ends with the same
    parameters, bit for bit, as one that was not (on the same number of CPUs or TPUs; a GPU may round otherwise).

    Args:
      config: as `configs/` makes them; `sret_jax.training.config.base_config` explains every key.
      workdir: the run's folder, for checkpoints, metrics and the picture of the learning curves. Of several hosts, all
        must see the same.

    Returns:
      The last evaluation: accuracy, top5_accuracy where there are more than five classes, loss, examples; ema_accuracy
      and so on of the moving average.

    Raises:
      UserError: what a user can mend; the message says how.
      Preempted: SIGTERM, or Ctrl-C in a program that called `end_on_ctrl_c`; a checkpoint of the last step is written.
    """
    end_if_imported_by_worker()
    check_config(config)
    workdir = str(expand_local(workdir))
    check_hosts(config)
    mesh = make_mesh(config.mesh, config.batch_size)
    train_source, eval_source = (
        open_split(config, split) for split in (config.data.train_split, config.data.eval_split)
    )
    check_agreement("the training and test images", train_source.digest() + eval_source.digest())
    labels = open_labels(config, train_source)
    said_by_teachers = labels_digest(labels, train_source) if labels else ""
    check_agreement("the soft labels", said_by_teachers)
    model = make_model(config, train_source.num_classes)
    epoch_steps = steps_per_epoch(train_source, config.batch_size)
    total_steps = epoch_steps * config.epochs
    make_passes(config)  # refuses what cannot be before anything is written
    said: list[str] = []
    with warnings_to(said.append):
        teachers = make_teachers(config, model)
    taught_by = [teacher.digest() for teacher in teachers]
    check_agreement("the teachers", "".join(taught_by))
    train_step, like = make_training(config, model, epoch_steps, mesh, teachers)
    evaluate = Evaluation(config, model, eval_source, mesh)
    what_decides = {
        **identity(config),
        "training images": len(train_source.examples),
        "test images": len(eval_source.examples),
        "classes": model.num_classes,
        "soft labels": said_by_teachers,
        "teacher": taught_by,
    }

    checkpoints = Checkpoints(
        workdir,
        keep=config.checkpoint.keep,
        identity=what_decides,
        defaults={**identity(base_config()), "soft labels": "", "teacher": []},
    )
    with checkpoints, Preemption() as preemption:
        restored = checkpoints.restore_latest(like, said.append)
        first_step = int(restored[0].step) if restored else 0
        weights = None if restored else initial_weights(config, model, said.append)
        check_agreement("the weights to begin with", tree_digest(weights) if jax.process_count() > 1 else "")
        report = Report(
            workdir,
            total_steps=total_steps,
            first_step=first_step,
            steps_per_epoch=epoch_steps,
            batch_size=config.batch_size,
            wandb_project=config.wandb_project,
            active=jax.process_index() == 0,
        )
        with report, Profile(workdir, first_step, config.profile_steps) as profile:
            report.start(**_facts(config, model, mesh, train_source, eval_source, teachers, labels))
            for message in said:
                report.message(message)
            if config.optimizer.warmup_epochs >= config.epochs:
                report.message(
                    f"the warm-up of {config.optimizer.warmup_epochs:g} epochs (config.optimizer.warmup_epochs) takes "
                    "the whole run: the learning rate rises until its end"
                )
            frozen = (place_teachers(teachers, mesh),) if teachers else ()
            rows = local_rows(mesh, config.batch_size)
            batches = training_batches(config, model, train_source, first_step, rows, labels)
            if first_step == total_steps:
                report.message("this run is finished: nothing is left to train")
            else:
                batch_like = abstract_batch(
                    mesh, config.batch_size, model.image_size, soft_classes=soft_classes(config, model.num_classes)
                )
                with report.compiling("the train step"), ThreadPoolExecutor(3) as threads:
                    first_batch = threads.submit(next, batches)
                    others: list[Future[Any]] = []
                    if not restored:
                        make_state = threads.submit(compile_initial_state, config, model, epoch_steps, mesh, weights)
                        others.append(make_state)
                    if _compiles_side_by_side(mesh):
                        others.append(threads.submit(evaluate.compile, like.variables))
                    else:
                        wait(others)
                    train_step = compile_everywhere(train_step, like, batch_like, *frozen)
                for other in others:
                    other.result()  # raises what it raised
                batches = itertools.chain([first_batch.result()], batches)

            state, evaluation = restored or (make_state.result()(), {})
            recent = StepMetrics(checkpoints, config.max_skipped_steps)
            preemption.first_step_begins()
            for step in range(first_step + 1, total_steps + 1):
                waited, batch = _timed(lambda: next(batches))
                state, metrics = train_step(state, put_batch(batch, mesh), *frozen)
                recent.add(step, metrics, waited)
                report.progress(step)
                profile.after(step, metrics)

                epoch, steps_into_epoch = divmod(step, epoch_steps)
                ends_epoch = steps_into_epoch == 0
                preempted = preemption.reached(step)
                if ends_epoch or step % config.log_every_steps == 0 or preempted:
                    report.train(step, {**recent.take(), **memory_used()})
                if ends_epoch:
                    if not evaluate.is_compiled:
                        with report.compiling("the evaluation step"):
                            evaluate.compile(state.variables)
                    evaluation = evaluate_state(evaluate, state)
                    report.evaluation(step, evaluation)
                    check_finite(step, evaluation, checkpoints)
                ends_period = ends_epoch and (epoch % config.checkpoint.every_epochs == 0 or epoch == config.epochs)
                every_steps = config.checkpoint.every_steps
                if ends_period or preempted or (every_steps and step % every_steps == 0):
                    checkpoints.save(step, state, evaluation, is_new=ends_epoch)
                if preempted and step < total_steps:
                    checkpoints.wait()
                    report.message(f"told to end: step {step} is saved")
                    raise preemption.end(
                        f"ended after step {step}, which is saved; the same command goes on from there"
                    )

            checkpoints.wait()
            report.finish(
                accuracy=evaluation["accuracy"],
                checkpoint=checkpoints.path(total_steps),
                best_checkpoint=checkpoints.path(checkpoints.best_step() or total_steps),
            )
            if preemption.interrupted:  # what is to follow the run is not wanted
                raise preemption.end(f"interrupted after step {total_steps}, the last: the run is finished")
    return evaluation


def _compiles_side_by_side(mesh: Mesh) -> bool:
    """Whether programs may be compiled at the same time.

    Not for GPUs: there XLA times kernels as it compiles, and records cuDNN's, which fails where others work meanwhile.
    Nor where several hosts wait for each other after each program: these have to be the same ones.
    """
    return jax.process_count() == 1 and mesh.devices.flat[0].platform != "gpu"


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds something took, and what it returned."""
    began_at = time.monotonic()
    result = do()
    return time.monotonic() - began_at, result


def _facts(
    config: ConfigDict,
    model: SReT,
    mesh: Mesh,
    train_source: Source,
    eval_source: Source,
    teachers: tuple[Teacher, ...],
    labels: SoftLabelSet | None,
) -> dict[str, Any]:
    device = mesh.devices.flat[0]
    named = create_model(config.model.name)
    changes = [
        f"{field} {getattr(model, field)}"
        for field in ("widths", "heads", "blocks", "recursions", "slices", "mlp_ratio", "nll_ratio", "drop_path_rate")
        if getattr(model, field) != getattr(named, field)
    ]
    fsdp = f", parameters split over {mesh.shape['fsdp']}" if mesh.shape["fsdp"] > 1 else ""
    return {
        "model": config.model.name + (", changed" if changes else ""),
        "images": f"{model.image_size} × {model.image_size} pixels, {model.num_classes} classes",
        "parameters": count_params(model),
        "MACs_per_image": count_macs(model),
        "compute": f"{mesh.devices.size} × {device.device_kind}{fsdp}, {jax.numpy.dtype(model.dtype).name}",
        **({"hosts": jax.process_count()} if jax.process_count() > 1 else {}),
        "training_images": f"{train_source.name}: {len(train_source.examples):,}",
        "test_images": f"{eval_source.name}: {len(eval_source.examples):,}",
        **({"training_loss": difference} if (difference := training_loss_of(config)) else {}),
        **({"teacher": ", ".join(teacher.name for teacher in teachers)} if teachers else {}),
        **({"soft_labels": _described(config, labels)} if labels else {}),
        "seed": config.seed,
        **({"weights": config.init_from} if config.init_from else {}),
        **({"changed": ", ".join(changes)} if changes else {}),
    }


def _described(config: ConfigDict, labels: SoftLabelSet) -> str:
    crops = config.distill.num_crops
    return (
        f"{config.distill.soft_labels}: {labels.label_type.name} of {len(labels):,} images, {crops} crops of an image"
        f"{' in a pass' if crops > 1 else ''}"
    )
