"""Ctrl-C: what it does to a process that called `end_on_ctrl_c`, and that every program does so before its imports."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
ON = (
    "import gc, os, signal, time; from sret_jax import interrupts; me = os.getpid(); interrupts.end_on_ctrl_c('then')\n"
)
STRIKE = "os.kill(me, signal.SIGINT)\n"


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100, **options
    )


@pytest.mark.parametrize(
    "busy",
    [
        "time.sleep(60)",
        # As in JAX's callback, where Python swallows what a handler raises.
        "gc.callbacks.append(lambda *_: (os.kill(me, signal.SIGINT), time.sleep(1))); gc.collect()",
        "class Swallow:\n  def __del__(self): os.kill(me, signal.SIGINT); time.sleep(1)\nSwallow()",
        # As XLA while it compiles: no handler of Python runs before it is done.
        "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
        "try:\n  os.kill(me, signal.SIGINT); time.sleep(1)\nexcept BaseException: pass",
    ],
)
def test_the_process_ends_whatever_it_is_busy_with(busy):
    late = "import threading; threading.Timer(0.2, os.kill, (me, signal.SIGINT)).start()\n"
    result = run("-c", ON + late + busy + "\nprint('went on')")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "stopped: then\n")


def test_a_first_signal_may_do_something_else_and_the_second_ends_the_process():
    wait = "time.sleep(0.3)\n"
    inside = f"with interrupts.first_ctrl_c(lambda: print('first', flush=True)):\n {STRIKE} {wait}"
    result = run("-c", ON + inside + f" {STRIKE} {wait} print('went on')")
    assert (result.returncode, result.stdout, result.stderr) == (130, "first\n", "stopped: then\n")
    result = run("-c", ON + inside + STRIKE + wait + "print('went on')")
    assert (result.returncode, result.stdout) == (130, "first\n")
    result = run("-c", ON + "with interrupts.first_ctrl_c(print): pass\n" + STRIKE + wait + "print('went on')")
    assert (result.returncode, result.stdout) == (130, "")


def test_where_it_is_ignored_it_stays_ignored():
    ignored = {"preexec_fn": lambda: __import__("signal").signal(2, __import__("signal").SIG_IGN)}
    result = run("-c", ON + STRIKE + "time.sleep(0.2); print('went on')", **ignored)
    assert (result.returncode, result.stdout, result.stderr) == (0, "went on\n", "")


def test_little_is_imported_before_it_is_heard():
    """`-S`, because an installation may import anything when Python starts."""
    script = "import sys; sys.path.insert(0, ''); import sret_jax.interrupts; print(*sys.modules)"
    imported = run("-S", "-c", script).stdout.split()
    assert "sret_jax.interrupts" in imported
    assert not {"importlib", "multiprocessing", "re", "typing"} & set(imported)


def test_importing_the_library_changes_no_signal_and_a_context_alone_nothing():
    script = (
        "import signal, sret_jax; from sret_jax import interrupts\n"
        "with interrupts.first_ctrl_c(print), interrupts.deaf_children(): pass\n"
        "import sret_jax.data.pack\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.set_wakeup_fd(-1))"
    )
    assert run("-c", script).stdout == "True -1\n"


def test_processes_that_are_started_deaf_do_not_hear_what_a_terminal_sends_to_all():
    child = "import time; time.sleep(0.5); print('child', flush=True)"
    script = (
        "import subprocess, sys\n"
        f"with interrupts.deaf_children(): child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "with interrupts.first_ctrl_c(lambda: None):\n"
        " os.killpg(0, signal.SIGINT)\n"
        " print('status', child.wait(), flush=True)\n"
        "os.killpg(0, signal.SIGINT); time.sleep(60)"
    )
    result = run("-c", ON + script, start_new_session=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "child\nstatus 0\n", "stopped: then\n")


@pytest.mark.parametrize(
    "program",
    [
        ["train.py", "--config=tests/training/tiny_run.py"],
        ["convert_torch_weights.py", "--help"],
        ["-m", "sret_jax"],
        ["-m", "sret_jax.plan", "--config=tests/training/tiny_run.py"],
        ["-m", "sret_jax.distill", "--help"],
        ["-m", "sret_jax.data.pack", "--help"],
        ["-m", "sret_jax.data.pack_soft_labels", "--help"],
        ["-m", "sret_jax.data.show", "--config=tests/training/tiny_run.py"],
    ],
    ids=" ".join,
)
def test_every_program_can_be_stopped_while_it_is_still_importing(program, tmp_path):
    for library in ("jax", "numpy"):
        strike = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"
        (tmp_path / f"{library}.py").write_text(strike)
    result = run(*program, env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert result.returncode == 130
    assert result.stdout == "" and result.stderr.startswith("stopped") and result.stderr.count("\n") == 1
