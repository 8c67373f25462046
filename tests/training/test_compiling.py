"""What is told while something compiles."""

import subprocess
import sys
import time

import pytest

from sret_jax.training.compiling import compiling


def test_a_log_says_that_something_compiles_then_rarely_how_long_and_that_it_is_done():
    lines = []
    with compiling("the train step", lines.append, first_line_seconds=0.1):
        assert lines == ["compiling the train step"]
        time.sleep(1.0)
    first, *between, last = lines
    assert first == "compiling the train step"
    assert 1 <= len(between) <= 6  # after 0.1, 0.2, 0.4, 0.8 seconds, and more on a busy machine
    assert all(line.startswith("still compiling the train step, 0:00:0") for line in between)
    assert last.startswith("compiled the train step in 0:00:0")


def test_a_terminal_shows_the_time_that_passes_and_keeps_one_line():
    lines, shown = [], []
    with compiling("the train step", lines.append, shown.append, alarm_seconds=0.05, first_line_seconds=0.05):
        time.sleep(0.5)
    assert shown[0] == "compiling the train step"
    assert len(shown) > 2
    assert all(text.startswith("compiling the train step, 0:00:0") for text in shown[1:])
    assert len(lines) == 1


def test_what_fails_to_compile_is_not_said_to_be_compiled():
    lines = []
    with pytest.raises(ValueError, match="no"), compiling("the train step", lines.append):
        raise ValueError("no")
    assert lines == ["compiling the train step"]


# As XLA writes it, from its own threads, to the file descriptor.
ALARM = """2026-08-15 06:23:03.016556: E external/xla/xla/service/slow_operation_alarm.cc:73]
********************************
[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=…
********************************
"""
END_OF_ALARM = """06:24:05.36857: E external/xla/xla/service/slow_operation_alarm.cc:140] The operation took 3m2.3s

********************************
[Compiling module jit_step] Very slow compile? If you want to file a bug, run with envvar XLA_FLAGS=--xla_dump_to=…
********************************
"""
SCRIPT = """
import os, signal, sys, time
from sret_jax.training.compiling import compiling
said = []
def write(text):
    os.write(2, text.encode())
with compiling("it", said.append, alarm_seconds=0.01):
    write("before\\n")
    stderr = os.readlink("/proc/self/fd/2")
    while os.readlink("/proc/self/fd/2") == stderr:
        time.sleep(0.01)
    for text in ("real warning\\n*****\\n", sys.argv[1], "between\\n", sys.argv[2], "and the last words"):
        write(text)
    if sys.argv[3] == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
assert os.readlink("/proc/self/fd/2") == stderr
write("\\nafter\\n")
"""


@pytest.mark.parametrize("end", ["well", "crash"])
def test_xlas_alarm_alone_is_kept_out_of_the_log_also_of_a_process_that_crashes(end):
    command = [sys.executable, "-c", SCRIPT, ALARM, END_OF_ALARM, end]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    expected = "before\nreal warning\n*****\nbetween\nand the last words"
    if end == "crash":
        assert (result.returncode, result.stderr) == (-9, expected)
    else:
        assert (result.returncode, result.stderr) == (0, expected + "\nafter\n")
