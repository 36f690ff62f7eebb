"""The picture of a prediction: time per token against what varies, a panel for each part."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from archs.errors import UserError
from archs.files import make_folder, write
from eval.predict.roofline import Prediction
from eval.report.pictures.palette import Palette

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
    palette = Palette.of(table["arch"])
    several = alt.Legend(title=fixed) if table[fixed].nunique() > 1 else None
    base = alt.Chart(table).encode(
        x=alt.X(f"{across}:Q", scale=alt.Scale(type="log", base=2), title=f"{across}"),
        y=alt.Y("tpot_ms:Q", scale=alt.Scale(type="log"), title="time per output token, ms"),
        color=palette.colour(legend=True),
        tooltip=["arch", "hardware", "batch", "context", "tpot_ms", "bound_by"],
    )
    lines = base.mark_line().encode(strokeDash=alt.StrokeDash(f"{fixed}:N", legend=several))
    points = base.mark_point(filled=True, size=45, opacity=1).encode(palette.shape(legend=True))
    chart = (
        alt.layer(lines, points)
        .properties(width=340, height=260)
        .facet(
            column=alt.Column(
                "hardware:N", title=f"{table['scale'].iloc[0]}, predicted where it fits"
            )
        )
    )
    options: dict[str, Any] = {"inline": True} if path.suffix == ".html" else {}
    options["format"] = path.suffix.removeprefix(".")
    drawn: io.BytesIO | io.StringIO = io.BytesIO() if path.suffix == ".png" else io.StringIO()
    chart.save(drawn, **options)
    make_folder(path.parent)
    write(path, drawn.getvalue())
