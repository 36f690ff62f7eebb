"""The chart of speculative decoding: what drafts gain, and where they stop paying."""

import altair as alt
import pandas as pd

from eval.report.figures import Figures, Setting
from eval.report.pictures.canvas import Axis, end_labels, themed
from eval.report.pictures.marks import Chart, along_x, along_y, named, tips
from eval.report.pictures.palette import INK

DASHES = [5, 4]


def speedup_against_drafts(f: Figures, setting: Setting) -> Chart | None:
    """Plain time per token over speculative, by drafts, at the smallest and the largest batch."""
    data = f.speculated(setting)
    if data.empty or data["drafts"].nunique() < 2:
        return None
    context = int(data["context"].mode().iloc[0])
    data = data[data["context"] == context]
    batches = sorted({int(data["batch"].min()), int(data["batch"].max())})
    data = data[data["batch"].isin(batches)].sort_values("drafts")
    data = data.assign(
        curve=data["arch"] + " " + data["how"] + " " + data["batch"].astype(str),
        large=data["batch"] > batches[0],
    )
    drafts = sorted(data["drafts"].unique())
    x = Axis.around(drafts, pad=0.03)
    y = Axis.around([1.0, *data["speedup"]], vertical=True)
    base = alt.Chart(data).encode(
        along_x("drafts", x, "drafts of a round", number="d", values=drafts),
        along_y("speedup", y, "times as fast as plain decode"),
        f.palette.colour(), detail="curve:N",
        tooltip=tips("arch", "how", "batch", "drafts", "speedup", "speedup_pred"),
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.8).encode(
        strokeDash=alt.condition("datum.large", alt.value(DASHES), alt.value([1, 0]))
    )
    points = base.mark_point(filled=True, size=50, opacity=1).encode(f.palette.shape())
    even = alt.Chart(pd.DataFrame({"speedup": [1.0]})).mark_rule(color=INK, strokeWidth=1)
    last = data.groupby("curve").tail(1)
    ends = {
        curve: (float(at), value)
        for curve, at, value in last[["curve", "drafts", "speedup"]].itertuples(index=False)
    }
    names = {curve: (arch, how) for curve, arch, how in
             last[["curve", "arch", "how"]].itertuples(index=False)}  # fmt: skip
    labels = [
        label._replace(arch=names[label.arch][0], more=names[label.arch][1])
        for label in end_labels(ends, x, y)
    ]
    told = f"batch {batches[0]}" + "".join(f" (dashed: {b})" for b in batches[1:])
    return themed(
        even.encode(alt.Y("speedup:Q", scale=y.scale))
        + lines + points + named(labels, x, y, f.palette),
        "What speculation gains", f"greedy · {told} · prompts of {context:,} tokens", str(setting),
    )  # fmt: skip
