"""The picture of a run: training loss, test accuracy and learning rate over epochs, as PNG."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (1560, 480)
"""Width and height of the picture in pixels."""

_DOTS_PER_INCH = 120
_INK, _MUTED, _GRID = "#24292f", "#6e7781", "#e6e8eb"
_LOSS, _ACCURACY, _LEARNING_RATE = "#0969da", "#1a7f37", "#bc4c00"
_MARKED_POINTS = 40  # up to so many points each gets a dot: a line of one point would be invisible
_SMOOTHED_POINTS = 60  # from so many points on, single batches hide the course of the loss


def draw_curves(records: Sequence[Mapping[str, Any]], title: str, subtitle: str = "") -> bytes:
    """Draws the records of a run.

    Args:
        records: what `metrics.jsonl` holds, in any order: objects with `kind`, `step`, `epoch`, and `loss` and
            `learning_rate` ("train") or `accuracy` as a fraction ("evaluation"). None stands for a number that was not
            finite and leaves a gap. Of several records of one kind and step the last counts. There may be none.
        title: stands above the picture in bold.
        subtitle: stands below the title in grey, as far as it fits on a line.

    Returns:
        A PNG file of `SIZE` pixels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = (pixels / _DOTS_PER_INCH for pixels in SIZE)
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, facecolor="white")
    figure.text(0.045, 0.93, title, fontsize=13, fontweight="bold", color=_INK, va="center", parse_math=False)
    subtitle = textwrap.shorten(subtitle, 165, placeholder=" …")
    figure.text(0.045, 0.855, subtitle, fontsize=9, color=_MUTED, va="center", parse_math=False)
    loss_axes, accuracy_axes, rate_axes = figure.subplots(
        1, 3, width_ratios=(3, 3, 2), gridspec_kw=dict(left=0.045, right=0.985, bottom=0.135, top=0.735, wspace=0.2)
    )

    last_epoch = max((record["epoch"] for record in records), default=0)
    for axes in (loss_axes, accuracy_axes, rate_axes):
        _prepare(axes, last_epoch)

    _draw_loss(loss_axes, *_curve(records, "train", "loss"))
    _draw_accuracy(accuracy_axes, *_curve(records, "evaluation", "accuracy"))
    _draw_learning_rate(rate_axes, *_curve(records, "train", "learning_rate"))

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _curve(records: Sequence[Mapping[str, Any]], kind: str, metric: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one metric in the order of the steps; empty where no value is finite."""
    by_step = {record["step"]: record for record in records if record["kind"] == kind}
    in_order = [by_step[step] for step in sorted(by_step)]
    values = [math.nan if record[metric] is None else float(record[metric]) for record in in_order]
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
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_MUTED)


def _heading(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=_INK, pad=8)


def _plot(axes: "Axes", epochs: Sequence[float], values: Sequence[float], color: str, faint: bool = False) -> None:
    marker = "o" if len(epochs) <= _MARKED_POINTS else ""
    style: dict[str, Any] = dict(linewidth=0.8, alpha=0.3) if faint else dict(linewidth=1.8)
    axes.plot(epochs, values, color=color, marker=marker, markersize=3.5, clip_on=False, **style)


def _say_nothing_there(axes: "Axes", text: str) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=_MUTED)


def _draw_loss(axes: "Axes", epochs: list[float], losses: list[float]) -> None:
    _heading(axes, "Training loss (nats)")
    if not epochs:
        _say_nothing_there(axes, "no training loss yet")
    elif len(epochs) < _SMOOTHED_POINTS:
        _plot(axes, epochs, losses, _LOSS)
    else:
        _plot(axes, epochs, losses, _LOSS, faint=True)
        _plot(axes, epochs, _running_mean(losses, len(losses) // _SMOOTHED_POINTS + 2), _LOSS)


def _running_mean(values: list[float], reach: int) -> list[float]:
    """Means over each value and the finite ones up to `reach` places before and after it, fewer at the ends."""
    means = []
    for place in range(len(values)):
        own_reach = min(reach, place, len(values) - 1 - place)
        window = [value for value in values[place - own_reach : place + own_reach + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def _draw_accuracy(axes: "Axes", epochs: list[float], accuracies: list[float]) -> None:
    _heading(axes, "Test accuracy (%)")
    if not epochs:
        _say_nothing_there(axes, "no evaluation yet")
        return
    percent = [100 * accuracy for accuracy in accuracies]
    _plot(axes, epochs, percent, _ACCURACY)
    axes.margins(y=0.08)
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))  # there is nothing above 100 %

    final_epoch, final = [(e, p) for e, p in zip(epochs, percent, strict=True) if math.isfinite(p)][-1]
    axes.plot([final_epoch], [final], color=_ACCURACY, marker="o", markersize=6, clip_on=False)
    axes.set_title(f"{final:.2f} %", loc="right", fontsize=11, fontweight="bold", color=_ACCURACY, pad=8)


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
