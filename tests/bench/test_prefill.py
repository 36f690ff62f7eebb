"""Prefill of every registered architecture: one prompt through the engine."""

from typing import Any

import pytest

from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from infer.engine import Engine


@pytest.mark.parametrize("prompt", [512])
@pytest.mark.parametrize("arch", (*REGISTRY, *HYBRIDS))
def test_prefill(benchmark: Any, arch: str, prompt: int) -> None:
    model = ModelSpec(arch=arch, scale=get_scale("tiny")).build()
    ids = [[token % model.vocab_size for token in range(prompt)]]

    def opened() -> tuple[tuple[Engine, int], dict[str, Any]]:
        engine = Engine(model, max_context=prompt)
        return (engine, engine.store.add()), {}

    def prefill(engine: Engine, slot: int) -> None:
        engine.prefill([slot], ids)

    benchmark.pedantic(prefill, setup=opened, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(
        arch=arch, scale="tiny", batch=1, context=prompt,
        prefill_tok_per_s=prompt / benchmark.stats.stats.median,
    )  # fmt: skip
