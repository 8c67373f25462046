import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from sret_jax import SReT, to_torch_state_dict
from sret_jax.data.augment import Augmentation
from sret_jax.training.mesh import BATCH_AXIS, put_batch
from sret_jax.training.optimizer import adamw
from sret_jax.training.step import init_state, make_eval_step, make_train_step

CLASSES = 10
ROWS = 16
LEARNING_RATE = 1e-3

# Everything random is on: what an image gets must not depend on the device that it lies on.
MODEL = SReT(
    image_size=32,
    widths=(8, 16, 32),
    heads=(1, 2, 4),
    blocks=(1, 2, 1),
    slices=((4, 2), (2, 1), (1, 1)),
    mlp_ratio=2.0,
    num_classes=CLASSES,
    drop_rate=0.1,
    attn_drop_rate=0.1,
    drop_path_rate=0.2,
    scan_unroll=False,
)
AUGMENTATION = Augmentation(flip=0.5, erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)

# BatchNorm follows, so their true gradient is zero: rounding noise alone moves them, and with them the running means.
STEM_NOISE = {f"patch_embed.conv{i}.bias" for i in (1, 2, 3)} | {f"patch_embed.bn{i}.running_mean" for i in (1, 2, 3)}


def random_batch(seed):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(256, size=(ROWS, 32, 32, 3), dtype=np.uint8),
        "label": random.integers(CLASSES, size=ROWS, dtype=np.int32),
    }


class Trainer:
    """The jitted steps on so many devices; `eps` is data to the program, so one compilation serves all."""

    def __init__(self, devices):
        self.mesh = Mesh(np.array(jax.devices()[:devices]), (BATCH_AXIS,))
        self.optimizer = optax.inject_hyperparams(adamw)(LEARNING_RATE, weight_decay=0.05, eps=1e-8)
        self.train_step = make_train_step(MODEL, self.optimizer, lambda _: LEARNING_RATE, AUGMENTATION, 0, self.mesh)
        self.eval_step = make_eval_step(MODEL, self.mesh)
        self.forward = jax.jit(MODEL.apply)

    def logits(self, state):
        images = {"image": random_batch(9)["image"] / np.float32(255)}
        return np.asarray(self.forward(state.variables, put_batch(images, self.mesh)["image"]))


