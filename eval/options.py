"""What commands share of their options: the device and durations."""

import math
from typing import Any

from archs.errors import UserError


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
