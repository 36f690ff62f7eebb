"""Progress of a long run: the cell at work, its rate, the share done and the time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

#: Seconds after which a log hears of a long cell again.
PATIENCE_S = 60.0


class Watch:
    """One cell's line on the display."""

    def __init__(self, progress: "Progress", weight: float) -> None:
        self._progress = progress
        self._weight = weight
        self.found = ""

    def at(self, fraction: float, text: str = "") -> None:
        """The cell is `fraction` done; `text` tells its rate."""
        self._progress.show(fraction * self._weight, text)

    def say(self, found: str) -> None:
        """A summary of the cell, for its line in a log."""
        self.found = found


class Silent(Watch):
    """Tells nobody."""

    def __init__(self) -> None:
        self.found = ""

    def at(self, fraction: float, text: str = "") -> None:
        """As `Watch.at`."""


class Progress:
    """A bar on a terminal; one line per cell elsewhere. `quiet` shows nothing.

    lines: lines on a terminal too, where drawing a bar would disturb what is timed.
    """

    def __init__(self, console: Console, *, quiet: bool = False, lines: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.lines = lines or not console.is_terminal
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._done = self._total = 0.0
        self._began = self._said_s = 0.0
        self._label = self._text = ""
        self._within = 0.0

    @contextmanager
    def over(self, total: float, cells: int, planned: int) -> Iterator[None]:
        """The whole run; `total` is the sum of cell weights."""
        self._done, self._total = 0.0, max(total, 1e-9)
        self._began = self._said_s = time.monotonic()
        if cells < planned and not self.quiet:
            self.console.print(f"{planned - cells} of {planned} points are done already")
        if self.quiet:
            yield
            return
        if self.lines:
            with self._never_silent():
                yield
            return
        self._bar = Bar(
            TextColumn("{task.description}", markup=False), BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}", markup=False), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=self.console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=self._total, rate="", left="")
        with self._bar:
            yield
        self._bar = None

    @contextmanager
    def _never_silent(self) -> Iterator[None]:
        """A log hears where the run is within PATIENCE_S, whether or not the cell says a thing."""
        over = Event()

        def speak() -> None:
            while not over.wait(max(self._said_s + PATIENCE_S - time.monotonic(), 0.01)):
                self.show(self._within, self._text)

        speaker = Thread(target=speak, daemon=True)
        speaker.start()
        try:
            yield
        finally:
            over.set()
            speaker.join()

    @contextmanager
    def alone(self, label: str) -> Iterator[Watch]:
        """A run of one cell."""
        with self.over(1.0, 1, 1), self.cell(label, 1.0) as watch:
            yield watch

    @contextmanager
    def cell(self, label: str, weight: float) -> Iterator[Watch]:
        """One cell from start to end."""
        began = time.monotonic()
        watch = Watch(self, weight)
        self.show(0.0, "", label)
        yield watch
        self.done(label, weight, time.monotonic() - began, watch.found)

    def done(self, label: str, weight: float, seconds: float, found: str = "") -> None:
        """A cell has ended; `found` is what it found, for its line in a log."""
        self._done += weight
        self.show(0.0, "", label)
        if self._bar is None and not self.quiet:
            said = f"{found}, " if found else ""
            self._line(f"{label}: {said}{seconds:.1f} s")

    def show(self, within: float, text: str, label: str = "") -> None:
        """Of the weights of cells at work, `within` is done; a log hears of it now and then."""
        self._label, self._within, self._text = label or self._label, within, text
        if self._bar is not None:
            done = min(self._done + within, self._total)
            self._bar.update(
                self._task, completed=done, rate=text, left=self._left(within).lstrip(", "),
                description=self._label,
            )  # fmt: skip
        elif not self.quiet and time.monotonic() - self._said_s > PATIENCE_S:
            self._line(f"{self._label}, {text}".rstrip(" ,"), within)

    def _line(self, text: str, within: float = 0.0) -> None:
        self._said_s = time.monotonic()
        percent = 100 * (self._done + within) / self._total
        line = f"[{percent:3.0f}%] {text}{self._left(within)}"
        self.console.print(line, markup=False, highlight=False)

    def _left(self, within: float = 0.0) -> str:
        done = self._done + within
        if done < 0.02 * self._total:
            return ""
        seconds = (time.monotonic() - self._began) * (self._total / done - 1)
        return f", {int(seconds // 60)}:{int(seconds % 60):02d} left"
