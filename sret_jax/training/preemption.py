"""Notices that the run must end soon: SIGTERM of a scheduler, on any host, and Ctrl-C."""

import contextlib
import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from sret_jax import interrupts

EXIT_STATUS = 128 + signal.SIGTERM
"""What a process that SIGTERM ended exits with: what is to be started again can tell by it."""


class Preempted(Exception):
    """The run was told to end; the message says what was saved.

    Attributes:
      status: that the process is to exit with: after SIGTERM 143, and after Ctrl-C 130.
    """

    def __init__(self, message: str, status: int = EXIT_STATUS) -> None:
        super().__init__(message)
        self.status = status


class Preemption:
    """Notices SIGTERM, which no longer ends the process, and after the first step Ctrl-C. A context manager, of the
    main thread.

    Where `jax.distributed` runs, it catches the signal of any host, or a cloud's notice, and lets all hosts agree on a
    step that none has passed. Before the first step there is nothing to save, and Ctrl-C ends the process, in programs
    that called `end_on_ctrl_c`; in others it stays as it is.
    """

    def __enter__(self) -> Self:
        self._noticed = self.interrupted = False
        self._before: Any = None
        self._context = contextlib.ExitStack()
        if not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.close()
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def first_step_begins(self) -> None:
        """From here on there is something to save: a Ctrl-C lets the step end."""
        self._context.enter_context(interrupts.first_ctrl_c(self._interrupt))

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step. To be asked after every step, by every host."""
        return self._noticed or multihost_utils.reached_preemption_sync_point(step)

    def end(self, message: str) -> Preempted:
        """The exception that ends the run, with the status of what ended it."""
        return Preempted(message, interrupts.EXIT_STATUS if self.interrupted else EXIT_STATUS)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True

    def _interrupt(self) -> None:
        print(
            "\ninterrupted: the run ends when this step, or an evaluation under way, is done and saved; again: at once",
            file=sys.stderr,
            flush=True,
        )
        self.interrupted = True
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX tells the other hosts of
        else:
            self._noticed = True
