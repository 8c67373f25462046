"""What programs print: a run of one's own in a process, for libraries print as they like."""

import subprocess
import sys

import pytest

QUIET = """
import asyncio, logging, sys
from absl import logging as absl_logging
from sret_jax.console import replace_what_cannot_be_shown, silence_libraries
replace_what_cannot_be_shown()
if sys.argv[1] == "quiet":
    silence_libraries()
print("224 × 224 caf\\udce9")

async def fail():
    raise OSError(28, "No space left on device")

async def save():
    asyncio.ensure_future(fail())
    await asyncio.sleep(0.01)

asyncio.run(save())
absl_logging.error("said again")
try:
    raise RuntimeError("Event loop is closed")
except RuntimeError:
    sys.excepthook(*sys.exc_info())
raise ValueError("a defect")
"""


@pytest.mark.parametrize("how", ["quiet", "verbose"])
def test_libraries_bury_no_error_and_defects_are_shown(how):
    # Standard output in ASCII, which lacks both letters.
    result = subprocess.run(
        [sys.executable, "-c", QUIET, how], capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert result.stdout == "224 ? 224 caf?\n"
    assert result.stderr.endswith("ValueError: a defect\n")
    assert result.stderr.count("Traceback") == 1 if how == "quiet" else result.stderr.count("Traceback") > 2
