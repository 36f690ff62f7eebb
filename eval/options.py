"""What commands share: the device, durations, and how they end."""

import math
from collections.abc import Iterable
from typing import Any

import typer

from archs.errors import UserError

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
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < math.inf:
        raise UserError(f"duration '{text}' must be a positive number of s, m or h, as in 9m")
    return seconds
