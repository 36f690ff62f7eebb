"""The libraries' places in the proof on a GPU: their own plain references stand for their kernels.

So what a baseline is given, and what becomes of it, is ours to the last operand; gradients too.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Case, Run, difference
from eval.proof.gpu.ops import chunk, recurrent
from eval.proof.gpu.ops import recurrent_baselines as baselines

pytestmark = pytest.mark.peers

CPU = torch.device("cpu")
STATE = (2, 32, 16)
STATE_UPDATE = "mamba_ssm.ops.triton.selective_state_update"


def naive(library: str, name: str) -> Callable[..., Any]:
    """fla's reference under the signature of its kernels."""
    plain = getattr(import_module(f"fla.ops.{library}.naive"), name)

    def run(
        q: Tensor, k: Tensor, v: Tensor, *, use_qk_l2norm_in_kernel: bool = False, **options: Any
    ) -> Any:
        if use_qk_l2norm_in_kernel:
            q, k = (F.normalize(t.float(), dim=-1) for t in (q, k))
        return plain(q=q, k=k, v=v, **options)

    return run


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of each kernel that a baseline imports."""
    update = import_module(STATE_UPDATE)
    monkeypatch.setattr(update, "selective_state_update", update.selective_state_update_ref)
    combined = import_module("mamba_ssm.ops.triton.ssd_combined")
    plain = combined.ssd_chunk_scan_combined_ref

    def whole_chunks(*given: Tensor, chunk_size: int) -> Tensor:
        """The reference takes no last chunk that is short."""
        return plain(*given, chunk_size=min(chunk_size, given[0].shape[1]))

    monkeypatch.setattr(combined, "mamba_chunk_scan_combined", whole_chunks)
    delta = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    channels = naive("kda", "naive_recurrent_kda")
    linear = naive("simple_gla", "naive_recurrent_simple_gla")
    for library, function, reference in (
        ("gated_delta_rule", "fused_recurrent_gated_delta_rule", delta),
        ("gated_delta_rule", "chunk_gated_delta_rule", delta),
        ("kda", "fused_recurrent_kda", channels),
        ("kda", "chunk_kda", channels),
        ("simple_gla", "fused_recurrent_simple_gla", linear),
        ("simple_gla", "chunk_simple_gla", linear),
    ):
        monkeypatch.setattr(import_module(f"fla.ops.{library}"), function, reference)


def unused(**_: object) -> Tensor:
    raise AssertionError("no kernel runs here")


def step_case(make: recurrent.Make, sizes: tuple[int, ...], others: baselines.Baselines) -> Case:
    return recurrent.step_case(0, unused, make, sizes, 3, torch.float32, 5, others)


def scan_case(
    scan: chunk.Scan, make: chunk.Make, sizes: tuple[int, ...], library: dict[str, chunk.Library],
    *, backward: bool,
) -> Case:  # fmt: skip
    plain: dict[str, chunk.Library] = {"torch": lambda given: (lambda: scan(*given)[0], given)}
    return chunk.scan_case(0, scan, make, sizes, 2, 64, 5, plain | library, backward=backward)


DECAY = (chunk.decay_scan.decay_chunk, chunk.decay_inputs)
DELTA = (chunk.gdn.gdn_chunk, chunk.gdn_inputs)
CHANNELS = (chunk.gdn.gdn_chunk, chunk.kda_inputs)
CASES: dict[str, tuple[str, Case]] = {
    "ssm": ("mamba-ssm", step_case(recurrent.ssm_inputs, STATE, baselines.ssm)),
    "selective": (
        "mamba-ssm", step_case(recurrent.selective_inputs, (96, 16), baselines.selective)
    ),
    "gdn": ("fla", step_case(recurrent.gdn_inputs, STATE, baselines.gdn)),
    "kda": ("fla", step_case(recurrent.kda_inputs, STATE, baselines.kda)),
    "linear": ("fla", step_case(recurrent.linear_inputs, STATE, baselines.linear)),
    **{
        f"{name}{' and back' * backward}": (
            name.partition(" ")[0], scan_case(*ours, sizes, {name.partition(" ")[0]: library},
                                              backward=backward))
        for name, ours, sizes, library in (
            ("mamba-ssm decay", DECAY, (1, 2, 16, 32), chunk._mamba_decay),
            ("fla decay", DECAY, (1, 2, 16, 32), chunk._fla_decay),
            ("fla gdn", DELTA, (1, 2, 16, 32), chunk._fla_gdn),
            ("fla kda", CHANNELS, (2, 2, 16, 32), chunk._fla_kda),
            ("fla gdn of as many heads", DELTA, (2, 2, 16, 32), chunk._fla_gdn),
        )
        for backward in (False, True)
    },
}  # fmt: skip


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("name", CASES)
def test_a_library_is_given_the_same_problem(name: str) -> None:
    library, case = CASES[name]

    def run(which: str) -> object:
        torch.manual_seed(0)
        made: Run = case.build(CPU)[which]
        return made()

    theirs, plain = run(library), run("torch")
    assert difference(theirs, plain) <= 2e-2
    if name.endswith("and back"):
        # What they have in common, at least: the gradients of v and decay, or of q and k.
        alike = [a.shape == b.shape for a, b in zip(theirs, plain, strict=False)]  # type: ignore[call-overload]
        assert sum(alike) >= 2
