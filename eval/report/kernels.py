"""The report's section on kernels, from a proof's own table: ours beside the fastest baseline."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

OURS = "triton"


@dataclass(frozen=True, slots=True)
class Compared:
    """One case: our time, its share of the device's ceiling, and the fastest baseline.

    ratio: their time over ours, above 1 where ours is faster; None where nothing was compared.
    """

    op: str
    case: str
    status: str
    time_us: float | None
    copy_fraction: float | None
    matrix_fraction: float | None
    baseline: str
    ratio: float | None


def compared(path: Path) -> list[Compared]:
    """Every case of a proof's `kernels.csv`, in the file's order."""
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    cases = []
    for (op, case), rows in table.groupby(["op", "case"], sort=False):
        held = {str(r["backend"]): dict(r) for _, r in rows.iterrows()}
        ours = held.get(OURS, {})
        timed = {n: float(r["time_us"]) for n, r in held.items() if r["status"] == "ok"}
        others = {n: t for n, t in timed.items() if n != OURS}
        best = min(others, key=lambda n: others[n], default="")
        cases.append(Compared(
            op=str(op), case=str(case), status=str(ours.get("status", "not measured")),
            time_us=timed.get(OURS), copy_fraction=_number(ours, "copy_fraction"),
            matrix_fraction=_number(ours, "matrix_fraction"), baseline=best,
            ratio=others[best] / timed[OURS] if best and OURS in timed else None,
        ))  # fmt: skip
    return cases


def kernel_section(folder: Path) -> str:
    """The section's HTML; empty where the folder holds no proof."""
    path = folder / "kernels.csv"
    if not path.is_file():
        return ""
    cases = compared(path)
    ratios = [c.ratio for c in cases if c.ratio is not None]
    ahead = sum(r > 1 for r in ratios)
    lead = (
        f"<p>{len(cases)} cases, cold cache, medians; {ahead} of the {len(ratios)} that have a "
        "baseline are faster than the fastest of them. Fractions are of this device's measured "
        "copy bandwidth and matrix rate.</p>"
    )
    names = ("op", "case", "ours, µs", "copy", "matrix", "fastest other", "its time / ours")
    heads = "".join(
        f'<th scope="col" class="{"text" if i in (0, 1, 5) else ""}"><button>{n}</button></th>'
        for i, n in enumerate(names)
    )
    rows = "".join(_row(c) for c in cases)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f'{lead}<div class="card">{table}</div>'


def _row(c: Compared) -> str:
    cells = (
        (c.op, "text"), (c.case, "text wrap"),
        (c.status if c.time_us is None else f"{c.time_us:,.1f}", ""),
        (_percent(c.copy_fraction), ""), (_percent(c.matrix_fraction), ""), (c.baseline, "text"),
        ("" if c.ratio is None else f"{c.ratio:.2f}", ""),
    )  # fmt: skip
    sorts = (
        c.op, c.case, c.time_us, c.copy_fraction, c.matrix_fraction, c.baseline, c.ratio,
    )  # fmt: skip
    return "<tr>" + "".join(
        f'<td class="{kind}" data-sort="{escape("" if s is None else str(s), quote=True)}">'
        f"{escape(text)}</td>"
        for (text, kind), s in zip(cells, sorts, strict=True)
    ) + "</tr>"  # fmt: skip


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.0f} %"


def _number(row: Mapping[str, object], name: str) -> float | None:
    text = str(row.get(name, ""))
    return float(text) if text else None
