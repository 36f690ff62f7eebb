"""The chart of models that were made smaller: what that costs, and what brings it back."""

import altair as alt
import pandas as pd

from eval.report.figures import Figures
from eval.report.pictures.canvas import themed
from eval.report.pictures.marks import Chart, tips
from eval.report.pictures.palette import INK

#: Ways to train a pruned model on, in the order of their rows, and what they are called.
WAYS = {
    "none": "as pruned", "scratch": "from scratch", "text": "on text", "distil": "distilled",
}  # fmt: skip
#: Marks of the axis, whose steps grow beyond ±1.
TICKS = (-5, -2, -1, 0, 1, 2, 5, 10, 20, 50, 100)


def loss_of_pruned(f: Figures) -> Chart | None:
    """Bits of held-out text over the parent's, by what was pruned and how it was trained on."""
    data = f.pruned()
    if data["way"].nunique() < 2:
        return None
    keys = ["plan", "way", "arch"]
    data = data.groupby(keys, as_index=False, sort=False).agg(value=("value", "mean"))
    # A plan that nobody trained on has nothing to be held against.
    data = data[data.groupby("plan")["way"].transform("nunique") > 1]
    data = data.assign(
        more=100 * (data["value"] - 1), how=data["plan"] + " " + data["way"].map(WAYS)
    )
    plans = list(dict.fromkeys(data["plan"]))
    every = [f"{plan} {way}" for plan in plans for way in WAYS.values()]
    order = [how for how in every if how in set(data["how"])]
    x = alt.Scale(type="symlog", constant=1, nice=False)
    points = alt.Chart(data).mark_point(filled=True, size=55, opacity=0.85).encode(
        alt.X("more:Q", title="bits of text more than the parent's, %", scale=x,
              axis=alt.Axis(values=list(TICKS), format="~g")),
        alt.Y("how:N", sort=order, title=None,
              axis=alt.Axis(labelFontSize=12, labelLimit=300, ticks=False)),
        f.palette.colour(legend=True), f.palette.shape(legend=True),
        tooltip=tips("arch", "how", "more"),
    )  # fmt: skip
    even = alt.Chart(pd.DataFrame({"more": [0.0]})).mark_rule(color=INK, strokeWidth=1)
    return themed(
        even.encode(alt.X("more:Q", scale=x)) + points,
        "What pruning costs, and what brings it back",
        "trained on for as many tokens in each way · means over seeds",
    )
