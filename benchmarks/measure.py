"""What the benchmarks share: turns, compilation, tables, records, pictures.

Needs only jax, flax, optax and numpy, and matplotlib for pictures.
"""

import argparse
import ast
import contextlib
import datetime
import json
import math
import multiprocessing
import os
import pickle
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import jax
import numpy as np
import optax

from sret_jax import SReT, UserError, compiler_options
from sret_jax.data.augment import Augmentation
from sret_jax.training.optimizer import Schedule, adamw, warmup_cosine

if TYPE_CHECKING:
    # Only pictures need it.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGENET_AUGMENTATION = Augmentation(flip=0.5, erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)

INK, MUTED, GRID = "#24292f", "#6e7781", "#e6e8eb"
COLORS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf8700", "#cf222e", "#1b7c83", "#a475f9", "#57606a", "#e16f24")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "triton", "libtpu", "jax-cuda13-plugin")
_DOTS_PER_INCH = 150

Run = Callable[[int], None]
"""Executes something so many times and waits for the last result."""

Measure = Callable[[int], float]
"""Seconds of a unit of work, in the round of this number."""


def in_turns(measures: Sequence[Measure], rounds: int) -> np.ndarray:
    """Seconds, (measures, rounds). All take turns, so that a busy moment of the machine hits all alike.

    There and back again, so that neighbours have the same moments.
    """
    seconds = np.zeros((len(measures), rounds))
    for number in range(rounds):
        for line in range(len(measures))[:: -1 if number % 2 else 1]:
            seconds[line, number] = measures[line](number)
    return seconds


def timer(run: Run, seconds: float) -> Measure:
    """Times one execution, as a part of so many as take `seconds`. Executes once, to see how many these are."""
    times = max(1, math.ceil(seconds / elapsed(run, 1)))
    return lambda _: elapsed(run, times) / times


def elapsed(run: Run, times: int) -> float:
    """Seconds that so many executions take."""
    start = time.perf_counter()
    run(times)
    return time.perf_counter() - start


def forward(model: SReT) -> Any:
    """A network's forward pass, (variables, images) -> logits, jitted as this library does."""
    return jax.jit(model.apply, compiler_options=compiler_options())


def compile_uncached(function: Any, *args: Any) -> tuple[Any, float]:
    """The compiled program, and the seconds that tracing and compiling it took with nothing cached."""
    jax.clear_caches()
    start = time.perf_counter()
    return function.lower(*args).compile(), time.perf_counter() - start


def planned_bytes(compiled: Any) -> int:
    """Of one device, as the compiler plans: temporaries, arguments and outputs, donated memory once."""
    plan = compiled.memory_analysis()
    planned = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return planned - plan.alias_size_in_bytes


def peak_bytes() -> int | None:
    """Of one device, in use at most so far; None where it does not measure that."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def schedule() -> Schedule:
    """A learning rate like the recipes'."""
    return warmup_cosine(1e-3, steps=100_000, warmup_steps=10_000)


def optimizer() -> optax.GradientTransformation:
    """The recipes' optimizer."""
    return adamw(schedule(), weight_decay=0.05)


def random_batch(model: SReT, batch_size: int) -> dict[str, np.ndarray]:
    """This host's part of a batch of noise."""
    rng, count = np.random.default_rng(0), batch_size // jax.process_count()
    images = rng.integers(0, 256, (count, model.image_size, model.image_size, 3), np.uint8)
    return {"image": images, "label": rng.integers(0, model.num_classes, count, np.int32)}


def in_own_process(function: Callable[..., Any], *args: Any, environment: Mapping[str, str] | None = None) -> Any:
    """What the function returns in a new process with these environment variables: see `own_process`."""
    with own_process(environment) as call:
        return call(function, *args)


@contextlib.contextmanager
def own_process(environment: Mapping[str, str] | None = None) -> Iterator[Callable[..., Any]]:
    """A new process with these environment variables, whose memory and end are its own.

    What is yielded calls a function there, with arguments, and returns what it returns.

    Raises:
      RuntimeError: the process ended before it returned anything; and whatever the function raises.
    """
    with (
        mock.patch.dict(os.environ, environment or {}),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):

        def call(function: Callable[..., Any], *args: Any) -> Any:
            try:
                return pool.submit(_call_telling, function, *args).result()
            except BrokenProcessPool as error:
                raise RuntimeError("its process died") from error

        yield call


