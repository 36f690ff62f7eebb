"""The charts of weights in few bits: what bits cost in loss and recall, what bytes take in time."""

import altair as alt
import pandas as pd

from eval.report.figures import Figures
from eval.report.pictures.canvas import Axis, end_labels, themed
from eval.report.pictures.marks import (
    Along,
    Chart,
    along_x,
    along_y,
    dashed_curves,
    named,
    stands,
    tips,
)
from eval.report.pictures.palette import INK

#: Ways to choose codes, as dashes.
DASHES = {"nearest": [1, 0], "awq": [6, 3], "gptq": [2, 2], "qat": [8, 2, 2, 2]}
PLAIN = "float32"


def loss_against_bits(f: Figures) -> Chart | None:
    """Bits of held-out text over those of plain weights, by how much less memory they take."""
    data = f.compressed("bits_per_weight", "bits_per_byte_ratio")
    data = data[data["weight_format"] != PLAIN]
    if data["weight_format"].nunique() < 2:
        return None
    scale, ways = str(data["scale"].iloc[0]), _ways(data["weight_format"])
    data = data.assign(
        way=ways, more=100 * (data["bits_per_byte_ratio"] - 1), curve=data["arch"] + " " + ways,
        how=data["weight_format"], smaller=32 / data["bits_per_weight"],
    ).sort_values("smaller")  # fmt: skip
    nearest = data[data["way"] == "nearest"]
    return dashed_curves(
        f, data, Along.of(data, "smaller", "times less memory than float32"),
        from_zero(data, "more", "bits of text more than with plain weights, %"), "way", DASHES,
        nearest.groupby("arch").tail(1), "What each bit of the weights is worth",
        f"{scale} shapes, trained · means over seeds",
        tip=("bits_per_weight", "smaller", "more"), origin=True,
    )  # fmt: skip


def recall_against_bits(f: Figures) -> Chart | None:
    """What a task's model still answers with its weights in few bits."""
    data = f.recalled()
    if data.empty:
        return None
    ways = _ways(data["format"])
    data = data.assign(way=ways, curve=data["arch"] + ways)
    return recall_lost(
        f, data[data["part"] == "weights"], "way", DASHES,
        "What each bit of the weights is worth in recall",
    )  # fmt: skip


def recall_lost(
    f: Figures, data: pd.DataFrame, by: str, dashes: dict[str, list[int]], title: str, *said: str
) -> Chart | None:
    """Answers lost, of `Figures.recalled`, by how much less memory what is in few bits takes."""
    if data["bits"].nunique() < 2:
        return None
    data = data.assign(
        smaller=32 / data["bits"], lost=100 * (data["plain"] - data["compressed_accuracy"]),
        how=data["format"],
    ).sort_values("smaller")  # fmt: skip
    worst = data.loc[data.groupby("arch")["lost"].idxmax()]
    return dashed_curves(
        f, data, Along.of(data, "smaller", "times less memory than float32"),
        from_zero(data, "lost", "answers lost, of all that is asked, %"), by, dashes, worst, title,
        " · ".join((str(data["scale"].iloc[0]), *said, "means over seeds that learnt it")),
        tip=("bits", "plain", "compressed_accuracy"), origin=True,
    )  # fmt: skip


def from_zero(data: pd.DataFrame, field: str, title: str) -> Along:
    """A vertical axis of a field that holds zero."""
    axis = Axis.around([0.0, *data[field]], log=False, vertical=True)
    return Along(field, axis, title, {"number": "~r"})


def _ways(formats: pd.Series) -> pd.Series:
    """How codes are chosen, by the names of formats."""
    return formats.str.extract(rf"-({'|'.join(DASHES)})\b")[0].fillna("nearest")


def time_against_bytes(f: Figures) -> Chart | None:
    """Time per output token by bytes of weights in memory, a curve an architecture."""
    data = f.compressed("held_weight_bytes", "tpot_ms", stage="decode")
    if data.empty:
        return None
    several = data.groupby("arch")["weight_format"].transform("nunique") > 1
    data = data[several]
    if data.empty:
        return None
    scale, hardware = str(data["scale"].iloc[0]), str(data["hardware"].iloc[0])
    data = data.assign(how=data["weight_format"]).sort_values("held_weight_bytes")
    x = Axis.around(list(data["held_weight_bytes"]), pad=0.06)
    y = Axis.around(list(data["tpot_ms"]), vertical=True)
    # Of formats of one size, curves take the fastest.
    fastest = data.groupby(["arch", "held_weight_bytes"])["tpot_ms"].transform("min")
    base = alt.Chart(data.assign(first=data["tpot_ms"] == fastest)).encode(
        along_x("held_weight_bytes", x, "weights in memory", unit="byte", number="~s"),
        along_y("tpot_ms", y, f.per_token, unit="ms"),
        f.palette.colour(), tooltip=tips("arch", "how", "held_weight_bytes", "tpot_ms"),
    )  # fmt: skip
    even = _as_bytes(data)
    labels = end_labels(stands(data.groupby("arch").tail(1), "held_weight_bytes", "tpot_ms"), x, y)
    return themed(
        even.encode(
            alt.X("held_weight_bytes:Q", scale=x.scale), alt.Y("tpot_ms:Q", scale=y.scale)
        )
        + base.mark_line(strokeWidth=1.6).transform_filter("datum.first")
        + base.mark_point(filled=True, size=45, opacity=1).encode(f.palette.shape())
        + named(labels, x, y, f.palette),
        "What fewer bytes gain in time", f"{scale} shapes · {hardware} · one sequence",
    )  # fmt: skip


def _as_bytes(data: pd.DataFrame) -> alt.Chart:
    """From the fastest plain model down: a time that follows the bytes."""
    plain = data[data["weight_format"] == PLAIN]
    top = (plain if not plain.empty else data).sort_values("tpot_ms").iloc[0]
    sizes = [data["held_weight_bytes"].min(), top["held_weight_bytes"]]
    rate = top["tpot_ms"] / top["held_weight_bytes"]
    line = pd.DataFrame({"held_weight_bytes": sizes, "tpot_ms": [rate * size for size in sizes]})
    return alt.Chart(line).mark_line(color=INK, strokeWidth=1, strokeDash=[2, 3], clip=True)
