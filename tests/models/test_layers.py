"""The parts of the network against NumPy, closed forms and XLA's own convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax.models import layers
from sret_jax.models.attention import SlicedAttention
from sret_jax.models.layers import BatchNorm, Dense, Pool, Stem, draw_branch_scales, layer_norm
from tests.models import numpy_sret
from tests.models.jaxprs import operations


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def batch_norm_variables():
    running = {"mean": _normal(3, seed=1), "var": np.exp(_normal(3, seed=2)), "batches": np.array(7, np.int32)}
    return {"params": {"scale": _normal(3, seed=3), "bias": _normal(3, seed=4)}, "batch_stats": running}


def test_batch_norm_normalises_with_running_statistics_in_evaluation(batch_norm_variables) -> None:
    x = 2 + 3 * _normal(4, 5, 6, 3)
    y, updates = BatchNorm().apply(batch_norm_variables, x, train=False, mutable=["batch_stats"])

    params, running = batch_norm_variables["params"], batch_norm_variables["batch_stats"]
    expected = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # rounding of float32
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], running)


def test_batch_norm_epsilon_is_1e_5(batch_norm_variables) -> None:
    batch_norm_variables["batch_stats"]["var"] = np.zeros(3, np.float32)
    y = BatchNorm().apply(batch_norm_variables, _normal(2, 3), train=False)
    params, running = batch_norm_variables["params"], batch_norm_variables["batch_stats"]
    expected = (_normal(2, 3) - running["mean"]) / np.sqrt(1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)  # rounding of float32 at values near 1000


def test_batch_norm_trains_with_the_batchs_statistics_and_keeps_unbiased_variance(batch_norm_variables) -> None:
    x = 2 + 3 * _normal(2, 2, 3, 3)  # 12 values a channel: biased and unbiased variance differ by 9 %
    y, updates = BatchNorm().apply(batch_norm_variables, x, train=True, mutable=["batch_stats"])

    params, running = batch_norm_variables["params"], batch_norm_variables["batch_stats"]
    mean, biased = x.mean((0, 1, 2)), x.var((0, 1, 2))
    expected = (x - mean) / np.sqrt(biased + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # rounding of float32

    updated = updates["batch_stats"]
    np.testing.assert_allclose(updated["mean"], 0.9 * running["mean"] + 0.1 * mean, rtol=1e-5)
    unbiased = x.reshape(-1, 3).var(0, ddof=1)
    np.testing.assert_allclose(updated["var"], 0.9 * running["var"] + 0.1 * unbiased, rtol=1e-5)
    assert updated["batches"] == 8
    assert updated["batches"].dtype == np.int32


def test_batch_norm_of_one_value_a_channel_keeps_finite_statistics(batch_norm_variables) -> None:
    _, updates = BatchNorm().apply(batch_norm_variables, _normal(1, 3), train=True, mutable=["batch_stats"])
    before = batch_norm_variables["batch_stats"]["var"]
    np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 * before, rtol=1e-6)  # one product of float32


def test_batch_norm_is_not_moved_by_initialisation() -> None:
    variables = BatchNorm().init(jax.random.key(0), 5 + _normal(4, 3), train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))
    assert variables["batch_stats"]["batches"] == 0
    np.testing.assert_array_equal(variables["params"]["scale"], np.ones(3))
    np.testing.assert_array_equal(variables["params"]["bias"], np.zeros(3))


def test_batch_norm_takes_statistics_in_float32_of_bfloat16_input(batch_norm_variables) -> None:
    # 4096 values near 100, whose spacing in bfloat16 is 0.5: a sum in bfloat16 would stop growing at 256.
    x = jnp.asarray(100 + _normal(4096, 3), jnp.bfloat16)
    y, updates = BatchNorm(dtype=jnp.bfloat16).apply(batch_norm_variables, x, train=True, mutable=["batch_stats"])

    exact = np.asarray(x, np.float64)
    running = batch_norm_variables["batch_stats"]
    assert y.dtype == jnp.bfloat16
    # rounding of float32 in sums of 4096
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.9 * running["mean"] + 0.1 * exact.mean(0), rtol=1e-5)
    expected = 0.9 * running["var"] + 0.1 * exact.var(0, ddof=1)
    np.testing.assert_allclose(updates["batch_stats"]["var"], expected, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("multiplier", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (5, 5), (6, 3), (1, 2)])
def test_pool_and_its_gradients_are_those_of_a_depthwise_convolution(
    height: int, width: int, multiplier: int, platform: str
) -> None:
    x = _normal(2, height, width, 3)
    params = {"kernel": _normal(3, 3, 1, 3 * multiplier, seed=1), "bias": _normal(3 * multiplier, seed=2)}
    cotangent = _normal(2, (height + 1) // 2, (width + 1) // 2, 3 * multiplier, seed=3)

    def convolve(params, x):
        y = jax.lax.conv_general_dilated(
            x,
            params["kernel"],
            window_strides=(2, 2),
            padding=((1, 1), (1, 1)),
            feature_group_count=3,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        return y + params["bias"]

    def pool(params, x):
        return Pool(3 * multiplier, platform=platform).apply({"params": params}, x)

    expected, expected_pullback = jax.vjp(convolve, params, x)
    y, pullback = jax.vjp(pool, params, x)
    # Sums of 9 products forwards and of up to 18 backwards, in another order: rounding of float32.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(
        jax.tree.leaves(pullback(cotangent)), jax.tree.leaves(expected_pullback(cotangent)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("platform", "convolutions"), [("cpu", 0), ("gpu", 0), ("tpu", 1)])
def test_pool_is_a_convolution_of_xlas_on_tpus_alone(platform: str, convolutions: int) -> None:
    x = _normal(1, 4, 4, 3)
    pool = Pool(6, platform=platform)
    variables = jax.eval_shape(pool.init, jax.random.key(0), x)
    names = [equation.primitive.name for equation, _ in operations(pool.apply, variables, x)]
    assert names.count("conv_general_dilated") == convolutions


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("platform", "width"), [("cpu", 6), ("cpu", 62), ("gpu", 6)])  # the first is not padded
def test_the_stem_of_every_platform_is_that_of_tpus(platform: str, width: int, train: bool) -> None:
    images = _normal(2, 18, 22, 3)
    variables = jax.jit(Stem(width).init, static_argnums=2)(jax.random.key(0), images, False)

    def stem(params, platform):
        both = {**variables, "params": params}
        return Stem(width, platform=platform).apply(both, images, train, mutable=["batch_stats"])

    expected, expected_pullback, wanted_statistics = jax.vjp(
        lambda params: stem(params, "tpu"), variables["params"], has_aux=True
    )
    y, pullback, statistics = jax.vjp(lambda params: stem(params, platform), variables["params"], has_aux=True)
    assert y.shape == expected.shape == (2, 3, 3, width)
    # float32 sums of 9 * width products in another order, in three layers that divide by deviations
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    found, wanted = pullback(_normal(*y.shape, seed=4)), expected_pullback(_normal(*y.shape, seed=4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), statistics, wanted_statistics)


@pytest.mark.parametrize(
    ("platform", "width", "features"),
    [
        ("cpu", 62, [31, 62, 62]),
        ("gpu", 62, [32, 64, 64]),
        ("gpu", 6, [8, 8, 8]),
        ("tpu", 62, [31, 62, 62]),
    ],
)
def test_the_stems_channels_are_padded_on_gpus_alone(platform: str, width: int, features: list[int]) -> None:
    stem, images = Stem(width, platform=platform), np.zeros((1, 16, 16, 3), np.float32)
    variables = jax.eval_shape(lambda: stem.init(jax.random.key(0), images, False))
    computed = [
        equation.outvars[0].aval.shape[-1]
        for equation, _ in operations(lambda v: stem.apply(v, images, False), variables)
        if equation.primitive.name == "conv_general_dilated"
    ]
    assert computed == features


def test_dense_layers_can_be_padded_with_channels_that_are_zero() -> None:
    x, layers = _normal(2, 5, 3), [Dense(3, 6, multiple=multiple) for multiple in (1, 4)]
    variables = layers[1].init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, layers[0].init(jax.random.key(0), x))
    narrow, wide = (layer.apply(variables, x, jnp.float32(2)) for layer in layers)
    np.testing.assert_allclose(wide[..., :6], narrow, rtol=1e-6)  # rounding of float32
    assert wide.shape == (2, 5, 8)
    assert not np.any(wide[..., 6:])

    behind = Dense(6, 4)
    variables = behind.init(jax.random.key(1), narrow)
    np.testing.assert_allclose(behind.apply(variables, wide), behind.apply(variables, narrow), rtol=1e-6)


@pytest.mark.parametrize(("platform", "axes"), [("cpu", 2), ("gpu", 3), ("tpu", 3)])
def test_dense_layers_take_tokens_as_rows_on_cpus_alone(platform: str, axes: int) -> None:
    dense, x = Dense(3, 4, platform=platform), np.zeros((2, 5, 3), np.float32)
    variables = jax.eval_shape(lambda: dense.init(jax.random.key(0), x))
    (product,) = (e for e, _ in operations(dense.apply, variables, x) if e.primitive.name == "dot_general")
    assert product.invars[0].aval.ndim == axes


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("permuted", [False, True])
def test_sliced_attention_equals_a_loop_over_groups_and_heads(groups: int, permuted: bool) -> None:
    batch, tokens, width, heads = 3, 12, 8, 2
    x = _normal(batch, tokens, width)
    params = {
        "qkv": {"kernel": _normal(width, 3 * width, seed=1), "bias": _normal(3 * width, seed=2)},
        "proj": {"kernel": _normal(width, width, seed=3), "bias": _normal(width, seed=4)},
    }
    # Not its own inverse, so that undoing it the wrong way shows.
    order = np.roll(np.random.RandomState(5).permutation(tokens), 1) if permuted else np.arange(tokens)
    assert permuted == (not np.array_equal(order[order], np.arange(tokens)))

    y = SlicedAttention(width, heads).apply(
        {"params": params}, x, groups, jnp.asarray(order) if permuted else None, False
    )

    attended = numpy_sret.attention(
        x.astype(np.float64), params["qkv"]["kernel"].T, params["qkv"]["bias"], heads, groups, order
    )
    expected = attended @ params["proj"]["kernel"] + params["proj"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-5)  # rounding of float32 at values near 10


def test_sliced_attention_mixes_tokens_within_groups_only() -> None:
    # Derivative of every token's output by every token's input, groups of three in a shuffled order.
    tokens, order = 6, np.array([4, 0, 3, 1, 5, 2])
    attention = SlicedAttention(width=4, heads=1)
    params = {
        "qkv": {"kernel": _normal(4, 12, seed=1), "bias": _normal(12, seed=2)},
        "proj": {"kernel": _normal(4, 4, seed=3), "bias": _normal(4, seed=4)},
    }
    jacobian = jax.jacobian(lambda x: attention.apply({"params": params}, x, 2, jnp.asarray(order), False)[0])
    influence = np.abs(jacobian(_normal(1, tokens, 4))).sum((1, 2, 4)) > 0

    group = np.empty(tokens, int)
    group[order] = np.arange(tokens) // 3
    np.testing.assert_array_equal(influence, group[:, None] == group[None])


def test_attention_dropout_drops_weights_and_scales_the_rest() -> None:
    # One token a group attends to itself with weight 1: a head's output is its value times 0 or 1 / (1 − rate).
    x, rate = np.ones((64, 16, 4), np.float32), 0.25
    kernel = np.concatenate([np.zeros((4, 8)), np.eye(4)], axis=1).astype(np.float32)
    params = {
        "qkv": {"kernel": kernel, "bias": np.zeros(12, np.float32)},
        "proj": {"kernel": np.eye(4, dtype=np.float32), "bias": np.zeros(4, np.float32)},
    }
    attention = SlicedAttention(width=4, heads=2, attn_drop_rate=rate)
    y = attention.apply({"params": params}, x, 16, None, True, rngs={"dropout": jax.random.key(0)})

    by_head = np.asarray(y).reshape(64, 16, 2, 2)
    np.testing.assert_array_equal(by_head[..., 0], by_head[..., 1])
    np.testing.assert_allclose(np.unique(by_head), [0, 1 / (1 - rate)], rtol=1e-6)  # one division of float32
    # 2048 draws: four standard deviations of their mean are 4 · sqrt(0.25 · 0.75 / 2048).
    assert abs((by_head[..., 0] == 0).mean() - rate) < 0.039
    np.testing.assert_array_equal(attention.apply({"params": params}, x, 16, None, False), x)


def test_output_dropout_of_attention_drops_elements_and_scales_the_rest() -> None:
    x, rate = _normal(8, 16, 8), 0.25
    attention = SlicedAttention(width=8, heads=2, drop_rate=rate)
    variables = attention.init(jax.random.key(0), x, 1, None, False)
    kept = np.asarray(attention.apply(variables, x, 1, None, False))
    y = np.asarray(attention.apply(variables, x, 1, None, True, rngs={"dropout": jax.random.key(1)}))

    # 1024 draws: four standard deviations of their mean are 4 · sqrt(0.25 · 0.75 / 1024).
    assert abs((y == 0).mean() - rate) < 0.055
    np.testing.assert_allclose(y[y != 0], (kept / (1 - rate))[y != 0], rtol=1e-5)  # rounding of float32


def test_branches_of_rate_zero_are_left_as_they_are() -> None:
    np.testing.assert_array_equal(draw_branch_scales(jax.random.key(0), 0.0, (5,)), np.ones(5, np.float32))


def test_branches_are_dropped_at_their_rate_and_the_rest_scaled_to_keep_the_mean() -> None:
    rates = np.array([[0.3], [0.6]], np.float32)
    scales = np.asarray(draw_branch_scales(jax.random.key(0), rates, (2, 4096)))
    assert scales.dtype == np.float32
    for row, rate in zip(scales, (0.3, 0.6), strict=True):
        np.testing.assert_allclose(np.unique(row), [0, 1 / (1 - rate)], rtol=1e-6)  # one division of float32
        # Four standard deviations of the mean of 4096 draws.
        assert abs((row > 0).mean() - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / 4096)


def test_layer_norm_epsilon_is_1e_6() -> None:
    # The variance is about epsilon, so that 1e-5 or 1e-7 would change the result by a factor.
    x = 1e-3 * _normal(5, 8)
    variables = {"params": {"scale": _normal(8, seed=1), "bias": _normal(8, seed=2)}}
    expected = numpy_sret.layer_norm(x.astype(np.float64), variables["params"]["scale"], variables["params"]["bias"])
    np.testing.assert_allclose(layer_norm(jnp.float32).apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_layer_norm_does_not_cancel_far_from_zero() -> None:
    # E[x²] is 1e6 here, which float32 holds to 0.06: E[x²] − E[x]² would lose the variance of 1.
    x = 1000 + _normal(5, 64)
    variables = {"params": {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)}}
    expected = numpy_sret.layer_norm(x.astype(np.float64), 1, 0)
    # The mean is rounded by up to 1000 · 6e-8 · a few.
    np.testing.assert_allclose(layer_norm(jnp.float32).apply(variables, x), expected, rtol=0, atol=5e-4)


def test_layer_norm_of_bfloat16_takes_statistics_in_float32() -> None:
    x = jnp.asarray(100 + 4 * _normal(5, 512), jnp.bfloat16)
    variables = {"params": {"scale": np.ones(512, np.float32), "bias": np.zeros(512, np.float32)}}
    y = layer_norm(jnp.bfloat16).apply(variables, x)
    assert y.dtype == jnp.bfloat16
    expected = numpy_sret.layer_norm(np.asarray(x, np.float64), 1, 0)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-4)  # rounding to bfloat16


@pytest.mark.parametrize("size", [8, 7])
def test_convolutions_as_products_of_patches_are_convolutions(size: int) -> None:
    x, kernel = _normal(2, size, size, 3), _normal(3, 3, 3, 5, seed=1)
    cotangent = _normal(2, -(-size // 2), -(-size // 2), 5, seed=2)

    def value_and_gradients(convolve):
        value, pull_back = jax.vjp(convolve, x, kernel)
        return value, *pull_back(cotangent)

    expected = value_and_gradients(layers._convolve)
    for found, array in zip(value_and_gradients(layers._convolve_patches), expected, strict=True):
        np.testing.assert_allclose(found, array, rtol=0, atol=2e-5)  # rounding of sums of up to a hundred numbers


def test_a_dense_layers_gain_multiplies_its_output_and_learns() -> None:
    x, layer = _normal(2, 3, 4), layers.Dense(4, 5)
    params = layer.init(jax.random.key(0), x)
    np.testing.assert_allclose(layer.apply(params, x, 0.7), 0.7 * layer.apply(params, x), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda gain: layer.apply(params, x, gain).sum())(0.7)
    np.testing.assert_allclose(gradient, layer.apply(params, x).sum(), rtol=1e-5)


def test_permuting_tokens_and_its_gradient_are_gathers() -> None:
    x, permutation = _normal(2, 6, 3), np.random.RandomState(0).permutation(6)
    y, pull_back = jax.vjp(lambda x: layers.permute_tokens(x, permutation), x)
    np.testing.assert_array_equal(y, x[:, permutation])
    np.testing.assert_array_equal(pull_back(y)[0], x)


def test_the_stems_patches_are_taken_of_arrays_that_are_computed_once_on_cpus() -> None:
    x, kernel = np.zeros((2, 8, 8, 3), np.float32), np.zeros((3, 3, 3, 5), np.float32)
    found = operations(layers._convolve_patches, x, kernel)
    kept = [equation.invars[0].aval.shape for equation, _ in found if equation.primitive.name == "optimization_barrier"]
    assert kept == [x.shape, (2 * 4 * 4, 9 * 3)]
