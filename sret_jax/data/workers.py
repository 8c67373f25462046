"""Processes that work for this one: what they leave alone, how they end, and what a program must not do in them."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import TypeVar

from sret_jax.errors import UserError
from sret_jax.interrupts import deaf_children

_Batch = TypeVar("_Batch")

# On a host: of threads in a process, each of which has a dozen images in hand, and of processes.
MOST_THREADS = 256
MOST_WORKERS = 1024

# Exit status of a worker that was about to do the program's work again.
_UNGUARDED = 64

_GUARD = (
    "A worker process imports the program's script, so that the script must not start its work when it is imported. "
    'Expected `if __name__ == "__main__":` in front of it: put it there'
)


def start_worker(*ignored: signal.Signals) -> None:
    """To be called first in a worker process: it ends with its parent, and leaves some signals to it."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def leave_devices() -> None:
    """Keep JAX in this process from the parent's accelerators, whose memory it would take."""
    import jax  # Grain does so too

    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")


def end_if_imported_by_worker() -> None:
    """End this process, silently, if it is a worker that has just imported the program's script.

    A script without a main guard would do all of its work again in each of its workers. The parent says so, by
    `explain_deaths`.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself finds out
        os._exit(_UNGUARDED)


def explain_deaths(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The batches of Grain's workers, with an error in words where one of them was `end_if_imported_by_worker`.

    Raises:
      UserError: while iterating, if one was.
    """
    try:
        with deaf_children():  # they are started for the first batch
            first = list(itertools.islice(batches, 1))
        yield from itertools.chain(first, batches)
    except RuntimeError as error:
        if f"exit code {_UNGUARDED}." not in str(error):
            raise
        raise UserError(
            f"the worker processes (config.data.workers) began the program anew. {_GUARD}, or set config.data.workers "
            "to 0"
        ) from None


def pool_died() -> UserError:
    """The error for a pool of processes that lost one, of which nothing else is known."""
    return UserError(
        "a worker process was killed, perhaps because memory ran out. Run the same command again, with fewer workers: "
        f"what was complete before is still there. Or this is a script of your own without a main guard. {_GUARD}"
    )


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
