"""The claim about pruning with distillation, computed from models that were pruned in some way.

Ways to train on are compared on the same pruned models, pair by pair, at equal tokens. Bits of
held-out text are relative to those of the parent.
"""

import re

import pandas as pd

from eval.report.evidence import Evidence, Verdict
from eval.results.statistics import student_t_mean

#: Bits more than the parent's, relative, that are almost no loss.
ALMOST_NONE = 0.02
#: Shares of a dimension that halve it.
HALF = re.compile(r":(0\.5|1/2)\b")
WAYS = ("none", "text", "scratch", "distil")


def pruned_and_distilled(found: Evidence) -> tuple[Verdict, str]:
    """Of each plan that halves something: what is lost, and to what distillation is better."""
    table = found.figures.pruned()
    plans = [name for name in dict.fromkeys(table["plan"]) if HALF.search(name)]
    if table.empty or not plans:
        return "not measured", "no model was pruned to half of something and trained on"
    told, verdicts = [], []
    for plan in plans:
        lost = table[table["plan"] == plan].pivot_table(
            index=["arch", "seed"], columns="way", values="value"
        ) - 1  # fmt: skip
        if "distil" not in lost:
            continue
        said = ", ".join(f"{100 * lost[way].mean():.2f} % {way}" for way in WAYS if way in lost)
        gains = {way: _gain(lost, way) for way in ("text", "scratch") if way in lost}
        better = ", ".join(
            f"{100 * low:.2f} to {100 * high:.2f} % better than {way}"
            for way, (low, high) in gains.items()
        )
        told.append(f"{plan}: {said}" + (f" (distilled {better})" if better else ""))
        verdicts += [low > 0 for low, _ in gains.values()]
        verdicts.append(bool(lost["distil"].mean() < ALMOST_NONE))
    if not verdicts:
        return "not measured", "no pruned model was distilled"
    verdict: Verdict = (
        "supported" if all(verdicts) else "conditional" if any(verdicts) else "refuted"
    )
    return verdict, "bits of text more than the parent's, means over models; " + "; ".join(told)


def _gain(lost: pd.DataFrame, way: str) -> tuple[float, float]:
    """The 95 % interval over models of what distillation loses less than another way."""
    apart = (lost[way] - lost["distil"]).dropna()
    if len(apart) < 2:
        return float("nan"), float("nan")
    found = student_t_mean(list(apart))
    return found.value - found.half, found.value + found.half
