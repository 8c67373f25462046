"""The options that programs of the networks are compiled with."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax import SReT, compiler_options
from sret_jax.models import compiler
from sret_jax.models.compiler import known_options

# One stage of 14 × 14 tokens; of 32 images there are 6,272, from 4,096 on YNNPACK takes norms.
NETWORK = SReT(image_size=112, widths=(32,), heads=(1,), blocks=(1,), recursions=(1,), slices=((4, 1),), num_classes=0)
IMAGES = jax.ShapeDtypeStruct((32, 112, 112, 3), jnp.float32)


def _operations_of_library_fusions(options: dict[str, Any]) -> list[set[str]]:
    variables = jax.eval_shape(lambda: NETWORK.init(jax.random.key(0), jnp.zeros((1, 112, 112, 3))))
    text = jax.jit(NETWORK.apply).lower(variables, IMAGES).compile(options).as_text()
    bodies = {}
    for body in re.finditer(r"^%([\w.-]+) \(.*?^}", text, re.MULTILINE | re.DOTALL):
        bodies[body[1]] = set(re.findall(r" = \S+ ([a-z-]+)\(", body[0]))
    return [bodies[name] for name in re.findall(r"%ynn_fusion\S* = .* calls=%([\w.-]+)", text)]


def test_cpus_leave_attention_to_ynnpack_but_neither_layers_products_nor_convolutions() -> None:
    fusions = _operations_of_library_fusions(compiler_options("cpu"))
    products = [operations for operations in fusions if operations & {"dot", "convolution"}]
    assert len(products) == 1  # where this fails for another version of XLA, measure the options anew
    assert {"dot", "exponential", "reduce"} <= products[0]

    # What the options are for. If ever not, they are needed no more.
    fusions = _operations_of_library_fusions({})
    assert any("convolution" in operations for operations in fusions)
    assert any("dot" in operations and "exponential" not in operations for operations in fusions)


def test_options_are_those_of_the_platform_and_of_training() -> None:
    assert compiler_options() == compiler_options(jax.default_backend())
    assert compiler_options("cpu", train=True) == compiler_options("cpu")
    assert compiler_options("gpu") == {}
    assert compiler_options("gpu", train=True) == {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options("tpu") == compiler_options("tpu", train=True) == {}


def test_options_that_this_xla_lacks_are_left_out_and_logged(monkeypatch, caplog) -> None:
    options = {"xla_backend_optimization_level": 1, "xla_of_tomorrow": True, "xla_disable_hlo_passes": 7.5}
    with caplog.at_level("INFO"):
        assert known_options(options) == {"xla_backend_optimization_level": 1}  # 7.5 is no value of the last
    assert [name in caplog.text for name in options] == [False, True, True]

    monkeypatch.setitem(compiler._ALWAYS, "cpu", {"xla_of_tomorrow": True})
    assert compiler_options("cpu") == {}
    assert jax.jit(lambda x: x + 1, compiler_options=compiler_options("cpu"))(1) == 2
