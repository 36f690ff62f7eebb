"""Charts of what one gives for what: state for time, context for sequences, size for loss."""

from math import exp, log

import altair as alt
import numpy as np
import pandas as pd

from eval.report.figures import EQUAL, Figures, Setting, exponent
from eval.report.leaderboard import short_count
from eval.report.pictures.canvas import Axis, end_labels, point_labels, themed
from eval.report.pictures.marks import Chart, along_x, along_y, curves, named, stands, tips
from eval.report.pictures.palette import FAINT, INK, VERDICTS
from eval.results.accelerators import ACCELERATORS
from eval.results.crossings import between
from eval.results.ladder import fit_ladder, long_enough, mixed, trained_sizes

#: The memory for which concurrent sequences are counted.
PART = "h100"


def slope_against_state(f: Figures, setting: Setting) -> Chart | None:
    """What every token of context adds to a step, over the bytes that it adds to the state."""
    bandwidth = f.bandwidth(setting)
    data = f.at(setting, "tpot_ms")
    contexts = data.groupby("batch")["context"].nunique()
    slopes = f.declared(setting.scale, "state_bytes_per_token")
    if data.empty or contexts.max() < 2 or slopes.empty or not bandwidth:
        return None
    batch = min(contexts[contexts == contexts.max()].index.astype(int))
    timed = data[data["batch"] == batch].groupby("arch")
    measured = {
        arch: 1e6 * np.polyfit(rows["context"].astype(float), rows["tpot_ms"], 1)[0] / batch
        for arch, rows in timed
        if rows["context"].nunique() > 1
    }
    data = slopes[slopes["arch"].isin(measured)].copy()
    data["ns_per_token"] = data["arch"].map(measured)
    x = Axis.around([0, *data["state_bytes_per_token"]], log=False)
    ideal = pd.DataFrame({"state_bytes_per_token": [0.0, x.high]})
    ideal["ns_per_token"] = 1e9 * ideal["state_bytes_per_token"] / bandwidth
    y = Axis.around([*data["ns_per_token"], *ideal["ns_per_token"]], log=False, vertical=True)
    horizontal = along_x(
        "state_bytes_per_token", x, "state that a token of context adds", number="~s", unit="bytes"
    )
    vertical = along_y(
        "ns_per_token", y, "measured time that it adds to every step", number="d", unit="ns"
    )
    line = alt.Chart(ideal).mark_line(color=INK, strokeWidth=1.5, clip=True)
    points = alt.Chart(data).mark_point(filled=True, size=90, opacity=1)
    corners = list(zip(ideal["state_bytes_per_token"], ideal["ns_per_token"], strict=True))
    places = stands(data, "state_bytes_per_token", "ns_per_token")
    return themed(
        line.encode(horizontal, vertical)
        + points.encode(
            horizontal, vertical, f.palette.colour(), f.palette.shape(),
            tooltip=tips("arch", "state_bytes_per_token", "ns_per_token"),
        )
        + named(point_labels(places, x, y, [corners]), x, y, f.palette),
        "What a token of context costs",
        f"batch {batch}, slope of {f.per_token} over context · line: bytes ÷ bandwidth",
        str(setting),
    )  # fmt: skip


def sequences_against_context(f: Figures, setting: Setting) -> Chart | None:
    """The most sequences whose state fits beside the weights."""
    data = f.declared(setting.scale, "state_bytes", "weight_bytes")
    if data.empty or data["context"].nunique() < 2:
        return None
    memory = ACCELERATORS[PART].memory_bytes
    room = memory - data["weight_bytes"]
    data["sequences"] = room.clip(lower=0) // data["state_bytes"]
    data = data[(data["context"] > 0) & (data["sequences"] > 0)]
    if data.empty:
        return None
    return curves(
        f, data, ("context", "context of every sequence, tokens", "d"),
        ("sequences", "concurrent sequences", ""), "How many sequences fit",
        f"declared state and weights in {memory / 1e9:.0f} GB · {setting.scale} shapes, "
        f"{setting.dtype}",
        number="~s",
    )  # fmt: skip


