"""Train steps that learn from a teacher, in the loop or in advance, and whole runs of both."""

import itertools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sret_jax import SReT, UserError, create_model, save_variables
from sret_jax.data.augment import MEAN, STD, Augmentation, normalize
from sret_jax.data.soft_labels import LabelType, SoftLabels, write_label_file
from sret_jax.training import loop
from sret_jax.training.build import open_split
from sret_jax.training.config import base_config, check_config
from sret_jax.training.mesh import make_mesh, put_batch
from sret_jax.training.step import Distillation, init_state, make_train_step
from sret_jax.training.teacher import Teacher, place_teachers

CLASSES, ROWS, SIZE = 10, 16, 32
MODEL = SReT(
    image_size=SIZE,
    widths=(8,),
    heads=(1,),
    blocks=(1,),
    recursions=(1,),
    slices=((4, 1),),
    num_classes=CLASSES,
    drop_path_rate=0.0,
)
WEIGHTS = np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)


def linear(variables, images):
    return images.mean(axis=(1, 2)) @ variables["kernel"] * 20


TEACHER = Teacher("linear", linear, {"kernel": WEIGHTS}, SIZE, MEAN, STD, CLASSES)


def random_batch(*, soft=False):
    random = np.random.default_rng(1)
    batch = {"image": random.integers(256, size=(ROWS, SIZE, SIZE, 3), dtype=np.uint8)}
    if soft:
        ranked = np.argsort(random.random((ROWS, CLASSES)), axis=1)[:, :3].astype(np.int32)
        return {**batch, "classes": ranked, "probabilities": np.tile(np.float16([0.5, 0.25, 0.125]), (ROWS, 1))}
    return {**batch, "label": random.integers(CLASSES, size=ROWS, dtype=np.int32)}


def first_step(batch, augmentation, distillation, *, mesh=None, accumulation=1):
    """Loss and parameters after one step of plain gradient descent."""
    mesh = mesh or make_mesh({"data": 1}, ROWS, jax.devices()[:1])
    optimizer = optax.sgd(1.0)
    step = make_train_step(
        MODEL,
        optimizer,
        lambda _: 1.0,
        augmentation,
        0,
        mesh,
        distillation=distillation,
        accumulation=accumulation,
    )
    frozen = [place_teachers(distillation.teachers, mesh)] if distillation.teachers else []
    state, metrics = step(init_state(MODEL, optimizer, 0, mesh), put_batch(batch, mesh), *frozen)
    return float(metrics["loss"]), jax.device_get(state.params)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def logits():
    """Of the student on the batch, without augmentation, before its first step."""
    state = init_state(MODEL, optax.sgd(1.0), 0, make_mesh({"data": 1}, ROWS, jax.devices()[:1]))
    images = normalize(jnp.asarray(random_batch()["image"]))
    student = jax.jit(lambda v, x: MODEL.apply(v, x, train=True, mutable=["batch_stats"])[0])
    return np.asarray(student(state.variables, images)), np.asarray(linear({"kernel": WEIGHTS}, images))


@pytest.mark.parametrize(("temperature", "label_weight"), [(1.0, 0.0), (4.0, 0.0), (4.0, 0.3)])
def test_the_loss_is_the_cross_entropy_with_the_teacher_and_a_part_of_the_labels(logits, temperature, label_weight):
    student, teacher = logits
    batch = random_batch()
    taught = -(np.exp(log_softmax(teacher / temperature)) * log_softmax(student / temperature)).sum(axis=1).mean()
    smoothed = np.full((ROWS, CLASSES), 0.02)
    smoothed[np.arange(ROWS), batch["label"]] += 0.8
    labelled = -(smoothed * log_softmax(student)).sum(axis=1).mean()
    distillation = Distillation((TEACHER,), temperature, label_weight)
    loss, _ = first_step(batch, Augmentation(label_smoothing=0.2), distillation)
    np.testing.assert_allclose(loss, (1 - label_weight) * taught + label_weight * labelled, rtol=1e-5)  # float32


