"""Pictures of predictions, a panel for each part: times per token, and servers under load."""

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


def require_picture(path: Path) -> None:
    """Raise UserError on another suffix than png, svg, html."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"picture '{path}' must end in {', '.join(SUFFIXES)}")


def draw(rows: Sequence[Prediction], path: Path) -> None:
    """Write a chart of those `predict` rows that fit in memory.

    Raises UserError where nothing fits, and as `require_picture`.
    """
    require_picture(path)
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
    _save(chart, path)


def draw_serving(rows: Sequence[Prediction], path: Path) -> None:
    """Write a chart of what `simulate` gives: of checkpoint intervals where there are several,
    otherwise of arrival rates.

    Raises UserError where there are no two of either, and as `require_picture`.
    """
    require_picture(path)
    several = len({row.get("checkpoint_every") for row in rows} - {None}) > 1
    if several and len({row.get("arrival_req_per_s") for row in rows}) > 1:
        raise UserError("a picture shows several arrival rates or several intervals; give one list")
    _save(prefix_chart(rows) if several else serving_chart(rows), path)


def prefix_chart(rows: Sequence[Prediction]) -> alt.FacetChart:
    """Bytes that are kept of prefixes against the share of prompts that is computed anew, along
    checkpoint intervals.
    """
    table = pd.DataFrame(rows)
    if "hit_rate" not in table:
        raise UserError(
            "a picture of checkpoint intervals needs a cache and answers; add --prefix-cache, or "
            "see why no request was served"
        )
    table = table.dropna(subset=["hit_rate"]).reset_index(drop=True)
    # Where the interval changes nothing, as for rows alone, one point stands for all.
    at = ["arch", "hardware", "hit_rate", "cached_state_bytes"]
    table["interval"] = table["checkpoint_every"].astype(str)
    table.loc[table.duplicated(at, keep=False), "interval"] = "any"
    table = table.drop_duplicates(at).reset_index(drop=True)
    table["anew"] = 1 - table["hit_rate"]
    table["cached_gib"] = table["cached_state_bytes"] / 2**30
    palette = Palette.of(table["arch"])
    base = alt.Chart(table).encode(
        x=alt.X("cached_gib:Q", title="kept of prefixes, GiB", scale=alt.Scale(type="symlog")),
        y=alt.Y("anew:Q", title="tokens of prompts computed anew", axis=alt.Axis(format="%"),
                scale=alt.Scale(domainMin=0)),
        order=alt.Order("checkpoint_every:Q"),
        color=palette.colour(legend=True),
        tooltip=["arch", "interval", "hit_rate", "cached_gib", "output_tok_per_s",
                 "ttft_p50_ms", "running_sequences"],
    )  # fmt: skip
    points = base.mark_point(filled=True, size=60, opacity=1).encode(palette.shape(legend=True))
    names = base.mark_text(dx=8, dy=-8, align="left").encode(text="interval:N")
    title = f"{table['scale'].iloc[0]}, simulated; at each point its checkpoint interval in tokens"
    return (
        alt.layer(base.mark_line(), points, names)
        .properties(width=420, height=320)
        .facet(column=alt.Column("hardware:N", title=title))
    )


def serving_chart(rows: Sequence[Prediction]) -> alt.FacetChart:
    """Tokens per second of each user against those of the whole part, along arrival rates.

    Raises UserError where there are no two of them.
    """
    table = pd.DataFrame(rows)
    if "arrival_req_per_s" not in table or table["arrival_req_per_s"].nunique() < 2:
        raise UserError("a picture of a server needs several arrival rates; add --rate sweep")
    table = table.dropna(subset=["output_tok_per_s_per_user"]).reset_index(drop=True)
    palette = Palette.of(table["arch"])
    base = alt.Chart(table).encode(
        x=alt.X("output_tok_per_s_per_user:Q", title="tokens/s of each user",
                scale=alt.Scale(zero=False)),
        y=alt.Y("output_tok_per_s:Q", title="tokens/s of the part"),
        order=alt.Order("arrival_req_per_s:Q"),
        color=palette.colour(legend=True),
        tooltip=["arch", "batching", "arrival_req_per_s", "output_tok_per_s", "running_sequences",
                 "max_sequences", "ttft_p50_ms", "tpot_p50_ms"],
    )  # fmt: skip
    several = alt.Legend(title="batching") if table["batching"].nunique() > 1 else None
    lines = base.mark_line().encode(strokeDash=alt.StrokeDash("batching:N", legend=several))
    points = base.mark_point(filled=True, size=45, opacity=1).encode(palette.shape(legend=True))
    title = f"{table['scale'].iloc[0]}, simulated: the further up and right, the better"
    return (
        alt.layer(lines, points)
        .properties(width=420, height=320)
        .facet(column=alt.Column("hardware:N", title=title))
    )


def _save(chart: alt.FacetChart, path: Path) -> None:
    options: dict[str, Any] = {"inline": True} if path.suffix == ".html" else {}
    options["format"] = path.suffix.removeprefix(".")
    drawn: io.BytesIO | io.StringIO = io.BytesIO() if path.suffix == ".png" else io.StringIO()
    chart.save(drawn, **options)
    make_folder(path.parent)
    write(path, drawn.getvalue())
