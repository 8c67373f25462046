"""Seconds from the start of `python train.py` to its first finished step, and what they go into.

    python benchmarks/startup.py [--rounds 3] [--out results]

Of the digits' config, and of a dry run of SReT-T: with an empty workdir, from a checkpoint, and from a checkpoint
without the cache of compiled programs. benchmarks/README.md explains the columns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks import measure
else:
    import measure  # a program's own folder is on the path

ROOT = Path(__file__).parents[1]

# Of each: the flags of `train.py`, and the steps of an epoch, which is the whole run.
RUNS: dict[str, tuple[list[str], int]] = {
    "digits": (["--config=configs/digits.py"], 22),
    "sret_t": (
        [
            *("--config=configs/sret_t.py", "--config.data.source=synthetic"),
            *("--config.data.synthetic_examples=64", "--config.batch_size=16"),
        ],
        4,
    ),
}
STARTS = ("first start", "restart", "restart, no cache")
PHASES = ("imports", "data", "state", "trace", "lower", "compile", "step", "first step", "processor", "evaluation")


def main() -> None:
    """Start the runs in turns, and print a line for each kind of start."""
    if os.environ.get("STARTUP_BEGAN_AT"):
        return _run_and_tell()
    args = _parse_args()
    seconds: dict[str, dict[str, list[dict[str, float]]]] = {}
    for name in args.run:
        seconds[name] = {start: [] for start in STARTS}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                _round(name, Path(folder) / "run", seconds[name])
    print(f"{measure.versions_line()}\nmedians of {args.rounds} rounds, in seconds\n")
    lines = []
    for name, starts in seconds.items():
        for start, rounds in starts.items():
            totals = [phases["first step"] for phases in rounds]
            medians = [f"{statistics.median(phases[phase] for phases in rounds):.1f}" for phase in PHASES]
            lines.append([name, start, *medians, f"{min(totals):.1f}–{max(totals):.1f}"])
    measure.print_aligned(["run", "start", *PHASES[:-3], "to first step", *PHASES[-2:], "min–max"], lines)
    if args.out:
        measure.write_json(args.out, "startup", {**measure.provenance(args), "seconds": seconds})


def _round(name: str, workdir: Path, seconds: dict[str, list[dict[str, float]]]) -> None:
    """Every kind of start, once: a run to its end, and twice its last step again."""
    flags, steps = RUNS[name]
    flags = [*flags, f"--workdir={workdir}", "--config.epochs=1", f"--config.checkpoint.every_steps={steps - 1}"]
    for start in STARTS:
        shutil.rmtree(workdir / "checkpoints" / str(steps), ignore_errors=True)
        without = ["--config.compilation_cache="] if start.endswith("no cache") else []
        phases = _start([*flags, *without])
        seconds[start].append(phases)
        print(f"{name}, {start}: {phases['first step']:.1f} s", file=sys.stderr)


def _start(flags: list[str]) -> dict[str, float]:
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"STARTUP_BEGAN_AT": str(time.time()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def _run_and_tell() -> None:
    """`train.py`, whose steps on the way to the first step of training are timed; the last line is JSON."""
    began_at = float(os.environ["STARTUP_BEGAN_AT"])
    sys.argv[0] = "train.py"
    import jax

    import train
    from sret_jax.training import evaluation, loop

    seconds = dict.fromkeys(PHASES, 0.0)
    seconds["imports"] = time.time() - began_at

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **options: Any) -> Any:
            started_at = time.time()
            result = function(*args, **options)
            seconds[phase] += time.time() - started_at
            return result

        return timing

    def compile_in_parts(step: Any, *args: Any) -> Any:
        traced = timed("trace", step.trace)(*args)
        compiled = timed("compile", timed("lower", traced.lower)().compile)()

        def step_timed_once(*args: Any) -> Any:
            if seconds["first step"]:
                return compiled(*args)
            result = timed("step", lambda: jax.block_until_ready(compiled(*args)))()
            seconds["first step"], seconds["processor"] = time.time() - began_at, time.process_time()
            return result

        return step_timed_once

    loop.open_split = timed("data", loop.open_split)
    loop.make_training = timed("state", loop.make_training)
    loop.compile_initial_state = timed("state", loop.compile_initial_state)
    loop.Checkpoints.restore_latest = timed("state", loop.Checkpoints.restore_latest)  # type: ignore[method-assign]
    loop.compile_everywhere = compile_in_parts
    evaluation.compile_everywhere = timed("evaluation", evaluation.compile_everywhere)
    try:
        train.run(train.main)
    finally:
        print(json.dumps(seconds))


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--rounds", type=measure.positive, default=3, help="of all starts of a run")
    parser.add_argument("--out", type=Path, help="folder for startup.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
