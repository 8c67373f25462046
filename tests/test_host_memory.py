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

# Page faults of an execution that needs 80 MB: the least and the median of eight, after a first one. Single executions
# fault more: another thread takes a little out of the freed 80 MB, so that the heap has to grow once more, or Eigen
# allocates buffers of less than 1 MB.
FAULTS = """
import resource, statistics, sys
from sret_jax.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import jax, jax.numpy as jnp
execute = jax.jit(lambda x: (jnp.outer(x, x) @ jnp.outer(x, x + 1)).sum())
x = jnp.arange(3200.0)
totals = []
for _ in range(9):
    execute(x).block_until_ready()
    totals.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
faults = [after - before for before, after in zip(totals, totals[1:])]
print(min(faults), round(statistics.median(faults)))
"""


def faults(what: str) -> list[int]:
    result = subprocess.run([sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True)
    return [int(number) for number in result.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="does nothing elsewhere")
def test_what_an_execution_frees_is_there_for_the_next() -> None:
    (fresh, _), (least, median) = faults("fresh"), faults("kept")
    assert least < 100
    pages = 80_000_000 / resource.getpagesize()
    assert median < pages / 20  # a buffer of Eigen's, but not the 80 MB
    if fresh < pages / 2:
        pytest.skip("the system hands out larger pages, of which there are few")
    assert least < fresh / 100


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
