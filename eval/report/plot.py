"""The report's pictures one by one, for notebooks: each takes a long table and returns a chart.

Raises UserError where the results lack what a picture needs.
"""

from collections.abc import Callable

import altair as alt
import pandas as pd

from archs.errors import UserError
from eval.report.figures import Figures
from eval.report.pictures import charts
from eval.report.pictures.plans import PLANS, pictures

__all__ = [
    "crossings", "gap_against_position", "intensity_against_context", "latency_against_context",
    "loss_against_bits", "loss_against_size", "loss_by_position", "loss_of_pruned",
    "memory_against_bits",
    "predicted_against_measured", "quality_against_state", "recall_against_bits",
    "recall_against_state_bits", "roofline", "rows_against_bits", "sequences_against_context",
    "simulated_against_served", "slope_against_state", "speedup_against_drafts", "task",
    "throughput_against_latency", "time_against_bytes", "without_state",
]  # fmt: skip


def _plot(name: str) -> Callable[[pd.DataFrame], alt.LayerChart]:
    """The picture of that name as a function, whose text is the plan's."""

    def plot(results: pd.DataFrame) -> alt.LayerChart:
        return _picture(results, name)

    plot.__doc__ = f"{PLANS[name].title}. {PLANS[name].how_to_read}"
    return plot


quality_against_state = _plot("quality-state")
latency_against_context = _plot("tpot-context")
throughput_against_latency = _plot("throughput-latency")
roofline = _plot("roofline")
slope_against_state = _plot("slope-state")
crossings = _plot("crossings")
sequences_against_context = _plot("sequences")
without_state = _plot("no-cache")
intensity_against_context = _plot("intensity")
loss_against_size = _plot("ladder")
predicted_against_measured = _plot("predicted-measured")
speedup_against_drafts = _plot("speculation")
simulated_against_served = _plot("served-simulated")
loss_against_bits = _plot("bits-loss")
time_against_bytes = _plot("time-bytes")
rows_against_bits = _plot("bits-rows")
memory_against_bits = _plot("bits-memory")
gap_against_position = _plot("bits-position")
recall_against_bits = _plot("bits-recall")
recall_against_state_bits = _plot("bits-recall-state")
loss_of_pruned = _plot("pruned-loss")


def loss_by_position(results: pd.DataFrame, *, from_mean: bool = False) -> alt.LayerChart:
    """Held-out loss over the position, up to beyond the trained length.

    from_mean: the difference from the mean over architectures at each position instead, without
    what the text does to all of them alike.
    """
    relative = _picture(results, "loss-position")
    return relative if from_mean else charts.loss_by_position(Figures(results)) or relative


def task(results: pd.DataFrame, name: str = "mqar") -> alt.LayerChart:
    """How much of a synthetic task each architecture gets right."""
    chart = charts.task(Figures(results), name)
    if chart is None:
        raise UserError(f"Task {name}: not measured: it needs accuracy at the scale '{name}'")
    return chart


def _picture(results: pd.DataFrame, name: str) -> alt.LayerChart:
    picture = pictures(results, [name])[0]
    if picture.chart is None:
        raise UserError(f"{picture.title}: {picture.missing}")
    return picture.chart
