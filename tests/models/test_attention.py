"""The ways to compute attention agree with the plain one, forwards and backwards."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models import attention
from sret_jax.models.attention import IMPLEMENTATIONS, SlicedAttention
from tests.models.jaxprs import operations


def _qkv(batch: int, tokens: int, width: int) -> np.ndarray:
    return np.random.RandomState(0).standard_normal((batch, tokens, 3 * width)).astype(np.float32)


def _numpy_attention(qkv: np.ndarray, heads: int, groups: int) -> np.ndarray:
    batch, tokens, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    out = np.empty((batch, tokens, width))
    runs = np.split(np.arange(tokens), groups)
    for b, run, h in np.ndindex(batch, groups, heads):
        columns = slice(h * width // heads, (h + 1) * width // heads)
        q, k, v = (part[:, columns].astype(np.float64) for part in np.split(qkv[b, runs[run]], 3, axis=1))
        scores = q @ k.T / np.sqrt(width // heads)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        out[b, runs[run], columns] = weights / weights.sum(1, keepdims=True) @ v
    return out


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("implementation", ["xla", "pieces"])
def test_implementations_equal_numpys_attention(implementation: str, groups: int, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_MOST_WHOLE", 0)
    monkeypatch.setattr(attention, "_MOST_IN_PIECE", 2 * 4 * 4**2)  # of two images, or of one
    qkv = _qkv(4, 12, 10)
    expected = _numpy_attention(qkv, 2, groups)
    # Rounding of float32 in sums of a dozen numbers near 1.
    np.testing.assert_allclose(IMPLEMENTATIONS[implementation](qkv, 2, groups), expected, rtol=0, atol=1e-6)


# Three sequences fit a piece, of six for each image: those of two images of four, or of one of five.
@pytest.mark.parametrize(("batch", "pieces"), [(4, 12), (5, 10)])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 2e-2)])  # rounding of numbers near 1
def test_pieces_are_loops_whose_gradients_are_those_of_the_whole(
    dtype: str, atol: float, batch: int, pieces: int, monkeypatch
) -> None:
    qkv = jnp.asarray(_qkv(batch, 12, 10), dtype)
    cotangent = jnp.asarray(np.random.RandomState(1).standard_normal((batch, 12, 10)), dtype)

    def gradient(implementation: str, qkv: jax.Array) -> jax.Array:
        out, pull_back = jax.vjp(lambda x: IMPLEMENTATIONS[implementation](x, 2, 3), qkv)
        return pull_back(cotangent.astype(out.dtype))[0]

    expected = gradient("xla", qkv.astype("float32"))
    whole = gradient("pieces", qkv)
    monkeypatch.setattr(attention, "_MOST_WHOLE", 0)
    monkeypatch.setattr(attention, "_MOST_IN_PIECE", 3 * 4 * 4**2)
    found = operations(lambda qkv: gradient("pieces", qkv), qkv)
    assert [e.params["length"] for e, _ in found if e.primitive.name == "scan"] == [pieces] * 2
    # Forwards two products. Backwards the scores again, and gradients of weights, queries, keys and values.
    assert sum(times for e, times in found if e.primitive.name == "dot_general") == pieces * (2 + 5)
    for result in (whole, gradient("pieces", qkv)):
        assert result.dtype == dtype
        np.testing.assert_allclose(np.float64(result), np.float64(expected), rtol=0, atol=atol)


def test_pieces_fit_the_caches_and_are_few() -> None:
    # (batch, slices and heads, tokens): of stages of SReT-S, and of a prime number of images
    shapes = [(16, 24, 98), (16, 6, 392), (16, 6, 196), (127, 16, 196), (2, 12, 2304)]
    assert [attention._piece(*shape) for shape in shapes] == [None, (4, 1), None, (1, 16), (1, 1)]


@pytest.mark.parametrize(("tokens", "computed"), [(4, 4), (5, 6)])
def test_cudnn_is_given_padded_heads_and_an_even_number_of_tokens(monkeypatch, tokens: int, computed: int) -> None:
    asked = []

    def by_xla(*args, implementation, **kwargs):
        asked.append((implementation, args[0].shape))
        return product(*args, implementation="xla", **kwargs)

    product = functools.partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    qkv = _qkv(2, 3 * tokens, 10)
    found, pull = jax.vjp(lambda qkv: IMPLEMENTATIONS["cudnn"](qkv, 2, 3), jnp.asarray(qkv))
    assert asked == [("cudnn", (6, computed, 2, 8))]
    np.testing.assert_allclose(found, _numpy_attention(qkv, 2, 3), rtol=0, atol=1e-6)  # rounding of float32
    wanted, reference = jax.vjp(lambda qkv: IMPLEMENTATIONS["xla"](qkv, 2, 3), jnp.asarray(qkv))
    np.testing.assert_allclose(pull(wanted)[0], reference(wanted)[0], rtol=0, atol=1e-5)  # rounding of float32


def test_the_fastest_implementation_is_chosen_by_platform_and_overridden_by_a_field() -> None:
    chosen = {
        platform: attention.fastest(platform, 784, 64, 2, (8, 2), jnp.bfloat16) for platform in ("cpu", "gpu", "tpu")
    }
    assert chosen == {"cpu": "pieces", "gpu": "xla", "tpu": "pallas"}
    assert _has_kernels(platform="tpu")
    assert not _has_kernels(platform="gpu")
    assert not _has_kernels(platform="tpu", attention="xla")
    assert _has_kernels(platform="cpu", attention="pallas")


@pytest.mark.parametrize(
    ("capability", "head_width", "dtype", "chosen"),
    [
        ("9.0", 32, "bfloat16", "cudnn"),
        ("8.0", 128, jnp.bfloat16, "cudnn"),
        ("10.3", 42, "bfloat16", "cudnn"),
        ("9.0", 136, "bfloat16", "xla"),
        ("9.0", 32, "float32", "xla"),
        ("7.5", 32, "bfloat16", "xla"),
        ("gfx942", 32, "bfloat16", "xla"),
    ],
)
def test_cudnn_is_chosen_where_it_can_attend(monkeypatch, capability: str, head_width: int, dtype, chosen: str) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert attention.fastest("gpu", 784, 2 * head_width, 2, (1, 1), dtype) == chosen
    assert attention.fastest("cpu", 784, 2 * head_width, 2, (1, 1), dtype) == "pieces"


def _has_kernels(**fields: str) -> bool:
    one_stage = {"widths": (4,), "heads": (2,), "blocks": (1,), "recursions": (1,), "slices": ((1, 1),)}
    model = sret_jax.SReT(image_size=16, num_classes=2, **one_stage, **fields)
    images = jnp.zeros((1, 16, 16, 3))
    found = operations(
        model.apply,
        sret_jax.create_model("sret_t", image_size=16, num_classes=2, **one_stage).init(jax.random.key(0), images),
        images,
    )
    calls = [equation.params["name"] for equation, _ in found if equation.primitive.name == "pallas_call"]
    return any("attention" in name for name in calls)


def test_dropout_on_attention_weights_is_computed_by_products_whatever_the_implementation() -> None:
    x = _qkv(2, 8, 2)
    layer = SlicedAttention(6, 2, attn_drop_rate=0.5, implementation="pallas")
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    y, _ = layer.init_with_output(rngs, x, 2, None, True)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("fields", [{"attention": "flash"}, {"mlp": "fused"}, {"platform": "cuda"}])
def test_unknown_ways_are_refused_with_those_that_there_are(fields: dict[str, str]) -> None:
    (name,) = fields
    with pytest.raises(sret_jax.UserError, match=rf"{name} is '\w+', expected None, '\w+'"):
        sret_jax.create_model("sret_t", **fields)
