"""The fused attention kernels, interpreted, against attention written out in NumPy with its gradient by hand."""

import functools
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sret_jax import UserError, create_model, list_models
from sret_jax.models.fused_attention import fused_attention
from sret_jax.plan.collectives import find_collectives
from sret_jax.training.mesh import make_mesh, split_batch
from tests.models.jaxprs import kernel_work, operations

# Rounding: of float32 sums; of weights and results to bfloat16's 8 bits.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (2e-2, 2e-2)}


def zoo_shapes(image_size: int) -> list[tuple[int, int, int, int]]:
    """All (tokens, width, heads, groups) of the published networks, in their order."""
    shapes = {}
    for name in list_models():
        try:
            model = create_model(name, image_size=image_size)
        except UserError:  # its slices do not divide so many tokens
            continue
        for size, width, heads, slices in zip(model.grid_sizes, model.widths, model.heads, model.slices, strict=True):
            shapes |= dict.fromkeys((size * size, width, heads, groups) for groups in slices)
    return list(shapes)


def attend(qkv: np.ndarray, grad: np.ndarray, heads: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention's output and the gradient of its input, float64, one slice and head after the other."""
    batch, tokens, width = grad.shape
    size, head_width = tokens // groups, width // heads
    scale = head_width**-0.5
    out, qkv_grad = np.empty(grad.shape), np.empty(qkv.shape)
    for image, group, head in np.ndindex(batch, groups, heads):
        rows = slice(group * size, (group + 1) * size)
        columns = [slice(s, s + head_width) for s in range(head * head_width, 3 * width, width)]
        query, key, value = (np.float64(qkv[image, rows, c]) for c in columns)
        scores = query @ key.T * scale
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        out[image, rows, columns[0]] = weights @ value
        out_grad = np.float64(grad[image, rows, columns[0]])
        weights_grad = out_grad @ value.T
        scores_grad = weights * (weights_grad - (weights * weights_grad).sum(1, keepdims=True)) * scale
        for c, part in zip(columns, (scores_grad @ key, scores_grad.T @ query, weights.T @ out_grad), strict=True):
            qkv_grad[image, rows, c] = part
    return out, qkv_grad


def draw(batch: int, tokens: int, width: int, dtype: str, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """A random input and a random gradient of the output."""
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.standard_normal((batch, tokens, k * width)), dtype) for k in (3, 1))


@functools.partial(jax.jit, static_argnums=(2, 3))
def fused(qkv: jax.Array, grad: jax.Array, heads: int, groups: int) -> tuple[jax.Array, jax.Array]:
    """As `attend`."""
    out, pull = jax.vjp(lambda qkv: fused_attention(qkv, heads, groups, interpret=True), qkv)
    return out, *pull(grad)


