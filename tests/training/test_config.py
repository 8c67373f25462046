import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax import UserError, count_params
from sret_jax.training.build import (
    make_augmentation,
    make_model,
    make_optimizer,
    make_passes,
    open_split,
    training_loss_of,
)
from sret_jax.training.config import base_config, check_config, flatten, identity
from sret_jax.training.mesh import make_mesh
from sret_jax.training.step import step_keys

CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parents[2] / "configs").glob("*.py"))


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_complete_and_builds_its_model_and_optimizer(name):
    config = load(name)
    check_config(config)
    model = make_model(config, num_classes=10)
    schedule, optimizer = make_optimizer(config, epoch_steps=100)
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    jax.eval_shape(optimizer.init, params)
    peak = config.optimizer.learning_rate * config.batch_size / 512
    assert max(float(schedule(step)) for step in range(0, 100 * config.epochs, 50)) == pytest.approx(peak, rel=0.05)


def test_images_of_one_class_are_refused(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "images").mkdir(parents=True)
        (tmp_path / split / "images" / "1.jpg").touch()
    config = load("sret_t")
    config.data.source, config.data.path = "folder", str(tmp_path)
    for split in ("train", "val"):
        with pytest.raises(
            UserError, match=r"has one class, 'images': there is nothing to learn.* sub-folders of train"
        ):
            open_split(config, split)


def test_sret_t_is_the_published_network_and_recipe():
    config = load("sret_t")
    assert count_params(make_model(config, num_classes=1000)) == 4_755_979
    schedule, _ = make_optimizer(config, epoch_steps=1251)
    assert float(schedule(0)) == pytest.approx(1e-6)
    assert float(schedule(15 * 1251)) == pytest.approx((1e-6 + 2e-3) / 2)  # half of the warm-up
    assert float(schedule(300 * 1251)) == pytest.approx(1e-5)


def test_unknown_keys_are_refused_together_with_the_nearest():
    config = base_config()
    config.optimizer.larning_rate = 1.0
    config.modle = "x"
    with pytest.raises(UserError) as error:
        check_config(config)
    assert "config.optimizer.larning_rate is not a key; did you mean optimizer.learning_rate" in str(error.value)
    assert "config.modle is not a key" in str(error.value)


def test_missing_keys_are_refused():
    config = base_config()
    del config.augment["flip"]
    with pytest.raises(UserError, match=r"config\.augment\.flip is missing"):
        check_config(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 10**20),
        ("seed", 2**32),  # which JAX takes for 0
        ("seed", 2**64),
        ("batch_size", 2**31),
        ("data.threads", 100_000),
        ("data.threads", 257),
        ("data.workers", 100_000),
        ("log_every_steps", 10**10),
        ("checkpoint.keep", 10**20),
        ("optimizer.warmup_epochs", 1e300),
        ("optimizer.learning_rate", 1e39),
        ("optimizer.clip_norm", float("inf")),
        ("augment.mixup", 1e308),
        ("data.crop_aspect", (1.0, float("inf"))),
        ("data.crop_area", (True, True)),
        ("distill.mean", (0.5, 0.5, 10**400)),
        ("distill.std", (0.5, 0.5, 1e-320)),
        ("data.path", "a\0b"),
        ("epochs", 0),
        ("batch_size", 0),
        ("seed", -1),
        ("log_every_steps", 0),
        ("augment.flip", 1.5),
        ("augment.mixup", -0.1),
        ("data.crop_area", (0.5, 0.1)),
        ("data.eval_crop_ratio", 1.1),
        ("data.crop_area", (0.5,)),
        ("data.background", (0, 0, 256)),
        ("data.background", (0.5, 0.5, 0.5)),
        ("data.crop_area", (0.5, 2.0)),
        ("data.crop_aspect", ("a", "b")),
        ("checkpoint.keep", 0),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.warmup_epochs", -1.0),
        ("optimizer.b1", 1.0),
        ("optimizer.learning_rate", -1.0),
    ],
)
def test_values_out_of_range_are_refused_by_name(key, value):
    config = base_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        check_config(config)


def test_a_runs_splits_have_its_background_which_is_a_part_of_its_identity():
    config = base_config()
    config.data.source = "synthetic"
    white = identity(config)
    config.data.background = (1, 2, 3)
    assert open_split(config, "train").background == (1, 2, 3)
    assert identity(config) == white | {"config.data.background": [1, 2, 3]} != white


