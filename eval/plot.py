"""The report's pictures one by one, for notebooks: each takes a long table and returns a chart.

Raises UserError where the results lack what a picture needs.
"""

import altair as alt
import pandas as pd

from archs.errors import UserError
from eval.plots import pictures


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


def loss_by_position(results: pd.DataFrame) -> alt.LayerChart:
    """Held-out loss over the position, up to beyond the trained length."""
    return _picture(results, "loss-position")


def recall(results: pd.DataFrame) -> alt.LayerChart:
    """Multi-query associative recall."""
    return _picture(results, "mqar")


def predicted_against_measured(results: pd.DataFrame) -> alt.LayerChart:
    """Measured time per token over the predicted one."""
    return _picture(results, "predicted-measured")


def _picture(results: pd.DataFrame, name: str) -> alt.LayerChart:
    picture = next(p for p in pictures(results) if p.name == name)
    if picture.chart is None:
        raise UserError(f"{picture.title}: {picture.missing}")
    return picture.chart
