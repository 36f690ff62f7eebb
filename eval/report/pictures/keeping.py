"""The charts of states in few bits: what bits cost in loss and in recall, and what time adds."""

import altair as alt
import pandas as pd

from eval.report.figures import Figures
from eval.report.pictures.canvas import Axis, end_labels, themed
from eval.report.pictures.marks import Chart, along_x, along_y, named, stands, tips
from eval.report.pictures.palette import INK

#: Ways to keep numbers, as dashes.
DASHES = {
    "nearest": [1, 0], "kivi": [6, 3], "ef": [2, 2], "sr": [8, 2, 2, 2], "fp8": [1, 3],
}  # fmt: skip
#: Losses below it are drawn at it: the noise of the text.
LEAST_NATS = 1e-4
#: What is in few bits, as dashes.
PARTS = {"weights": [1, 0], "kv": [6, 3], "memory": [2, 2]}
#: Of a state, what its loss by position is drawn of.
DRIFTING = {"memory:int8": [1, 0], "memory:int8-ef": [2, 2], "memory:int4": [6, 3]}


def rows_against_bits(f: Figures) -> Chart | None:
    """What keeping rows of attention in few bits costs far from the start."""
    return _against_bits(f, "kv", "What each bit of keys, values and latents is worth")


def memory_against_bits(f: Figures) -> Chart | None:
    """The same of recurrent states."""
    return _against_bits(f, "memory", "What each bit of a recurrent state is worth")


def _against_bits(f: Figures, kind: str, title: str) -> Chart | None:
    data, span = f.kept_far()
    data = data[data["kind"] == kind]
    if data["state_format"].nunique() < 2:
        return None
    ways = data["state_format"].str.extract(rf"[-:]({'|'.join(DASHES)})\b")[0].fillna("nearest")
    data = data.assign(
        way=ways, how=data["state_format"], curve=data["arch"] + " " + ways,
        smaller=32 / data["bits_per_state_number"],
        more=data["loss_gap_at_position"].clip(lower=LEAST_NATS),
    ).sort_values("smaller")  # fmt: skip
    x = Axis.around(list(data["smaller"]), pad=0.06)
    y = Axis.around(list(data["more"]), vertical=True)
    used = [way for way in DASHES if way in set(ways)]
    dash = alt.Scale(domain=used, range=[DASHES[way] for way in used])
    look = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300)
    base = alt.Chart(data).encode(
        along_x("smaller", x, "times less memory than a state of float32"),
        along_y("more", y, "loss over that of a state as computed", unit="nat a token"),
        f.palette.colour(), detail="curve:N",
        tooltip=tips("arch", "how", "bits_per_state_number", "loss_gap_at_position"),
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.6).encode(
        strokeDash=alt.StrokeDash("way:N", scale=dash, legend=look)
    )
    points = base.mark_point(filled=True, size=45, opacity=1).encode(f.palette.shape())
    labels = end_labels(stands(data.groupby("arch").tail(1), "smaller", "more"), x, y)
    scale = str(data["scale"].iloc[0])
    return themed(
        lines + points + named(labels, x, y, f.palette), title,
        f"{scale} shapes, trained · {span} · means over seeds · losses under {LEAST_NATS:g} at it",
    )  # fmt: skip


def gap_against_position(f: Figures) -> Chart | None:
    """How rounding a recurrent state at every token adds up along a text."""
    data = f.kept_gaps()
    data = data[data["state_format"].isin(DRIFTING)]
    if data["position"].nunique() < 2:
        return None
    data = data.assign(
        how=data["state_format"], curve=data["arch"] + data["state_format"],
        more=data["value"].clip(lower=LEAST_NATS),
    )  # fmt: skip
    x = Axis.around(list(data["position"]), pad=0.06)
    y = Axis.around(list(data["more"]), vertical=True)
    used = [name for name in DRIFTING if name in set(data["how"])]
    dash = alt.Scale(domain=used, range=[DRIFTING[name] for name in used])
    look = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300)
    base = alt.Chart(data).encode(
        along_x("position", x, "position, up to", number="d", values=sorted(set(data["position"]))),
        along_y("more", y, "loss over that of a state as computed", unit="nat a token"),
        f.palette.colour(), detail="curve:N", tooltip=tips("arch", "how", "position", "value"),
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.6).encode(
        strokeDash=alt.StrokeDash("how:N", scale=dash, legend=look)
    )
    points = base.mark_point(filled=True, size=35, opacity=1).encode(f.palette.shape())
    worst = data[data["how"] == used[-1]]
    labels = end_labels(stands(worst.groupby("arch").tail(1), "position", "more"), x, y)
    scale = str(data["scale"].iloc[0])
    return themed(
        lines + points + named(labels, x, y, f.palette), "What rounding at every token adds up to",
        f"{scale} shapes, trained · means over seeds · losses under {LEAST_NATS:g} drawn at it",
    )  # fmt: skip


def recall_against_bits(f: Figures) -> Chart | None:
    """What a task's model still answers with its weights, or its state, in few bits."""
    data = f.recalled()
    if data.empty or data["bits"].nunique() < 2:
        return None
    data = data.assign(
        smaller=32 / data["bits"], lost=100 * (data["plain"] - data["compressed_accuracy"]),
        how=data["format"], curve=data["arch"] + data["part"],
    ).sort_values("smaller")  # fmt: skip
    x = Axis.around(list(data["smaller"]), pad=0.06)
    y = Axis.around([0.0, *data["lost"]], log=False, vertical=True)
    used = [part for part in PARTS if part in set(data["part"])]
    dash = alt.Scale(domain=used, range=[PARTS[part] for part in used])
    look = alt.Legend(orient="top", title=None, symbolType="stroke", symbolSize=300)
    base = alt.Chart(data).encode(
        along_x("smaller", x, "times less memory than float32"),
        along_y("lost", y, "answers lost, of all that is asked", unit="%", number="d"),
        f.palette.colour(), detail="curve:N",
        tooltip=tips("arch", "how", "bits", "plain", "compressed_accuracy"),
    )  # fmt: skip
    lines = base.mark_line(strokeWidth=1.6).encode(
        strokeDash=alt.StrokeDash("part:N", scale=dash, legend=look)
    )
    points = base.mark_point(filled=True, size=45, opacity=1).encode(f.palette.shape())
    none = alt.Chart(pd.DataFrame({"lost": [0.0]})).mark_rule(color=INK, strokeWidth=1)
    worst = data.loc[data.groupby("arch")["lost"].idxmax()]
    labels = end_labels(stands(worst, "smaller", "lost"), x, y)
    return themed(
        none.encode(alt.Y("lost:Q", scale=y.scale))
        + lines + points + named(labels, x, y, f.palette),
        "What each bit is worth in recall",
        f"{data['scale'].iloc[0]} · rounded to nearest · means over seeds",
    )  # fmt: skip
