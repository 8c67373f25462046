"""What XLA's compilers are to be told about programs that compute these networks."""

from typing import Any

import jax

_ALWAYS: dict[str, dict[str, Any]] = {
    "cpu": {
        # Products by Eigen. By default YNNPACK takes all, and needs up to 1.3 times as long for the networks' shapes,
        # and twice as long for their convolutions; what it fuses with reductions, such as attention, is faster with it.
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
        # Optimization barriers, which the networks have to keep work apart, stay until XLA has fused.
        "xla_disable_hlo_passes": "cse_barrier_expander",
    }
}
_IN_TRAINING: dict[str, dict[str, Any]] = {
    # Products by cuBLAS: those that XLA finds by a search among Triton's take up to 1.6 times as long (sret_s).
    "gpu": {"xla_gpu_enable_triton_gemm": False}
}


def compiler_options(platform: str | None = None, *, train: bool = False) -> dict[str, Any]:
    """The options of XLA with which programs of these networks are fastest: docs/performance.md has the figures.

    For `jax.jit(model.apply, compiler_options=compiler_options())`. Whatever computes a network in this library is
    compiled with them. Results differ by rounding alone.

    Args:
      platform: "cpu", "gpu" or "tpu"; None is JAX's default.
      train: whether the program takes gradients.

    Returns:
      Options for `compiler_options=` of `jax.jit`, or of a lowered program's `compile`; {} for XLA's defaults.
    """
    platform = platform or jax.default_backend()
    return _ALWAYS.get(platform, {}) | (_IN_TRAINING.get(platform, {}) if train else {})
