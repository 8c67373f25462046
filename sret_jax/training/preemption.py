"""A scheduler's notice that the run must end soon: SIGTERM, on any host."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 128 + signal.SIGTERM
"""What a process that SIGTERM ended exits with: what is to be started again can tell by it."""


class Preempted(Exception):
    """The run was told to end; the message says what was saved."""


class Preemption:
    """Notices SIGTERM, which no longer ends the process. A context manager, of the main thread.

    Where `jax.distributed` runs, it catches the signal of any host, or a cloud's notice, and lets all hosts agree on a
    step that none has passed.
    """

    def __enter__(self) -> Self:
        self._noticed = False
        self._before: Any = None
        if not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def reached(self, step: int) -> bool:
        """Whether to save and end after this step. To be asked after every step, by every host."""
        return self._noticed or multihost_utils.reached_preemption_sync_point(step)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True
