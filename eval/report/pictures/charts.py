"""The seven charts, each a function from figures and a setting to a chart, or None without data.

Every chart says in its title at which scale, batch and context and on which hardware it was
taken, and labels what it can beside the marks.
"""

from itertools import pairwise, zip_longest

import altair as alt
import pandas as pd

from eval.report.figures import Figures, Setting
from eval.report.pictures.canvas import Axis, point_labels, themed
from eval.report.pictures.marks import Chart, along_x, along_y, curves, named, si, stands, tips
from eval.report.pictures.palette import FAINT, INK, PAPER, RULE


def quality_against_state(f: Figures, setting: Setting) -> Chart | None:
    """Bits per byte over the bytes that a sequence must keep, with the Pareto front."""
    scale, quality = f.quality("bits_per_byte")
    state = f.declared(setting.scale, "state_bytes")
    if quality.empty or state.empty:
        return None
    counts = state.groupby("context")["arch"].nunique()
    context = int(max(counts[counts == counts.max()].index))
    data = quality.merge(state[state["context"] == context], on="arch")
    data = data[data["state_bytes"] > 0]
    if data.empty:
        return None
    data["front"] = [
        not ((data["value"] < v) & (data["state_bytes"] <= s)).any()
        and not ((data["value"] <= v) & (data["state_bytes"] < s)).any()
        for v, s in zip(data["value"], data["state_bytes"], strict=True)
    ]
    x = Axis.around(list(data["state_bytes"]))
    ends = [*data["value"], *data["low"].dropna(), *data["high"].dropna()]
    y = Axis.around(ends, log=False, vertical=True)
    horizontal = along_x("state_bytes", x, "state of one sequence, bytes", number="~s")
    vertical = along_y("value", y, "bits per byte, held-out text")
    base = alt.Chart(data)
    front = base.transform_filter("datum.front").mark_line(
        interpolate="step-after", color=RULE, strokeWidth=2, strokeDash=[5, 4]
    )
    spread = base.mark_rule(strokeWidth=1.4).encode(
        horizontal, y=alt.Y("low:Q", scale=y.scale), y2="high:Q", color=f.palette.colour()
    )
    points = base.mark_point(filled=True, size=110, opacity=1).encode(
        horizontal, vertical, f.palette.colour(), f.palette.shape(),
        stroke=alt.condition("datum.front", alt.value(INK), alt.value(PAPER)),
        strokeWidth=alt.condition("datum.front", alt.value(2), alt.value(0.5)),
        tooltip=tips("arch", "value", "low", "high", "state_bytes"),
    )  # fmt: skip
    best = data[data["front"]].sort_values("state_bytes")
    steps = list(zip(best["state_bytes"], best["value"], strict=True))
    corners = [(b[0], a[1]) for a, b in pairwise(steps)]
    bars = data.dropna(subset=["low"])[["state_bytes", "low", "high"]].itertuples(index=False)
    walls = [[(at, low), (at, high)] for at, low, high in bars]
    walls.append([p for pair in zip_longest(steps, corners) for p in pair if p])
    places = stands(data, "state_bytes", "value")
    labels = named(point_labels(places, x, y, walls), x, y, f.palette)
    return themed(
        front.encode(horizontal, vertical) + spread + points + labels,
        f"Quality against state at {context:,} tokens of context",
        f"loss: trained scale {scale} · state: {setting.scale} shapes, one sequence",
    )


def latency_against_context(f: Figures, setting: Setting) -> Chart | None:
    """Time per output token over context, at the batch with most contexts."""
    data = f.at(setting, "tpot_ms")
    contexts = data.groupby("batch")["context"].nunique()
    if data.empty or contexts.max() < 2:
        return None
    batch = min(contexts[contexts == contexts.max()].index.astype(int))
    data = data[data["batch"] == batch]
    return curves(
        f, data, ("context", "context, tokens", "d"), ("tpot_ms", f.per_token, "ms"),
        "Latency against context", f"batch {batch} · {setting}",
    )  # fmt: skip


def throughput_against_latency(f: Figures, setting: Setting) -> Chart | None:
    """What a larger batch buys and costs, at the context with most batches."""
    data = f.at(setting, "tpot_ms", "output_tok_per_s")
    batches = data.groupby("context")["batch"].nunique()
    if data.empty or batches.max() < 2:
        return None
    context = int(max(batches[batches == batches.max()].index))
    data = data[data["context"] == context].sort_values(["arch", "batch"])
    x = Axis.around(list(data["tpot_ms"]), pad=0.12)
    y = Axis.around(list(data["output_tok_per_s"]), vertical=True)
    base = alt.Chart(data).encode(
        along_x("tpot_ms", x, f.per_token, unit="ms"),
        along_y("output_tok_per_s", y, "output of the whole batch", number="~s", unit="token/s"),
        f.palette.colour(),
        tooltip=tips("arch", "batch", "context", "tpot_ms", "output_tok_per_s"),
    )
    lines = base.mark_line(strokeWidth=1.8).encode(order="batch:Q", detail="arch:N")
    points = base.mark_point(filled=True, size=55, opacity=1).encode(f.palette.shape())
    places = stands(data.groupby("arch").tail(1), "tpot_ms", "output_tok_per_s")
    paths = [
        list(zip(curve["tpot_ms"], curve["output_tok_per_s"], strict=True))
        for _, curve in data.groupby("arch")
    ]
    batches_seen = ", ".join(str(b) for b in sorted(data["batch"].unique()))
    return themed(
        lines + points + named(point_labels(places, x, y, paths), x, y, f.palette),
        "Throughput against latency",
        f"batches {batches_seen} along each curve · context {context:,}",
        str(setting),
    )


