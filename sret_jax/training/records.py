"""What a run's report leaves in the workdir: `metrics.jsonl`, TensorBoard events, and where the other files lie."""

import math
import numbers
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from sret_jax.errors import UserError
from sret_jax.files import DamagedError, expand_local, naming, open_to_add, parse_json, replace, to_json

# What the records of each kind have. The curves are drawn from them.
_EVERY = {"step", "epoch", "seconds"}
_NEEDED = {"train": _EVERY | {"loss", "learning_rate"}, "evaluation": _EVERY | {"accuracy"}}

# More than float32 metrics of a batch add up to, and less than what a picture cannot be drawn of.
_LARGEST_NUMBER = 1e100


class Records:
    """`metrics.jsonl` and the TensorBoard events of one run, open for more."""

    def __init__(self, workdir: str, first_step: int) -> None:
        self._metrics_path = metrics_path(workdir)
        self._events_path = expand_local(workdir) / "tensorboard"
        with naming(self._events_path):
            self._events_path.mkdir(parents=True, exist_ok=True)

        is_resumed = first_step > 0 and self._metrics_path.is_file()
        kept = [r for r in read_metrics(self._metrics_path) if r["step"] <= first_step] if is_resumed else []
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        replace(self._metrics_path, "".join(to_json(record) + "\n" for record in kept))
        with naming(self._metrics_path):
            self._metrics = open_to_add(self._metrics_path)

        # Not SummaryWriter: it writes in a thread of its own, and when that dies of a full disk the next calls wait for
        # it forever. The suffix keeps two writers apart that were opened within one second, and names no link that
        # lies there.
        with naming(self._events_path):
            self._events = EventsWriter(str(self._events_path / "events"), f".{uuid.uuid4().hex[:8]}.{first_step}")
        redone_from = first_step + 1 if first_step else 0
        self._write_event(Event(step=redone_from, session_log=SessionLog(status=SessionLog.START)))

    def write(self, place: Mapping[str, Any], metrics: Mapping[str, float | None], cost: Mapping[str, float]) -> None:
        """Adds a line to `metrics.jsonl`, and the metrics to the events, before it returns.

        `place` holds step, epoch and kind, `cost` the seconds that the run has taken.
        """
        line = to_json({**place, **{name: _json_number(value) for name, value in metrics.items()}, **cost})
        with naming(self._metrics_path):
            self._metrics.write(line.encode() + b"\n")
            self._metrics.flush()
        scalars = [
            Summary.Value(tag=f"{place['kind']}/{name}", simple_value=float(value))
            for name, value in metrics.items()
            if value is not None
        ]
        self._write_event(Event(step=place["step"], summary=Summary(value=scalars)))

    def close(self) -> None:
        """Closes the files; a disk may turn out to be full only then."""
        with naming(self._metrics_path):
            self._metrics.close()
        with naming(self._events_path):
            self._events.close()

    def _write_event(self, event: Event) -> None:
        event.wall_time = time.time()
        with naming(self._events_path):
            self._events.write_event(event)
            self._events.flush()


def metrics_path(workdir: str) -> Path:
    """Of the metrics in a workdir."""
    return expand_local(workdir) / "metrics.jsonl"


def facts_path(workdir: str) -> Path:
    """Of the facts that the run in a workdir began with."""
    return expand_local(workdir) / "run.json"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`. What follows the last line break is a line that a kill cut short: dropped."""
    with naming(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line, path)
        except DamagedError:
            record = {}
        if not _is_record(record):
            raise UserError(f"{path}, line {number}: expected a record of a run. Remove this line, or the file.")
        records.append(record)
    return records


def _is_record(record: Mapping[str, Any]) -> bool:
    """Whether a line of `metrics.jsonl` has what every one of its kind has: numbers, or null for what is none."""
    needed = _NEEDED.get(str(record.get("kind")), set())
    numbers_ = {name: value for name, value in record.items() if name != "kind"}
    return (
        bool(needed)
        and needed <= numbers_.keys()
        and all(value is None or _is_number(value) for value in numbers_.values())
        and isinstance(record["step"], int)
        and all(record[name] is not None and record[name] >= 0 for name in ("step", "epoch", "seconds"))
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST_NUMBER


def _json_number(value: float | None) -> float | None:
    """A Python number, also from NumPy's; None for what JSON cannot hold."""
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, numbers.Integral) else float(value)
