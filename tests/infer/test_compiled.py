"""Compiled decode: the tokens of the plain engine, past windows and pages; clear refusals."""

import pytest
import torch

from archs.errors import UserError
from archs.registry import REGISTRY, ModelSpec
from eval.conformance import CHECK_SCALE
from infer.engine import Engine
from infer.sampling import Sampling

PROMPTS = [[5, 9, 200, 31, 7], [1, 2, 3, 4, 5]]


def engines_for(arch: str) -> tuple[Engine, Engine]:
    model = ModelSpec(arch=arch, scale=CHECK_SCALE).build(seed=3)
    options = {"max_sequences": 2, "max_context": 64, "page_size": 8}
    return Engine(model, **options), Engine(model, **options, compiled=True)


def same_tokens(arch: str) -> None:
    plain, compiled = engines_for(arch)
    expected = plain.generate(PROMPTS, 40).tokens
    assert compiled.generate(PROMPTS, 40).tokens == expected
    assert compiled.generate(PROMPTS, 40).tokens == expected
    assert compiled.store.allocated_bytes == 0


def test_compiled_decode_of_attention_gives_the_same_tokens() -> None:
    same_tokens("gqa")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*sorted({*REGISTRY} - {"gqa", "mha", "mqa"}), "gdn:swa=1:1"])
def test_compiled_decode_gives_the_same_tokens(arch: str) -> None:
    same_tokens(arch)


def test_a_sequence_that_ends_before_others_stays_in_the_batch() -> None:
    """In the middle, where the rest would lie in slots that are not adjacent; drawn tokens, too."""
    model = ModelSpec(arch="gqa", scale=CHECK_SCALE).build(seed=3)
    options = {"max_sequences": 3, "max_context": 64, "page_size": 8}
    plain = Engine(model, **options)
    prompts = [*PROMPTS, [7, 7, 7, 7, 7]]
    for sampling in (None, Sampling(temperature=1.0, seed=5)):
        free = plain.generate(prompts, 12, sampling).tokens
        stop = free[1][3]
        expected = plain.generate(prompts, 12, sampling, stop=stop)
        assert len(expected.tokens[1]) <= 4 and max(map(len, expected.tokens)) > 4
        engine = Engine(model, **options, compiled=True)
        seen: list[int] = []
        found = engine.generate(prompts, 12, sampling, stop=stop, on_token=seen.append)
        assert found.tokens == expected.tokens
        assert sorted(seen) == sorted(t for tokens in found.tokens for t in tokens)
        assert engine.store.allocated_bytes == 0


def test_a_ragged_batch_is_refused_with_a_remedy() -> None:
    engine = engines_for("gqa")[1]
    with pytest.raises(UserError, match=r"lengths \[3, 1\].*compiled=False"):
        engine.generate([[1, 2, 3], [4]], 4)
    assert engine.store.allocated_bytes == 0


@pytest.mark.parametrize(
    ("prompts", "picked", "new"),
    [([3, 3, 3], [0, 2], None), ([3, 3], [1, 0], None), ([9, 1], [0, 1], None),
     ([3, 3], [0, 1], [1, 0])],
    ids=["a subset", "another order", "unlike lengths", "padding"],
)  # fmt: skip
@pytest.mark.parametrize("arch", ["gdn", "gqa"])
def test_a_batch_that_is_not_plain_is_refused_before_it_changes_anything(
    arch: str, prompts: list[int], picked: list[int], new: list[int] | None
) -> None:
    model = ModelSpec(arch=arch, scale=CHECK_SCALE).build(seed=3)
    engine = Engine(model, max_sequences=3, max_context=64, page_size=8, compiled=True)
    slots = [engine.store.add() for _ in prompts]
    engine.prefill(slots, [[1] * n for n in prompts])
    before, allocated = [engine.store.snapshot(s) for s in slots], engine.store.allocated_bytes
    counts = None if new is None else torch.tensor(new)
    with pytest.raises(UserError, match="no plain batch"):
        engine.extend_last([slots[i] for i in picked], torch.tensor([[5]] * len(picked)), counts)
    assert engine.store.allocated_bytes == allocated
    for slot, layers in zip(slots, before, strict=True):
        for held, now in zip(layers, engine.store.snapshot(slot), strict=True):
            assert all(torch.equal(held[name], now[name]) for name in held)


def test_lookback_is_refused_with_a_remedy() -> None:
    model = ModelSpec(arch="gqa", scale=CHECK_SCALE).build()
    with pytest.raises(UserError, match="lookback=2"):
        Engine(model, lookback=2, compiled=True)


def test_filling_the_last_row_compiles_nothing_anew() -> None:
    model = ModelSpec(arch="gqa", scale=CHECK_SCALE).build(seed=3)
    engine = Engine(model, max_context=24, page_size=8, compiled=True)
    times = engine.generate([[1, 2, 3, 4]], 20).step_ms
    assert max(times[8:]) < 500


def test_weights_laid_out_anew_are_noticed() -> None:
    model = ModelSpec(arch="gqa", scale=CHECK_SCALE).build(seed=3)
    compiled = Engine(model, max_context=24, compiled=True)
    Engine(model, max_sequences=8, max_context=24)
    with pytest.raises(UserError, match="open a new engine"):
        compiled.generate([[1, 2, 3]], 4)


@pytest.mark.slow
def test_two_compiled_models_take_turns() -> None:
    specs = [ModelSpec(arch=arch, scale=CHECK_SCALE) for arch in ("gqa", "mqa", "gqa")]
    models = [spec.build(seed=seed) for seed, spec in enumerate(specs)]
    expected = [Engine(model, max_context=24).generate([[1, 2, 3]], 12).tokens for model in models]
    engines = [Engine(model, max_context=24, compiled=True) for model in models]
    for _ in range(2):
        found = [engine.generate([[1, 2, 3]], 12).tokens for engine in engines]
        assert found == expected
