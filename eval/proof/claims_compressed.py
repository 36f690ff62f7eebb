"""The claim about weights in few bits, computed from models that were stored in several formats.

Formats are compared on the same models, pair by pair. Bits of held-out text are relative to those
of the same model with plain weights, of qat to one that was trained on as long.
"""

import re
from collections.abc import Sequence
from itertools import pairwise

import pandas as pd

from eval.report.evidence import Evidence, Verdict

#: Bits by which formats are told, and what one must lose to be worth recovering.
BITS = (8, 4, 3, 2)
LOSES = 5e-4
#: Ways to choose codes that go by what a matrix is multiplied with.
AWARE = ("awq", "gptq")


def few_bits(found: Evidence) -> tuple[Verdict, str]:
    """Memory, loss by bits, ways to choose codes, training for it, and time."""
    table = found.figures.compressed("bits_per_weight", "bits_per_byte_ratio")
    names = list(dict.fromkeys(table["weight_format"]))
    nearest = _nearest(names)
    if len(nearest) < 2:
        return "not measured", "no models stored in two formats of fewer bits"
    told: list[str] = []
    parts = [
        _memory(nearest, table, told),
        _loss(found, nearest, told),
        _aware(found, nearest, names, told),
        _trained(found, nearest, names, told),
        _time(found, told),
    ]
    held = [part for part in parts if part is not None]
    verdict: Verdict = "supported" if all(held) else "conditional" if any(held) else "refuted"
    return verdict, "; ".join(told)


def _nearest(names: Sequence[str]) -> dict[int, str]:
    """By bits the first format of the table whose codes are the nearest ones."""
    found: dict[int, str] = {}
    for name in names:
        bits = re.fullmatch(r"int(\d)(?:-g\d+)?", name)
        if bits:
            found.setdefault(int(bits[1]), name)
    return {bits: found[bits] for bits in BITS if bits in found}


def _memory(nearest: dict[int, str], table: pd.DataFrame, told: list[str]) -> bool | None:
    """Whether memory shrinks by nine tenths of the ratio of bits; None beside no plain model."""
    shrinks = {}
    for bits, name in nearest.items():
        both = _beside(table, "bits_per_weight", name)
        if not both.empty:
            shrinks[bits] = float((both["plain"] / both["packed"]).mean())
    if not shrinks:
        return None
    said = ", ".join(f"{nearest[b]} {r:.1f} of {32 / b:.1f}" for b, r in shrinks.items())
    scale = table["scale"].iloc[0]
    told.append(f"memory at {scale}, scales and the embedding included, shrinks {said} times")
    return all(ratio > 0.9 * 32 / bits for bits, ratio in shrinks.items())


def _beside(table: pd.DataFrame, measure: str, name: str) -> pd.DataFrame:
    """The measure of each model in a format and in float32: columns packed and plain."""
    keys = ["arch", "scale", "hardware"]
    sides = [
        table[table["weight_format"] == format_].set_index(keys)[measure]
        for format_ in (name, "float32")
    ]
    return pd.DataFrame({"packed": sides[0], "plain": sides[1]}).dropna()


def _loss(found: Evidence, nearest: dict[int, str], told: list[str]) -> bool:
    """Whether loss grows as bits go."""
    losses = {bits: found.ratios(name).mean() - 1 for bits, name in nearest.items()}
    said = ", ".join(f"{nearest[bits]} {100 * loss:.2f} %" for bits, loss in losses.items())
    told.append(f"bits of text more, rounded to nearest: {said}")
    ordered = list(losses.values())
    return all(a < b for a, b in pairwise(ordered))


def _aware(
    found: Evidence, nearest: dict[int, str], names: Sequence[str], told: list[str]
) -> bool | None:
    """Whether a way that knows the inputs loses less at every number of bits that it was tried."""
    verdicts = []
    for bits in (4, 3, 2):
        base = nearest.get(bits, "")
        for way in AWARE:
            found_more = found.more(base, f"{base}-{way}") if f"{base}-{way}" in names else None
            if found_more is None:
                continue
            value, low, high = (100 * x for x in found_more)
            told.append(f"{base} loses {value:.3f} % ({low:.3f} to {high:.3f}) more than by {way}")
            verdicts.append(low > 0)
    return all(verdicts) if verdicts else None


def _trained(
    found: Evidence, nearest: dict[int, str], names: Sequence[str], told: list[str]
) -> bool | None:
    """Whether training with rounded weights recovers half of what rounding loses."""
    verdicts = []
    for base in nearest.values():
        if f"{base}-qat" not in names:
            continue
        pair = pd.DataFrame({"qat": found.ratios(f"{base}-qat"), "nearest": found.ratios(base)})
        lost = pair.dropna().mean() - 1
        if lost["nearest"] < LOSES:
            told.append(f"{base} loses too little for qat to recover any")
            continue
        share = 1 - lost["qat"] / lost["nearest"]
        told.append(f"qat recovers {100 * share:.0f} % of what {base} loses")
        verdicts.append(bool(share >= 0.5))
    return all(verdicts) if verdicts else None


def _time(found: Evidence, told: list[str]) -> bool | None:
    """Whether decode gains as much as memory shrinks; it does not where other work is left."""
    table = found.figures.compressed("tpot_ms", "held_weight_bytes", stage="decode")
    gains = []
    for name in dict.fromkeys(table["weight_format"]):
        times, sizes = (_beside(table, m, name) for m in ("tpot_ms", "held_weight_bytes"))
        if name == "float32" or times.empty:
            continue
        faster = (times["plain"] / times["packed"]).median()
        smaller = (sizes["plain"] / sizes["packed"]).median()
        gains.append((name, faster, smaller))
    if not gains:
        return None
    said = ", ".join(f"{name} {f:.2f} times at {s:.1f} times fewer bytes" for name, f, s in gains)
    told.append(f"decode is faster by, median over architectures: {said}")
    return all(faster > 0.9 * smaller for _, faster, smaller in gains)
