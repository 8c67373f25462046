"""What the scans give to each application of a block: here, dropout of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax import SReT, UserError
from sret_jax.models import recursion
from sret_jax.models.recursion import Stage
from tests.models.jaxprs import operations


def test_every_application_of_every_block_drops_by_itself() -> None:
    # Blocks do nothing. Projection layer r of block b adds 10**(3b + r) times 0 or 2, so that each digit of the output
    # tells what one of them dropped.
    stage = Stage(
        blocks=2,
        heads=1,
        recursions=3,
        slices=(1, 1),
        mlp_ratio=1,
        nll_ratio=1,
        drop_path_rates=(0, 0),
        drop_rate=0.5,
        unroll=False,
    )
    x = np.zeros((16, 16, 8), np.float32)
    shapes = jax.eval_shape(lambda: stage.init(jax.random.key(0), x, None, False))["params"]["blocks"]
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params["block"]["coefficients"][:] = [1, 0, 1, 0]
    params["nlls"]["coefficients"][:] = 1
    params["nlls"]["mlp"]["fc2"]["bias"][:] = 10.0 ** np.arange(6).reshape(2, 3, 1)

    run = jax.jit(lambda key: stage.apply({"params": {"blocks": params}}, x, None, True, rngs={"dropout": key}))
    y = np.asarray(run(jax.random.key(0)))
    digits = np.stack([y // 10**i % 10 for i in range(6)])

    np.testing.assert_array_equal(np.unique(digits), [0, 2])
    kept = digits > 0
    # 2048 draws each: four standard deviations of a mean are 4 · 0.5 / sqrt(2048).
    tolerance = 4 * 0.5 / np.sqrt(2048)
    for i in range(6):
        assert abs(kept[i].mean() - 0.5) < tolerance
        for j in range(i):
            assert abs((kept[i] == kept[j]).mean() - 0.5) < tolerance, (i, j)
    assert abs((np.asarray(run(jax.random.key(1))) == y).mean() - 0.5**6) < tolerance


def test_on_cpus_an_applications_vectors_are_its_own_and_keep_their_values_and_gradients() -> None:
    def stage(platform: str) -> Stage:
        return Stage(1, 2, 3, (2, 2), 2.0, 1.0, (0.0,), platform=platform)

    x = np.random.RandomState(0).normal(size=(2, 8, 4)).astype(np.float32)
    variables = jax.jit(lambda key: stage("cpu").init(key, x, None, False))(jax.random.key(0))

    def loss(params: Any, platform: str) -> jax.Array:
        return jnp.square(stage(platform).apply({"params": params}, x, None, False)).sum()

    found, wanted = (jax.value_and_grad(loss)(variables["params"], platform) for platform in ("cpu", "gpu"))
    # the same products in another order, float32
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
    comparisons = [
        [equation.primitive.name for equation, _ in operations(lambda p, on=on: loss(p, on), variables["params"])]
        for on in ("cpu", "gpu")
    ]
    assert [names.count("gt") for names in comparisons] == [2, 0]  # the first application, and the scan's body


def test_residual_connections_and_products_are_kept_apart_on_cpus_alone() -> None:
    x = np.zeros((2, 8, 4), np.float32)

    def barriers(platform: str) -> int:
        stage = Stage(1, 2, 3, (2, 2), 2.0, 1.0, (0.0,), platform=platform)
        variables = jax.eval_shape(lambda: stage.init(jax.random.key(0), x, None, False))
        forward = operations(lambda variables: stage.apply(variables, x, None, False), variables)
        return sum(equation.primitive.name == "optimization_barrier" for equation, _ in forward)

    # behind attention, MLP and NLL, and in front of the two products of each; in the first application and the scan's
    assert [barriers(platform) for platform in ("cpu", "gpu", "tpu")] == [2 * 3 * (1 + 2), 0, 0]


@pytest.mark.parametrize("recursions", [1, 3])
def test_variables_of_other_recursions_are_refused(recursions: int) -> None:
    def model(recursions: int) -> SReT:
        fields = dict(image_size=16, widths=(8,), heads=(2,), blocks=(1,), slices=((1, 1),), num_classes=3)
        return SReT(**fields, recursions=(recursions,))

    images = jnp.zeros((1, 16, 16, 3))
    variables = model(2).init(jax.random.key(0), images)
    with pytest.raises(UserError, match=f"NLLs for 2 applications of a block, expected {recursions}"):
        model(recursions).apply(variables, images)


def test_a_scan_is_traced_once_and_the_initialisation_not_with_it(monkeypatch) -> None:
    traced = {"block": 0, "initialisation": 0}

    def counted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any) -> Any:
            traced[what] += 1
            return function(*arguments)

        return count

    stage = Stage(
        blocks=4,
        heads=1,
        recursions=4,
        slices=(1, 1),
        mlp_ratio=1,
        nll_ratio=1,
        drop_path_rates=(0,) * 4,
        platform="gpu",
        unroll=False,
    )
    x = jnp.zeros((1, 4, 8))
    shapes = jax.eval_shape(lambda: stage.init(jax.random.key(0), x, None, False))
    monkeypatch.setattr(recursion, "unit_coefficients", counted("block", recursion.unit_coefficients))
    initialisation = counted("initialisation", recursion.RecursiveBlock._init_nlls)
    monkeypatch.setattr(recursion.RecursiveBlock, "_init_nlls", initialisation)
    jax.eval_shape(lambda variables: stage.apply(variables, x, None, False), shapes)
    # A first application, and one for all the later ones; and Flax sets a lifted module up once to see what it has.
    assert traced == {"block": 2, "initialisation": 1}
