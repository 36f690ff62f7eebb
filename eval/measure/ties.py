"""Whether two tokens that parted are a tie: the logits that chose between them differ by rounding.

Decode, verification and other company sum in other orders. Where a state is kept in few bits, what
lies in the middle between two codes may get either, so a tie is as wide as that makes logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from archs.backbone import Model
from archs.storage import rounds_values
from eval.measure.agreement import SLACK, TIES, exact_logits
from eval.tasks.score import read_through_store

#: Two logits closer than this, relative to the largest one, are equal but for rounding.
TIE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Gap(NamedTuple):
    """How far two logits are apart, and how far those of a tie may be; relative to the largest."""

    apart: float
    limit: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding alone may have chosen."""
        return self.apart <= self.limit


@torch.inference_mode()
def tie_gap(model: Model, tokens: Sequence[int], one: int, other: int) -> Gap:
    """Of two tokens after these, by the torch forms.

    Of a state in few bits the logits are those that its codes give. Rows are rounded alike however
    they came, so codes differ at ties alone; values are rounded at the end of every step, wherever
    steps end, and each way may be as far from the exact logits as single steps are.
    """
    backend = model.backend
    model.use("torch")
    ids = torch.tensor([list(tokens)], device=model.embedding.weight.device)
    exact = exact_logits(model, ids, len(tokens) - 1)[0, 0].double()
    logits, limit = exact, TIE[model.norm.weight.dtype]
    if model.state_format:
        logits = _kept_logits(model, ids)
        share = SLACK if rounds_values(model) else TIES
        # Both logits may have moved, in opposite directions.
        moved = 2 * share * float((logits - exact).abs().max() / exact.abs().max())
        limit = max(limit, moved)
    model.use(backend)
    return Gap(float((logits[one] - logits[other]).abs() / logits.abs().max()), limit)


def _kept_logits(model: Model, ids: Tensor) -> Tensor:
    """Logits [V] after tokens [1, T], read through a store."""
    *_, last = read_through_store(model, ids)
    return model.logits(last[:, -1])[0].double()
