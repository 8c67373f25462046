"""What XLA's compilers are to be told about programs that compute these networks."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax

_LOG = logging.getLogger(__name__)

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
    compiled with them. Results differ by rounding alone. An option that the installed XLA does not take is left out.

    Args:
      platform: "cpu", "gpu" or "tpu"; None is JAX's default.
      train: whether the program takes gradients.

    Returns:
      Options for `compiler_options=` of `jax.jit`, or of a lowered program's `compile`; {} for XLA's defaults.
    """
    platform = platform or jax.default_backend()
    return known_options(_ALWAYS.get(platform, {}) | (_IN_TRAINING.get(platform, {}) if train else {}))


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options among these that the installed XLA takes: most are experimental, and come and go with its versions.

    Args:
      options: by name, as `compiler_options=` of `jax.jit` takes them, of any platform.

    Returns:
      Those that compile. The others are logged at the level INFO, each once a process.
    """
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    try:
        jax.jit(_nothing).lower().compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        _LOG.info("XLA's option %s=%s is left out: %s", name, value, error)
        return False
    return True


def _nothing() -> int:
    """The program with which XLA is asked for its options: it knows those of all platforms on each."""
    return 0