def intensity_against_context(f: Figures, setting: Setting) -> Chart | None:
    """FLOPs per byte of a prefill and of a decode step, over the context."""
    data = f.declared(setting.scale, "arith_intensity_pred", "prefill_intensity_pred")
    data = data[data["context"] > 0] if not data.empty else data
    if data.empty or data["context"].nunique() < 2:
        return None
    data = data.rename(columns={"arith_intensity_pred": "decode", "prefill_intensity_pred": "pre"})
    tall = data.melt(["arch", "context"], ["decode", "pre"], "phase", "intensity")
    tall["phase"] = tall["phase"].replace("pre", "prefill")
    ridge = ACCELERATORS[PART].ridge_flop_per_byte("bfloat16")
    contexts = sorted(data["context"].unique())
    x = Axis.around(contexts, pad=0.03)
    y = Axis.around([*tall["intensity"], ridge], vertical=True)
    base = alt.Chart(tall).encode(
        along_x("context", x, "prompt, or context of the step", number="d", unit="tokens",
                values=contexts),
        along_y("intensity", y, "arithmetic intensity", unit="FLOP/byte"),
        f.palette.colour(),
        tooltip=tips("arch", "phase", "context", "intensity"),
    )  # fmt: skip
    dashes = alt.StrokeDash("phase:N", scale=alt.Scale(range=[[1, 0], [4, 3]]), legend=None)
    knee = pd.DataFrame({"context": [x.low, x.high], "intensity": [ridge, ridge]})
    roof = alt.Chart(knee).mark_line(color=INK).encode(
        alt.X("context:Q", scale=x.scale), alt.Y("intensity:Q", scale=y.scale)
    )  # fmt: skip
    mark = alt.Chart(knee.tail(1)).mark_text(
        align="right", dx=-6, dy=-8, color=INK, fontSize=11,
        text=f"{PART.upper()}, bfloat16, turns compute-bound at {ridge:.0f}",
    ).encode(alt.X("context:Q", scale=x.scale), alt.Y("intensity:Q", scale=y.scale))  # fmt: skip
    ends = stands(data.sort_values("context").groupby("arch").tail(1), "context", "decode")
    return themed(
        roof + mark + base.mark_line(strokeWidth=1.8).encode(dashes)
        + base.mark_point(filled=True, size=45, opacity=1).encode(f.palette.shape())
        + named(end_labels(ends, x, y), x, y, f.palette),
        "Arithmetic intensity of prefill and decode",
        f"batch 1 · decode solid, prefill dashed · {setting.scale} shapes, {setting.dtype}",
    )  # fmt: skip


def without_state(f: Figures, setting: Setting) -> Chart | None:
    """Time of the next token with the state kept and with everything computed again."""
    data = f.at(setting, "cached_tpot_ms", "nocache_tpot_ms")
    data = data[data["batch"] == data["batch"].min()]
    if data.empty or data["context"].nunique() < 2:
        return None
    fitted = {
        arch: exponent(list(rows["context"]), list(rows["nocache_tpot_ms"]))
        for arch, rows in data.groupby("arch")
        if len(rows) > 1
    }
    names = {"cached_tpot_ms": "kept", "nocache_tpot_ms": "computed again"}
    tall = data.rename(columns=names).melt(["arch", "context"], [*names.values()], "phase", "ms")
    contexts = sorted(data["context"].unique())
    x = Axis.around(contexts, pad=0.03)
    y = Axis.around(list(tall["ms"]), vertical=True)
    base = alt.Chart(tall).encode(
        along_x("context", x, "tokens before", number="d", values=contexts),
        along_y("ms", y, "time of the next token", unit="ms"),
        f.palette.colour(),
        tooltip=tips("arch", "phase", "context", "ms"),
    )
    dashes = alt.StrokeDash(
        "phase:N", scale=alt.Scale(domain=[*names.values()], range=[[1, 0], [4, 3]]), legend=None
    )
    last = data.sort_values("context").groupby("arch").tail(1)
    ends = stands(last[last["arch"].isin(fitted)], "context", "nocache_tpot_ms")
    labels = [
        label._replace(more=f"n^{fitted[label.arch]:.1f}") for label in end_labels(ends, x, y)
    ]
    return themed(
        base.mark_line(strokeWidth=1.8).encode(dashes)
        + base.mark_point(filled=True, size=45, opacity=1).encode(f.palette.shape())
        + named(labels, x, y, f.palette),
        "What the state saves",
        "solid: state kept · dashed: the whole prefix again, with the exponent of generating "
        "n tokens that way",
        str(setting),
    )  # fmt: skip


