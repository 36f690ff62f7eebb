"""The picture of a prediction: time per token against what varies, a panel for each part."""

import io
from collections.abc import Sequence
from pathlib import Path

import altair as alt
import pandas as pd

from archs.errors import UserError
from archs.files import make_folder, write
from eval.predict import Prediction

SUFFIXES = (".png", ".svg", ".html")


def draw(rows: Sequence[Prediction], path: Path) -> None:
    """Write a chart of those `predict` rows that fit in memory.

    Raises UserError on another suffix than png, svg, html, and where nothing fits.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"picture '{path}' must end in {', '.join(SUFFIXES)}")
    table = pd.DataFrame(rows)
    table = table[table["fits"]].reset_index(drop=True)
    if table.empty:
        raise UserError(
            "nothing asked for fits in memory, so there is no time to draw; lower batch"
        )
    across = "context" if table["context"].nunique() > 1 else "batch"
    fixed = "batch" if across == "context" else "context"
    table["series"] = table["arch"]
    if table[fixed].nunique() > 1:
        table["series"] += f", {fixed} " + table[fixed].astype(str)
    chart = (
        alt.Chart(table)
        .mark_line(point=True)
        .encode(
            x=alt.X(f"{across}:Q", scale=alt.Scale(type="log", base=2), title=f"{across}"),
            y=alt.Y("tpot_ms:Q", scale=alt.Scale(type="log"), title="time per output token, ms"),
            color=alt.Color("series:N", title=None, sort=None),
            tooltip=["arch", "hardware", "batch", "context", "tpot_ms", "bound_by"],
        )
        .properties(width=340, height=260)
        .facet(
            column=alt.Column(
                "hardware:N", title=f"{table['scale'].iloc[0]}, predicted where it fits"
            )
        )
    )
    options = {"inline": True} if path.suffix == ".html" else {}
    drawn: io.BytesIO | io.StringIO = io.BytesIO() if path.suffix == ".png" else io.StringIO()
    chart.save(drawn, format=path.suffix.removeprefix("."), **options)
    make_folder(path.parent)
    write(path, drawn.getvalue())
