"""Threads and worker processes that make batches ahead of their use, in an order that does not depend on them."""

import itertools
import math
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from sret_jax.data.workers import end_if_imported_by_worker, leave_devices, start_worker
from sret_jax.errors import UserError

# Rows that a thread makes at a time, about. Those among them that show the same image need it decoded only once.
_CHUNK = 12

# More than any run takes; Grain needs a length.
_ENDLESS = 10**12

# Where workers put their batches; Linux alone has it as a folder.
_SHARED_MEMORY = "/dev/shm"


class Example(NamedTuple):
    """A row of a batch."""

    image: np.ndarray
    target: Mapping[str, Any]  # its label or soft labels, by the names of a batch: numbers or arrays of NumPy
    mask: bool  # False: there is no such example, or it is broken
    broken: Sequence[tuple[int, str]] = ()  # index and reason of each broken image met on the way to this one
    refused: str = ""  # why no batch can be made, for the user


def read_ahead(
    load: Callable[[Sequence[int]], Sequence[Example]],
    *,
    batch_size: int,
    rows: Sequence[int] | None,
    first_batch: int = 0,
    num_batches: int = _ENDLESS,
    group: int = 1,
    example_bytes: int,
    num_threads: int,
    num_workers: int,
) -> grain.DatasetIterator:
    """Batches, in their order, of what `load` returns for the positions of their rows.

    Args:
      load: from positions to examples; called in several threads at once, and in worker processes a copy of it. Row `r`
        of batch `k` has position `k * batch_size + r`.
      batch_size: rows of a batch, over all hosts.
      rows: those that this host loads, in this order; None for all.
      first_batch: number of the first batch to return.
      num_batches: how many batches the caller takes, at most; the iterator may give a few more.
      group: rows, one behind the other, that show the same image.
      example_bytes: size of an example's image.
      num_threads: threads in each process.
      num_workers: worker processes; 0 for threads of this process alone.

    Returns:
      An iterator of `image`, what targets hold and `mask`, stacked, `broken`, those of all rows, each once, and
      `refused`, of the first row that has one. To be closed, and to be read through `workers.explain_deaths`.

    Raises:
      UserError: there is too little shared memory for the workers.
    """
    end_if_imported_by_worker()
    rows = range(batch_size) if rows is None else rows
    size = max(_CHUNK // group, 1) * group
    chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
    turns = max(num_workers, 1)

    def load_chunk(number: int) -> Sequence[Example]:
        # Grain deals the numbers out to n workers in turn, and takes a batch from each in turn. So that these are the
        # batches in their order, every n-th number has to stand for chunks of every n-th batch.
        number_of_worker, worker = divmod(number, turns)
        round_, chunk = divmod(number_of_worker, len(chunks))
        first_row = (first_batch + round_ * turns + worker) * batch_size
        return load([first_row + row for row in chunks[chunk]])

    # Equally much for each worker: in the last round there may be batches beyond the last.
    rounds = math.ceil(num_batches / turns)
    # Threads make parts of batches: the first batch comes soon, and two batches are about all that a process keeps.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(2 * len(chunks), num_threads))
    dataset = grain.MapDataset.range(rounds * turns * len(chunks)).map(load_chunk).to_iter_dataset(options)
    stack = _Stack()
    dataset = dataset.batch(len(chunks), batch_fn=stack)
    if num_workers:
        stack.enable_shared_memory_output()  # which Grain asks for where there are several workers
        _check_shared_memory(num_workers * len(rows) * example_bytes, others_later=num_batches == _ENDLESS)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own, which only programs of absl have parsed
    dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_init_worker)
    return iter(dataset)


class _Stack:
    """From the chunks of a batch to the batch."""

    def __init__(self) -> None:
        self._in_shared_memory = False

    def enable_shared_memory_output(self) -> None:
        """Stack images right where Grain would copy them to, so that the parent finds them there."""
        self._in_shared_memory = True

    def __call__(self, chunks: Sequence[Sequence[Example]]) -> dict[str, Any]:
        examples = list(itertools.chain.from_iterable(chunks))
        return {
            "image": self._stacked([example.image for example in examples]),
            **{name: np.stack([example.target[name] for example in examples]) for name in examples[0].target},
            "mask": np.array([example.mask for example in examples], np.bool_),
            "broken": sorted({image for example in examples for image in example.broken}),
            "refused": next(filter(None, (example.refused for example in examples)), ""),
        }

    def _stacked(self, images: Sequence[np.ndarray]) -> np.ndarray:
        shape = len(images), *images[0].shape
        return np.stack(images, out=SharedMemoryArray(shape, images[0].dtype) if self._in_shared_memory else None)


def _check_shared_memory(bytes_in_turn: int, *, others_later: bool) -> None:
    """Refuse what would end in a bus error: a worker has a batch in hand, two in queues, one may be taken already.

    The workers of training keep theirs while those of an evaluation come and go, for which a run of days must not end.
    """
    needed = (9 if others_later else 4) * bytes_in_turn  # 4 and 4, and as much again as labels and rounding take
    if os.path.isdir(_SHARED_MEMORY) and (free := shutil.disk_usage(_SHARED_MEMORY).free) < needed:
        raise UserError(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB left, but the worker processes need {needed / 1e6:.0f} MB of "
            "it. Give the machine or the container more (Docker: --shm-size), or lower config.data.workers"
        )


def _init_worker(worker: int, workers: int) -> None:
    """Leave signals to the parent, which may need another batch before it ends."""
    del worker, workers
    start_worker(signal.SIGINT, signal.SIGTERM)
    leave_devices()