def test_the_loss_of_soft_labels_spreads_what_they_leave_and_knows_the_temperature(logits):
    student, _ = logits
    batch = random_batch(soft=True)
    target = np.full((ROWS, CLASSES), 0.125 / 7)
    np.put_along_axis(target, batch["classes"], batch["probabilities"].astype(np.float64), axis=1)
    expected = -(target * log_softmax(student / 2)).sum(axis=1).mean()
    loss, _ = first_step(batch, Augmentation(soft_labels="marginal_smoothing"), Distillation(temperature=2.0))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # float32


@pytest.mark.parametrize("soft", [False, True])
def test_one_device_and_a_mesh_of_eight_distil_alike_in_parts(soft):
    distillation = Distillation() if soft else Distillation((TEACHER,), 2.0, 0.5)
    augmentation = Augmentation(mixup=0.8, cutmix=1.0, partner="permuted", soft_labels="hard" if soft else "")
    batch = random_batch(soft=soft)
    loss, params = first_step(batch, augmentation, distillation, accumulation=2)
    mesh = make_mesh({"data": 2, "fsdp": 4}, ROWS)
    other_loss, other_params = first_step(batch, augmentation, distillation, mesh=mesh, accumulation=2)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-5)  # float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other_params, params)


def tiny_config():
    config = base_config()
    config.batch_size = 24
    config.data.source = "synthetic"
    config.data.synthetic_examples = 48
    config.model.image_size = SIZE
    config.model.widths, config.model.heads = (8,), (1,)
    config.model.blocks, config.model.recursions, config.model.slices = (1,), (2,), ((4, 2),)
    config.optimizer.learning_rate = 1e-2
    config.log_every_steps = 1
    config.mesh = {"data": 8}
    return config


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "learning_rate" in line]


@pytest.fixture(scope="module")
def fkd_config(tmp_path_factory):
    """Five epochs of two steps from random soft labels: one epoch, a pass with two crops, two epochs."""
    config, folder = tiny_config(), tmp_path_factory.mktemp("labels")
    write_labels(config, folder, seed=0)
    config.epochs = 5
    config.optimizer.warmup_epochs = 1.0
    config.distill.soft_labels = str(folder)
    config.distill.num_crops = 2
    config.augment.mixup, config.augment.cutmix, config.augment.partner = 0.8, 1.0, "permuted"
    return config


def write_labels(config, folder, seed):
    rng, source = np.random.default_rng(seed), open_split(config, "train")
    for key in source.examples.keys():  # noqa: SIM118, it is no dict
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        classes = np.array([rng.permutation(1000)[:5] for _ in range(3)], np.int32)
        probabilities = np.tile([0.5, 0.2, 0.1, 0.1, 0.05], (3, 1))
        labels = SoftLabels(np.tile([0.1, 0.2, 0.5, 0.6], (3, 1)), rng.random(3) < 0.5, classes, probabilities)
        write_label_file(folder / f"{key}.tar", labels, LabelType.parse("marginal_smoothing_k5"))


def test_a_run_from_soft_labels_that_is_interrupted_and_goes_on_ends_as_an_undisturbed_one(
    fkd_config, tmp_path, monkeypatch
):
    fkd_config.checkpoint.every_steps = 3
    loop.train(fkd_config, str(tmp_path / "undisturbed"))
    undisturbed = losses(tmp_path / "undisturbed")
    assert len(undisturbed) == 10
    batches = loop.training_batches
    # The last checkpoint is that of step 3, in the middle of the pass.
    monkeypatch.setattr(loop, "training_batches", lambda *arguments: itertools.islice(batches(*arguments), 4))
    with pytest.raises(StopIteration):
        loop.train(fkd_config, str(tmp_path / "run"))
    monkeypatch.undo()
    # The same labels may lie elsewhere; others are another run's.
    config = fkd_config.copy_and_resolve_references()
    config.distill.soft_labels = str(tmp_path / "moved")
    shutil.copytree(fkd_config.distill.soft_labels, config.distill.soft_labels)
    loop.train(config, str(tmp_path / "run"))
    assert losses(tmp_path / "run") == undisturbed
    write_labels(config, tmp_path / "moved", seed=1)
    with pytest.raises(UserError, match="soft labels"):
        loop.train(config, str(tmp_path / "run"))


