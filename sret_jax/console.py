"""What a program prints: no letter in it ends the program, and no library buries its errors."""

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from types import TracebackType

from absl import logging as absl_logging


def replace_what_cannot_be_shown() -> None:
    """Print a question mark for what the terminal's encoding lacks, and for bytes of a name that are not its own.

    Standard error shows such letters as `\\x…` whatever is done.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def silence_libraries() -> None:
    """Keep libraries from logging what their exceptions say, too, and what they make of the same failure later."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    # Orbax and TFDS speak through this logger, of every file that they open and again of what they raise.
    absl_logging.get_absl_logger().setLevel("CRITICAL")
    # Of writes that failed beside the one that Orbax raises.
    logging.getLogger("asyncio").setLevel("CRITICAL")
    sys.excepthook = _but_for_closed_loops


@contextlib.contextmanager
def stderr_through(script: str, *arguments: str) -> Iterator[None]:
    """Let a process read the standard error of this one, and pass on what it thinks fit; without one, all arrives.

    A process, not a thread: when this one crashes, its last words still arrive.

    Args:
      script: in Python. It reads file 0 and writes file 2, until nothing more comes.
      arguments: its `sys.argv[1:]`.
    """
    try:
        stderr = os.dup(2)
        command = [sys.executable, "-I", "-S", "-c", script, *arguments]
        reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr)
    except OSError:
        yield
        return
    assert reader.stdin
    os.dup2(reader.stdin.fileno(), 2)
    reader.stdin.close()
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that began meanwhile may write there too
            reader.wait(timeout=2)


def _but_for_closed_loops(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Orbax ends its event loop at the first write that fails; TensorStore then hands this an error for each other."""
    if not (kind is RuntimeError and str(error) == "Event loop is closed"):
        sys.__excepthook__(kind, error, traceback)
