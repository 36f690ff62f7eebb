"""The report's pictures one by one, for notebooks: each takes a long table and returns a chart.

Raises UserError where the results lack what a picture needs.
"""

import altair as alt
import pandas as pd

from archs.errors import UserError
from eval.report.figures import Figures
from eval.report.pictures import charts
from eval.report.pictures.plans import pictures

__all__ = [
    "crossings",
    "intensity_against_context",
    "latency_against_context",
    "loss_against_size",
    "loss_by_position",
    "predicted_against_measured",
    "quality_against_state",
    "roofline",
    "sequences_against_context",
    "slope_against_state",
    "task",
    "throughput_against_latency",
    "without_state",
]


def quality_against_state(results: pd.DataFrame) -> alt.LayerChart:
    """Bits per byte over the bytes that one sequence keeps, Pareto front marked."""
    return _picture(results, "quality-state")


def latency_against_context(results: pd.DataFrame) -> alt.LayerChart:
    """Time per output token over the context."""
    return _picture(results, "tpot-context")


def throughput_against_latency(results: pd.DataFrame) -> alt.LayerChart:
    """Tokens per second of the batch over time per token, batch by batch."""
    return _picture(results, "throughput-latency")


def roofline(results: pd.DataFrame) -> alt.LayerChart:
    """Rate over arithmetic intensity, under the machine's measured ceilings."""
    return _picture(results, "roofline")


def slope_against_state(results: pd.DataFrame) -> alt.LayerChart:
    """Time that a token of context adds to a step, over the bytes that it adds to the state."""
    return _picture(results, "slope-state")


def crossings(results: pd.DataFrame) -> alt.LayerChart:
    """For every pair of architectures, from which context on one is the faster."""
    return _picture(results, "crossings")


def sequences_against_context(results: pd.DataFrame) -> alt.LayerChart:
    """How many sequences fit beside the weights, over the context."""
    return _picture(results, "sequences")


def without_state(results: pd.DataFrame) -> alt.LayerChart:
    """Time of the next token with and without the state, with fitted exponents."""
    return _picture(results, "no-cache")


def intensity_against_context(results: pd.DataFrame) -> alt.LayerChart:
    """Arithmetic intensity of prefill and decode, over the context."""
    return _picture(results, "intensity")


def loss_against_size(results: pd.DataFrame) -> alt.LayerChart:
    """Loss over parameters with the ladder's fit."""
    return _picture(results, "ladder")


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


def predicted_against_measured(results: pd.DataFrame) -> alt.LayerChart:
    """Measured time per token over the predicted one."""
    return _picture(results, "predicted-measured")


def _picture(results: pd.DataFrame, name: str) -> alt.LayerChart:
    picture = pictures(results, [name])[0]
    if picture.chart is None:
        raise UserError(f"{picture.title}: {picture.missing}")
    return picture.chart
