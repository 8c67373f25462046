"""The compiler for TPUs takes the kernels as they are called by every published network."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sret_jax.models import attention
from sret_jax.models.fused_attention import fits, fused_attention
from sret_jax.models.fused_mlp import fused_mlp, weights_fit
from sret_jax.models.layers import largest_divisor
from sret_jax.models.tpu_kernels import held_bytes, images_in_program, parts_of_image, traced_for
from sret_jax.plan.devices import find_target
from sret_jax.training.mesh import make_mesh
from tests.models import test_fused_attention, test_fused_mlp


def test_a_program_takes_as_many_images_as_fit_and_divide_the_batch():
    def images(batch: int, tokens: int, width: int) -> int:
        return images_in_program([jax.ShapeDtypeStruct((batch, tokens, width), jnp.bfloat16)] * 2)

    assert held_bytes((3, 5, 130), jnp.bfloat16) == 3 * 5 * 256 * 2
    # 2 MiB hold 5 images of two arrays of 784 tokens, whose 64 channels take a register's 128 lanes, 83 of 49
    assert [images(128, 784, 64), images(10, 784, 64), images(7, 784, 64)] == [4, 5, 1]
    assert images(81, 49, 128) == 81
    assert images(2, 10**6, 128) == 1
    # and 4096 tokens of three arrays in two parts
    assert [parts_of_image(tokens, 64, jnp.bfloat16, arrays=3) for tokens in (784, 2304, 4096)] == [1, 1, 2]
    assert [largest_divisor(12, limit) for limit in (0, 1, 5, 12, 100)] == [1, 1, 4, 12, 12]


V4, V5P, V5E = (types.SimpleNamespace(device_kind=f"TPU {kind}") for kind in ("v4", "v5", "v5 lite"))


# Tokens, width, heads and groups, and what the compiler says.
@pytest.mark.parametrize(
    ("device", "shape", "dtype", "takes"),
    [
        (V4, (784, 64, 2, 1), "float32", True),
        (V4, (784, 126, 3, 1), "float32", False),
        (V4, (784, 126, 3, 2), "float32", True),
        (V4, (784, 126, 3, 1), "bfloat16", True),
        (V4, (196, 252, 6, 1), "float32", True),
        (V4, (576, 128, 4, 1), "float32", True),
        (V4, (576, 252, 6, 1), "bfloat16", True),
        (V4, (576, 252, 6, 1), "float32", False),
        (V4, (2304, 64, 2, 1), "bfloat16", False),
        (V4, (2304, 64, 2, 2), "bfloat16", True),
        (V4, (2304, 64, 2, 2), "float32", False),
        (V4, (2304, 64, 2, 8), "float32", False),
        (V4, (2304, 126, 3, 2), "bfloat16", False),
        (V4, (2304, 126, 3, 4), "bfloat16", True),
        (V4, (2304, 126, 3, 8), "bfloat16", True),
        (V5P, (2304, 126, 3, 1), "float32", True),
        (V5P, (2304, 252, 6, 1), "float32", False),
        (V5P, (2304, 252, 6, 1), "bfloat16", True),
        (V5P, (4096, 64, 2, 1), "float32", True),
        (V5P, (4096, 126, 3, 1), "float32", False),
        (V5P, (4096, 126, 3, 1), "bfloat16", True),
        (V5P, (5184, 126, 3, 1), "bfloat16", False),
        (V5P, (5184, 126, 3, 2), "float32", False),
        (V5P, (5184, 126, 3, 2), "bfloat16", True),
        (V5P, (6400, 64, 2, 1), "float32", False),
        (V5P, (6400, 64, 2, 1), "bfloat16", True),
        (V5P, (6400, 64, 2, 2), "float32", False),
        (V5P, (6400, 126, 3, 8), "float32", True),
        (V5P, (9216, 126, 3, 2), "bfloat16", False),
        (V5E, (4096, 64, 2, 1), "float32", True),
        (V5E, (6400, 64, 2, 1), "float32", False),
        (V5E, (6400, 126, 3, 1), "bfloat16", False),
        (V5E, (6400, 126, 3, 2), "float32", False),
        (V5E, (6400, 126, 3, 8), "float32", True),
    ],
)
def test_attentions_kernels_are_chosen_where_the_compiler_takes_them(device, shape, dtype, takes):
    tokens, width, heads, groups = shape
    with traced_for(device):
        assert fits(*shape, dtype) == takes
        chosen = attention.fastest("tpu", tokens, width, heads, (groups, groups), dtype)
        assert chosen == ("pallas" if takes else "xla")
        # all applications of a stage are computed alike
        whole_too = attention.fastest("tpu", tokens, width, heads, (groups, 1), dtype)
        assert whole_too == ("pallas" if takes and fits(tokens, width, heads, 1, dtype) else "xla")


@pytest.mark.parametrize("device", [V4, V5P, V5E])
def test_the_published_networks_use_attentions_kernels_in_bfloat16(device):
    with traced_for(device):
        for size in (224,) if device is V4 else (224, 384, 512):
            assert all(fits(*shape, "bfloat16") for shape in test_fused_attention.zoo_shapes(size))


# A v4 has the least vector memory. Its smallest slice has four chips, as a v5p's has, of which one is taken.
@pytest.mark.by_hand
@pytest.mark.parametrize("topology", ["v5e:1x1", "v4:2x2x1", "v5p:2x2x1"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("image_size", [224, 384, 512])
def test_the_compiler_takes_every_shape_of_the_zoo(image_size, dtype, topology):
    for tokens, width, hidden in test_fused_mlp.zoo_shapes(image_size):
        if weights_fit(width, hidden, dtype):
            *arguments, grad = jax.eval_shape(functools.partial(test_fused_mlp.draw, 8, tokens, width, hidden, dtype))
            compile_for_tpus(topology, functools.partial(fused_mlp, epsilon=1e-6), grad, *arguments)
    for tokens, width, heads, groups in test_fused_attention.zoo_shapes(image_size):
        with traced_for(find_target(topology).devices[0]):
            if not fits(tokens, width, heads, groups, dtype):
                continue
        qkv, grad = (jax.ShapeDtypeStruct((8, tokens, k * width), dtype) for k in (3, 1))
        compile_for_tpus(topology, functools.partial(fused_attention, heads=heads, groups=groups), grad, qkv)


def compile_for_tpus(topology, function, grad, *arguments):
    """A function and its gradient, on one chip."""
    mesh = make_mesh({"data": 1}, 8, find_target(topology).devices[:1])
    everywhere = NamedSharding(mesh, PartitionSpec())
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), (grad, arguments)
    )

    def with_gradient(grad, arguments):
        out, pull = jax.vjp(function, *arguments)
        return out, pull(grad)

    jax.jit(with_gradient).lower(*abstract).compile()
