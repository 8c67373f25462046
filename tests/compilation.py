"""How the tests compile: in a third of the time, to programs that compute the same, only slower."""

import functools
import os
import subprocess
import sys

# Halves the time in which programs compile, where XLA has it. XLA ends a process that is given a flag it does not know.
_QUICK_FLAG = "--xla_cpu_use_fusion_emitters=false"

# Where a process leaves the answer for those that it starts.
_ANSWER = "SRET_JAX_TESTS_XLA_FLAGS"


def variables(devices: int) -> dict[str, str]:
    """Environment variables to be set before JAX starts, for a process with so many CPU devices."""
    return {
        "JAX_PLATFORMS": "cpu",  # wherever they run: JAX's plugin for GPUs does not know the flag, and ends the process
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XLA_FLAGS": _known_flags(),
    }


@functools.cache
def _known_flags() -> str:
    """The flag, if this XLA takes it: asked in a process of its own, which ends if it does not."""
    if _ANSWER not in os.environ:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": _QUICK_FLAG}
        start = [sys.executable, "-c", "import jax; jax.devices()"]
        known = subprocess.run(start, env=environment, capture_output=True, timeout=300).returncode == 0
        os.environ[_ANSWER] = _QUICK_FLAG if known else ""
    return os.environ[_ANSWER]
