import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sret_jax import SReT, compiler_options, to_torch_state_dict
from sret_jax.data.augment import Augmentation, normalize
from sret_jax.training import step as step_module
from sret_jax.training.mesh import make_mesh, put_batch
from sret_jax.training.optimizer import adamw
from sret_jax.training.step import (
    abstract_state,
    init_state,
    make_eval_step,
    make_train_step,
    step_keys,
    with_variables,
)

CLASSES = 10
ROWS = 16
LEARNING_RATE = 1e-3

# Everything random is on: what an image gets must not depend on the device that it lies on.
MODEL = SReT(
    image_size=32,
    widths=(8, 16),
    heads=(1, 2),
    blocks=(1, 2),
    recursions=(2, 2),
    slices=((4, 2), (2, 1)),
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
        self.mesh = make_mesh({"data": -1}, ROWS, jax.devices()[:devices])
        self.optimizer = optax.inject_hyperparams(adamw, static_args="clip_norm")(
            LEARNING_RATE, weight_decay=0.05, eps=1e-8
        )
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


@pytest.mark.parametrize(("classes", "ranked"), [(2, ()), (5, ()), (6, ("top5_accuracy",)), (10, ("top5_accuracy",))])
def test_a_rank_that_every_class_has_is_no_metric(classes, ranked):
    model, mesh = MODEL.clone(num_classes=classes), make_mesh({"data": -1}, ROWS, jax.devices()[:1])
    images = jax.ShapeDtypeStruct((ROWS, 32, 32, 3), jnp.uint8)
    batch = {"image": images, "label": jnp.zeros(ROWS, jnp.int32), "mask": jnp.ones(ROWS, bool)}
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    sums = jax.eval_shape(make_eval_step(model, mesh), variables, batch)
    assert sums.keys() == {"loss", "accuracy", "examples", *ranked}


def test_the_same_seed_and_step_draw_the_same_and_others_others(one):
    batch = put_batch(random_batch(0), one.mesh)

    def loss(seed, step):
        state = init_state(MODEL, one.optimizer, seed, one.mesh)
        step = jax.device_put(np.int32(step), state.step.sharding)
        return float(one.train_step(state.replace(step=step), batch)[1]["loss"])

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


# One stage without later slices or dropout: nothing is drawn.
SMALL = SReT(
    image_size=32,
    widths=(8,),
    heads=(1,),
    blocks=(1,),
    recursions=(1,),
    slices=((4, 1),),
    num_classes=CLASSES,
    drop_path_rate=0.0,
)


def one_device():
    return make_mesh({"data": 1}, ROWS, jax.devices()[:1])


def assert_close(found, expected):
    # float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_state_split_over_fsdp_trains_like_whole_state_and_stays_split():
    wide, optimizer, states = (
        SMALL.clone(widths=(32,), drop_rate=0.1),
        adamw(LEARNING_RATE, weight_decay=0.05, eps=1e-3),
        [],
    )
    for axes in ({"data": 8}, {"data": 2, "fsdp": 4}):
        mesh = make_mesh(axes, ROWS)
        train_step = make_train_step(wide, optimizer, lambda _: LEARNING_RATE, AUGMENTATION, 0, mesh, ema_decay=0.9)
        state = init_state(wide, optimizer, 0, mesh, ema=True)
        for step in range(3):
            state, _ = train_step(state, put_batch(random_batch(step), mesh))
        states.append(state)
    whole, split = states
    assert_close(jax.device_get(split), jax.device_get(whole))
    kernels = [leaf for leaf in jax.tree.leaves(split) if leaf.ndim > 1 and leaf.size >= 1024]
    assert len(kernels) >= 16  # the four largest: parameter, two moments, average
    assert all(kernel.addressable_shards[0].data.size == kernel.size // 4 for kernel in kernels)


def test_accumulation_averages_the_gradients_of_its_parts():
    mesh, optimizer, batch = one_device(), optax.sgd(1.0), random_batch(0)
    model = SMALL.clone(drop_rate=0.2)
    state = init_state(model, optimizer, 0, mesh)
    images, labels = normalize(jnp.asarray(batch["image"])), jnp.asarray(batch["label"])

    def loss_fn(params, batch_stats, part):
        variables, rows = {"params": params, "batch_stats": batch_stats}, 2 * jnp.arange(ROWS // 2) + part
        rngs = {"dropout": jax.random.fold_in(step_keys(0, 0)[1], part)}  # each part drops by itself
        logits, updates = model.apply(variables, images[rows], train=True, mutable=["batch_stats"], rngs=rngs)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()
        return loss, updates["batch_stats"]

    # With the step's own products: an element of the stem's gradient is a difference of much larger numbers.
    options = compiler_options(train=True)
    gradient = jax.jit(jax.value_and_grad(loss_fn, has_aux=True), compiler_options=options)
    (first_loss, stats), first = gradient(state.params, state.batch_stats, 0)
    (second_loss, stats), second = gradient(state.params, stats, 1)
    expected = jax.tree.map(lambda p, a, b: p - (a + b) / 2, state.params, first, second)
    train_step = make_train_step(model, optimizer, lambda _: 1.0, Augmentation(), 0, mesh, accumulation=2)
    after, metrics = train_step(state, put_batch(batch, mesh))

    assert_close(after.params, expected)
    assert_close(after.batch_stats, stats)
    assert float(metrics["loss"]) == pytest.approx(float(first_loss + second_loss) / 2, rel=1e-5)


@pytest.mark.by_hand  # test_distillation.py has parts on a mesh of eight
def test_accumulation_gives_the_same_on_one_device_and_on_four():
    optimizer, states = optax.sgd(0.1), []
    for devices in (1, 4):
        mesh = make_mesh({"data": -1}, ROWS, jax.devices()[:devices])
        train_step = make_train_step(SMALL, optimizer, lambda _: 0.1, AUGMENTATION, 0, mesh, accumulation=4)
        states.append(train_step(init_state(SMALL, optimizer, 0, mesh), put_batch(random_batch(0), mesh))[0])
    assert_close(jax.device_get(states[1].variables), jax.device_get(states[0].variables))


def test_the_moving_average_is_that_of_all_variables():
    mesh, optimizer, decay = one_device(), optax.sgd(0.1), 0.75
    state = init_state(SMALL, optimizer, 0, mesh, ema=True)
    train_step = make_train_step(SMALL, optimizer, lambda _: 0.1, Augmentation(), 0, mesh, ema_decay=decay)
    expected = jax.tree.map(np.float64, jax.device_get(state.variables))
    for step in range(3):
        state, _ = train_step(state, put_batch(random_batch(step), mesh))
        expected = jax.tree.map(lambda a, v: decay * a + (1 - decay) * v, expected, jax.device_get(state.variables))
    for i in (1, 2, 3):
        batches = expected["batch_stats"]["stem"][f"bn{i}"]
        batches["batches"] = 3  # a count has no average
    assert_close(jax.device_get(state.ema), expected)


def with_an_infinite_bias(params):
    params["head"]["bias"] = params["head"]["bias"].at[3].set(np.inf)


def with_a_steep_head(params):
    """The logits stay as they were, but the gradient of the scale is so large that its square is infinite."""
    params["head"]["kernel"] *= 1e25
    params["norm"]["scale"] *= 1e-25
    params["norm"]["bias"] *= 1e-25


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(accumulation):
    mesh, optimizer = one_device(), adamw(LEARNING_RATE, weight_decay=0.05)
    options = {"accumulation": accumulation, "ema_decay": 0.9}
    train_step = make_train_step(SMALL, optimizer, lambda step: step + 1.0, Augmentation(), 0, mesh, **options)
    good = init_state(SMALL, optimizer, 0, mesh, ema=True)
    for spoil, loss_is_finite in ((with_an_infinite_bias, False), (with_a_steep_head, True)):
        bad = jax.tree.map(jnp.copy, good)
        spoil(bad.params)
        before = jax.device_get(bad)
        after, metrics = train_step(bad, put_batch(random_batch(0), mesh))
        assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (1, 1, 1.0)
        assert np.isfinite(metrics["loss"]) == loss_is_finite
        assert not np.isfinite(metrics["gradient_norm"])
        unchanged = before.replace(step=after.step, skipped=after.skipped)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), jax.device_get(unchanged))

    # The next good step has the rate of the one that was skipped.
    mended = good.replace(step=after.step, skipped=after.skipped)
    mended, metrics = train_step(mended, put_batch(random_batch(1), mesh))
    assert (int(mended.step), int(mended.skipped), float(metrics["skipped"])) == (2, 1, 0.0)
    assert float(metrics["learning_rate"]) == 1.0


@pytest.mark.parametrize("ema", [True, False])
def test_other_variables_replace_those_of_a_state_and_its_moving_average(ema):
    mesh, optimizer = make_mesh({"data": 2, "fsdp": 4}, ROWS), adamw(LEARNING_RATE, weight_decay=0.05)
    state = init_state(SMALL, optimizer, 0, mesh, ema=ema)
    variables = jax.device_get(init_state(SMALL, optimizer, 1, mesh).variables)
    changed = with_variables(state, variables, mesh)
    for found in (changed.variables, changed.ema if ema else changed.variables):
        jax.tree.map(np.testing.assert_array_equal, found, variables)
    like = abstract_state(SMALL, optimizer, mesh, ema=ema)
    jax.tree.map(lambda leaf, want: np.testing.assert_(leaf.sharding == want.sharding), changed, like)
    jax.tree.map(lambda leaf, want: np.testing.assert_(leaf.dtype == want.dtype), changed, like)


def test_a_step_has_the_loss_of_its_smoothed_labels_and_moves_everything():
    model, mesh, optimizer = SMALL, one_device(), adamw(LEARNING_RATE, weight_decay=0.0)
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


def test_networks_programs_are_compiled_with_their_options_which_keep_barriers(monkeypatch):
    def sum_of_products(x):
        return jax.lax.optimization_barrier(x * 2) + 1

    def barriers(options):
        compiled = jax.jit(sum_of_products).lower(jnp.ones(8)).compile(options)
        return compiled.as_text().count("opt-barrier(")

    assert barriers(None) == 0  # if ever not, that option is needed no more
    asked, given = [], {}

    def options_of(platform, *, train=False):
        asked.append((platform, train))
        return compiler_options(platform, train=train)

    def recording_jit(function, **arguments):
        given[function.__name__] = arguments
        return jit(function, **arguments)

    jit = jax.jit
    monkeypatch.setattr(step_module, "compiler_options", options_of)
    monkeypatch.setattr(jax, "jit", recording_jit)
    mesh = make_mesh({"data": -1}, ROWS, jax.devices()[:1])
    optimizer = adamw(lambda _: LEARNING_RATE, weight_decay=0.05)
    make_train_step(MODEL, optimizer, lambda _: LEARNING_RATE, AUGMENTATION, 0, mesh)
    make_eval_step(MODEL, mesh)
    monkeypatch.undo()
    assert asked == [("cpu", True), ("cpu", False)]
    found = [given[name]["compiler_options"] for name in ("train_step", "eval_step")]
    assert [barriers(options) for options in found] == [1, 1]


def test_no_array_of_a_step_gains_axes_by_itself():
    mesh, optimizer = make_mesh({"data": -1}, ROWS, jax.devices()[:2]), adamw(LEARNING_RATE, weight_decay=0.05)
    mixing = dataclasses.replace(AUGMENTATION, partner="permuted")
    soft = Augmentation(mixup=0.8, soft_labels="marginal_smoothing")
    labels = random_batch(0)
    few = {
        "image": labels["image"],
        "classes": jax.ShapeDtypeStruct((ROWS, 3), np.int32),
        "probabilities": jax.ShapeDtypeStruct((ROWS, 3), np.float16),
    }
    masked = {**labels, "mask": jax.ShapeDtypeStruct((ROWS,), bool)}
    with jax.numpy_rank_promotion("raise"):
        state = abstract_state(MODEL, optimizer, mesh)
        for augmentation, batch in ((AUGMENTATION, labels), (mixing, labels), (soft, few)):
            step = make_train_step(MODEL, optimizer, lambda _: LEARNING_RATE, augmentation, 0, mesh, accumulation=2)
            assert jax.tree.map(jnp.shape, step.eval_shape(state, batch)[0]) == jax.tree.map(jnp.shape, state)
        sums = make_eval_step(MODEL, mesh).eval_shape(state.variables, masked)
    assert all(value.shape == () for value in sums.values())
