"""Programs for any batch, and batches without images: nothing that a network does depends on how many there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import sret_jax

FIELDS = {
    "widths": (8, 16),
    "heads": (1, 2),
    "blocks": (1, 1),
    "recursions": (2, 2),
    "slices": ((2, 1), (1, 1)),
    "image_size": 32,
    "num_classes": 3,
}
RNGS = {"dropout": jax.random.key(1), "permutation": jax.random.key(2)}


def images(batch):
    return jax.random.normal(jax.random.key(3), (batch, 32, 32, 3))


def training_loss(model, variables, images):
    """With the gradient of the parameters."""

    def loss(params):
        variables_ = {**variables, "params": params}
        logits, _ = model.apply(variables_, images, train=True, mutable=["batch_stats"], rngs=RNGS)
        return jnp.square(logits).sum()

    return jax.value_and_grad(loss)(variables["params"])


@pytest.fixture(scope="module")
def variables():
    model = sret_jax.SReT(**FIELDS)
    return jax.jit(model.init)(jax.random.key(0), images(1))


def for_any_batch(function, variables, platform):
    (batch,) = export.symbolic_shape("batch")
    like = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    return export.export(jax.jit(function), platforms=[platform])(variables, like)


@pytest.mark.parametrize(
    ("platform", "exported_for", "dtype"),
    [("cpu", "cpu", "float32"), ("gpu", "cuda", "float32"), ("tpu", "tpu", "bfloat16")],
)
def test_a_network_as_it_is_by_default_is_exported_for_any_batch_and_so_is_its_gradient(
    variables, platform, exported_for, dtype
):
    model = sret_jax.SReT(**FIELDS, platform=platform, dtype=dtype)

    def both(variables, images):
        return model.apply(variables, images), training_loss(model, variables, images)

    exported = for_any_batch(both, variables, exported_for)
    assert exported.platforms == (exported_for,)
    assert str(exported.out_avals[0].shape) == "(batch, 3)"


@pytest.mark.parametrize("batch", [1, 3])  # JAX takes a symbolic size for at least 1
def test_an_exported_program_computes_what_the_network_does(variables, batch):
    model = sret_jax.SReT(**FIELDS)
    exported = for_any_batch(model.apply, variables, "cpu")
    found = exported.call(variables, images(batch))
    expected = jax.jit(model.apply)(variables, images(batch))
    assert found.shape == (batch, 3)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # sums in another order


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_batch_without_images_has_no_logits_and_can_be_trained_on(variables, platform):
    model = sret_jax.SReT(**FIELDS, platform=platform)
    logits, features = jax.jit(
        lambda variables, images: (
            model.apply(variables, images),
            model.apply(variables, images, method="features"),
        )
    )(variables, images(0))
    assert (logits.shape, features.shape) == ((0, 3), (0, 16))
    shapes = jax.eval_shape(lambda variables, images: training_loss(model, variables, images), variables, images(0))
    assert jax.tree.map(jnp.shape, shapes[1]) == jax.tree.map(jnp.shape, variables["params"])
