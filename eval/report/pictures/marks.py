"""What charts are drawn with: axes, curves with their names, tooltips."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from eval.report.figures import Figures
from eval.report.pictures.canvas import CHAR, Axis, Label, end_labels, themed
from eval.report.pictures.palette import INK, PAPER, RULE, Palette

Chart = alt.LayerChart
#: An axis of thousands would name its origin "0k".
LABEL = "datum.value === 0 ? '0' : datum.label"


def curves(
    f: Figures, data: pd.DataFrame, x_of: tuple[str, str, str], y_of: tuple[str, str, str],
    title: str, *subtitle: str, log_y: bool = True, marks: Sequence[int] = (), number: str = "~g",
    also: Sequence[str] = (),
) -> Chart:  # fmt: skip
    """One curve an architecture over a log axis, labelled at its end; dashed lines at `marks`.

    also: further columns to show when the pointer rests on a point.
    """
    (over, over_title, over_format), (name, name_title, unit) = x_of, y_of
    data = data.sort_values(["arch", over])
    values = sorted(data[over].unique())
    x = Axis.around(values, pad=0.03)
    y = Axis.around(list(data[name]), log=log_y, vertical=True)
    base = alt.Chart(data).encode(
        along_x(over, x, over_title, number=over_format, values=values),
        along_y(name, y, name_title, unit=unit, number=number),
        f.palette.colour(),
        tooltip=tips("arch", over, name, *also),
    )
    ends = stands(data.groupby("arch").tail(1), over, name)
    dashed = alt.Chart(pd.DataFrame({over: list(marks)})).mark_rule(color=RULE, strokeDash=[5, 4])
    return themed(
        dashed.encode(alt.X(f"{over}:Q", scale=x.scale))
        + base.mark_line(strokeWidth=1.8)
        + base.mark_point(filled=True, size=50, opacity=1).encode(f.palette.shape())
        + named(end_labels(ends, x, y), x, y, f.palette),
        title,
        *subtitle,
    )


class Along(NamedTuple):
    """One axis of a chart: its field, where it lies, and the title and look of its marks."""

    field: str
    axis: Axis
    title: str
    look: dict[str, Any]

    @classmethod
    def of(cls, data: pd.DataFrame, field: str, title: str, **look: Any) -> "Along":
        """Across a table's values, on a log axis. look: as `along_x`'s."""
        return cls(field, Axis.around(list(data[field]), pad=0.06), title, look)


def dashed_curves(
    f: Figures, data: pd.DataFrame, x: Along, y: Along, by: str,
    dashes: Mapping[str, Sequence[int]], ends: pd.DataFrame, title: str, *subtitle: str,
    tip: Sequence[str], size: int = 45, origin: bool = False,
) -> Chart:  # fmt: skip
    """A curve for each architecture and each value of `by`, which has a dash of its own.

    data: has `curve`, which tells curves apart. ends: one row for each architecture, where its
    name goes. tip: fields shown when the pointer rests on a point. origin: a line at y = 0.
    """
    used = [name for name in dashes if name in set(data[by])]
    dash = alt.Scale(domain=used, range=[dashes[name] for name in used])
    look = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300)
    base = alt.Chart(data.sort_values(x.field)).encode(
        along_x(x.field, x.axis, x.title, **x.look), along_y(y.field, y.axis, y.title, **y.look),
        f.palette.colour(), detail="curve:N", tooltip=tips("arch", "how", *tip),
    )  # fmt: skip
    labels = end_labels(stands(ends, x.field, y.field), x.axis, y.axis)
    chart = (
        base.mark_line(strokeWidth=1.6).encode(
            strokeDash=alt.StrokeDash(f"{by}:N", scale=dash, legend=look)
        )
        + base.mark_point(filled=True, size=size, opacity=1).encode(f.palette.shape())
        + named(labels, x.axis, y.axis, f.palette)
    )
    if origin:
        zero = alt.Chart(pd.DataFrame({y.field: [0.0]})).mark_rule(color=INK, strokeWidth=1)
        chart = zero.encode(alt.Y(f"{y.field}:Q", scale=y.axis.scale)) + chart
    return themed(chart, title, *subtitle)


def stands(data: pd.DataFrame, x: str, y: str) -> dict[str, tuple[float, float]]:
    """Where each architecture stands."""
    rows = data[["arch", x, y]].itertuples(index=False, name=None)
    return {arch: (across, up) for arch, across, up in rows}


def named(labels: Sequence[Label], x: Axis, y: Axis, palette: Palette) -> alt.LayerChart:
    """Text in its architecture's colour, with a thin line to what it names."""
    rows = []
    for label in labels:
        left, at = x.pixel(label.x), x.pixel(label.from_x)
        right = left + CHAR * len(label.text)
        touch = left - 3 if at < left else min(at, right + 3)
        far = abs(touch - at) + abs(y.pixel(label.y) - y.pixel(label.from_y))
        row = {**label._asdict(), "text": label.text, "touch": x.value(touch), "far": far}
        rows.append(row)
    base = alt.Chart(pd.DataFrame(rows))
    across, up = alt.X("x:Q", scale=x.scale), alt.Y("y:Q", scale=y.scale)
    text = base.mark_text(align="left", baseline="middle", fontSize=11, fontWeight=500)
    leader = base.transform_filter("datum.far > 22").mark_rule(strokeWidth=0.7)
    halo = base.mark_text(
        align="left", baseline="middle", fontSize=11, fontWeight=500, stroke=PAPER,
        strokeWidth=3, opacity=0.85,
    ).encode(across, up, text="text:N")  # fmt: skip
    leader = leader.encode(
        alt.X("from_x:Q", scale=x.scale), alt.Y("from_y:Q", scale=y.scale),
        x2="touch:Q", y2="y:Q", color=palette.colour(),
    )  # fmt: skip
    return leader + halo + text.encode(across, up, palette.colour(), text="text:N")


def along_x(name: str, axis: Axis, title: str, **look: Any) -> alt.X:
    """A field along a horizontal axis. look: unit, number format, tick values."""
    return alt.X(f"{name}:Q", scale=axis.scale, **_axis(axis, title, **look))


def along_y(name: str, axis: Axis, title: str, **look: Any) -> alt.Y:
    """A field along a vertical axis."""
    return alt.Y(f"{name}:Q", scale=axis.scale, **_axis(axis, title, **look))


def _axis(
    axis: Axis, title: str, *, unit: str = "", number: str = "~g", values: Sequence[float] = ()
) -> dict[str, Any]:
    ticks = [float(value) for value in values] or axis.ticks()
    look: dict[str, Any] = {"values": ticks} if ticks else {"tickCount": 7}
    return {
        "title": f"{title}, {unit}" if unit else title,
        "axis": alt.Axis(format="," + number if number == "d" else number, labelExpr=LABEL, **look),
    }


def tips(*names: str) -> list[alt.Tooltip]:
    """Fields shown when the pointer rests on a mark."""
    texts = {"arch", "how", "phase"}
    return [
        alt.Tooltip(f"{n}:N") if n in texts else alt.Tooltip(f"{n}:Q", format=",.4~g")
        for n in names
    ]


def si(value: float) -> str:
    """Three digits and a prefix, ready for a unit: "3.35 T"."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {prefix}"
    return f"{value:.3g} "
