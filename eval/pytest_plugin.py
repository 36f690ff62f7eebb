"""Decode benchmarks in anybody's pytest suite, with our measures in pytest-benchmark's records.

    @pytest.mark.parametrize("arch", ["gqa", "gdn"])
    def test_decode(decode_bench, arch):
        decode_bench(arch=arch, batch=8, context=4096)

Loaded by pytest where decodebench is installed. A benchmark is one decode step with the device
synchronised around it; an architecture whose decode is not its parallel form is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from archs.backbone import Model


class DecodeBench(Protocol):
    """Times one decode step; the figures are in `benchmark.stats` and `benchmark.extra_info`."""

    def __call__(
        self, *, arch: str, batch: int = 1, context: int = 1024, scale: str = "70m",
        device: str = "auto", backend: str = "auto", compiled: bool = False, rounds: int = 16,
    ) -> dict[str, Any]:  # fmt: skip
        """Returns `extra_info`: our measures by their names.

        arch: a registry name, a pattern or a file; context: tokens held before the first step.
        Raises UserError on what does not exist or fit; the test fails where decode is incorrect
        and is skipped, saying why, where the backend has no form for the architecture.
        """
        ...


@pytest.fixture
def decode_bench(benchmark: Any) -> DecodeBench:
    """A callable that times one decode step of an architecture (see `DecodeBench`)."""

    def run(
        *, arch: str, batch: int = 1, context: int = 1024, scale: str = "70m",
        device: str = "auto", backend: str = "auto", compiled: bool = False, rounds: int = 16,
    ) -> dict[str, Any]:  # fmt: skip
        from archs.backends import NoFormError, resolve_backend
        from eval.options import resolve_device

        where = resolve_device(device)
        chosen = resolve_backend(backend, where)
        model = _model(arch, scale, str(where))
        try:
            _require_correct(model, batch, context, chosen, compiled)
        except NoFormError as why:
            pytest.skip(str(why))
        step, engine = _step_at(model, batch, context, rounds, chosen, compiled)
        benchmark.extra_info.update(
            arch=arch, scale=scale, batch=batch, context=context,
            kernel_backend=engine.kernel_backend, device=str(where),
            state_bytes=engine.store.allocated_bytes // batch,
        )  # fmt: skip
        benchmark.pedantic(step, rounds=rounds, iterations=1, warmup_rounds=3)
        if benchmark.stats is not None:
            benchmark.extra_info.update(_measures(model, batch, context, benchmark))
        return dict(benchmark.extra_info)

    return run


@lru_cache(maxsize=2)
def _model(arch: str, scale: str, device: str) -> Model:
    import torch

    from archs.registry import ModelSpec
    from archs.sizes import get_scale
    from eval.decode import build_to_serve

    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    return build_to_serve(ModelSpec(arch=arch, scale=get_scale(scale)), where, dtype)


def _require_correct(model: Model, batch: int, context: int, backend: str, compiled: bool) -> None:
    from eval.agreement import agreement

    found = agreement(model, context=context, batches=(batch,), backend=backend, compiled=compiled)
    if not found.holds:
        pytest.fail(found.why_not)


def _step_at(
    model: Model, batch: int, context: int, rounds: int, backend: str, compiled: bool
) -> tuple[Callable[[], None], Any]:
    """One greedy decode step from synthetic state of `context` tokens, device synchronised."""
    import torch

    from eval.hardware import now_s
    from infer.engine import Engine

    device = model.embedding.weight.device
    engine = Engine(
        model, max_sequences=batch, max_context=context + rounds + 4, backend=backend,
        compiled=compiled,
    )  # fmt: skip
    slots = [engine.store.add() for _ in range(batch)]
    engine.store.fill(slots, context)
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)

    def step() -> None:
        tokens.copy_(engine.extend_last(slots, tokens).argmax(-1, keepdim=True))
        now_s(device)

    return step, engine


def _measures(model: Model, batch: int, context: int, benchmark: Any) -> dict[str, float]:
    from eval.decode import decode_cost

    cost = decode_cost(model, batch, context)
    stats = benchmark.stats.stats
    return {
        "tpot_ms": stats.mean * 1e3,
        "tpot_p50_ms": stats.median * 1e3,
        "output_tok_per_s": batch / stats.mean,
        "step_bytes": cost.bytes,
        "step_flops": cost.flops,
        "arith_intensity_pred": cost.intensity_flop_per_byte,
    }
