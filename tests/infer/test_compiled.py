"""Compiled decode: the tokens of the plain engine, past windows and pages; clear refusals."""

import pytest

from archs.errors import UserError
from archs.registry import REGISTRY, ModelSpec
from eval.conformance import CHECK_SCALE
from infer.engine import Engine

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


def test_a_ragged_batch_is_refused_with_a_remedy() -> None:
    engine = engines_for("gqa")[1]
    with pytest.raises(UserError, match=r"lengths \[3, 1\].*compiled=False"):
        engine.generate([[1, 2, 3], [4]], 4)
    assert engine.store.allocated_bytes == 0


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
