"""Tests of sret_jax.data.read_ahead."""

import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest

from sret_jax.data.read_ahead import Example, read_ahead
from sret_jax.errors import UserError


@pytest.fixture(scope="module")
def load() -> Callable[[Sequence[int]], list[Example]]:
    """Examples whose label is their position; each third of them met two broken images."""

    def load(positions: Sequence[int]) -> list[Example]:  # inside, so that workers need not import this module
        return [
            Example(
                np.full((2, 2, 3), p % 256, np.uint8),
                {"label": np.int32(p)},
                p % 2 == 0,
                [(p, "a"), (7, "b")] if p % 3 == 0 else [],
            )
            for p in positions
        ]

    return load


def start(load: Callable[[Sequence[int]], list[Example]], **arguments: Any) -> grain.DatasetIterator:
    arguments = {"batch_size": 40, "rows": None, "example_bytes": 12, "num_threads": 3, "num_workers": 0} | arguments
    return read_ahead(load, **arguments)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_batches_come_in_order_with_the_rows_asked_for(
    load: Callable[[Sequence[int]], list[Example]], num_workers: int
) -> None:
    rows = [3, 1, *range(10, 40)]  # three chunks, the last one shorter
    batches = start(load, rows=rows, first_batch=5, num_workers=num_workers)
    for k, batch in enumerate(itertools.islice(batches, 7)):
        labels = (5 + k) * 40 + np.array(rows)
        np.testing.assert_array_equal(batch["label"], labels)
        np.testing.assert_array_equal(batch["image"], np.broadcast_to(labels[:, None, None, None] % 256, (32, 2, 2, 3)))
        np.testing.assert_array_equal(batch["mask"], labels % 2 == 0)
        assert batch["broken"] == [(7, "b"), *((label, "a") for label in labels[np.argsort(labels)] if label % 3 == 0)]
    batches.close()


def test_a_worker_ignores_the_signals_that_its_parent_handles_but_its_death_is_an_error(
    load: Callable[[Sequence[int]], list[Example]],
) -> None:
    batches = start(load, num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    os.kill(worker.pid, signal.SIGINT)
    for k in range(1, 10):
        assert next(batches)["label"][0] == 40 * k
    worker.kill()
    with pytest.raises(RuntimeError, match="Worker process was terminated"):
        list(itertools.islice(batches, 9))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_keep_off_the_devices_and_images_reach_the_parent_without_another_copy(
    num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")  # as a GPU's: a worker that asked for it would see

    def load(positions: Sequence[int]) -> list[Example]:
        import jax

        copied = vars(np).setdefault("copied_images", [])
        if not copied:  # Grain copies to shared memory by this function what does not lie there
            copyto, copied[:] = np.copyto, [0]

            def counted(target: np.ndarray, source: np.ndarray, *args: Any, **kwargs: Any) -> None:
                copied[0] += np.ndim(source) == 4
                copyto(target, source, *args, **kwargs)

            np.copyto = counted
        platforms = {device.platform for device in jax.devices()}
        label = {"copied": np.int32(copied[0]), "cpu": np.bool_(platforms == {"cpu"})}
        return [Example(np.full((2, 2, 3), p % 256, np.uint8), label, True) for p in positions]

    batches = start(load, num_workers=num_workers)
    for k, batch in enumerate(itertools.islice(batches, 8)):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], (40 * k + np.arange(40)) % 256)
        assert batch["cpu"].all() and not batch["copied"].any()
    batches.close()
    assert os.environ["JAX_PLATFORMS"] == "no_such_platform"


def test_a_script_without_a_main_guard_is_told_so_in_one_line(tmp_path: Path) -> None:
    script = """
from sret_jax.data.pipeline import train_batches
from sret_jax.data.sources import open_source

source = open_source("synthetic", "train", image_size=8, length=8)
next(train_batches(source, batch_size=8, image_size=8, seed=0, num_workers=1))
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, tmp_path / "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stderr.count("Traceback") == 1  # the script's own: it does not catch a UserError
    last = done.stderr.splitlines()[-1]
    assert last.startswith("sret_jax.errors.UserError: the worker processes (config.data.workers) began the program")
    assert 'if __name__ == "__main__":' in last and "config.data.workers to 0" in last


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    program = """if __name__ == "__main__":
        import multiprocessing, os, signal
        from sret_jax.data.pipeline import train_batches
        from sret_jax.data.sources import open_source
        source = open_source("synthetic", "train", image_size=8, length=8)
        batches = train_batches(source, batch_size=8, image_size=8, seed=0, num_workers=1)
        next(batches)
        print(multiprocessing.active_children()[0].pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    parent = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert parent.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{int(parent.stdout)}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{int(parent.stdout)}")


def test_too_little_shared_memory_for_the_workers_is_the_users_error(
    load: Callable[[Sequence[int]], list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, 64_000_000, 64_000_000)
    start(load, num_workers=2, batch_size=50, num_batches=3, example_bytes=150_000)
    with pytest.raises(UserError, match=r"has 64 MB left, but the worker processes need 72 MB.*--shm-size"):
        start(load, num_workers=2, batch_size=60, num_batches=3, example_bytes=150_000)


def test_training_takes_no_shared_memory_that_its_evaluations_will_need(
    load: Callable[[Sequence[int]], list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the whole, training holds four batches a worker and what comes with them when the evaluation begins.
    whole, held = 2 * 9 * 50 * 150_000, int(2 * 4.1 * 50 * 150_000)
    leave(monkeypatch, whole - 1, whole, whole - held)
    with pytest.raises(UserError, match="the worker processes need 135 MB"):
        start(load, num_workers=2, batch_size=50, example_bytes=150_000)
    start(load, num_workers=2, batch_size=50, example_bytes=150_000)
    start(load, num_workers=2, batch_size=50, num_batches=3, example_bytes=150_000)


def leave(monkeypatch: pytest.MonkeyPatch, *free: int) -> None:
    """Let the disk have so many bytes free at one question, and so many at the next."""
    usage, answers = shutil.disk_usage("/"), list(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=answers.pop(0)))