def crossings(f: Figures, setting: Setting) -> alt.LayerChart | str | None:
    """For every pair the context from which the row decodes faster, measured and predicted.

    The reason why not where nothing crosses.
    """
    data = f.at(setting, "tpot_ms", "tpot_pred_ms")
    contexts = data.groupby("batch")["context"].nunique()
    if data.empty or contexts.max() < 2:
        return None
    batch = min(contexts[contexts == contexts.max()].index.astype(int))
    data = data[data["batch"] == batch]
    tables = [
        data.pivot(index="context", columns="arch", values=m) for m in ("tpot_ms", "tpot_pred_ms")
    ]
    table = tables[0].dropna(axis="columns")
    archs = [a for a in f.palette.archs if a in table]
    partly = [a for a in f.palette.archs if a in tables[0] and a not in table]
    ends = [int(table.index.min()), int(table.index.max())]
    timed = f"timed from {ends[0]:,} to {ends[1]:,} tokens, batch {batch}"
    if len(archs) < 2:
        return f"no two architectures were timed at the same contexts, {timed} ({setting})"
    rows = []
    for first in archs:
        for second in archs:
            if first != second:
                verdict, text = _crossing(tables[0], first, second)
                rows.append(
                    {
                        "faster": first, "slower": second, "verdict": verdict, "measured": text,
                        "predicted": _crossing(tables[1], first, second)[1],
                    }
                )  # fmt: skip
    if not any(row["verdict"] in ("from", "until") for row in rows):
        return f"no two of {len(archs)} architectures cross, {timed} ({setting})"
    base = alt.Chart(pd.DataFrame(rows)).encode(
        alt.X("slower:N", sort=archs, title="…than this one", axis=alt.Axis(labelAngle=-40)),
        alt.Y("faster:N", sort=archs, title="this one is faster…"),
        tooltip=[alt.Tooltip(f"{n}:N") for n in ("faster", "slower", "measured", "predicted")],
    )
    colour = alt.Color(
        "verdict:N", legend=None, scale=alt.Scale(domain=[*VERDICTS], range=[*VERDICTS.values()])
    )
    text = base.mark_text(fontSize=9, dy=-5, color=INK).encode(text="measured:N")
    below = base.mark_text(fontSize=8, dy=6, color=INK).encode(text="predicted:N")
    return themed(
        base.mark_rect(stroke=FAINT).encode(colour) + text + below,
        "From which context on one is faster than another",
        f"{timed} · above measured, below predicted · = within {100 * EQUAL:.0f} %",
        str(setting),
        f"left out, as not timed at all of these: {', '.join(partly)}" if partly else "",
    )


def _crossing(table: pd.DataFrame, first: str, second: str) -> tuple[str, str]:
    contexts, a, b = [int(c) for c in table.index], list(table[first]), list(table[second])
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    if all(abs(gap) < EQUAL * min(x, y) for gap, x, y in zip(gaps, a, b, strict=True)):
        return "equal", "="
    found = between(contexts, gaps)
    if found.context is None:
        return found.verdict, found.verdict if found.verdict == "always" else ""
    return found.verdict, found.told(_rounded, below="< {}", on="≥ {}", to="{} to {}")


def _rounded(context: int) -> str:
    return short_count(context) if context % 1024 == 0 else f"{context:,}"


def loss_against_size(f: Figures) -> Chart | None:
    """Loss over parameters, with the curves that are fitted to all of them at once."""
    points = trained_sizes(f.long)
    points = points[points["arch"].isin(long_enough(points))]
    if points["arch"].nunique() < 2 or mixed(points):
        return None
    fit = fit_ladder(points)
    means = points.groupby(["arch", "parameters"], as_index=False)["loss"].mean()
    x = Axis.around(list(means["parameters"]), pad=0.04)
    y = Axis.around(list(means["loss"]), log=False, vertical=True)
    sizes = [exp(at) for at in np.linspace(log(x.low), log(x.high), 40)]
    fitted = pd.DataFrame(
        [
            {"arch": arch, "parameters": n, "loss": fit.loss(arch, n)}
            for arch in means["arch"].unique()
            for n in sizes
        ]
    )
    horizontal = along_x("parameters", x, "parameters with the head", number="~s")
    vertical = along_y("loss", y, "bits per byte, held-out text")
    lines = alt.Chart(fitted).mark_line(strokeWidth=1.5, clip=True)
    marks = alt.Chart(means).mark_point(filled=True, size=70, opacity=1)
    ends = stands(fitted.groupby("arch").tail(1), "parameters", "loss")
    return themed(
        lines.encode(horizontal, vertical, f.palette.colour(), detail="arch:N")
        + marks.encode(
            horizontal, vertical, f.palette.colour(), f.palette.shape(),
            tooltip=tips("arch", "parameters", "loss"),
        )
        + named(end_labels(ends, x, y), x, y, f.palette),
        "Loss against size",
        f"points: means over seeds · curves: {fit.floor:.2f} + A / N^{fit.exponent:.2f}, one A "
        f"each, off by {100 * fit.error:.1f} % (root mean square)",
    )  # fmt: skip
