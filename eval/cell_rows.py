"""Rows of a cell from what was measured, and its progress while it trains."""

from collections.abc import Callable
from typing import Any

from eval.progress import Watch
from eval.quality import Estimate
from eval.results import Row
from train.loop import StepReport


def reporter(watch: Watch) -> Callable[[StepReport], None]:
    """What shows a training run's progress on a cell's line."""

    def show(report: StepReport) -> None:
        rate = f"{report.tok_per_s:,.0f} tok/s, loss {report.train_loss_nats:.2f}"
        watch.at(report.step / report.steps, rate)

    return show


def estimate_row(measure: str, found: Estimate, **at: Any) -> Row:
    """A row with its interval."""
    return Row(measure=measure, value=found.value, low=found.low, high=found.high, n=found.n, **at)


def median_row(measure: str, times: list[float], **at: Any) -> Row:
    """The median of repeats, with the least and the largest."""
    ordered = sorted(times)
    return Row(
        measure=measure, value=ordered[len(ordered) // 2], low=ordered[0], high=ordered[-1],
        n=len(ordered), **at,
    )  # fmt: skip
