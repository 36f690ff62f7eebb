"""Traces of what users sent: the public files as they are, and a plain one of our own.

Columns tell the format. CSV: those of Azure's LLM inference traces, of BurstGPT (with or without
sessions), or `arrival_s, prompt_tokens, output_tokens` with an optional `group`. JSONL: Mooncake's,
whose `hash_ids` name the blocks of 512 tokens that prompts share. Requests of which the trace says
that they gave no token are left out.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from archs.errors import UserError, unknown_name
from archs.files import read_text

#: Tokens of a prompt that one of Mooncake's hash_ids stands for.
MOONCAKE_BLOCK = 512
BURSTGPT = frozenset(
    ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace. blocks: names of what its prompt consists of, in whole blocks."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    group: str = ""
    blocks: tuple[int, ...] = ()


class _Format:
    """columns: needed ones, and those that may be there. read: of a row's values."""

    def __init__(
        self, needed: frozenset[str], optional: frozenset[str],
        read: Callable[[Mapping[str, Any]], Arrival],
    ) -> None:  # fmt: skip
        self.needed = needed
        self.optional = optional
        self.read = read


def _seconds(text: str) -> float:
    moment = datetime.fromisoformat(text.strip())
    # Azure's older files name no zone; differences alone matter.
    return moment.replace(tzinfo=None).timestamp() if moment.tzinfo is None else moment.timestamp()


def _azure(row: Mapping[str, Any]) -> Arrival:
    return Arrival(
        _seconds(row["TIMESTAMP"]), _count(row, "ContextTokens"), _count(row, "GeneratedTokens")
    )


def _burstgpt(row: Mapping[str, Any]) -> Arrival:
    return Arrival(
        _number(row, "Timestamp"), _count(row, "Request tokens"), _count(row, "Response tokens"),
        str(row["Model"]),
    )  # fmt: skip


def _plain(row: Mapping[str, Any]) -> Arrival:
    return Arrival(
        _number(row, "arrival_s"), _count(row, "prompt_tokens"), _count(row, "output_tokens"),
        str(row.get("group", "")),
    )  # fmt: skip


def _mooncake(row: Mapping[str, Any]) -> Arrival:
    blocks = row["hash_ids"]
    if not isinstance(blocks, list) or not all(isinstance(b, int) for b in blocks):
        raise UserError(f"hash_ids={blocks!r} is no list of integers")
    return Arrival(
        _number(row, "timestamp") / 1e3, _count(row, "input_length"),
        _count(row, "output_length"), "", tuple(blocks),
    )  # fmt: skip


FORMATS = (
    _Format(frozenset(("TIMESTAMP", "ContextTokens", "GeneratedTokens")), frozenset(), _azure),
    _Format(BURSTGPT, frozenset(("Session ID", "Elapsed time")), _burstgpt),
    _Format(
        frozenset(("arrival_s", "prompt_tokens", "output_tokens")), frozenset(("group",)), _plain
    ),
    _Format(
        frozenset(("timestamp", "input_length", "output_length", "hash_ids")), frozenset(),
        _mooncake,
    ),
)  # fmt: skip


def read_trace(path: Path) -> list[Arrival]:
    """The requests of a trace by their arrival, the first at 0 s.

    Raises UserError naming the line of an unknown column, a missing or impossible value.
    """
    if not path.is_file():
        raise UserError(f"trace '{path}' does not exist; give a .csv or .jsonl file")
    read = _json_lines if path.suffix in (".jsonl", ".json") else _csv_lines
    found = []
    for line, row in read(path):
        try:
            arrival = _format_of(row).read(row)
        except (UserError, ValueError) as why:
            raise UserError(f"'{path}' line {line}: {why}") from None
        if arrival.output_tokens:
            found.append(arrival)
    if not found:
        raise UserError(f"trace '{path}' holds no request that was answered; give another")
    found.sort(key=lambda a: a.arrival_s)
    first = found[0].arrival_s
    return [
        Arrival(a.arrival_s - first, a.prompt_tokens, a.output_tokens, a.group, a.blocks)
        for a in found
    ]


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    lines = csv.DictReader(read_text(path).splitlines())
    for row in lines:
        if None in row or None in row.values():
            raise UserError(f"'{path}' line {lines.line_num}: has not as many values as the header")
        yield lines.line_num, row


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as why:
            raise UserError(f"'{path}' line {number}: is no JSON: {why}") from None
        if not isinstance(row, dict):
            raise UserError(f"'{path}' line {number}: is no JSON object")
        yield number, row


def _format_of(row: Mapping[str, Any]) -> _Format:
    names = set(row)
    for known in FORMATS:
        if known.needed <= names:
            for name in sorted(names - known.needed - known.optional):
                raise unknown_name("column", name, sorted(known.needed | known.optional))
            return known
    nearest = max(FORMATS, key=lambda known: len(known.needed & names))
    missing = ", ".join(sorted(nearest.needed - names))
    raise UserError(
        f"columns {', '.join(sorted(names))} are none of the known traces'; nearest lacks {missing}"
    )


def _number(row: Mapping[str, Any], name: str) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        raise UserError(f"{name}='{row[name]}' is no number") from None
    if not math.isfinite(value) or value < 0:
        raise UserError(f"{name}={row[name]} must be finite and at least 0")
    return value


def _count(row: Mapping[str, Any], name: str) -> int:
    value = _number(row, name)
    if value % 1:
        raise UserError(f"{name}={row[name]} must be a whole number of tokens")
    return int(value)
