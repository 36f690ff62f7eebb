"""Step sizes Δ = softplus(raw) within the step kernels, down to where float32 ends."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from tests.kernels.interpreter import interpreted
from tests.kernels.slots import in_place
from tests.kernels.step_inputs import SLOTS
from tests.kernels.steps import STEPS, case

RAW = [-80.0, -20.0, -16.0, -7.0, -0.1, 0.0, 3.0, 19.9, 20.1, 300.0]


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def step_size(raw: float) -> float:
    return F.softplus(torch.tensor(raw, dtype=torch.float64)).item()


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize("name", ["ssm", "selective"])
def test_step_sizes_are_accurate_at_any_size(name: str, raw: float) -> None:
    step = STEPS[name]
    args, pool = step.made(case(1))
    args |= {"dt": torch.full(args["dt"].shape, raw), "dt_bias": torch.zeros_like(args["dt_bias"])}
    args |= {"b": torch.ones(args["b"].shape), "x": torch.ones(args["x"].shape)}
    pool.zero_()
    step.run(args, pool, in_place(SLOTS, 1))
    assert pool[SLOTS[0]].flatten().tolist() == pytest.approx(
        [step_size(raw)] * pool[0].numel(), rel=1e-6, abs=0
    )


@pytest.mark.parametrize("raw", RAW)
def test_gdn_decays_by_step_sizes_of_any_size(raw: float) -> None:
    step = STEPS["gdn"]
    args, pool = step.made(case(1))
    args |= {"dt_bias": torch.zeros(2), "a_log": torch.zeros(2)}
    args |= {"a": torch.full(args["a"].shape, raw), "b": torch.full(args["b"].shape, -60.0)}
    pool.fill_(1)
    step.run(args, pool, in_place(SLOTS, 1))
    decay = torch.tensor(-step_size(raw), dtype=torch.float64).exp().item()
    assert pool[SLOTS[0]].flatten().tolist() == pytest.approx(
        [decay] * pool[0].numel(), rel=2e-6, abs=1e-20
    )
