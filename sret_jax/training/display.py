"""How a run's report looks: a progress bar on a terminal, and lines anywhere."""

import datetime
import os
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class RunConsole(Console):
    """Where a run prints. Its reader may go before it ends: Rich would end the program then."""

    def on_broken_pipe(self) -> None:
        """Called by Rich."""
        _send_nowhere(self)


class Display:
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
        """Shows the bar, on a terminal."""
        self._bar.start()

    def close(self) -> None:
        """Leaves the bar as it is; what follows stands below it."""
        try:
            self._bar.stop()
        except OSError:
            _send_nowhere(self._console)

    def move(self, step: int, time_left: str) -> None:
        """The bar is at `step`."""
        self._bar.update(self._task, completed=step, time_left=time_left)

    def numbers(self, texts: list[str]) -> None:
        """What stands beside the bar."""
        self._bar.update(self._task, numbers="  ".join(texts))

    def line(self, *parts: str) -> None:
        """Prints a line of the parts that are not empty, above the bar; nothing if nobody is there any more.

        A terminal may be closed and a disk be full while a run goes on: the metrics are in files of their own.
        """
        text = shown("  ".join(filter(None, parts)), getattr(self._console.file, "encoding", None) or "utf-8")
        try:
            if self.is_plain:
                print(text, file=self._console.file, flush=True)
            else:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        except OSError:
            _send_nowhere(self._console)

    def block(self, facts: Mapping[str, object]) -> None:
        """Prints a line for each fact, aligned."""
        width = max(map(len, facts))
        for name, fact in facts.items():
            self.line(f"{words(name):{width}}", text_of(fact))


def _send_nowhere(console: Console) -> None:
    """Else what is still to be printed would fail too, at the latest when Python ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), console.file.fileno())


def shown(text: str, encoding: str = "utf-8") -> str:
    """A text with a question mark for what cannot be shown: what the encoding lacks, and bytes of a name in another."""
    return text.encode(encoding, "replace").decode(encoding)


def words(name: str) -> str:
    """An identifier for people."""
    return name.replace("_", " ")


def text_of(fact: object) -> str:
    """A fact for people: counts with commas."""
    return f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:33"."""
    return str(datetime.timedelta(seconds=round(seconds)))
