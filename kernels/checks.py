"""What every kernel's wrapper asks of its arguments, before any launch."""

import torch
from torch import Tensor


def require(holds: bool, name: str, value: object, rule: str, *of: object) -> None:
    """Raise ValueError with the argument, its value and the rule unless it holds.

    of: what stands in the rule's braces; formatted only where it is raised, since a launch waits.
    """
    if not holds:
        raise ValueError(f"{name}={value} {rule.format(*of)}")


class Form:
    """What a tensor is, for an error: written only when there is one, since a launch waits."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __str__(self) -> str:
        t = self.tensor
        return f"{str(t.dtype)[6:]}{list(t.shape)} with strides {list(t.stride())} on {t.device}"


def form(t: Tensor) -> Form:
    """`t` as an error names it."""
    return Form(t)


def counters(arrivals: Tensor | None, count: int, device: torch.device) -> Tensor:
    """`arrivals`, or fresh zeros: in each of `count` int32 the programs of one result arrive.

    The last to arrive clears its counter, so one buffer serves every launch of a stream.
    """
    if arrivals is None:
        return torch.zeros(count, dtype=torch.int32, device=device)
    fits = arrivals.dtype == torch.int32 and arrivals.device == device
    require(fits and arrivals.is_contiguous() and arrivals.numel() >= count, "arrivals",
            form(arrivals), "must be contiguous int32 [>= {}] on {}", count, device)  # fmt: skip
    return arrivals
