"""What a run tells a person (a progress bar or plain lines) and what it writes down (metrics, TensorBoard, a picture).

Everything lies in the run's folder, the workdir:

- `metrics.jsonl`: one JSON object per line, see `Report`;
- `tensorboard/`: the same numbers as TensorBoard events, `train/loss` and so on;
- `run.json`: the facts that the run began with, as printed;
- `learning_curves.png`: drawn from the two JSON files by `learning_curves`.
"""

import datetime
import json
import math
import numbers
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from sret_jax.errors import UserError
from sret_jax.files import naming, replace
from sret_jax.training.curves import draw_curves
from sret_jax.training.weights_and_biases import open_wandb_run

_SECONDS_BETWEEN_PLAIN_LINES = 10.0
_WAITING_WORTH_SAYING = 0.05  # part of a step


class Report:
    """Shows and records one run, or one more part of a run that was interrupted. A context manager.

    On a terminal: a progress bar, with lines above it. Elsewhere, such as in a log file: lines without control codes,
    for training steps at most one in ten seconds.

    Each call of `train` and `evaluation` adds a line to `metrics.jsonl` at once: an object with `step`, `epoch` (a
    fraction within an epoch), `kind` ("train" or "evaluation"), the metrics as given, `seconds` (that the run has taken
    so far, its interrupted parts up to the step where each was taken up again included), and, for training,
    `images_per_second` and `step_seconds` (see `train`). A number that is not finite, or not known yet, is null.

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
        self._workdir = workdir
        self._total_steps = total_steps
        self._first_step = first_step
        self._steps_per_epoch = steps_per_epoch
        self._batch_size = batch_size
        self._wandb_project = wandb_project
        self._wandb_run: Any = None
        self._active = active
        self._clock = clock
        self._display = _Display(console or Console(), total_steps, first_step)
        self._began_at = clock()
        self._first_tick: tuple[int, float] | None = None  # step and time at the end of the first step
        self._interval_start: tuple[int, float] | None = None  # from where images per second are counted
        self._step_seconds: float | None = None
        self._last_plain_line_at = -math.inf

    def __enter__(self) -> Self:
        if self._active:
            self._records = _Records(self._workdir, self._first_step)
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
        replace(_facts_path(self._workdir), json.dumps(facts, indent=2, default=str, ensure_ascii=False) + "\n")
        if self._wandb_project:
            self._wandb_run = open_wandb_run(self._wandb_project, self._workdir, facts)
        epochs = self._total_steps / self._steps_per_epoch
        plan = f"{self._total_steps:,} steps of {self._batch_size:,} images, {epochs:.4g} epochs"
        if self._first_step:
            plan += f", {self._first_step:,} steps done before"
        self._display.block({**facts, "training": plan, "workdir": self._workdir})

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
                "took": _duration(self._clock() - self._began_at),
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
        return f"{_duration(seconds_per_step * (self._total_steps - step))} left"


def learning_curves(workdir: str) -> str:
    """Draws what a run has recorded so far.

    Args:
        workdir: the folder of a run, finished or not.

    Returns:
        The path of the picture, `learning_curves.png` in the workdir; an older one is replaced.

    Raises:
        UserError: if the workdir holds no `metrics.jsonl` or one that no run wrote, or cannot be written to.
    """
    metrics = _metrics_path(workdir)
    if not metrics.is_file():
        raise UserError(f"there is no {metrics.name} in {workdir}: give the workdir of a run that has begun to train.")
    facts_path = _facts_path(workdir)
    facts = json.loads(facts_path.read_text(encoding="utf-8")) if facts_path.is_file() else {"model": "Learning curves"}
    subtitle = "  ·  ".join(f"{_words(name)}: {_text(fact)}" for name, fact in facts.items() if name != "model")
    picture = Path(workdir) / "learning_curves.png"
    replace(picture, draw_curves(_read_metrics(metrics), facts["model"], subtitle))
    return str(picture)


class _Display:
    """The bar on a terminal, and lines anywhere."""

    def __init__(self, console: Console, total_steps: int, first_step: int) -> None:
        self.is_plain = not console.is_terminal or console.is_dumb_terminal
        self._console = console
        self._bar = Progress(
            BarColumn(bar_width=None, style="bright_black", complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[time_left]}", style="bright_black"),
            console=console,
            disable=self.is_plain,
            expand=True,
        )
        self._task = self._bar.add_task(
            "", total=total_steps, completed=first_step, numbers="compiling the first step", time_left=""
        )

    def open(self) -> None:
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()

    def move(self, step: int, time_left: str) -> None:
        self._bar.update(self._task, completed=step, time_left=time_left)

    def numbers(self, texts: list[str]) -> None:
        self._bar.update(self._task, numbers="  ".join(texts))

    def line(self, *parts: str) -> None:
        text = "  ".join(filter(None, parts))
        if self.is_plain:
            print(text, file=self._console.file, flush=True)
        else:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def block(self, facts: Mapping[str, object]) -> None:
        width = max(map(len, facts))
        for name, fact in facts.items():
            self.line(f"{_words(name):{width}}", _text(fact))


class _Records:
    """`metrics.jsonl` and the TensorBoard events of one run, open for more."""

    def __init__(self, workdir: str, first_step: int) -> None:
        if "://" in workdir:
            raise UserError(f"the workdir {workdir} is not a folder: give a path on a local or mounted disk.")
        self._metrics_path = _metrics_path(workdir)
        self._events_path = Path(workdir) / "tensorboard"
        with naming(self._events_path):
            self._events_path.mkdir(parents=True, exist_ok=True)

        is_resumed = first_step > 0 and self._metrics_path.is_file()
        kept = [r for r in _read_metrics(self._metrics_path) if r["step"] <= first_step] if is_resumed else []
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        replace(self._metrics_path, "".join(json.dumps(record) + "\n" for record in kept))
        with naming(self._metrics_path):
            self._metrics = self._metrics_path.open("a", encoding="utf-8")

        # Not SummaryWriter: it writes in a thread of its own, and when that dies of a full disk the next calls wait for
        # it forever. The suffix keeps two writers that were opened within one second apart.
        with naming(self._events_path):
            self._events = EventsWriter(str(self._events_path / "events"), f".{first_step}")
        redone_from = first_step + 1 if first_step else 0
        self._write_event(Event(step=redone_from, session_log=SessionLog(status=SessionLog.START)))

    def write(self, place: Mapping[str, Any], metrics: Mapping[str, float | None], cost: Mapping[str, float]) -> None:
        line = json.dumps({**place, **{name: _json_number(value) for name, value in metrics.items()}, **cost})
        with naming(self._metrics_path):
            self._metrics.write(line + "\n")
            self._metrics.flush()
        scalars = [
            Summary.Value(tag=f"{place['kind']}/{name}", simple_value=float(value))
            for name, value in metrics.items()
            if value is not None
        ]
        self._write_event(Event(step=place["step"], summary=Summary(value=scalars)))

    def close(self) -> None:
        with naming(self._metrics_path):
            self._metrics.close()
        with naming(self._events_path):
            self._events.close()

    def _write_event(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self._events_path):
            self._events.write_event(event)
            self._events.flush()


def _metrics_path(workdir: str) -> Path:
    return Path(workdir) / "metrics.jsonl"


def _facts_path(workdir: str) -> Path:
    return Path(workdir) / "run.json"


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`. What follows the last line break is a line that a kill cut short: dropped."""
    with naming(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"step", "epoch", "kind", "seconds"} <= record.keys():
            raise UserError(f"{path}, line {number}: expected a record of a run. Remove this line, or the file.")
        records.append(record)
    return records


def _json_number(value: float | None) -> float | None:
    """A Python number, also from NumPy's; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(fact: object) -> str:
    return f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact)


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