def assert_as_written_out(batch, tokens, width, heads, groups, dtype, seed=0):
    qkv, grad = draw(batch, tokens, width, dtype, seed)
    found = fused(qkv, grad, heads, groups)
    for value, expected, atol in zip(found, attend(qkv, grad, heads, groups), TOLERANCES[dtype], strict=True):
        assert value.dtype == dtype
        np.testing.assert_allclose(np.float64(value), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", zoo_shapes(224), ids=str)
def test_every_shape_of_the_zoo_is_as_written_out(shape):
    assert_as_written_out(1, *shape, "float32")


@pytest.mark.parametrize("shape", zoo_shapes(224)[:2] + zoo_shapes(224)[-2:], ids=str)
def test_bfloat16_is_as_written_out(shape):
    assert_as_written_out(1, *shape, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", zoo_shapes(384) + zoo_shapes(512), ids=str)
def test_every_shape_of_larger_images_is_as_written_out(shape, dtype):
    tokens, width, heads, groups = shape
    if tokens > 1024:  # of many equal heads, one register's worth
        width, heads = 2 * width // heads, 2
    assert_as_written_out(1, tokens, width, heads, groups, dtype)


@st.composite
def shapes(draw):
    groups, heads = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    tokens = groups * draw(st.integers(1, 300 // groups))
    return draw(st.integers(1, 5)), tokens, heads * draw(st.integers(1, 50)), heads, groups


@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(shape=shapes(), dtype=st.sampled_from(list(TOLERANCES)), seed=st.integers(0, 1000))
def test_any_shape_is_as_written_out(shape, dtype, seed):
    assert_as_written_out(*shape, dtype, seed)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 600, 8, 2, 1),  # queries in several turns, the last shorter
        (2, 1034, 4, 2, 2),  # and they do not start where a register does
        (2, 34, 12, 2, 17),  # two tokens each
        (5, 14, 400, 2, 2),  # heads wider than a register
        (1, 3, 6, 6, 3),  # tokens on their own, heads of one channel
    ],
)
def test_shapes_that_are_cut_otherwise_are_as_written_out(shape):
    assert_as_written_out(*shape, "float32")


def test_large_scores_do_not_overflow():
    qkv, grad = draw(1, 10, 8, "float32")
    out, qkv_grad = fused(1e3 * qkv, grad, 2, 1)
    expected = attend(1e3 * qkv, grad, 2, 1)
    np.testing.assert_allclose(out, expected[0], rtol=1e-4, atol=1e-2)  # of values of a thousand
    np.testing.assert_allclose(qkv_grad, expected[1], rtol=1e-4, atol=1e-2)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    qkv, grad = draw(6, 20, 8, "float32")
    whole = fused(qkv, grad, 2, 2)
    for count in (1, 5):
        for part, value in zip(fused(qkv[:count], grad[:count], 2, 2), whole, strict=True):
            np.testing.assert_array_equal(part, value[:count])


def test_the_input_is_all_that_is_kept_for_the_gradient():
    qkv, _ = draw(2, 48, 8, "bfloat16")
    _, pull = jax.vjp(lambda qkv: fused_attention(qkv, 2, 1, interpret=True), qkv)
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [qkv.shape]


@pytest.mark.parametrize("shape", [(300, 64, 2, 1), (256, 256, 8, 2), (256, 32, 1, 64), (1200, 8, 1, 1)], ids=str)
def test_the_compiler_is_told_what_the_kernels_compute_and_move(shape):
    tokens, width, heads, groups = shape
    qkv, grad = draw(2, tokens, width, "bfloat16")
    found = operations(lambda *arrays: fused(*arrays, heads, groups), qkv, grad)
    calls, flops, transcendentals = kernel_work(found, {"exp2"})
    assert len(calls) == 2
    estimates = [call.params["cost_estimate"] for call in calls]
    assert sum(estimate.flops for estimate in estimates) == flops
    assert sum(estimate.transcendentals for estimate in estimates) == transcendentals
    moved = [sum(v.aval.size * v.aval.dtype.itemsize for v in (*call.invars, *call.outvars)) for call in calls]
    assert [estimate.bytes_accessed for estimate in estimates] == moved == [4 * grad.nbytes, 7 * grad.nbytes]


@pytest.fixture(scope="module", params=[{"data": 8}, {"data": 2, "fsdp": 4}], ids=str)
def mesh(request):
    return make_mesh(request.param, 16)


def test_eight_devices_compute_the_same_without_a_word_to_each_other(mesh):
    qkv, grad = draw(16, 28, 16, "float32")
    split = jax.device_put((qkv, grad), split_batch(mesh))
    compiled = fused.lower(*split, 2, 2).compile()
    assert find_collectives(compiled.as_text()) == []
    for value, expected in zip(compiled(*split), fused(qkv, grad, 2, 2), strict=True):
        assert value.sharding.is_equivalent_to(split_batch(mesh), 3)
        np.testing.assert_array_equal(value, expected)


def test_scans_with_rematerialisation_run_on_eight_devices(mesh):
    def gradients(qkv, weights):
        @jax.checkpoint
        def layer(qkv, weights):
            return fused_attention(qkv, 2, 2, interpret=True) @ weights, None

        return jax.grad(lambda *a: jnp.square(jax.lax.scan(layer, *a)[0]).sum(), argnums=(0, 1))(qkv, weights)

    qkv, _ = draw(16, 28, 16, "float32")
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((2, 16, 48)) / 4, jnp.float32)
    on_mesh = jax.device_put(qkv, split_batch(mesh)), jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    found, expected = jax.jit(gradients)(*on_mesh), jax.jit(gradients)(qkv, weights)
    for value, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-4, atol=1e-4)  # a sum over the batch in another order


@pytest.mark.parametrize("batch", [12, 3])
def test_a_batch_that_the_devices_cannot_share_is_still_right(batch):
    mesh = make_mesh({"data": 2, "fsdp": 4}, 8)
    qkv, grad = draw(batch, 28, 16, "float32")
    whole = jax.device_put((qkv, grad), NamedSharding(mesh, PartitionSpec()))
    for value, expected in zip(fused(*whole, 2, 2), fused(qkv, grad, 2, 2), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_importing_the_library_does_not_import_pallas():
    code = (
        "import sys, sret_jax.models.fused_attention, sret_jax.models.fused_mlp; "
        "sys.exit('jax.experimental.pallas' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
