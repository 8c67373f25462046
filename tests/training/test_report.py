"""What a run prints and writes down, also when it is interrupted or the disk refuses."""

import io
import itertools
import json
import math
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from sret_jax.errors import UserError
from sret_jax.training.curves import SIZE, curves_figure, draw_curves
from sret_jax.training.records import read_metrics
from sret_jax.training.report import Report, learning_curves

TRAIN = {"loss": 1.5, "learning_rate": 3e-4}
EVALUATION = {"accuracy": 0.9722, "top5_accuracy": 0.999, "loss": 0.125, "examples": 360}


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> Console:
    """Where a run prints that is not on a terminal."""
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.fixture
def terminal() -> Console:
    environment = {"TERM": "xterm-256color", "COLUMNS": "110"}
    return Console(file=io.StringIO(), force_terminal=True, _environ=environment)


def report_of(workdir: str | Path, first_step: int = 0, **others: Any) -> Report:
    """A run of 30 steps, 3 epochs, 8 images a step."""
    return Report(str(workdir), total_steps=30, first_step=first_step, steps_per_epoch=10, batch_size=8, **others)


def records_in(workdir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    records = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        *fields, (name, checksum) = json.loads(line, parse_constant=refuse).items()
        assert name == "crc32" and checksum == zlib.crc32(json.dumps(dict(fields)).encode())
        records.append(dict(fields))
    return records


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def events_in(path: Path) -> Iterator[Event]:
    """Reads the record format: length, its checksum, the event, its checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]


def png_size(path: str | Path) -> tuple[int, int]:
    header = Path(path).read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


# What is written


def test_every_call_adds_one_json_line(tmp_path: Path, clock: Clock, log: Console) -> None:
    numpy_number: Any = np.float32(0.5)
    with report_of(tmp_path / "new" / "run", clock=clock, console=log) as report:
        clock.wait(60)
        report.train(5, TRAIN)
        clock.wait(2)
        report.train(10, {**TRAIN, "loss": numpy_number})
        clock.wait(1)
        report.evaluation(10, EVALUATION)
    assert records_in(tmp_path / "new" / "run") == [
        dict(
            step=5,
            epoch=0.5,
            kind="train",
            loss=1.5,
            learning_rate=3e-4,
            images_per_second=None,
            step_seconds=None,
            seconds=60,
        ),
        dict(
            step=10,
            epoch=1,
            kind="train",
            loss=0.5,
            learning_rate=3e-4,
            images_per_second=20,
            step_seconds=0.4,
            seconds=62,
        ),
        dict(
            step=10,
            epoch=1,
            kind="evaluation",
            accuracy=0.9722,
            top5_accuracy=0.999,
            loss=0.125,
            examples=360,
            seconds=63,
        ),
    ]


def test_a_line_is_on_disk_before_the_run_ends(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report:
        report.train(1, TRAIN)
        assert [record["step"] for record in records_in(tmp_path)] == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_a_number_that_is_not_finite_is_null_in_the_file_and_shown_as_it_is(
    tmp_path: Path, log: Console, value: float
) -> None:
    with report_of(tmp_path, console=log) as report:
        report.train(1, {**TRAIN, "loss": value})
    assert records_in(tmp_path)[0]["loss"] is None
    assert f"loss {value:.4f}" in printed(log)


def test_start_keeps_the_facts(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report:
        report.start(model="sret_t", parameters=1_234_567, devices="1 × cpu", path=Path("a"))
    facts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    checksum = facts.pop("crc32")
    assert checksum == zlib.crc32(json.dumps(facts).encode())
    assert facts == {"model": "sret_t", "parameters": 1_234_567, "devices": "1 × cpu", "path": "a"}


# The speed


def test_speed_leaves_out_the_first_step_and_evaluations(tmp_path: Path, clock: Clock, log: Console) -> None:
    with report_of(tmp_path, clock=clock, console=log) as report:
        clock.wait(500)  # compiles
        report.progress(1)
        clock.wait(1)
        report.train(5, TRAIN)  # four steps in one second
        clock.wait(100)  # steps to 8, which nobody can tell from the evaluation
        report.evaluation(8, EVALUATION)
        clock.wait(0.25)
        report.train(10, TRAIN)
    assert [r["images_per_second"] for r in records_in(tmp_path) if r["kind"] == "train"] == [4 * 8, 2 * 8 / 0.25]


def test_evaluation_before_the_first_step_does_not_start_the_watch(tmp_path: Path, clock: Clock, log: Console) -> None:
    with report_of(tmp_path, clock=clock, console=log) as report:
        report.evaluation(0, EVALUATION)
        clock.wait(500)
        report.train(1, TRAIN)
        clock.wait(1)
        report.train(3, TRAIN)
    assert [r.get("images_per_second") for r in records_in(tmp_path)] == [None, None, 16]


def test_speed_is_recent_and_time_left_is_from_the_mean(tmp_path: Path, clock: Clock, log: Console) -> None:
    with report_of(tmp_path, clock=clock, console=log) as report:
        clock.wait(900)
        report.progress(1)
        clock.wait(100)
        report.train(11, TRAIN)
        clock.wait(20)
        report.train(21, TRAIN)
    lines = printed(log).splitlines()
    assert "0.8 images/s" in lines[0] and "0:03:10 left" in lines[0]  # 10 s a step, 19 steps
    assert "4.0 images/s" in lines[1] and "0:00:54 left" in lines[1]  # 6 s a step, 9 steps


# Resuming


def test_resuming_drops_what_is_done_again_and_a_line_cut_short(tmp_path: Path, clock: Clock, log: Console) -> None:
    with report_of(tmp_path, clock=clock, console=log) as report:
        for step in (5, 10, 15, 20):
            report.train(step, TRAIN)
            clock.wait(10)
            if step % 10 == 0:
                report.evaluation(step, EVALUATION)
    before = records_in(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "epo')

    clock.wait(3600)
    with report_of(tmp_path, first_step=10, clock=clock, console=log) as report:
        assert records_in(tmp_path) == before[:3]
        clock.wait(7)
        report.train(15, TRAIN)
    assert [(r["kind"], r["step"]) for r in records_in(tmp_path)] == [
        ("train", 5),
        ("train", 10),
        ("evaluation", 10),
        ("train", 15),
    ]
    assert records_in(tmp_path)[-1]["seconds"] == 20 + 7  # the pause and the lost steps took no part in the run
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_only_the_line_that_is_cut_short_is_dropped(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report:
        report.train(5, TRAIN)
        report.train(10, TRAIN)
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-4])
    with report_of(tmp_path, first_step=10, console=log):
        assert [record["step"] for record in records_in(tmp_path)] == [5]


def test_beginning_anew_drops_all(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report:
        report.evaluation(0, EVALUATION)
        report.train(5, TRAIN)
    with report_of(tmp_path, console=log):
        assert records_in(tmp_path) == []


def test_a_foreign_line_is_refused_by_its_number_and_stays(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report:
        report.train(5, TRAIN)
    metrics = tmp_path / "metrics.jsonl"
    content = metrics.read_text() + "a note\n"
    metrics.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"), report_of(tmp_path, first_step=10, console=log):
        pass
    assert metrics.read_text() == content


# TensorBoard


def test_tensorboard_events_hold_the_numbers(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report:
        report.train(5, {**TRAIN, "loss": math.nan})
        report.evaluation(10, EVALUATION)
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert ".tfevents." in path.name
    scalars = {(e.step, value.tag): value.simple_value for e in events_in(path) for value in e.summary.value}
    assert math.isnan(scalars.pop((5, "train/loss")))
    assert scalars == {
        (5, "train/learning_rate"): pytest.approx(3e-4),
        (10, "evaluation/accuracy"): pytest.approx(0.9722),
        (10, "evaluation/top5_accuracy"): pytest.approx(0.999),
        (10, "evaluation/loss"): 0.125,
        (10, "evaluation/examples"): 360,
    }


def test_tensorboard_hides_steps_that_are_done_again(tmp_path: Path, log: Console) -> None:
    for first_step in (0, 10):
        with report_of(tmp_path, first_step=first_step, console=log) as report:
            report.train(first_step + 5, TRAIN)
    first, second = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:]))
    starts = {
        path: [e.step for e in events_in(path) if e.session_log.status == SessionLog.START] for path in (first, second)
    }
    assert starts == {first: [0], second: [11]}


# What is printed


def test_a_log_file_holds_plain_lines(tmp_path: Path, clock: Clock, log: Console) -> None:
    with report_of(tmp_path, clock=clock, console=log) as report:
        report.start(model="sret_t", parameters=1_234_567, devices="1 × cpu")
        report.progress(1)
        clock.wait(9)
        report.train(10, TRAIN)
        report.evaluation(10, EVALUATION)
        report.message("checkpoint 120 was damaged, using [checkpoint 80]")
        report.finish(accuracy=0.9722, checkpoint="checkpoints/30", best_checkpoint="best")
    assert printed(log).splitlines() == [
        "model       sret_t",
        "parameters  1,234,567",
        "devices     1 × cpu",
        "training    30 steps of 8 images, 3 epochs",
        f"workdir     {tmp_path}",
        "epoch 1/3  step 10/30  loss 1.5000  lr 3.00e-04  8.0 images/s  0:00:20 left",
        "epoch 1/3  step 10/30  test accuracy 97.22 %  top-5 99.90 %  loss 0.1250",
        "checkpoint 120 was damaged, using [checkpoint 80]",
        "test accuracy    97.22 %",
        "checkpoint       checkpoints/30",
        "best checkpoint  best",
        f"learning curves  {tmp_path}/learning_curves.png",
        "took             0:00:09",
    ]


def test_a_log_file_gets_a_training_line_every_ten_seconds_and_the_last(
    tmp_path: Path, clock: Clock, log: Console
) -> None:
    with report_of(tmp_path, clock=clock, console=log) as report:
        for step in range(1, 31):
            report.train(step, TRAIN)
            clock.wait(1)
    steps = [int(line.split("step ")[1].split("/")[0]) for line in printed(log).splitlines()]
    assert steps == [1, 11, 21, 30]
    assert len(records_in(tmp_path)) == 30


def test_a_terminal_shows_a_bar_and_lines_above_it(tmp_path: Path, clock: Clock, terminal: Console) -> None:
    with report_of(tmp_path, clock=clock, console=terminal) as report:
        report.progress(1)
        clock.wait(9)
        report.train(10, TRAIN)
        report.message("checkpoint 120 was damaged, using [checkpoint 80]")
        report.finish(accuracy=0.5, checkpoint="checkpoints/30", best_checkpoint="best")
    text = printed(terminal)
    assert "\x1b[" in text
    assert "compiling the first step" in text
    assert "10/30" in text
    assert "loss 1.5000  lr 3.00e-04  8.0 images/s" in text
    assert "0:00:20 left" in text
    assert "checkpoint 120 was damaged, using [checkpoint 80]\n" in text
    assert "epoch 1/3  step 10/30  loss" not in text  # the bar says it


def test_a_log_file_says_that_the_train_step_is_compiled(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report, report.compiling("the train step"):
        assert printed(log) == "compiling the train step\n"
    assert printed(log).splitlines()[1:] == ["compiled the train step in 0:00:00"]


def test_a_terminal_shows_how_long_the_train_step_has_been_compiled(tmp_path: Path, terminal: Console) -> None:
    with report_of(tmp_path, console=terminal) as report:
        with report.compiling("the train step"):
            while "compiling the train step, 0:00:01" not in printed(terminal):
                time.sleep(0.1)
        assert "compiled the train step in 0:00:0" in printed(terminal)


def test_an_error_in_the_run_passes_and_the_terminal_is_left_in_order(tmp_path: Path, terminal: Console) -> None:
    with pytest.raises(KeyboardInterrupt), report_of(tmp_path, console=terminal) as report:
        report.train(1, TRAIN)
        raise KeyboardInterrupt
    hide_cursor, show_cursor = "\x1b[?25l", "\x1b[?25h"
    assert printed(terminal).rfind(show_cursor) > printed(terminal).rfind(hide_cursor) >= 0


def test_an_inactive_report_prints_and_writes_nothing(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path / "run", active=False, console=log) as report:
        report.start(model="sret_t")
        with report.compiling("the train step"):
            pass
        report.progress(1)
        report.train(1, TRAIN)
        report.evaluation(1, EVALUATION)
        report.message("hello")
        report.finish(accuracy=0.5, checkpoint="checkpoints/30", best_checkpoint="best")
    assert printed(log) == ""
    assert list(tmp_path.iterdir()) == []


# The picture


def test_finish_draws_the_picture_and_a_resumed_run_draws_it_again(tmp_path: Path, log: Console) -> None:
    pictures = []
    for first_step in (0, 10):
        with report_of(tmp_path, first_step=first_step, console=log) as report:
            report.start(model="sret_t")
            for step in range(first_step + 1, first_step + 11):
                report.train(step, {"loss": 1 / step, "learning_rate": 1e-3})
            report.evaluation(first_step + 10, {**EVALUATION, "accuracy": 0.5 + first_step / 100})
            report.finish(accuracy=0.5, checkpoint="checkpoints", best_checkpoint="best")
        assert png_size(tmp_path / "learning_curves.png") == SIZE
        pictures.append((tmp_path / "learning_curves.png").read_bytes())
    assert pictures[0] != pictures[1]


def test_learning_curves_of_a_run_that_was_killed(tmp_path: Path, log: Console) -> None:
    with report_of(tmp_path, console=log) as report:
        report.train(5, TRAIN)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 25, "epo')
    path = learning_curves(str(tmp_path))
    assert path == str(tmp_path / "learning_curves.png")
    assert png_size(path) == SIZE


def train_record(step: int, loss: float | None = 1.0) -> dict[str, Any]:
    return dict(kind="train", step=step, epoch=step / 10, loss=loss, learning_rate=1e-3, seconds=step)


def evaluation_record(step: int, accuracy: float | None = 0.5) -> dict[str, Any]:
    return dict(kind="evaluation", step=step, epoch=step / 10, accuracy=accuracy, seconds=step)


@pytest.mark.parametrize(
    ("records", "has_loss", "has_accuracy"),
    [
        ([], False, False),
        ([train_record(5)], True, False),
        ([evaluation_record(0)], False, True),
        ([train_record(5, None), evaluation_record(10, None)], False, False),
        ([train_record(5), train_record(6, None), train_record(7, 0.5), evaluation_record(10, 1.0)], True, True),
        ([train_record(step, 1 / step) for step in range(1, 500)], True, False),
    ],
    ids=["nothing", "one step", "one evaluation", "nothing finite", "a gap", "many"],
)
@pytest.mark.filterwarnings("error")
def test_each_curve_is_there_if_it_was_recorded(
    records: list[dict[str, Any]], has_loss: bool, has_accuracy: bool
) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(draw_curves(records, "sret_t"))).convert("RGB")).astype(int)
    assert pixels.shape == (SIZE[1], SIZE[0], 3)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    assert np.any((blue > 180) & (red < 60)) == has_loss
    assert np.any((green > 100) & (red < 60) & (blue < 80)) == has_accuracy


def test_of_several_records_of_one_step_the_last_is_drawn() -> None:
    twice = [evaluation_record(10, 0.1), evaluation_record(20, 0.9), evaluation_record(10, 0.3)]
    once = [evaluation_record(20, 0.9), evaluation_record(10, 0.3)]
    assert draw_curves(twice, "sret_t") == draw_curves(once, "sret_t")


def evaluations(*accuracies: float | None, **others: float) -> list[dict[str, Any]]:
    """One at the end of each epoch."""
    return [{**evaluation_record(10 * epoch, accuracy), **others} for epoch, accuracy in enumerate(accuracies, 1)]


def points(line: Any) -> list[tuple[float, float]]:
    return [(float(epoch), float(value)) for epoch, value in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_the_test_loss_stands_beside_the_training_loss_which_says_how_it_differs() -> None:
    records = [train_record(10, 2.0), train_record(20, 1.5)]
    records += [{**evaluation_record(10 * epoch), "loss": loss} for epoch, loss in ((1, 1.75), (2, 1.25))]
    loss_axes, _, _ = curves_figure(records, "", "", "with augmentation, mixup").axes
    assert {line.get_label(): points(line) for line in loss_axes.lines} == {
        "training, with augmentation, mixup": [(1, 2.0), (2, 1.5)],
        "test": [(1, 1.75), (2, 1.25)],
    }
    named = [text.get_text() for text in loss_axes.get_legend().get_texts()]
    assert named == ["training, with augmentation, mixup", "test"]


def test_the_moving_averages_evaluations_are_curves_of_their_own() -> None:
    records = evaluations(0.5, 0.75, loss=1.0, ema_loss=0.5, ema_accuracy=0.875)
    loss_axes, accuracy_axes, _ = curves_figure(records, "", "", "").axes
    averages = [
        line for axes in (loss_axes, accuracy_axes) for line in axes.lines if "moving average" in line.get_label()
    ]
    assert [points(line) for line in averages] == [[(1, 0.5), (2, 0.5)], [(1, 87.5), (2, 87.5)]]


@pytest.mark.parametrize(
    ("records", "summary", "marked"),
    [
        (evaluations(0.5), "last 50.00 %, the best", {(1, 50)}),
        (evaluations(0.25, 0.75, 0.5), "last 50.00 %, best 75.00 % at epoch 2", {(3, 50), (2, 75)}),
        (evaluations(0.75, 0.5, 0.75), "last 75.00 %, the best", {(3, 75), (1, 75)}),
        (evaluations(0.75, 0.5, None), "last 50.00 %, best 75.00 % at epoch 1", {(2, 50), (1, 75)}),
        (evaluations(0.25, 0.5, ema_accuracy=0.75), "last 75.00 %, the best", {(2, 75), (1, 75)}),
    ],
    ids=["one", "earlier", "as good earlier", "the last not finite", "the moving average is better"],
)
def test_the_best_epoch_is_marked_beside_the_last(
    records: list[dict[str, Any]], summary: str, marked: set[tuple[float, float]]
) -> None:
    _, axes, _ = curves_figure(records, "", "", "").axes
    assert axes.get_title(loc="right") == summary
    assert {point for line in axes.lines if len(points(line)) == 1 for point in points(line)} >= marked


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("a", 300), ("many short words " * 40, 1), ("x" * 400, 2), ("$\\frac{", 300), ("Blüte 花 " * 30, 1)],
    ids=["short", "words", "a word", "formula", "another script"],
)
@pytest.mark.filterwarnings("error")
def test_no_text_is_cut_and_none_lies_over_another(name: str, epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, Bbox]] = []
    draw = Text.draw

    def observe(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text():
            drawn.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", observe)
    records = evaluations(*[1 - epoch / 1e6 for epoch in range(epochs)], loss=1.0, ema_loss=0.5, ema_accuracy=0.5)
    records += [train_record(10 * epoch, 123.456) for epoch in range(1, epochs + 1)]
    picture = draw_curves(records, name, f"a path: {name}", "with augmentation, mixup, soft targets")
    width, height = Image.open(io.BytesIO(picture)).size
    assert (width, height >= SIZE[1]) == (SIZE[0], True)
    for text, box in drawn:
        assert 0 <= box.x0 < box.x1 <= width and 0 <= box.y0 < box.y1 <= height, text
    for (text, box), (other, other_box) in itertools.combinations(drawn, 2):
        assert not box.padded(-1).overlaps(other_box.padded(-1)), (text, other)
    shown = "".join(text for text, _ in drawn)
    for expected in (name, f"a path: {name}", "training, with augmentation, mixup, soft targets", "Test accuracy (%)"):
        assert "".join(expected.split()) in "".join(shown.split())


def test_learning_curves_without_records_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        learning_curves(str(tmp_path))


# What the disk refuses


def test_a_workdir_below_a_file_is_refused(tmp_path: Path, log: Console) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run/tensorboard: Not a directory"):
        report_of(tmp_path / "file" / "run", console=log).__enter__()


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "learning_curves.png"])
def test_a_folder_where_a_file_should_be_is_named(tmp_path: Path, log: Console, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}: Is a directory"), report_of(tmp_path, console=log) as report:
        report.start(model="sret_t")
        report.finish(accuracy=0.5, checkpoint="checkpoints/30", best_checkpoint="best")


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.jsonl.new", "run.json.new", "learning_curves.png.new"])
def test_nothing_is_written_through_a_link(tmp_path: Path, log: Console, name: str) -> None:
    victim, workdir = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    workdir.mkdir()
    (workdir / name).symlink_to(victim)
    with report_of(workdir, console=log) as report:
        report.start(model="sret_t")
        report.evaluation(10, EVALUATION)
        report.finish(accuracy=0.5, checkpoint="checkpoints/30", best_checkpoint="best")
    assert victim.read_text() == "precious"
    assert not (workdir / "metrics.jsonl").is_symlink()


RECORD = b'{"step": 10, "epoch": 1.0, "kind": "train", "loss": 1.5, "learning_rate": 0.1, "seconds": 9.5}'


@pytest.mark.parametrize(
    "line",
    [
        b"\xff",
        b"[" * 100_000,
        RECORD.replace(b"10", b'"10"'),
        RECORD.replace(b"10", b"-1"),
        RECORD.replace(b"10", b"true"),
        RECORD.replace(b"10", b"1.5"),
        RECORD.replace(b"1.0", b"9" * 400),
        RECORD.replace(b"9.5", b"1e999"),
        RECORD.replace(b"9.5", b"null"),
        RECORD.replace(b"1.5", b"[1.5]"),
        RECORD.replace(b"1.5", b"NaN"),
        RECORD.replace(b'"loss"', b'"lots"'),
        RECORD.replace(b'"train"', b'"trian"'),
        RECORD.replace(b'"train"', b"{}"),
        RECORD.replace(b'"train"', b'"evaluation"'),
    ],
)
def test_a_line_that_no_run_wrote_is_named(tmp_path: Path, log: Console, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(RECORD + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a record of a run"):
        learning_curves(str(tmp_path))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a record of a run"):
        report_of(tmp_path, first_step=10, console=log).__enter__()


def test_no_damaged_digit_is_used(tmp_path: Path, log: Console, caplog: pytest.LogCaptureFixture) -> None:
    with report_of(tmp_path, console=log) as report:
        report.start(model="sret_t", batch_size=32)
        report.train(10, TRAIN)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    for at in range(whole.index(b'"crc32"')):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: expected a record"):
            read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    facts = tmp_path / "run.json"
    facts.write_text(facts.read_text().replace("32,", "33,", 1))
    learning_curves(str(tmp_path))
    assert "run.json is not what was written: its checksum differs" in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"])
def test_curves_are_drawn_without_damaged_facts_and_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(RECORD + b"\n")
    (tmp_path / "run.json").write_bytes(content)
    assert png_size(learning_curves(str(tmp_path))) == SIZE
    assert "run.json is not what was written" in caplog.text and "drawn without the facts" in caplog.text


@pytest.mark.parametrize("model", [None, 3, {"a": []}, "$x_{$", "\udce9"])
def test_curves_are_drawn_under_any_title(tmp_path: Path, model: object) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(RECORD + b"\n")
    (tmp_path / "run.json").write_text(json.dumps({"model": model, "other": model}))
    assert png_size(learning_curves(str(tmp_path))) == SIZE


@pytest.mark.parametrize("encoding", ["koi8-r", "ascii", "utf-8"])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_console_cannot_show_ends_no_run(tmp_path: Path, encoding: str, is_terminal: bool) -> None:
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding=encoding), force_terminal=is_terminal)
    workdir = tmp_path / os.fsdecode(b"caf\xe9")
    with report_of(workdir, console=console) as report:
        report.start(model="sret_t", images="224 × 224 pixels", training_images=f"{workdir}/images train: 24")
        report.train(5, TRAIN)
        report.evaluation(10, EVALUATION)
        report.finish(accuracy=0.5, checkpoint=f"{workdir}/checkpoints/30", best_checkpoint="best")
    console.file.flush()
    text = written.getvalue().decode(encoding)
    assert f"224 {'×' if encoding == 'utf-8' else '?'} 224 pixels" in text and "caf?/images" in text
    assert json.loads((workdir / "run.json").read_bytes())["training_images"] == f"{workdir}/images train: 24"
    assert (workdir / "learning_curves.png").exists() and len(records_in(workdir)) == 2


def test_a_workdir_that_is_not_on_a_disk_is_refused(log: Console) -> None:
    with pytest.raises(UserError, match="gs://bucket/run is not a folder"):
        report_of("gs://bucket/run", console=log).__enter__()


def test_a_full_disk_ends_the_run_with_the_name_of_the_file(tmp_path: Path, log: Console) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(UserError, match=r"metrics\.jsonl: File too large"), report_of(tmp_path, console=log) as report:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
        try:
            for step in range(1, 31):
                report.train(step, TRAIN)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    with report_of(tmp_path, first_step=30, console=log):
        assert 5 < len(records_in(tmp_path)) < 30


@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path: Path, terminal: bool) -> None:
    script = (
        "import sys; from sret_jax.training.display import RunConsole; from sret_jax.training.report import Report\n"
        f"console = RunConsole(file=sys.stdout, force_terminal={terminal})\n"
        "sizes = dict(total_steps=40, first_step=0, steps_per_epoch=20, batch_size=8)\n"
        f"with Report({str(tmp_path / 'run')!r}, console=console, **sizes) as report:\n"
        "    report.start(model='sret_t')\n"
        "    sys.stdin.readline()\n"
        "    for step in (20, 40):\n"
        "        report.message('a line'); report.evaluation(step, {'accuracy': 0.5, 'loss': 1.0})\n"
        "print('the end')"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin and process.stdout and process.stderr
    assert process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    errors = process.stderr.read().decode()
    assert (process.wait(), errors) == (0, "")
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [20, 40]
