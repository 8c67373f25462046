"""The MLP with its norm and residual connection, and the non-linear projection layer, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models import mlp
from sret_jax.models.layers import layer_norm
from sret_jax.models.mlp import MLP, NonLinearProjection
from tests.models import numpy_sret
from tests.models.jaxprs import operations


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def _official_mlp(params) -> dict[str, np.ndarray]:
    linear = {name: params[name] for name in ("fc1", "fc2")}
    weights = {f"mlp.{fc}.weight": np.asarray(layer["kernel"]).T for fc, layer in linear.items()}
    return weights | {f"mlp.{fc}.bias": np.asarray(layer["bias"]) for fc, layer in linear.items()}


def _through_identities(x: np.ndarray, rate: float = 0.0) -> tuple[MLP, dict]:
    """An MLP with its variables whose norm gives x, (c,), for every token, and whose kernels are identities."""
    count = len(x)
    identity = {"kernel": np.eye(count, dtype=np.float32), "bias": np.zeros(count, np.float32)}
    params = {"norm": {"scale": np.zeros(count, np.float32), "bias": x}, "fc1": identity, "fc2": identity}
    return MLP(count, count, layer_norm(jnp.float32, "norm"), drop_rate=rate), {"params": params}


def test_mlp_uses_the_exact_gelu() -> None:
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    layer, variables = _through_identities(x)
    y = layer.apply(variables, _normal(1, 1, 33), 0.0, 1.0, None, train=False)
    expected = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.tolist()]
    # Rounding of float32; the tanh approximation is wrong by up to 5e-4.
    np.testing.assert_allclose(y[0, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # the latter pads hidden channels
@pytest.mark.parametrize("scales", [None, np.array([0, 1.25], np.float32)], ids=["", "stochastic depth"])
def test_mlp_equals_numpy(scales: np.ndarray | None, platform: str) -> None:
    x = _normal(2, 3, 4)
    params = {
        "norm": {"scale": _normal(4, seed=5), "bias": _normal(4, seed=6)},
        "fc1": {"kernel": _normal(4, 6, seed=1), "bias": _normal(6, seed=2)},
        "fc2": {"kernel": _normal(6, 4, seed=3), "bias": _normal(4, seed=4)},
    }
    layer = MLP(4, 6, layer_norm(jnp.float32, "norm"), platform=platform)
    y = layer.apply({"params": params}, x, jnp.float32(0.7), jnp.float32(-2), scales, train=True)
    normed = numpy_sret.layer_norm(x.astype(np.float64), params["norm"]["scale"], params["norm"]["bias"])
    branch = numpy_sret.mlp(_official_mlp(params), normed) * (1 if scales is None else scales[:, None, None])
    # rounding of float32 in sums of six products
    np.testing.assert_allclose(y, 0.7 * x - 2 * branch, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("platform", "hidden"), [("cpu", 6), ("gpu", 8), ("tpu", 6)])
def test_hidden_channels_are_whole_vectors_on_gpus_alone(platform: str, hidden: int) -> None:
    layer, x, one = MLP(4, 6, layer_norm(jnp.float32, "norm"), platform=platform), _normal(2, 3, 4), jnp.float32(1)
    variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, one, one, None, train=True))
    found = operations(lambda v: layer.apply(v, x, one, one, None, train=True), variables)
    products = [e.outvars[0].aval.shape[-1] for e, _ in found if e.primitive.name == "dot_general"]
    assert products == [hidden, 4]


def test_mlp_drops_hidden_units_and_outputs() -> None:
    # Through identities and at 10, where GELU is the identity, an output is 0 or 10 / (1 − rate)².
    layer, variables = _through_identities(np.full(4, 10, np.float32), rate=0.5)
    x = _normal(2, 256, 4)
    y = layer.apply(variables, x, jnp.float32(0), 1.0, None, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(np.unique(y), [0, 40], rtol=1e-5)  # rounding of float32
    # Both must keep it: probability 1/4. Four standard deviations of 2048 draws: 4 · sqrt(0.25 · 0.75 / 2048).
    assert abs((np.asarray(y) > 0).mean() - 0.25) < 0.039
    in_evaluation = layer.apply(variables, x, jnp.float32(0), 1.0, None, train=False)
    np.testing.assert_allclose(in_evaluation, np.full(x.shape, 10), rtol=1e-6)


def test_where_dropout_is_active_mlps_are_products_whatever_the_implementation() -> None:
    layer = MLP(4, 6, layer_norm(jnp.float32, "norm"), drop_rate=0.5, implementation="pallas")
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    x, one = _normal(2, 8, 4), jnp.float32(1)
    variables = layer.init(rngs, x, one, one, None, train=True)
    assert np.isfinite(layer.apply(variables, x, one, one, None, train=True, rngs=rngs)).all()
    assert "pallas_call" in _primitives(lambda x: layer.apply(variables, x, one, one, None, train=False), x)


def test_non_linear_projection_weighs_its_input_and_its_mlp() -> None:
    x = _normal(2, 3, 4)
    layer = NonLinearProjection(mlp_ratio=1.5)
    params = layer.init(jax.random.key(0), x, False)["params"]
    assert params["mlp"]["fc1"]["kernel"].shape == (4, 6)
    normed = numpy_sret.layer_norm(x.astype(np.float64), params["norm"]["scale"], params["norm"]["bias"])
    y = layer.apply({"params": params | {"coefficients": np.array([2, -3], np.float32)}}, x, False)
    # rounding of float32 in sums of six products
    np.testing.assert_allclose(
        y, 2 * x - 3 * numpy_sret.mlp(_official_mlp(params["mlp"]), normed), rtol=1e-5, atol=1e-5
    )


def test_gelu_is_the_exact_one_and_so_is_its_gradient() -> None:
    x = np.linspace(-6, 6, 101, dtype=np.float32)
    cdf = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    density = np.exp(-(x.astype(np.float64) ** 2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(mlp.gelu(x), x * cdf, rtol=0, atol=1e-6)  # rounding of 1 + erf
    gradient = jax.vmap(jax.grad(mlp.gelu))(x)
    np.testing.assert_allclose(gradient, cdf + x * density, rtol=0, atol=1e-6)


def test_the_fastest_implementation_is_chosen_by_platform_and_size() -> None:
    chosen = {platform: mlp.fastest(platform, 64, 230, jnp.bfloat16) for platform in ("cpu", "gpu", "tpu")}
    assert chosen == {"cpu": "xla", "gpu": "xla", "tpu": "pallas"}
    # 12 bytes for each pair of a token's and a hidden channel, of the 9 MiB that weights may take
    assert mlp.fastest("tpu", 512, 1536, jnp.bfloat16) == "pallas"
    assert mlp.fastest("tpu", 512, 1664, jnp.bfloat16) == "xla"
    # 28 bytes, of which 12 are the parts that float32 is multiplied in
    assert mlp.fastest("tpu", 512, 640, jnp.float32) == "pallas"
    assert mlp.fastest("tpu", 512, 768, jnp.float32) == "xla"


def test_a_field_of_the_network_overrides_what_is_fastest() -> None:
    assert _kernels(platform="tpu") == 4  # the MLP and the projection layer of two applications
    assert _kernels(platform="gpu") == 0
    assert _kernels(platform="tpu", mlp="xla") == 0
    assert _kernels(platform="cpu", mlp="pallas") == 4


def test_each_stage_takes_kernels_if_its_largest_mlp_fits() -> None:
    assert _kernels(platform="tpu", widths=(512,), mlp_ratio=0.5, nll_ratio=0.5) == 4
    assert _kernels(platform="tpu", widths=(512,), mlp_ratio=0.5, nll_ratio=200.0) == 0  # too large a projection layer
    assert _kernels(platform="tpu", widths=(512,), mlp_ratio=200.0, nll_ratio=0.5) == 0
    assert _kernels(platform="tpu", widths=(512,), mlp_ratio=3.0) == 0
    assert _kernels(platform="tpu", widths=(512,), mlp_ratio=3.0, dtype="bfloat16") == 4
    two = {"heads": (2, 2), "blocks": (1, 1), "recursions": (1, 1), "slices": ((1, 1), (1, 1))}
    assert _kernels(platform="tpu", widths=(4, 1024), mlp_ratio=8.0, **two) == 2


def test_training_takes_the_kernels_in_both_directions() -> None:
    assert _kernels(platform="tpu", train=True) == 2 * 4
    assert _kernels(platform="tpu", train=True, drop_rate=0.1) == 0


def _kernels(*, train: bool = False, **fields) -> int:
    """How many times a small network calls the kernels, with its gradient if it trains."""
    one_stage = {"widths": (4,), "heads": (2,), "blocks": (1,), "recursions": (2,), "slices": ((1, 1),)}
    model = sret_jax.SReT(image_size=16, num_classes=2, **{**one_stage, **fields})
    images = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def run(variables, images):
        rngs = {"dropout": jax.random.key(0)}
        logits, _ = model.apply(variables, images, train=train, mutable=["batch_stats"], rngs=rngs)
        return logits.sum()

    found = operations(jax.grad(run, allow_int=True) if train else run, variables, images)
    return sum(times for e, times in found if e.primitive.name == "pallas_call" and "mlp" in e.params["name"])


def test_weights_too_large_for_the_chip_are_refused_with_the_cure() -> None:
    with pytest.raises(sret_jax.UserError, match=r'an MLP of 4 and 400000 channels .* give mlp="xla"'):
        _kernels(platform="tpu", mlp="pallas", mlp_ratio=1e5)


def _primitives(function, *arguments) -> set[str]:
    return {equation.primitive.name for equation, _ in operations(function, *arguments)}
