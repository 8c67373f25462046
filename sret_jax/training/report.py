"""What a run tells a person (a progress bar or plain lines) and what it writes down (metrics, TensorBoard, a picture).

Everything lies in the run's folder, the workdir:

- `metrics.jsonl`: one JSON object per line, see `Report`;
- `tensorboard/`: the same numbers as TensorBoard events, `train/loss` and so on;
- `run.json`: the facts that the run began with, as printed;
- `learning_curves.png`: drawn from the two JSON files by `learning_curves`.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from sret_jax.errors import UserError
from sret_jax.files import DamagedError, expand_local, read_json, replace, to_json
from sret_jax.training.compiling import compiling
from sret_jax.training.curves import draw_curves
from sret_jax.training.display import Display, RunConsole, duration, shown, text_of, words
from sret_jax.training.records import Records, facts_path, metrics_path, read_metrics
from sret_jax.training.weights_and_biases import open_wandb_run

_LOG = logging.getLogger(__name__)

_SECONDS_BETWEEN_PLAIN_LINES = 10.0
_WAITING_WORTH_SAYING = 0.05  # part of a step


class Report:
    """Shows and records one run, or one more part of a run that was interrupted. A context manager.

    On a terminal: a progress bar, with lines above it. Elsewhere, such as in a log file: lines without control codes,
    for training steps at most one in ten seconds.

    Each call of `train` and `evaluation` adds a line to `metrics.jsonl` at once: an object with `step`, `epoch` (a
    fraction within an epoch), `kind` ("train" or "evaluation"), the metrics as given, `seconds` (that the run has taken
    so far, its interrupted parts up to the step where each was taken up again included), and, for training,
    `images_per_second` and `step_seconds` (see `train`). A number that is not finite, or not known yet, is null. The
    last is `crc32`, a checksum of the others: damaged lines are refused.

    Entering drops what an interrupted run recorded after `first_step`, from `metrics.jsonl` and from what TensorBoard
    shows, for these steps are done again. If `first_step` is 0 nothing has been done, and all is dropped.

    Args:
        workdir: the folder of the run on a local or mounted disk; made if missing.
        total_steps: number of the last training step; steps count from 1.
        first_step: training steps that are done already: 0, or what the checkpoint that is resumed from holds.
        steps_per_epoch: training steps that make an epoch.
        batch_size: training images per step, over all devices.
        wandb_project: of Weights & Biases, which gets the same numbers; empty is none.
        active: whether to show and write anything: only on process 0 of a run on several hosts.
        console: where to print; by default standard output.
        clock: returns seconds from any fixed point in time.

    Raises:
        UserError: from any method, if the workdir is not a local path or a file in it cannot be written (a full disk,
            no permission); from entering also if `metrics.jsonl` holds a line that no run wrote.
    """

    def __init__(
        self,
        workdir: str,
        *,
        total_steps: int,
        first_step: int,
        steps_per_epoch: int,
        batch_size: int,
        wandb_project: str = "",
        active: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._workdir = str(expand_local(workdir))
        self._total_steps = total_steps
        self._first_step = first_step
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._wandb_project = wandb_project
        self._wandb_run: Any = None
        self._active = active
        self._clock = clock
        self._display = Display(console or RunConsole(), total_steps, first_step)
        self._began_at = clock()
        self._first_tick: tuple[int, float] | None = None  # step and time at the end of the first step
        self._interval_start: tuple[int, float] | None = None  # from where images per second are counted
        self._step_seconds: float | None = None
        self._last_plain_line_at = -math.inf

    def __enter__(self) -> Self:
        if self._active:
            self._records = Records(self._workdir, self._first_step)
            self._began_at = self._clock() - self._records.seconds_before
            self._display.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._active:
            self._display.close()
            self._records.close()
            if self._wandb_run is not None:
                self._wandb_run.finish(exit_code=0 if error is None else 1)

    def start(self, *, model: str, **facts: object) -> None:
        """Prints what is about to run, one aligned line per fact, and keeps it in `run.json`.

        Args:
            model: the network's name, which also becomes the title of the picture.
            facts: anything else worth knowing; `batch_size=32` is printed as "batch size  32".
        """
        if not self._active:
            return
        facts = {"model": model, **facts}
        replace(facts_path(self._workdir), to_json(facts, indent=2) + "\n")
        if self._wandb_project:
            self._wandb_run = open_wandb_run(self._wandb_project, self._workdir, facts)
        epochs = self._total_steps / self._steps_per_epoch
        plan = f"{self._total_steps:,} steps of {self._batch_size:,} images, {epochs:.4g} epochs"
        if self._first_step:
            plan += f", {self._first_step:,} steps done before"
        self._display.block({**facts, "training": plan, "workdir": self._workdir})

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Shows that something is being compiled in this context, such as "the train step", and for how long."""
        if not self._active:
            with compiling(what, lambda _: None):
                yield
            return
        show = None if self._display.is_plain else lambda text: self._display.numbers([text])
        with compiling(what, self._display.line, show):
            yield
        self._display.numbers([])

    def progress(self, step: int) -> None:
        """Moves the bar: training step `step` is done, or under way on the device. Cheap enough for every step.

        The first call, after the first step, keeps that step and its compilation out of the speed and the time left.
        """
        if not self._active:
            return
        if self._first_tick is None:
            self._first_tick = self._interval_start = (step, self._clock())
        self._display.move(step, self._time_left(step))

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows and records training step `step`, which is done on the device, not only under way.

        The speed is that of the steps since the last call, without the first step of the run and without steps that an
        evaluation interrupted. There is none while no step has been timed.

        Args:
            step: number of the step, from 1.
            metrics: numbers by name, among them `loss` and `learning_rate`; also shown, where there are such:
                `data_seconds`, that a step waited for its batch on average, and `skipped`, how many steps.
        """
        if not self._active:
            return
        now = self._clock()
        if self._interval_start is not None and step > self._interval_start[0]:
            interval_step, interval_time = self._interval_start
            if now > interval_time:  # a clock may be too coarse for one tiny step
                self._step_seconds = (now - interval_time) / (step - interval_step)
        self._interval_start = (step, now)
        self._first_tick = self._first_tick or (step, now)
        speed = self._batch_size / self._step_seconds if self._step_seconds else None
        self._record(
            "train",
            step,
            {
                **metrics,
                "images_per_second": speed,
                "step_seconds": self._step_seconds,
            },
        )

        numbers_text = [f"loss {metrics['loss']:.4f}", f"lr {metrics['learning_rate']:.2e}"]
        if self._step_seconds and speed:
            numbers_text.append(f"{speed:,.{0 if speed >= 100 else 1}f} images/s")
            waiting = metrics.get("data_seconds", 0.0) / self._step_seconds
            if waiting > _WAITING_WORTH_SAYING:
                numbers_text.append(f"{min(waiting, 1):.0%} waiting for data")
        if metrics.get("skipped"):
            numbers_text.append(f"{metrics['skipped']:.0f} steps skipped, not finite")
        self._display.numbers(numbers_text)
        self._display.move(step, self._time_left(step))
        is_due = now - self._last_plain_line_at >= _SECONDS_BETWEEN_PLAIN_LINES or step == self._total_steps
        if self._display.is_plain and is_due:
            self._last_plain_line_at = now
            self._display.line(self._place(step), *numbers_text, self._time_left(step))

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows and records an evaluation on the test images after training step `step`.

        Args:
            step: number of the step, 0 before the first.
            metrics: numbers by name: `accuracy` and, if there is one, `top5_accuracy` as fractions, `loss`, others.
        """
        if not self._active:
            return
        self._record("evaluation", step, metrics)
        line = [self._place(step), f"test accuracy {100 * metrics['accuracy']:.2f} %"]
        if "top5_accuracy" in metrics:
            line.append(f"top-5 {100 * metrics['top5_accuracy']:.2f} %")
        if "ema_accuracy" in metrics:
            line.append(f"of the moving average {100 * metrics['ema_accuracy']:.2f} %")
        self._display.line(*line, f"loss {metrics['loss']:.4f}")
        if self._interval_start is not None:
            self._interval_start = (step, self._clock())

    def message(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._active:
            self._display.line(text)

    def finish(self, *, accuracy: float, checkpoint: str, best_checkpoint: str) -> None:
        """Draws the learning curves, ends the bar and prints how the run came out.

        Args:
            accuracy: final test accuracy as a fraction.
            checkpoint: where the final checkpoint lies.
            best_checkpoint: and the one with the best evaluation.
        """
        if not self._active:
            return
        picture = learning_curves(self._workdir)
        self._display.close()
        self._display.block(
            {
                "test accuracy": f"{100 * accuracy:.2f} %",
                "checkpoint": checkpoint,
                "best checkpoint": best_checkpoint,
                "learning curves": picture,
                "took": duration(self._clock() - self._began_at),
            }
        )

    def _record(self, kind: str, step: int, metrics: Mapping[str, float | None]) -> None:
        epoch = round(step / self._steps_per_epoch, 4)
        seconds = round(self._clock() - self._began_at, 3)
        self._records.write({"step": step, "epoch": epoch, "kind": kind}, metrics, {"seconds": seconds})
        if self._wandb_run is not None:
            self._wandb_run.log({f"{kind}/{name}": value for name, value in metrics.items()}, step=step)

    def _place(self, step: int) -> str:
        epoch, epochs = step / self._steps_per_epoch, self._total_steps / self._steps_per_epoch
        return f"epoch {epoch:.4g}/{epochs:.4g}  step {step}/{self._total_steps}"

    def _time_left(self, step: int) -> str:
        """From the mean time of a step since the first, evaluations included; empty while unknown."""
        if self._first_tick is None or step <= self._first_tick[0]:
            return ""
        seconds_per_step = (self._clock() - self._first_tick[1]) / (step - self._first_tick[0])
        return f"{duration(seconds_per_step * (self._total_steps - step))} left"


def learning_curves(workdir: str) -> str:
    """Draws what a run has recorded so far.

    Args:
        workdir: the folder of a run, finished or not.

    Returns:
        The path of the picture, `learning_curves.png` in the workdir; an older one is replaced.

    Raises:
        UserError: if the workdir holds no `metrics.jsonl` or one that no run wrote, or cannot be written to.
    """
    metrics = metrics_path(workdir)
    if not metrics.is_file():
        raise UserError(f"there is no {metrics.name} in {workdir}: give the workdir of a run that has begun to train.")
    facts = {"model": "Learning curves", **_read_facts(facts_path(workdir))}
    model, training_loss = (shown(text_of(facts.pop(name, ""))) for name in ("model", "training_loss"))
    told = (shown(f"{words(name)}: {text_of(fact)}").replace(" ", "\N{NO-BREAK SPACE}") for name, fact in facts.items())
    picture = expand_local(workdir) / "learning_curves.png"
    replace(picture, draw_curves(read_metrics(metrics), model, "  ·  ".join(told), training_loss))
    return str(picture)


def _read_facts(path: Path) -> dict[str, Any]:
    """The facts that a run began with; none where they are missing or, with a warning, damaged."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except DamagedError as error:
        _LOG.warning("%s, so that the learning curves are drawn without the facts in it", error)
        return {}
