"""The end of a run of several hosts of which one is gone: one line, where JAX prints a hundred."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator

import jax

from sret_jax.console import stderr_through
from sret_jax.errors import UserError

_LINE = (
    "error: another process of this run has died, or cannot be reached: look at what it said itself. Then start all "
    "processes again: the same command goes on from the last checkpoint"
)

# In what JAX raises where another host's part does not come.
_SIGNS = re.compile(
    "gloo|nccl|coordination|connection (reset|closed|refused)|socket closed|heartbeat|unavailable|deadline.exceeded",
    re.IGNORECASE,
)

# Passes on what it reads until JAX's threads see another process gone. They warn, end this one and print where it was.
_FILTER = """
import os, re, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sign = re.compile(
    rb"coordination_service_agent.cc|JAX distributed service detected fatal errors|Failed to retrieve preemption notice"
)
line_of_ours, kept, lost, said = sys.argv[1].encode(), b"", False, False
while block := os.read(0, 1 << 16):
    *lines, kept = (kept + block).split(b"\\n")
    for line in lines:
        lost = lost or bool(sign.search(line))
        if not lost:
            os.write(2, line + b"\\n")
            said = said or line == line_of_ours
    if not lost and not re.match(rb"[EFIW]", kept):
        os.write(2, kept)
        kept = b""
if lost:
    kept = b"" if said else line_of_ours + b"\\n"
os.write(2, kept)
"""


@contextlib.contextmanager
def one_line_for_lost_hosts() -> Iterator[None]:
    """Say in a line, the last one on stderr, that another host is gone, and end the process at once with an error.

    JAX would wait for the lost one at the end, and end the process when it has waited. For programs, whose process it
    ends; where there is one process, nothing changes.
    """
    if jax.process_count() == 1:
        yield
        return
    with stderr_through(_FILTER, _LINE):
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if not _SIGNS.search(str(error)):
                raise
            print(_LINE, file=sys.stderr, flush=True)
            os._exit(1)