def roofline(f: Figures, setting: Setting) -> Chart | None:
    """Attainable and attained FLOP/s over arithmetic intensity."""
    bandwidth = f.bandwidth(setting)
    rate = f.machine(setting, "matrix_flops_per_s")
    data = f.at(setting, "tpot_ms", "step_flops", "step_bytes").rename(columns={"tpot_ms": "ms"})
    if data.empty or not bandwidth or not rate:
        return None
    prefill = f.at(setting, "ttft_ms", "step_flops", "step_bytes", stage="prefill")
    prefill = prefill.rename(columns={"ttft_ms": "ms"})
    data = pd.concat([data.assign(phase="decode"), prefill.assign(phase="prefill")])
    data["intensity"] = data["step_flops"] / data["step_bytes"]
    data["flops_per_s"] = data["step_flops"] / (data["ms"] / 1e3)
    ridge = rate / bandwidth
    x = Axis.around([*data["intensity"], ridge / 2, ridge * 4])
    y = Axis.around([*data["flops_per_s"], rate], vertical=True)
    roof = pd.DataFrame({"intensity": [x.low, ridge, x.high]})
    roof["flops_per_s"] = (roof["intensity"] * bandwidth).clip(upper=rate)
    horizontal = along_x("intensity", x, "arithmetic intensity", unit="FLOP/byte")
    vertical = along_y("flops_per_s", y, "rate", number="~s", unit="FLOP/s")
    line = alt.Chart(roof).mark_line(color=INK, strokeWidth=2, clip=True)
    knee = alt.Chart(roof.iloc[[2]]).mark_text(
        dy=-10, dx=-6, align="right", color=INK, fontSize=11,
        text=f"ridge {ridge:.3g} FLOP/byte: {si(bandwidth)}B/s copied, {si(rate)}FLOP/s",
    )  # fmt: skip
    pick = alt.selection_point(fields=["arch"], bind="legend")
    points = alt.Chart(data).mark_point(size=70, strokeWidth=1.5).encode(
        horizontal, vertical, f.palette.colour(legend=True), f.palette.shape(legend=True),
        f.palette.fill(),
        fillOpacity=alt.condition("datum.phase == 'decode'", alt.value(0.8), alt.value(0)),
        opacity=alt.condition(pick, alt.value(1), alt.value(0.08)),
        tooltip=tips("arch", "phase", "batch", "context", "intensity", "flops_per_s"),
    ).add_params(pick)  # fmt: skip
    phases = " and prefill (hollow)" if len(prefill) else ""
    return themed(
        line.encode(horizontal, vertical) + knee.encode(horizontal, vertical) + points,
        "Roofline of this machine",
        f"decode{phases}, every batch and context · {setting}",
    )


def loss_by_position(f: Figures) -> Chart | None:
    """Held-out loss over the position of the predicted token."""
    scale, data = _losses(f)
    if data.empty:
        return None
    trained, where = _trained_on(f, scale)
    return curves(
        f, data, POSITION, ("loss", "loss", "nat/token"), "Loss by position", where,
        log_y=False, marks=trained,
    )  # fmt: skip


def loss_against_mean(f: Figures) -> Chart | None:
    """The same as its difference from the mean over architectures at each position.

    Which documents reach a position moves all losses alike, and far more than architectures
    differ. Positions that some architecture lacks are left out; one architecture alone is drawn
    as it is.
    """
    scale, data = _losses(f)
    if data.empty:
        return None
    table = data.pivot(index="position", columns="arch", values="loss").dropna()
    if min(table.shape) < 2:
        return loss_by_position(f)
    mean = table.mean(axis="columns")
    data = data[data["position"].isin(mean.index)]
    data = data.assign(difference=data["loss"] - data["position"].map(mean))
    trained, where = _trained_on(f, scale)
    told = dict.fromkeys([mean.index[0], *(t for t in trained if t in mean.index), mean.index[-1]])
    shared = ", ".join(f"{mean[at]:.2f} at {at:,}" for at in told)
    taken = (
        f"taken off is the mean over {table.shape[1]} architectures, in nat/token: {shared} tokens"
    )
    return curves(
        f, data, POSITION, ("difference", "loss less the mean of all", "nat/token"),
        "Loss by position", where, taken,
        log_y=False, marks=trained, number="+~g", also=["loss"],
    )  # fmt: skip


