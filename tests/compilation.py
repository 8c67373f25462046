"""How the tests compile: in a third of the time, to programs that compute the same, only slower."""


def variables(devices: int) -> dict[str, str]:
    """Environment variables to be set before JAX starts, for a process with so many CPU devices."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_use_fusion_emitters=false"
    # On CPUs wherever they run: JAX's plugin for GPUs does not know the flags, and ends the process.
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
