"""The picture of a run: losses, test accuracy and learning rate over epochs, as PNG."""

import io
import math
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (1560, 480)
"""Width and height of the picture in pixels; it is higher where title and subtitle take more than a line each."""

_DOTS_PER_INCH = 120
_INK, _MUTED, _GRID = "#24292f", "#6e7781", "#e6e8eb"
_TRAINING, _TEST, _LEARNING_RATE = "#0969da", "#1a7f37", "#bc4c00"
_MARKED_POINTS = 40  # up to so many points each gets a dot: a line of one point would be invisible
_SMOOTHED_POINTS = 60  # from so many points on, single batches hide the course of the loss

_MARGINS = (70, 24)  # pixels left and right of the curves
_AXES_BELOW, _AXES_HEIGHT = 65, 288  # pixels, from the picture's lower edge
_TITLE: dict[str, Any] = {"fontsize": 13, "fontweight": "bold", "color": _INK}
_SUBTITLE: dict[str, Any] = {"fontsize": 9, "color": _MUTED}


def draw_curves(records: Sequence[Mapping[str, Any]], title: str, subtitle: str = "", training_loss: str = "") -> bytes:
    """Draws the records of a run.

    Args:
        records: what `metrics.jsonl` holds, in any order: objects with `kind`, `step`, `epoch`, and `loss` and
            `learning_rate` ("train") or `accuracy` as a fraction and `loss`, and those of the moving average,
            `ema_accuracy` and `ema_loss` ("evaluation"). None stands for a number that was not finite and leaves a gap;
            what no record has is not drawn. Of several records of one kind and step the last counts. There may be none.
        title: stands above the picture in bold.
        subtitle: stands below the title in grey.
        training_loss: what is done to images and labels for it that is not done for the test loss.

    Returns:
        A PNG file, `SIZE[0]` pixels wide.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")  # of a name in another script: boxes
        FigureCanvasAgg(curves_figure(records, title, subtitle, training_loss)).print_png(png)
    return png.getvalue()


def curves_figure(records: Sequence[Mapping[str, Any]], title: str, subtitle: str, training_loss: str) -> "Figure":
    """The figure that `draw_curves` draws."""
    from matplotlib.figure import Figure

    figure = Figure(dpi=_DOTS_PER_INCH, facecolor="white")
    lines = [(line, _TITLE, 40) for line in _wrapped(figure, title, _TITLE)]
    lines += [(line, _SUBTITLE, 24) for line in _wrapped(figure, subtitle, _SUBTITLE)]
    width, height = SIZE[0], max(SIZE[1], _AXES_BELOW + _AXES_HEIGHT + 63 + sum(space for _, _, space in lines))
    figure.set_size_inches(width / _DOTS_PER_INCH, height / _DOTS_PER_INCH)
    top = height - 14
    for line, style, space in lines:
        figure.text(_MARGINS[0] / width, (top - space / 2) / height, line, va="center", parse_math=False, **style)
        top -= space
    loss_axes, accuracy_axes, rate_axes = figure.subplots(
        1,
        3,
        width_ratios=(3, 3, 2),
        gridspec_kw=dict(
            left=_MARGINS[0] / width,
            right=1 - _MARGINS[1] / width,
            bottom=_AXES_BELOW / height,
            top=(_AXES_BELOW + _AXES_HEIGHT) / height,
            wspace=0.2,
        ),
    )

    last_epoch = max((record["epoch"] for record in records), default=0)
    for axes in (loss_axes, accuracy_axes, rate_axes):
        _prepare(axes, last_epoch)

    _draw_loss(loss_axes, records, training_loss)
    _draw_accuracy(accuracy_axes, records)
    _draw_learning_rate(rate_axes, *_curve(records, "train", "learning_rate"))
    return figure


def _wrapped(figure: "Figure", text: str, style: Mapping[str, Any]) -> list[str]:
    """The text in lines that fit between the margins."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    room = SIZE[0] - sum(_MARGINS)

    def width(line: str) -> float:
        drawn = figure.text(0, 0, line, parse_math=False, **style)
        extent = drawn.get_window_extent(canvas.get_renderer())
        drawn.remove()
        return extent.width

    characters = max(len(text), 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font")
        while True:
            lines = textwrap.wrap(text, characters)
            widest = max(map(width, lines), default=0)
            if widest <= room:
                return lines
            characters = max(min(int(characters * room / widest), characters - 1), 1)


def _curve(records: Sequence[Mapping[str, Any]], kind: str, metric: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric in the order of the steps; empty where no value is finite."""
    by_step = {record["step"]: record for record in records if record["kind"] == kind}
    in_order = [by_step[step] for step in sorted(by_step)]
    values = [math.nan if record.get(metric) is None else float(record[metric]) for record in in_order]
    if not any(map(math.isfinite, values)):
        return [], []
    return [record["epoch"] for record in in_order], values


def _prepare(axes: "Axes", last_epoch: float) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor("white")
    axes.set_xlabel("epoch", fontsize=9, color=_MUTED)
    axes.set_xlim(0, last_epoch or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.tick_params(labelsize=9, colors=_MUTED, length=0)
    axes.tick_params(axis="x", pad=6.5)  # below the lowest label of the other axis
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_MUTED)


def _heading(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=_INK, pad=8)


def _plot(
    axes: "Axes", epochs: Sequence[float], values: Sequence[float], color: str, label: str = "", **style: Any
) -> None:
    if epochs:
        style = dict(marker="o" if len(epochs) <= _MARKED_POINTS else "", markersize=3.5, linewidth=1.8) | style
        axes.plot(epochs, values, color=color, clip_on=False, label=label, **style)


def _legend(axes: "Axes", place: Literal["upper right", "lower right"]) -> None:
    """Names the curves, in a corner where there are none."""
    legend = axes.legend(loc=place, fontsize=8, frameon=False, labelcolor=_INK, handlelength=1.6, borderaxespad=0.2)
    for text in legend.get_texts():
        text.set_parse_math(False)
    low, high = axes.get_ylim()
    room = (high - low) * (0.09 * len(legend.get_texts()) + 0.02)
    axes.set_ylim(*((low, high + room) if place == "upper right" else (low - room, high)))


def _say_nothing_there(axes: "Axes", text: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=_MUTED)


def _draw_loss(axes: "Axes", records: Sequence[Mapping[str, Any]], training_loss: str) -> None:
    _heading(axes, "Loss (nats)")
    epochs, losses = _curve(records, "train", "loss")
    label = f"training, {training_loss}" if training_loss else "training"
    if len(epochs) < _SMOOTHED_POINTS:
        _plot(axes, epochs, losses, _TRAINING, label)
    else:
        _plot(axes, epochs, losses, _TRAINING, linewidth=0.8, alpha=0.3)
        _plot(axes, epochs, _running_mean(losses, len(losses) // _SMOOTHED_POINTS + 2), _TRAINING, label)
    _plot(axes, *_curve(records, "evaluation", "loss"), _TEST, "test")
    _plot(axes, *_curve(records, "evaluation", "ema_loss"), _TEST, "test, moving average", linestyle="--", marker="")
    if axes.lines:
        _legend(axes, "upper right")
    else:
        _say_nothing_there(axes, "no loss yet")


def _running_mean(values: list[float], reach: int) -> list[float]:
    """Means over each value and the finite ones up to `reach` places before and after it, fewer at the ends."""
    means = []
    for place in range(len(values)):
        own_reach = min(reach, place, len(values) - 1 - place)
        window = [value for value in values[place - own_reach : place + own_reach + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _draw_accuracy(axes: "Axes", records: Sequence[Mapping[str, Any]]) -> None:
    _heading(axes, "Test accuracy (%)")
    epochs, accuracies = _curve(records, "evaluation", "accuracy")
    ema_epochs, ema_accuracies = _curve(records, "evaluation", "ema_accuracy")
    if not epochs and not ema_epochs:
        _say_nothing_there(axes, "no evaluation yet")
        return
    percent, ema_percent = ([100 * accuracy for accuracy in each] for each in (accuracies, ema_accuracies))
    _plot(axes, epochs, percent, _TEST, "weights")
    _plot(axes, ema_epochs, ema_percent, _TEST, "their moving average", linestyle="--", marker="")
    axes.margins(y=0.08)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))  # there is nothing above 100 %
    if ema_epochs:
        _legend(axes, "lower right")

    points = [*zip(epochs, percent, strict=True), *zip(ema_epochs, ema_percent, strict=True)]
    points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    last_epoch, last = max(points)
    best_epoch, best = max(points, key=lambda point: (point[1], -point[0]))
    axes.plot([last_epoch], [last], color=_TEST, marker="o", clip_on=False)
    axes.plot([best_epoch], [best], color=_TEST, marker="o", markersize=9, fillstyle="none", clip_on=False)
    summary = f"last {last:.2f} %, "
    summary += "the best" if best == last else f"best {best:.2f} % at epoch {best_epoch:.4g}"
    axes.set_title(summary, loc="right", fontsize=8, fontweight="bold", color=_TEST, pad=8)


def _draw_learning_rate(axes: "Axes", epochs: list[float], rates: list[float]) -> None:
    _heading(axes, "Learning rate")
    if not epochs:
        _say_nothing_there(axes, "no training step yet")
        return
    _plot(axes, epochs, rates, _LEARNING_RATE)
    highest = max(rate for rate in rates if math.isfinite(rate))
    axes.set_ylim(0, 1.08 * highest or 1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.yaxis.get_offset_text().set(fontsize=8, color=_MUTED, ha="right", x=1)
