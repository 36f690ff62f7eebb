"""The charts of states in few bits: what bits cost in loss and in recall, and what time adds."""

import pandas as pd

from eval.report.figures import Figures
from eval.report.pictures.canvas import Axis
from eval.report.pictures.compression import recall_lost
from eval.report.pictures.marks import Along, Chart, dashed_curves

#: Ways to keep numbers, as dashes.
DASHES = {
    "nearest": [1, 0], "kivi": [6, 3], "ef": [2, 2], "sr": [8, 2, 2, 2], "fp8": [1, 3],
}  # fmt: skip
#: Losses below it are drawn at it: the noise of the text.
LEAST_NATS = 1e-4
#: What of a state is in few bits, as dashes.
PARTS = {"kv": [6, 3], "memory": [1, 0]}
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
    return dashed_curves(
        f, data, Along.of(data, "smaller", "times less memory than a state of float32"),
        _loss(data), "way", DASHES, data.groupby("arch").tail(1), title,
        f"{_scale(data)} shapes, trained · {span} · means over seeds · losses under {LEAST_NATS:g} "
        "at it",
        tip=("bits_per_state_number", "loss_gap_at_position"),
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
    ticks = sorted(set(data["position"]))
    worst = data[data["how"] == [name for name in DRIFTING if name in set(data["how"])][-1]]
    return dashed_curves(
        f, data, Along.of(data, "position", "position, up to", number="d", values=ticks),
        _loss(data), "how", DRIFTING, worst.groupby("arch").tail(1),
        "What rounding at every token adds up to",
        f"{_scale(data)} shapes, trained · means over seeds · losses under {LEAST_NATS:g} drawn at "
        "it",
        tip=("position", "value"), size=35,
    )  # fmt: skip


def recall_against_state_bits(f: Figures) -> Chart | None:
    """What a task's model still answers with its rows, or its recurrent state, in few bits."""
    data = f.recalled()
    if data.empty:
        return None
    data = data[data["part"].isin(PARTS) & ~data["format"].str.contains("-sr|-ef|-kivi")]
    return recall_lost(
        f, data.assign(curve=data["arch"] + data["part"]), "part", PARTS,
        "What each bit of the state is worth in recall", "rounded to nearest",
    )  # fmt: skip


def _loss(data: pd.DataFrame) -> Along:
    axis = Axis.around(list(data["more"]), vertical=True)
    return Along("more", axis, "loss over that of a state as computed", {"unit": "nat a token"})


def _scale(data: pd.DataFrame) -> str:
    return str(data["scale"].iloc[0])
