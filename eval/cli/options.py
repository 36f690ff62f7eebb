"""Shared by commands: the device, durations, and exit codes."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from archs.errors import UserError

#: One format of all weights, and of all states.
Weights = Annotated[
    str, typer.Option(help="How weights are stored: int8, int4-g64; default: plain numbers.")
]
State = Annotated[
    str, typer.Option(help="How states are kept: kv:int8,memory:int8; default: as computed.")
]
#: Exit codes of commands that found a failure, and whose time budget ended before all was done.
FAILED, UNFINISHED = 1, 3
#: Statuses that are findings, and no failures.
FINE = ("ok", "unsupported", "oom")


def leave(statuses: Iterable[object], *, finished: bool = True) -> None:
    """End the command with the exit code that these statuses come to; return where that is 0."""
    failed = [status for status in statuses if status not in FINE]
    if not finished or failed:
        raise typer.Exit(FAILED if finished else UNFINISHED)


def resolve_device(name: str) -> Any:
    """The torch device; `auto` is CUDA where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        from archs.errors import unknown_name

        raise unknown_name("device", name, ["auto", "cpu", "cuda"])
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not available on this machine; use --device cpu")
    return torch.device(name)


def parse_duration_s(text: str | None) -> float | None:
    """Seconds in `90`, `45s`, `9m` or `2h`. Raises UserError."""
    if text is None:
        return None
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    return _quantity(text, units, "duration", "as in 9m", default="s")


def parse_latency_ms(text: str) -> float:
    """Milliseconds in `20ms`, `0.5s` or `800us`. Raises UserError."""
    return _quantity(text, {"us": 1e-3, "ms": 1.0, "s": 1e3}, "time per token", "as in 20ms")


def parse_bytes(text: str) -> float:
    """Bytes in `80GB` (of 10^9) or `80GiB` (of 2^30). Raises UserError."""
    units = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
    return _quantity(text, units, "memory", "as in 80GB")


def _quantity(
    text: str, units: Mapping[str, float], what: str, example: str, default: str = ""
) -> float:
    """A positive number with one of these units. Raises UserError."""
    found = re.fullmatch(r"(.*?)\s*([a-zA-Z]*)", text)
    number, unit = found.groups() if found else ("", "")
    try:
        value = float(number) * units[unit or default]
    except (ValueError, KeyError):
        value = -1.0
    if not 0 < value < math.inf:
        *first, last = units
        raise UserError(
            f"{what} '{text}' must be a positive number of {', '.join(first)} or {last}, {example}"
        )
    return value