def _call_telling(function: Callable[..., Any], *args: Any) -> Any:
    """What the function returns, or an error that another process can be told: some of PyTorch's cannot be copied."""
    try:
        return function(*args)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def run_program(main: Callable[[], None]) -> None:
    """Call `main`; a user's mistake ends the program with its message."""
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")


def failure(error: Exception) -> str:
    """What stands in a table where something could not be measured."""
    text = str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    first_line = (text.strip().splitlines() or [""])[0]
    return f"failed: {first_line[:200] or type(error).__name__}"


@contextlib.contextmanager
def failing_into(record: dict[str, Any]) -> Iterator[None]:
    """What fails in this context is said in the record, under "failure", and the rest goes on."""
    try:
        yield
    except Exception as error:
        record["failure"] = failure(error)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)


def median_spread(values: np.ndarray, digits: int) -> list[str]:
    """Over the rounds: median, and least and most."""
    return [f"{np.median(values):.{digits}f}", f"{values.min():.{digits}f}–{values.max():.{digits}f}"]


def median_spread_ratio(values: np.ndarray, first: np.ndarray, digits: int) -> list[str]:
    """Over the rounds: median, least and most, and the median of each round's ratio to the first line."""
    return [*median_spread(values, digits), f"{np.median(values / first):.2f}"]


def print_aligned(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table, all columns to the right. A line of fewer cells than the header ends early."""
    rows = [header, *lines]
    columns = ([row[i] for row in rows if i < len(row) - (len(row) < len(header))] for i in range(len(header)))
    widths = [max(map(len, column)) for column in columns]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), flush=True)


def print_device() -> None:
    """The devices that JAX computes on, and its version."""
    device = jax.devices()[0]
    print(f"{jax.device_count()} × {device.device_kind} ({device.platform}), jax {jax.__version__}")


def versions() -> dict[str, str]:
    """Of the packages that decide on figures, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def versions_line() -> str:
    """The same for a person."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Where a record is from: command line, time, packages, machine."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "arguments": vars(args),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": {"architecture": platform.machine(), "cpus": os.cpu_count()},
    }


def device_facts() -> dict[str, Any]:
    """The devices that JAX computes on, for a record."""
    device = jax.devices()[0]
    return {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()}


def write_json(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write a record to NAME.json in the folder, which need not be there."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def new_figure(title: str, subtitle: str, width: float, height: float) -> "Figure":
    """An empty picture with a heading; width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, facecolor="white", layout="constrained")
    # Beside the heading of the axes, which constrained layout keeps free; two of its lines are of other sizes.
    figure.suptitle(f"{title}\n", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.01, 1 - 0.42 / height, subtitle, fontsize=8.5, color=MUTED, va="center")
    return figure


def prepare(axes: "Axes", title: str, xlabel: str = "", ylabel: str = "") -> None:
    """One style for all: a quiet grid, no frame, labels in grey."""
    axes.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8.5, colors=MUTED, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)


def legend(axes: "Axes", **options: Any) -> None:
    """A legend without a frame, if anything has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8.5, labelcolor=INK, **options)


def write_picture(folder: Path, name: str, figure: "Figure") -> None:
    """Write a picture to NAME.png in the folder, which need not be there."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    folder.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(folder / f"{name}.png")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


def field(text: str) -> tuple[str, Any]:
    """NAME=VALUE, a field of the model, for argparse; values as in Python, and words without quotes."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE, such as recursions=(3,3,3)")
    with contextlib.suppress(ValueError, SyntaxError):
        return name, ast.literal_eval(value)
    return name, value


def add_field_flag(parser: argparse.ArgumentParser) -> None:
    """`--field NAME=VALUE`, any number of times."""
    parser.add_argument("--field", nargs="+", type=field, default=[], metavar="NAME=VALUE", help="other fields of SReT")
