"""The fused MLP kernels, interpreted, against an MLP written out in NumPy with its gradient by hand."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sret_jax import UserError, create_model, list_models
from sret_jax.models.fused_mlp import Weights, fused_mlp, rows_of_tile, weights_fit
from sret_jax.models.layers import layer_norm
from sret_jax.models.mlp import MLP
from sret_jax.plan.collectives import find_collectives
from sret_jax.training.mesh import make_mesh, split_batch
from tests.models.jaxprs import kernel_work, operations

# Of the largest number: rounding of float32 sums; of factors and results to bfloat16's 8 bits.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}
EPSILON = 1e-6


def zoo_shapes(image_size: int) -> list[tuple[int, int, int]]:
    """All (tokens, width, hidden) of the published networks, in their order."""
    shapes = {}
    for name in list_models():
        try:
            model = create_model(name, image_size=image_size)
        except UserError:  # its slices do not divide so many tokens
            continue
        for size, width in zip(model.grid_sizes, model.widths, strict=True):
            ratios = (model.mlp_ratio, model.nll_ratio)
            shapes |= dict.fromkeys((size * size, width, int(width * ratio)) for ratio in ratios)
    return list(shapes)


def draw(batch: int, tokens: int, width: int, hidden: int, dtype: str, seed: int = 0):
    """Random arguments of `fused_mlp`, the first image's branch dropped, and a random gradient of the output."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * random.standard_normal(shape), jnp.float32)

    x, grad = (normal(batch, tokens, width).astype(dtype) for _ in range(2))
    scales = jnp.asarray([0.0, *[1.25] * batch][:batch], jnp.float32)
    weights = Weights(
        1 + normal(width, scale=0.1),
        normal(width, scale=0.1),
        normal(width, hidden, scale=width**-0.5),
        normal(hidden, scale=0.1),
        normal(hidden, width, scale=hidden**-0.5),
        normal(width, scale=0.1),
    )
    return x, normal() + 2, normal() - 2, scales, weights, grad


@jax.jit
def fused(x, keep, gain, scales, weights, grad):
    """Output, and gradients of x, keep, gain and the weights."""
    function = functools.partial(fused_mlp, epsilon=EPSILON, interpret=True)
    out, pull = jax.vjp(lambda *a: function(*a[:3], scales, a[3]), x, keep, gain, weights)
    return out, *pull(grad)


def written_out(x, keep, gain, scales, weights, grad):
    """The same, float64."""
    x, keep, gain, scales, grad = (np.float64(array) for array in (x, keep, gain, scales, grad))
    norm_scale, norm_bias, kernel1, bias1, kernel2, bias2 = map(np.float64, weights)
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)
    normalised = centred / deviation
    normed = normalised * norm_scale + norm_bias
    hidden = normed @ kernel1 + bias1
    cdf = 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    y = hidden * cdf @ kernel2 + bias2

    def over_tokens(a, b):
        return np.einsum("bni,bnj->ij", a, b)

    y_grad = gain * grad * scales[:, None, None]
    slope = cdf + hidden * np.exp(-(hidden**2) / 2) / math.sqrt(2 * math.pi)
    hidden_grad = y_grad @ kernel2.T * slope
    normed_grad = hidden_grad @ kernel1.T
    z = normed_grad * norm_scale
    x_grad = z - z.mean(-1, keepdims=True) - normalised * (z * normalised).mean(-1, keepdims=True)
    weights_grad = Weights(
        (normed_grad * normalised).sum((0, 1)),
        normed_grad.sum((0, 1)),
        over_tokens(normed, hidden_grad),
        hidden_grad.sum((0, 1)),
        over_tokens(hidden * cdf, y_grad),
        y_grad.sum((0, 1)),
    )
    branch = scales[:, None, None] * y
    x_grad = keep * grad + x_grad / deviation
    return keep * x + gain * branch, x_grad, (grad * x).sum(), (grad * branch).sum(), weights_grad