EXTREMES = [
    *(0, 1, -1, 3, 10**20, -(10**20), 2**31, 2**32, 2**64, 10**400, True, False),
    *(0.0, -0.5, 0.5, 1e-320, 1e39, 1e308, -1e308, float("inf"), float("-inf"), float("nan")),
    *("", "a\0b", "\udce9", "x" * 10_000, "\x1b[31m\n", None, [], (), {}),
    *((0.5, 10**400), (True, True), (float("nan"), 1.0), (1e-320, 1.0), (1.0, float("inf")), ("a", "b")),
    *((0.0, 0.0, 0.0), (1e-320, 1.0, 1.0), (10**400, 1.0, 1.0), (float("inf"), 1.0, 1.0), (True, 1.0, 1.0)),
    *((10**20, 10**20, 10**20), (2, 10**400, 2), ((8, 2), (4, 10**20), (1, 1)), ((10**400, 1),) * 3, ((),) * 3),
]


def build_all_that_needs_no_devices(config):
    """What a run does with its config before anything is compiled."""
    check_config(config)
    model = make_model(config, num_classes=10)
    make_mesh(config.mesh, config.batch_size)
    make_passes(config)
    schedule, _ = make_optimizer(config, epoch_steps=20_000)
    schedule(jnp.int32(20_000))
    make_augmentation(config)
    identity(config)
    step_keys(config.seed, 0)
    np.float32([*config.distill.mean, *config.distill.std, config.distill.temperature, config.augment.mixup])
    return model


@pytest.mark.parametrize("key", sorted({**flatten(base_config()), "mesh.data": 1, "mesh.fsdp": 1}))
def test_whatever_a_key_is_set_to_works_or_is_one_line_that_names_it(key):
    path = key.split(".")
    for value in EXTREMES:
        config = base_config()
        config.model.name, config.batch_size = "sret_t", 8
        where = config
        for name in path[:-1]:
            where = where[name]
        try:
            where[path[-1]] = value
        except (OverflowError, TypeError, ValueError):
            continue  # ml_collections refuses it, which `flags.py` makes one line of
        try:
            build_all_that_needs_no_devices(config)
        except UserError as error:
            message = str(error)
            named = "model" if key == "model.name" else path[-1].replace("_", " ")
            assert named in message.replace("_", " "), (value, message)
            assert "\n" not in message and message.isprintable(), (value, message)
            assert len(message) < 1500, (value, message)


def test_a_run_of_more_steps_than_devices_count_is_refused():
    config = base_config()
    config.epochs = 10**6
    with pytest.raises(UserError, match=r"config\.epochs is 1,000,000, which makes 20,000,000,000 steps"):
        make_optimizer(config, epoch_steps=20_000)


def test_the_identity_of_a_run_leaves_out_how_it_is_computed():
    config, other = load("digits"), load("digits")
    other.mesh.data = 4
    other.data.path = "/elsewhere"
    other.model.remat = True
    other.model.scan_unroll = False
    other.model.attention, other.model.mlp, other.model.platform = "xla", "xla", "gpu"
    other.compilation_cache = ""
    other.checkpoint.keep = 7
    assert identity(config) == identity(other)
    other.model.mlp_ratio = 2.0
    assert {k for k in identity(config) if identity(config)[k] != identity(other)[k]} == {"config.model.mlp_ratio"}


def test_every_key_has_a_place_in_the_flat_config():
    assert flatten(base_config())["mesh"] == {"data": -1, "fsdp": 1}
    assert flatten(base_config())["optimizer.b1"] == 0.9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"augment.flip": 0.5}, "with augmentation"),
        ({"data.crop_area": (0.08, 1.0)}, "with augmentation"),
        ({"data.rand_augment": "rand-m9"}, "with augmentation"),
        ({"augment.label_smoothing": 0.1}, "with soft targets"),
        ({"augment.erasing": 0.25, "augment.cutmix": 1.0}, "with augmentation, mixup"),
        ({"augment.flip": 0.5, "augment.mixup": 0.8, "distill.teacher": "a"}, "with augmentation, mixup, soft targets"),
        ({"distill.soft_labels": "labels"}, "with augmentation, soft targets"),
    ],
)
def test_the_training_loss_is_named_by_what_the_test_loss_is_without(changes, words):
    config = base_config()
    config.update_from_flattened_dict(changes)
    assert training_loss_of(config) == words
