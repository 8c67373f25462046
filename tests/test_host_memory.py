"""What a process keeps of the memory that it frees."""

import os
import platform
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sret_jax import host_memory

ROOT = Path(__file__).parents[1]

# The median of the page faults of ten executions, each of which needs 80 MB. Now and then another thread has taken a
# little of what was freed, and the heap grows once more. No products: Eigen's threads allocate memory of their own.
FAULTS = """
import resource, statistics, sys
from sret_jax.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import jax, jax.numpy as jnp
execute = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: y[::-1] + y.T, jnp.outer(x, x)).sum())
x = jnp.arange(3200.0)
faults = []
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    execute(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(round(statistics.median(faults)))
"""


def faults(what: str) -> int:
    result = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="does nothing elsewhere")
def test_what_an_execution_frees_is_there_for_the_next() -> None:
    fresh, kept = faults("fresh"), faults("kept")
    assert kept < 100
    if fresh < 80_000_000 / resource.getpagesize() / 2:
        pytest.skip("the system hands out larger pages, of which there are few")
    assert kept < fresh / 100


# In train.py's place, what JAX is told when training begins.
BEGUN = """
import sys
import jax, train
from sret_jax.training import loop
loop.train = lambda config, workdir: print("asynchronous", jax.config.values["jax_cpu_enable_async_dispatch"])
sys.argv[1:] = ["--config=configs/digits.py", f"--workdir={sys.argv[1]}"]
train.run(train.main)
"""


def test_training_begins_with_it(tmp_path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BEGUN, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "asynchronous False" in result.stdout, result.stderr


def test_another_thread_cannot_have_its_memory_kept() -> None:
    with ThreadPoolExecutor(1) as threads, pytest.raises(RuntimeError, match="first thread"):
        threads.submit(host_memory.keep_freed_memory).result()


@pytest.mark.parametrize(("backend", "library"), [("gpu", "glibc"), ("cpu", "")])
def test_on_other_devices_and_without_glibc_nothing_is_kept(monkeypatch, backend: str, library: str) -> None:
    def refuse(*arguments):
        raise AssertionError("the C library is not to be told anything")

    monkeypatch.setattr(host_memory.jax.config, "update", lambda name, value: None)
    monkeypatch.setattr(host_memory.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(host_memory.platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(host_memory.ctypes, "CDLL", refuse)
    host_memory.keep_freed_memory()
