"""What a long run shows: the cell at work, its rate, how far the whole is and the time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


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
        """What the cell found, for its line in a log."""
        self.found = f"{found}, "


class Progress:
    """A bar on a terminal; one line per cell elsewhere. `quiet` shows nothing."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._done = self._total = 0.0
        self._began = 0.0

    @contextmanager
    def over(self, total: float, cells: int, planned: int) -> Iterator[None]:
        """The whole run; `total` is the sum of cell weights."""
        self._done, self._total = 0.0, max(total, 1e-9)
        self._began = time.monotonic()
        if cells < planned and not self.quiet:
            self.console.print(f"{planned - cells} of {planned} cells are done already")
        if self.quiet or not self.console.is_terminal:
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
    def cell(self, label: str, weight: float) -> Iterator[Watch]:
        """One cell from start to end."""
        began = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, description=label, rate="")
        watch = Watch(self, weight)
        yield watch
        self._done += weight
        self.show(0.0, "")
        if self._bar is None and not self.quiet:
            seconds = time.monotonic() - began
            self.console.print(
                f"[{100 * self._done / self._total:3.0f}%] {label}: {watch.found}{seconds:.1f} s"
                f"{self._left()}"
            )

    def show(self, within: float, text: str) -> None:
        """The current cell has done `within` of its weight."""
        if self._bar is not None:
            done = min(self._done + within, self._total)
            self._bar.update(
                self._task, completed=done, rate=text, left=self._left(within).lstrip(", ")
            )

    def _left(self, within: float = 0.0) -> str:
        done = self._done + within
        if done < 0.02 * self._total:
            return ""
        seconds = (time.monotonic() - self._began) * (self._total / done - 1)
        return f", {int(seconds // 60)}:{int(seconds % 60):02d} left"
