"""What the equality tests of recurrent mixers share: delicate values, and one mixer in a store."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from archs.mixer import Mixer
from infer.store import StateStore

TOLERANCE = 1e-4


@torch.no_grad()
def randomise(theirs: Any, seed: int) -> None:
    """Every parameter random, those that start as constants included; decays stay moderate."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in theirs.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(-1.0, 1.5, generator=generator)
        elif parameter.dim() < 2:
            parameter.normal_(0.3, 0.4, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


def mixer_steps(mixer: Mixer, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Outputs [B, T, D] of one mixer, extended piece by piece through a store."""
    batch, tokens = x.shape[:2]
    store = StateStore([mixer.state_spec()], max_sequences=batch, max_context=tokens, page_size=4)
    slots = [store.add() for _ in range(batch)]
    out, start = [], 0
    for size in sizes:
        step = store.begin(slots, size)
        out.append(mixer.extend(x[:, start : start + size], step.layers[0]))
        store.commit(step)
        start += size
    return torch.cat(out, 1)


def assert_close(got: Tensor, expected: Tensor) -> None:
    """float32, within 1e-4."""
    torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)
