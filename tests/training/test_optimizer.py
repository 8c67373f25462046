import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sret_jax.training.optimizer import adamw, warmup_constant, warmup_cosine

PEAK, INITIAL, FINAL, STEPS, WARMUP = 2e-3, 1e-6, 1e-5, 1000, 100


@pytest.fixture
def schedule():
    return warmup_cosine(PEAK, steps=STEPS, warmup_steps=WARMUP, initial=INITIAL, final=FINAL)


@pytest.mark.parametrize("step", [0, 1, 50, 99])
def test_warmup_is_linear(schedule, step):
    assert float(schedule(step)) == pytest.approx(INITIAL + (PEAK - INITIAL) * step / WARMUP, rel=1e-6)


@pytest.mark.parametrize("step", [100, 101, 500, 999, 1000])
def test_after_the_warmup_a_cosine_counts_from_the_start_of_training(schedule, step):
    expected = FINAL + (PEAK - FINAL) * (1 + math.cos(math.pi * step / STEPS)) / 2
    assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_without_warmup_the_first_step_has_the_peak():
    assert float(warmup_cosine(PEAK, steps=STEPS, warmup_steps=0)(0)) == pytest.approx(PEAK)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, INITIAL), (50, (INITIAL + PEAK) / 2), (100, PEAK), (777, PEAK), (10**6, PEAK)]
)
def test_a_constant_rate_follows_the_warmup(step, rate):
    assert float(warmup_constant(PEAK, warmup_steps=WARMUP, initial=INITIAL)(step)) == pytest.approx(rate, rel=1e-6)


@pytest.mark.parametrize(("norm", "scale"), [(2.5, 0.5), (10.0, 1.0)])
def test_clipping_scales_all_gradients_by_their_common_norm(norm, scale):
    params = {"layer": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)}}
    gradients = {"layer": {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])}}  # norm 5
    # With so large an eps AdamW's first step is the gradient times the rate, divided by eps.
    optimizer = adamw(1.0, weight_decay=0.0, eps=1e6, clip_norm=norm)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_allclose(updates["layer"]["kernel"], [[-3e-6 * scale, 0.0]], rtol=1e-4)
    np.testing.assert_allclose(updates["layer"]["bias"], [-4e-6 * scale], rtol=1e-4)


def test_adamw_is_pytorchs():
    # Loshchilov and Hutter, algorithm 2, as PyTorch documents it; two steps in float64.
    rate, decay, b1, b2, eps = 0.1, 0.5, 0.9, 0.999, 1e-8
    kernel, bias = np.array([[1.0, -2.0]]), np.array([3.0])
    gradients = [(np.array([[0.5, -0.1]]), np.array([2.0])), (np.array([[-0.3, 0.7]]), np.array([1.0]))]

    params = {"layer": {"kernel": jnp.array(kernel, jnp.float32), "bias": jnp.array(bias, jnp.float32)}}
    optimizer = adamw(rate, weight_decay=decay)
    state = optimizer.init(params)
    moments = {name: [0.0, 0.0] for name in ("kernel", "bias")}
    expected = {"kernel": kernel, "bias": bias}
    for t, (kernel_gradient, bias_gradient) in enumerate(gradients, start=1):
        grads = {
            "layer": {"kernel": jnp.array(kernel_gradient, jnp.float32), "bias": jnp.array(bias_gradient, jnp.float32)}
        }
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, gradient in (("kernel", kernel_gradient), ("bias", bias_gradient)):
            m = moments[name][0] = b1 * moments[name][0] + (1 - b1) * gradient
            v = moments[name][1] = b2 * moments[name][1] + (1 - b2) * gradient**2
            if name == "kernel":
                expected[name] = expected[name] * (1 - rate * decay)
            expected[name] = expected[name] - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    for name, value in expected.items():
        np.testing.assert_allclose(params["layer"][name], value, rtol=1e-5)  # float32