def assert_as_written_out(batch, tokens, width, hidden, dtype, seed=0):
    arguments = draw(batch, tokens, width, hidden, dtype, seed)
    found, expected = fused(*arguments), written_out(*arguments)
    assert found[0].dtype == found[1].dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(found[2:])} == {np.dtype("float32")}
    for i, (value, wanted) in enumerate(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)):
        rtol = TOLERANCES[dtype][i > 0]
        # A sum whose terms cancel is rounded as they are: gradients of coefficients are one number of many products.
        largest = max(np.abs(wanted).max(), math.sqrt(batch * tokens * width) if wanted.ndim == 0 else 0)
        np.testing.assert_allclose(np.float64(value), wanted, rtol=0, atol=rtol * largest)


def widest_dtype(width, hidden):
    """What weights of this size may be on the chip."""
    return next(dtype for dtype in ("float32", "bfloat16") if weights_fit(width, hidden, dtype))


@pytest.mark.parametrize("shape", zoo_shapes(224), ids=str)
def test_every_shape_of_the_zoo_is_as_written_out(shape):
    assert_as_written_out(2, *shape, widest_dtype(*shape[1:]))


@pytest.mark.parametrize("shape", zoo_shapes(224)[:1] + zoo_shapes(224)[-1:], ids=str)
def test_bfloat16_is_as_written_out(shape):
    assert_as_written_out(2, *shape, "bfloat16")


@pytest.mark.parametrize("tokens", [300, 320])
def test_wide_layers_take_few_tokens_at_a_time(tokens):
    # 1 MiB holds 64 rows of 4096 channels in float32, 170 of 1536
    assert rows_of_tile(tokens, 4000) == 64
    assert [rows_of_tile(256, 1512), rows_of_tile(196, 1512), rows_of_tile(49, 1512)] == [128, 160, 49]
    assert [rows_of_tile(784, 230), rows_of_tile(300, 230), rows_of_tile(5, 10**6)] == [112, 256, 5]
    assert_as_written_out(1, tokens, 8, 4000, "float32")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for s in zoo_shapes(384) + zoo_shapes(512) if s[0] < 1000], ids=str)
def test_every_shape_of_larger_images_is_as_written_out(shape):
    assert_as_written_out(1, *shape, widest_dtype(*shape[1:]))


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(1, 50), st.integers(1, 150)),
    dtype=st.sampled_from(list(TOLERANCES)),
    seed=st.integers(0, 1000),
)
def test_any_shape_is_as_written_out(shape, dtype, seed):
    batch, tokens, width, hidden = shape
    # A norm of one channel, or of two alike, divides rounding by epsilon.
    assert_as_written_out(batch, tokens, width + 3, hidden, dtype, seed)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 784, 8, 20),  # tokens in several equal turns
        (2, 729, 8, 20),  # in turns, the last shorter
        (8, 576, 160, 30),  # images in several programs, whose gradients add up
        (1, 1, 6, 1),
        (2, 6000, 4, 6),  # an image too long for a program
    ],
)
def test_shapes_that_are_cut_otherwise_are_as_written_out(shape):
    assert_as_written_out(*shape, "float32")


def test_the_layer_computes_the_same_in_both_ways(monkeypatch):
    x, keep, gain, scales, _, grad = draw(3, 20, 8, 12, "float32")
    monkeypatch.setattr("sret_jax.models.fused_mlp.fused_mlp", functools.partial(fused_mlp, interpret=True))

    def run(implementation, scales):
        layer = MLP(8, 12, layer_norm(jnp.float32, "norm"), implementation=implementation)
        variables = layer.init(jax.random.key(0), x, keep, gain, scales, False)
        variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)  # norms and biases begin at 0 and 1
        out, pull = jax.vjp(lambda *a: layer.apply(*a, scales, True), variables, x, keep, gain)
        return out, pull(grad)

    for given in (scales, None):
        found, expected = run("pallas", given), run("xla", given)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, expected)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    x, keep, gain, scales, weights, grad = draw(6, 20, 8, 12, "float32")
    whole = fused(x, keep, gain, scales, weights, grad)[:2]
    for count in (1, 5):
        part = fused(x[:count], keep, gain, scales[:count], weights, grad[:count])[:2]
        for value, expected in zip(part, whole, strict=True):
            np.testing.assert_array_equal(value, expected[:count])