@functools.cache
def run(trainer, eps):
    """Losses of five steps, and the state after them."""
    state = init_state(MODEL, trainer.optimizer, 0, trainer.mesh)
    state.opt_state.hyperparams["eps"] = jax.device_put(np.float32(eps), state.step.sharding)
    losses = []
    for step in range(5):
        state, metrics = trainer.train_step(state, put_batch(random_batch(step), trainer.mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def one():
    return Trainer(1)


@pytest.fixture(scope="module")
def eight():
    return Trainer(8)


def test_one_device_and_a_mesh_of_eight_give_equal_losses(one, eight):
    # Sums over a batch are taken in another order: float32 rounding.
    np.testing.assert_allclose(run(eight, 1e-8)[0], run(one, 1e-8)[0], rtol=1e-5)


def test_one_device_and_a_mesh_of_eight_give_equal_parameters_and_logits(one, eight):
    # An eps far above rounding noise keeps AdamW from dividing noise by noise: nothing needs an exception.
    found, expected = (run(trainer, 1e-3)[1] for trainer in (eight, one))
    for path, leaf in jax.tree.leaves_with_path(expected.variables):
        value = functools.reduce(lambda tree, key: tree[key.key], path, found.variables)
        np.testing.assert_allclose(value, leaf, atol=1e-5, rtol=1e-5, err_msg=str(path))
    np.testing.assert_allclose(eight.logits(found), one.logits(expected), atol=1e-5, rtol=1e-5)


def test_with_the_recipes_eps_only_what_has_no_gradient_moves_otherwise(one, eight):
    found, expected = (to_torch_state_dict(run(t, 1e-8)[1].variables, MODEL) for t in (eight, one))
    differing = total = 0
    for name in expected.keys() - STEM_NOISE:
        compared = slice(None)
        if name.endswith("qkv.bias"):  # softmax does not see key biases: their true gradient is zero too
            width = len(expected[name]) // 3
            compared = np.r_[:width, 2 * width : 3 * width]
        difference = np.abs(np.float64(np.atleast_1d(found[name])) - expected[name])[compared]
        assert difference.max() <= 2 * 5 * LEARNING_RATE  # five steps apart, in opposite directions
        differing, total = differing + (difference > 1e-5).sum(), total + difference.size
    # A single weight whose gradient happens to be rounding noise in one step moves by up to a whole step.
    assert differing < 1e-3 * total


def test_evaluation_counts_masked_rows_not_at_all_and_others_once(eight):
    _, state = run(eight, 1e-3)
    batch = {**random_batch(9), "mask": np.arange(ROWS) < 11}
    batch["image"][11:] = 0
    sums = jax.device_get(eight.eval_step(state.variables, put_batch(batch, eight.mesh)))

    images = np.float32(batch["image"] / 255.0 - [0.485, 0.456, 0.406]) / np.float32([0.229, 0.224, 0.225])
    logits = np.asarray(eight.forward(state.variables, put_batch({"image": images}, eight.mesh)["image"]), np.float64)[
        :11
    ]
    labels = batch["label"][:11]
    label_logits = logits[np.arange(11), labels]
    assert sums["examples"] == 11
    assert sums["accuracy"] == (logits.argmax(1) == labels).sum()
    assert sums["top5_accuracy"] == ((logits > label_logits[:, None]).sum(1) < 5).sum()
    # A sum of eleven float32 losses.
    np.testing.assert_allclose(sums["loss"], (np.log(np.exp(logits).sum(1)) - label_logits).sum(), rtol=1e-5)


def test_the_same_seed_and_step_draw_the_same_and_others_others(one):
    batch = put_batch(random_batch(0), one.mesh)

    def loss(seed, step):
        state = init_state(MODEL, one.optimizer, seed, one.mesh)
        step = jax.device_put(np.int32(step), state.step.sharding)
        return float(one.train_step(state.replace(step=step), batch)[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


def test_a_step_has_the_loss_of_its_smoothed_labels_and_moves_everything():
    # One stage without later slices or dropout: nothing is drawn.
    model = SReT(
        image_size=32,
        widths=(8,),
        heads=(1,),
        blocks=(1,),
        recursions=(1,),
        slices=((4, 1),),
        num_classes=CLASSES,
        drop_path_rate=0.0,
    )
    mesh, optimizer = Mesh(np.array(jax.devices()[:1]), (BATCH_AXIS,)), adamw(LEARNING_RATE, weight_decay=0.0)
    batch, state = random_batch(0), init_state(model, optimizer, 0, mesh)
    images = np.float32((batch["image"] / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    logits, _ = jax.jit(lambda v: model.apply(v, images, train=True, mutable=["batch_stats"]))(state.variables)
    before = jax.device_get(state)
    augmentation = Augmentation(label_smoothing=0.1)
    train_step = make_train_step(model, optimizer, lambda step: 7.0 + step, augmentation, 0, mesh)
    after, metrics = train_step(state, put_batch(batch, mesh))

    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = np.full((ROWS, CLASSES), 0.01)
    targets[np.arange(ROWS), batch["label"]] = 0.91
    # float32
    np.testing.assert_allclose(metrics["loss"], -(targets * log_probabilities).sum(1).mean(), rtol=1e-5)
    assert float(metrics["learning_rate"]) == 7.0
    assert float(metrics["gradient_norm"]) > 0
    assert int(after.step) == 1
    assert all(int(after.batch_stats["stem"][f"bn{i}"]["batches"]) == 1 for i in (1, 2, 3))
    for tree, old in ((after.params, before.params), (after.batch_stats, before.batch_stats)):
        jax.tree.map(lambda new, value: np.testing.assert_(np.any(new != value)), tree, old)
