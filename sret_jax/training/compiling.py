"""What a person is told while XLA compiles, which may take minutes."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from sret_jax.console import stderr_through
from sret_jax.training.display import duration

_FIRST_LINE_SECONDS = 30.0
_ALARM_SECONDS = 100.0  # XLA raises its alarm after 120


@contextlib.contextmanager
def compiling(
    what: str,
    say: Callable[[str], object],
    show: Callable[[str], object] | None = None,
    *,
    first_line_seconds: float = _FIRST_LINE_SECONDS,
    alarm_seconds: float = _ALARM_SECONDS,
) -> Iterator[None]:
    """Tell what is being compiled, for how long, and when it is done, and keep XLA's alarm of slowness out of the log.

    The alarm asks people to file a bug, and no option of XLA turns it off. What else is written to standard error while
    something compiles arrives there.

    Args:
      what: is compiled in this context, such as "the train step".
      say: prints a line: at the beginning, after 30 seconds, after a minute, and so on, and at the end.
      show: on a terminal, shows a text in the place of the last, every second, instead of these lines but the last.
      first_line_seconds: after which a line says that it goes on; the next come after twice, four times as long.
      alarm_seconds: after which standard error is filtered.
    """
    began_at = time.monotonic()
    done = threading.Event()

    def took() -> str:
        return duration(time.monotonic() - began_at)

    def tell() -> None:
        due = first_line_seconds
        with contextlib.ExitStack() as at_end:
            is_filtered = False
            while not done.wait(min(1.0, first_line_seconds, alarm_seconds)):
                seconds = time.monotonic() - began_at
                if seconds >= alarm_seconds and not is_filtered:
                    at_end.enter_context(stderr_through(_FILTER))
                    is_filtered = True
                if show:
                    show(f"compiling {what}, {took()}")
                elif seconds >= due:
                    say(f"still compiling {what}, {took()}")
                    due *= 2

    (show or say)(f"compiling {what}")
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
    say(f"compiled {what} in {took()}")


# Passes on what it reads, but for the alarm: a line that names the alarm's file, and what belongs to it behind that.
# Ends with its input, that is, when nobody writes any more, however that came about.
_FILTER = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
kept, in_alarm = b"", False
while block := os.read(0, 1 << 16):
    *lines, kept = (kept + block).split(b"\\n")
    for line in lines:
        rest = not line.strip(b"* ") or b"Very slow compile?" in line
        in_alarm = b"slow_operation_alarm.cc:" in line or (in_alarm and rest)
        if not in_alarm:
            os.write(2, line + b"\\n")
os.write(2, kept)
"""