def test_nothing_but_the_arguments_is_kept_for_the_gradient():
    arguments = draw(2, 48, 8, 30, "bfloat16")[:5]
    _, pull = jax.vjp(functools.partial(fused_mlp, epsilon=EPSILON, interpret=True), *arguments)
    kept = sorted(leaf.shape for leaf in jax.tree.leaves(pull))
    assert kept == sorted(leaf.shape for leaf in jax.tree.leaves(arguments))


@pytest.mark.parametrize("shape", [(784, 64, 230), (49, 32, 40)], ids=str)
def test_the_compiler_is_told_what_the_kernels_compute_and_move(shape):
    tokens, width, hidden = shape
    arguments = draw(2, tokens, width, hidden, "bfloat16")
    calls, flops, transcendentals = kernel_work(operations(fused, *arguments), {"erf", "exp", "rsqrt"})
    # Programs of the backward kernel add to the same sums: no chip may take them at once.
    semantics = [call.params["compiler_params"].dimension_semantics for call in calls]
    assert semantics == [("parallel",), ("arbitrary",)]
    estimates = [call.params["cost_estimate"] for call in calls]
    assert sum(estimate.flops for estimate in estimates) == flops
    assert sum(estimate.transcendentals for estimate in estimates) == transcendentals
    moved = [sum(v.aval.size * v.aval.dtype.itemsize for v in (*call.invars, *call.outvars)) for call in calls]
    assert [estimate.bytes_accessed for estimate in estimates] == moved
    # What grows with the batch is read and written once: x and the output, with both gradients.
    weights_bytes = 12 * width * hidden
    for estimate, arrays in zip(estimates, (2, 3), strict=True):
        assert (
            arrays * arguments[0].nbytes <= estimate.bytes_accessed < arrays * arguments[0].nbytes + 2 * weights_bytes
        )


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")])
def test_float32_products_are_float32_on_tpus_too(dtype, precision):
    found = operations(fused, *draw(2, 8, 8, 12, dtype))
    products = [e for e, _ in found if e.primitive.name == "dot_general" and e.outvars[0].aval.ndim == 2]
    assert len(products) == 7
    assert {p.name for product in products for p in product.params["precision"]} == {precision}


@pytest.fixture(scope="module", params=[{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def mesh(request):
    return make_mesh(request.param, 16)


def test_eight_devices_compute_the_same_and_add_up_gradients_alone(mesh):
    arguments = draw(16, 28, 8, 20, "float32")
    split, everywhere = split_batch(mesh), NamedSharding(mesh, PartitionSpec())
    on_mesh = [
        jax.device_put(argument, placement)
        for argument, placement in zip(arguments, (split, *[everywhere] * 2, split, everywhere, split), strict=True)
    ]
    compiled = fused.lower(*on_mesh).compile()
    assert {found.kind for found in find_collectives(compiled.as_text())} == {"all-reduce"}
    found, expected = compiled(*on_mesh), fused(*arguments)
    for value, wanted in zip(found[:2], expected[:2], strict=True):
        assert value.sharding.is_equivalent_to(split, 3)
        np.testing.assert_array_equal(value, wanted)
    for value, wanted in zip(jax.tree.leaves(found[2:]), jax.tree.leaves(expected[2:]), strict=True):
        # sums over the batch in another order
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("batch", [12, 3])
def test_a_batch_that_the_devices_cannot_share_is_still_right(batch):
    mesh = make_mesh({"data": 2, "fsdp": 4}, 8)
    arguments = draw(batch, 28, 8, 20, "float32")
    found = fused(*jax.device_put(arguments, NamedSharding(mesh, PartitionSpec())))
    for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(fused(*arguments)), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=0, atol=1e-5 * max(1, np.abs(wanted).max()))