@pytest.mark.by_hand  # the steps of it are tested above
def test_a_run_with_a_teacher_learns_from_what_the_teacher_says(tmp_path, capsys):
    config = tiny_config()
    fields = {name: config.model[name] for name in ("image_size", "widths", "heads", "blocks", "recursions", "slices")}
    model = create_model("sret_t", **fields)
    variables = model.init(jax.random.key(3), jnp.zeros((1, SIZE, SIZE, 3)))
    variables = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 1 else leaf, variables)  # far from even
    save_variables(tmp_path / "teacher", variables, model, name="sret_t")
    config.distill.teacher = str(tmp_path / "teacher")
    config.distill.temperature = 2.0
    loop.train(config, str(tmp_path / "run"))
    assert re.search(rf"^teacher +{tmp_path}/teacher$", capsys.readouterr().out, re.MULTILINE)
    source = open_split(config, "train")
    batch = next(loop.training_batches(config, model, source, 0))
    distillation = Distillation(loop.make_teachers(config, model), 2.0)
    mesh = make_mesh({"data": 8}, 24)
    optimizer = optax.sgd(1.0)
    step = make_train_step(model, optimizer, lambda _: 1.0, Augmentation(), 0, mesh, distillation=distillation)
    state = init_state(model, optimizer, 0, mesh)
    _, metrics = step(state, put_batch(batch, mesh), place_teachers(distillation.teachers, mesh))
    np.testing.assert_allclose(losses(tmp_path / "run")[0], metrics["loss"], rtol=1e-6)
    # With another teacher the run would be another, wherever it lies.
    other = jax.tree.map(lambda leaf: leaf + 1, variables)
    save_variables(tmp_path / "teacher", other, model, name="sret_t", overwrite=True)
    with pytest.raises(UserError, match="teacher"):
        loop.train(config, str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill.num_crops": 2}, "num_crops is 2, expected 1 without soft labels"),
        ({"distill.temperature": 2.0}, "temperature is 2.0, expected 1.0 where there is nothing to learn from"),
        ({"distill.label_weight": 0.5}, "label_weight is 0.5, expected 0.0 where there is nothing to learn from"),
        ({"distill.soft_labels": "x", "distill.teacher": "y"}, "distill.teacher is 'y', expected '' with soft labels"),
        ({"distill.soft_labels": "x", "augment.flip": 0.5}, "augment.flip is 0.5, expected 0.0 with soft labels"),
        ({"distill.soft_labels": "x", "data.repeats": 3}, "data.repeats is 3, expected 1 with soft labels"),
        ({"distill.soft_labels": "x", "distill.num_crops": 5}, "num_crops is 5, expected what divides the batch size"),
        ({"distill.soft_labels": "x", "distill.label_type": "k5"}, "there is no type of soft labels 'k5'"),
        ({"distill.temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"distill.std": (1.0, 0.0, 1.0)}, "std is .* expected three numbers, for red, green and blue above 0"),
        ({"distill.mean": (float("nan"), 0.0, 0.0)}, "mean is .* expected three numbers"),
        ({"distill.label_type": "bogus"}, "there is no type of soft labels 'bogus'"),
        ({"distill.interpolation": "nearest"}, "interpolation is 'nearest', expected 'bilinear' or 'bicubic'"),
        ({"augment.partner": "next"}, "partner is 'next', expected 'reversed' or 'permuted'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    config = base_config()
    config.batch_size = 24
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_too_few_epochs_for_a_pass_are_refused_before_anything_is_written(fkd_config, tmp_path):
    config = fkd_config.copy_and_resolve_references()
    config.epochs = 3
    with pytest.raises(UserError, match=r"2 crops of an image .* are never taken in 3 epochs"):
        loop.train(config, str(tmp_path / "run"))
    assert not pathlib.Path(tmp_path / "run").exists()
