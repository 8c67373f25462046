"""What the others say when a host of their run is gone; tests/training/test_hosts.py has one that is."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAST = "error: another process of this run has died, or cannot be reached: look at what it said itself. Then start all "
FATAL = (
    "E1128 05:39:35 8013 coordination_service_agent.cc:289] Polled an error\\n"
    "F1128 05:39:35 8013 client.h:80] Terminating process because the JAX distributed service detected fatal errors.\\n"
    "*** Check failure stack trace: ***\\n    @     0x7f2eb5840634  absl\\n"
)
WARNING = (
    "W1128 09:30:17 31568 preemption_sync_manager.cc:147] Failed to retrieve preemption notice from coordination "
    "service: UNAVAILABLE: failed to connect\\nAdditional GRPC error information from remote target\\n"
)


def run(body, *, processes=2):
    script = f"""
import os
import jax
from sret_jax.training.lost_hosts import one_line_for_lost_hosts
jax.process_count = lambda: {processes}
with one_line_for_lost_hosts():
    os.write(2, b"before\\n")
    {body}
os.write(2, b"after\\n")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "faulthandler", "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    "body",
    [
        f"os.write(2, b'{FATAL}'); os.abort()",
        "raise ValueError('UNKNOWN: Gloo all-reduce failed: Read error: Connection reset by peer')",
        f"os.write(2, b'{FATAL}'); raise ValueError('UNKNOWN: Gloo all-reduce failed')",
        f"os.write(2, b'{WARNING}'); raise ValueError('UNKNOWN: Gloo all-reduce failed')",
    ],
)
def test_one_line_comes_last_and_alone(body):
    result = run(body)
    assert result.returncode != 0
    before, last = result.stderr.splitlines()
    assert before == "before" and last.startswith(LAST)


@pytest.mark.parametrize(
    ("body", "processes", "last"),
    [
        ("raise KeyError('x')", 2, "KeyError: 'x'"),
        ("raise ValueError('Gloo')", 1, "ValueError: Gloo"),
        ("os.write(2, b'no end of line')", 2, "no end of lineafter"),
    ],
)
def test_everything_else_arrives(body, processes, last):
    lines = run(body, processes=processes).stderr.splitlines()
    assert lines[0] == "before" and lines[-1] == last
