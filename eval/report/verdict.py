"""A table in a few sentences: who leads in quality, who decodes fastest, whose state is smallest.

Only figures of the table are told. The paired test decides who leads in quality
(`eval.results.paired`); times within `EQUAL` of the fastest are said to be equal; what was not
measured is named.
"""

from collections.abc import Iterable, Sequence

import pandas as pd

from eval.report.figures import EQUAL, Figures, Setting
from eval.report.leaderboard import Column, fullest, quality_column
from eval.report.pictures.marks import si


def verdict(long: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """The sentences for a long table and the wide table of it."""
    figures, archs = Figures(long), list(table["arch"])
    timed = _longest_common(figures)
    said = [_quality(table), *(_speed(figures, archs, *at) for at in timed)]
    if not timed:
        said.append(_declared_state(figures))
    missing = [] if quality_column(table) else ["bits per byte"]
    missing += [] if fullest(table, "accuracy") else ["tasks"]
    missing += [] if timed else ["decode speed"]
    if missing:
        said.append(f"Not measured: {_list(missing)}.")
    return [sentence for sentence in said if sentence]


def _quality(table: pd.DataFrame) -> str:
    name = quality_column(table)
    column = name and Column.parse(name)
    if not column:
        return ""
    scored = list(table.loc[table[name].notna(), "arch"])
    told = [f"trained at scale {column.scale}", *column.extra]
    absent = [arch for arch in table["arch"] if arch not in scored]
    told += [f"without {_list(absent)}"] if absent else []
    where = f"bits per byte, {', '.join(told)}"
    if f"{name}:ahead_of" not in table:
        return f"Quality is not compared: no two figures have an interval ({where})."
    ahead = {
        str(arch): str(worse).split("; ") if worse else []
        for arch, worse in zip(table["arch"], table[f"{name}:ahead_of"], strict=True)
        if not pd.isna(worse)
    }
    leaders = [arch for arch in ahead if not any(arch in worse for worse in ahead.values())]
    if len(leaders) == len(ahead):
        return (
            f"In quality no architecture leads: none of {len(ahead)} is ahead of another beyond "
            f"chance ({where})."
        )
    if len(leaders) > 1:
        return (
            f"In quality {_list(leaders)} lead, tied: of {len(ahead)} architectures none is ahead "
            f"of any of them beyond chance ({where})."
        )
    behind, others = len(ahead[leaders[0]]), len(ahead) - 1
    beaten = f"all {others} others" if behind == others else f"{behind} of {others} others"
    return f"In quality {leaders[0]} leads, ahead of {beaten} beyond chance ({where})."


def _longest_common(f: Figures) -> list[tuple[Setting, int, int]]:
    """By machine the setting, batch and context of most architectures, the longest of several.

    The batch is the smallest of its setting.
    """
    found = []
    for machine in dict.fromkeys(s.hardware for s in f.settings):
        cells = []
        for setting in (s for s in f.settings if s.hardware == machine):
            data = f.at(setting, "tpot_ms")
            data = data[data["batch"] == data["batch"].min()]
            for (batch, context), rows in data.groupby(["batch", "context"]):
                cells.append((len(rows), int(context), setting, int(batch)))
        if cells:
            _, context, setting, batch = max(cells, key=lambda cell: cell[:2])
            found.append((setting, batch, context))
    return found


def _speed(f: Figures, archs: Sequence[str], setting: Setting, batch: int, context: int) -> str:
    data = f.at(setting, "tpot_ms")
    data = data[(data["batch"] == batch) & (data["context"] == context)].sort_values("tpot_ms")
    times = dict(zip(data["arch"], data["tpot_ms"], strict=True))
    best, worst = min(times.values()), max(times.values())
    fastest = [arch for arch, ms in times.items() if ms < (1 + EQUAL) * best]
    where = f"{f.per_token}, batch {batch}, {setting}"
    if len(times) == 1:
        speed = f"At {context:,} tokens only {fastest[0]} was timed: {best:.3g} ms ({where})"
    elif len(fastest) == len(times):
        speed = (
            f"At {context:,} tokens no architecture decodes faster: all {len(times)} are within "
            f"{100 * EQUAL:.0f} % of {best:.3g} ms ({where})"
        )
    else:
        tied = f"decode fastest, tied within {100 * EQUAL:.0f} %"
        slowest = [arch for arch, ms in times.items() if ms > worst / (1 + EQUAL)]
        speed = (
            f"At {context:,} tokens {_list(fastest)} {tied if fastest[1:] else 'decodes fastest'}: "
            f"{best:.3g} ms against {worst:.3g} ms of {_list(slowest)}, the slowest ({where})"
        )
    untimed = [arch for arch in archs if arch not in times]
    speed += f"; {_list(untimed)} not timed there" if untimed else ""
    state = _state(f, setting.scale, context, times)
    return f"{speed}{f'; {state}' if state else ''}."


def _declared_state(f: Figures) -> str:
    """State at the longest context that most architectures declare, where nothing was timed."""
    for setting in f.declared_settings[:1]:
        data = f.declared(setting.scale, "state_bytes")
        counts = data.groupby("context")["arch"].nunique()
        context = int(max(counts[counts == counts.max()].index))
        state = _state(f, setting.scale, context, data["arch"])
        return f"At {context:,} tokens, {setting.scale} shapes, {state}." if state else ""
    return ""


def _state(f: Figures, scale: str, context: int, archs: Iterable[str]) -> str:
    data = f.declared(scale, "state_bytes")
    if data.empty:
        return ""
    data = data[(data["context"] == context) & data["arch"].isin(list(archs))]
    held = dict(zip(data["arch"], data["state_bytes"], strict=True))
    if len(held) < 2:
        return ""
    low, high = min(held.values()), max(held.values())
    least, most = (_list([a for a, size in held.items() if size == end]) for end in (low, high))
    if low == high:
        return f"the state of a sequence takes {si(low)}B in all of them"
    times = f", {_round(high / low)} times as much" if low else ""
    return f"a sequence keeps {si(low)}B of state in {least}, {si(high)}B in {most}{times}"


def _round(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 10 else f"{ratio:.2g}"


def _list(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    *rest, last = names
    return f"{', '.join(rest)} and {last}" if rest else last
