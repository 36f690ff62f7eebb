"""The chart of servers beside their clocks."""

import altair as alt
import pandas as pd

from eval.report.figures import Figures, Setting
from eval.report.pictures.canvas import themed
from eval.report.pictures.marks import Chart, tips
from eval.report.pictures.palette import FAINT, INK
from eval.results.measures import on_clock

#: Measures beside the bound on their error, and what they are called.
COMPARED = {
    "output_tok_per_s": (0.15, "throughput"),
    "ttft_p50_ms": (0.25, "time to the first token, median"),
}
#: Ratios that are drawn.
LEAST, MOST = 0.4, 2.5


def simulated_against_served(f: Figures, setting: Setting) -> Chart | None:
    """Each server's figures over those of its clock, by architecture."""
    parts, errors = [], []
    for measure, (_, what) in COMPARED.items():
        clocked = on_clock(measure, "sim")
        data = f.served(setting, measure, clocked)
        if data.empty:
            continue
        data = data.assign(ratio=data[measure] / data[clocked], what=what)
        errors.append(f"{what} {_off(data['ratio'])}")
        parts.append(data[["arch", "options", "ratio", "what"]])
        predicted = f.served(setting, measure, on_clock(measure, "pred"))
        if not predicted.empty:
            alone = predicted[measure] / predicted[on_clock(measure, "pred")]
            errors[-1] += f" ({_off(alone)} by the roofline alone)"
    if not parts:
        return None
    data = pd.concat(parts, ignore_index=True)
    order = list(dict.fromkeys(data["arch"]))
    x = alt.Scale(type="log", domain=[LEAST, MOST], clamp=True)
    rows = alt.Y("arch:N", sort=order, title=None, axis=alt.Axis(labelFontSize=12, ticks=False))
    shapes = alt.Scale(domain=[w for _, w in COMPARED.values()], range=["circle", "diamond"])
    look = alt.Legend(orient="top", title=None, labelLimit=400)
    points = alt.Chart(data).mark_point(filled=True, size=60, opacity=0.85).encode(
        alt.X("ratio:Q", title="server ÷ clock", scale=x,
              axis=alt.Axis(values=[0.5, 0.75, 1, 1.33, 2], format="~g")),
        rows, f.palette.colour(), alt.Shape("what:N", scale=shapes, legend=look),
        tooltip=tips("arch", "options", "what", "ratio"),
    )  # fmt: skip
    bands = [
        alt.Chart(pd.DataFrame({"low": [1 - bound], "high": [1 + bound]}))
        .mark_rect(color=FAINT, opacity=0.5)
        .encode(alt.X("low:Q", scale=x), x2="high:Q")
        for bound, _ in COMPARED.values()
    ]
    even = alt.Chart(pd.DataFrame({"ratio": [1.0]})).mark_rule(color=INK, strokeWidth=1)
    return themed(
        bands[0] + bands[1] + even.encode(alt.X("ratio:Q", scale=x)) + points,
        "Servers against their clock", "median error: " + " · ".join(errors), str(setting),
    )  # fmt: skip


def _off(ratios: "pd.Series[float]") -> str:
    """Relative to the server, as a prediction's error is."""
    return f"{100 * (1 / ratios - 1).abs().median():.0f} %"
