"""Ctrl-C in the programs: the first one ends them in a line, with what there is to save saved; a second one, at once.

Python raises `KeyboardInterrupt` wherever the program is: in a callback of JAX it is swallowed, and while XLA compiles
it waits. So a thread hears of the signal here, through `signal.set_wakeup_fd`, whatever the others do. This module
imports nothing that takes time: programs call it before they import anything that does.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

EXIT_STATUS = 128 + signal.SIGINT
"""What a program that Ctrl-C ended exits with, as shells have it."""

# What the first signal does instead of ending the process; the second finds nothing here.
_first: list[Callable[[], object]] = []

_is_on = False


def end_on_ctrl_c(then: str = "") -> None:
    """Have SIGINT end this process: with `EXIT_STATUS` and a line on stderr, no traceback, and at once.

    Nothing is cleaned up, as after a kill, for which everything here is prepared: what is not complete does not stand
    under its name. To be called by programs, in their first thread, before other imports; not by functions that others
    may call: it is for the whole process. Where SIGINT is ignored, as in the background of a shell's script, it stays
    ignored.

    Args:
      then: what the line says after "stopped".
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    global _is_on
    _is_on = True
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)  # or no byte would be written
    line = f"stopped{f': {then}' if then else ''}\n"
    threading.Thread(target=_listen, args=(heard, line), name="ctrl-c", daemon=True).start()


@contextlib.contextmanager
def first_ctrl_c(do: Callable[[], object]) -> Iterator[None]:
    """As long as the context lasts, a SIGINT calls this, in another thread, instead of ending the process. Only one.

    Without `end_on_ctrl_c` nothing changes.
    """
    _first.append(do)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            _first.remove(do)


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that this thread starts meanwhile do not hear SIGINT, which a terminal sends to them too.

    From their first moment: while a Python process starts, it would end it with a traceback. Without `end_on_ctrl_c`
    nothing changes.
    """
    if not _is_on:
        yield
        return
    import multiprocessing.resource_tracker

    multiprocessing.resource_tracker.ensure_running()  # which lets this thread hear SIGINT again when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _listen(heard: int, line: str) -> None:
    while number := os.read(heard, 1):
        if number[0] != signal.SIGINT:
            continue
        try:
            do = _first.pop()
        except IndexError:
            _end(line)
        do()


def _end(line: str) -> None:
    """Ends the process with the line alone on its own, and a cursor: a progress bar may have hidden it."""
    with contextlib.suppress(OSError):
        terminal = sys.stderr is not None and os.isatty(2)
        os.write(2, (("\r\x1b[K\x1b[?25h" if terminal else "") + line).encode())
    os._exit(EXIT_STATUS)