POSITION = ("position", "position up to, tokens", "d")


def _losses(f: Figures) -> tuple[str, pd.DataFrame]:
    """The trained scale and its rows of arch, position, loss; none with a single position."""
    scale, data = f.quality("loss_at_position", "position")
    if data.empty or data["position"].nunique() < 2:
        return scale, pd.DataFrame()
    return scale, data.astype({"position": int}).rename(columns={"value": "loss"})


def _trained_on(f: Figures, scale: str) -> tuple[list[int], str]:
    """The longest trained length, where known, and a line that says it."""
    _, trained = f.quality("bits_per_byte", "context")
    lengths = sorted({int(c) for c in trained.get("context", []) if c is not None})[-1:]
    reached = "".join(f", trained on {length:,} tokens (dashed)" for length in lengths)
    return lengths, f"trained scale {scale}, held-out text{reached}"


def task(f: Figures, name: str) -> Chart | None:
    """What a synthetic task was answered."""
    _, data = f.quality("accuracy", scale=name)
    if data.empty:
        return None
    data = data.assign(percent=100 * data["value"])
    for end in ("low", "high"):
        data[end] = (100 * data[end]).clip(0, 100)
    data["text"] = [f"{p:.1f} %" for p in data["percent"]]
    order = list(data.sort_values("percent", ascending=False, kind="stable")["arch"])
    rows = alt.Y("arch:N", sort=order, title=None, axis=alt.Axis(labelFontSize=12, ticks=False))
    across = alt.Scale(domain=[0, 112], nice=False)
    base = alt.Chart(data).encode(rows)
    ticks = alt.Axis(values=[0, 20, 40, 60, 80, 100], domain=False)
    bars = base.mark_bar(height=17, cornerRadiusEnd=2).encode(
        alt.X("percent:Q", title="answered right, %", scale=across, axis=ticks),
        f.palette.colour(), tooltip=tips("arch", "percent", "low", "high"),
    )  # fmt: skip
    low = alt.X("low:Q", scale=across)
    halo = base.mark_rule(color=PAPER, strokeWidth=4).encode(low, x2="high:Q")
    spread = base.mark_rule(color=INK, strokeWidth=1.2).encode(low, x2="high:Q")
    text = base.mark_text(align="left", color=INK, fontSize=11).encode(
        x=alt.datum(102, scale=across), text="text:N"
    )
    asked = f.asked(name)
    subtitle = f"trained from scratch{' · ' * bool(asked)}{asked}"
    return themed(bars + halo + spread + text, f"Task {name}", subtitle)


def predicted_against_measured(f: Figures, setting: Setting) -> Chart | None:
    """Measured step time over the predicted one, every cell."""
    data = f.at(setting, "tpot_ms", "tpot_pred_ms")
    how = "roofline of each operation"
    if data.empty:
        bandwidth = f.bandwidth(setting)
        data = f.at(setting, "tpot_ms", "step_bytes")
        if data.empty or not bandwidth:
            return None
        data["tpot_pred_ms"] = 1e3 * data["step_bytes"] / bandwidth
        how = "bytes ÷ measured bandwidth"
    data["ratio"] = data["tpot_ms"] / data["tpot_pred_ms"]
    # Relative to the clock, as a prediction's error is.
    off = (1 / data["ratio"] - 1).abs().median()
    both = Axis.around([*data["tpot_ms"], *data["tpot_pred_ms"]])
    y = Axis(both.low, both.high, 400, vertical=True)
    line = pd.DataFrame({"predicted": [both.low, both.high]})
    line = line.assign(low=line["predicted"] / 1.1, high=line["predicted"] * 1.1)
    ends = alt.X("predicted:Q", scale=both.scale)
    band = alt.Chart(line).mark_area(color=FAINT, opacity=0.5, clip=True).encode(
        ends, alt.Y("low:Q", scale=y.scale), y2="high:Q"
    )  # fmt: skip
    equal = alt.Chart(line).mark_line(color=INK, strokeWidth=1.2).encode(
        ends, alt.Y("predicted:Q", scale=y.scale)
    )  # fmt: skip
    pick = alt.selection_point(fields=["arch"], bind="legend")
    points = alt.Chart(data).mark_point(filled=True, size=65).encode(
        along_x("tpot_pred_ms", both, "predicted time per output token", unit="ms"),
        along_y("tpot_ms", y, f"measured {f.per_token}", unit="ms"),
        f.palette.colour(legend=True), f.palette.shape(legend=True),
        opacity=alt.condition(pick, alt.value(0.9), alt.value(0.06)),
        tooltip=tips("arch", "batch", "context", "tpot_pred_ms", "tpot_ms", "ratio"),
    ).add_params(pick)  # fmt: skip
    return themed(
        band + equal + points,
        "Predicted against measured",
        f"median error {100 * off:.0f} % over {len(data)} cells · prediction: {how}",
        str(setting),
    )
