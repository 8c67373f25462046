"""A profile of a few steps on request, for TensorBoard's profile plug-in, XProf and Perfetto."""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from sret_jax.errors import brief

_LOG = logging.getLogger(__name__)

# The first steps compile and fill the queues.
_STEPS_BEFORE = 10


class Profile:
    """Records so many steps, from the 10th of this process on, in `WORKDIR/profile`. A context manager."""

    def __init__(self, workdir: str, first_step: int, steps: int) -> None:
        """Prepare to record.

        Args:
          workdir: the run's folder.
          first_step: steps that are done already.
          steps: how many to record; 0 is none.
        """
        self._folder = str(Path(workdir) / "profile")
        self._start = first_step + _STEPS_BEFORE
        self._stop = self._start + steps
        self._is_recording = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def after(self, step: int, result: Any) -> None:
        """Start or stop, if it is time to; to be called after each step, with what it computes."""
        if step == self._start < self._stop:
            jax.block_until_ready(result)
            jax.profiler.start_trace(self._folder)
            self._is_recording = True
        elif step == self._stop:
            jax.block_until_ready(result)
            self._end()

    def _end(self) -> None:
        if self._is_recording:
            self._is_recording = False
            try:
                jax.profiler.stop_trace()
            except Exception as error:  # whatever XLA makes of what the disk refuses, and of names that are not UTF-8
                _LOG.warning("the profile cannot be written to %s: %s", self._folder, brief(error))
