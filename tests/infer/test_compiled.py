"""Compiled steps: the logits of the plain engine, past windows and pages; clear refusals."""

from dataclasses import replace
from datetime import date
from typing import Any

import pytest
import torch

from archs.errors import UserError
from archs.registry import REGISTRY, ModelSpec
from eval.proof.conformance import CHECK_SCALE
from infer.engine import Engine
from infer.sampling import Sampling

pytestmark = pytest.mark.usefixtures("fast_algorithms")

#: Compilation takes as many times longer as there are layers: two where their results are compared,
#: as two may differ as four do, and one where the engine is.
SCALE, ONE_LAYER = (replace(CHECK_SCALE, name=f"check of {n} layers", n_layers=n) for n in (2, 1))
PROMPTS = [[5, 9, 200, 31, 7], [1, 2, 3, 4, 5]]
#: A compilation takes a minute: each day half of the architectures decode, the others verify.
COMPILED = [*sorted({*REGISTRY} - {"gqa", "mha", "mqa"}), "gdn:swa=1:1"]
TODAY = date.today().toordinal() % 2


def engines_for(arch: str, **options: Any) -> tuple[Engine, Engine]:
    overrides = {arch: options} if options else {}
    model = ModelSpec(arch=arch, scale=SCALE, overrides=overrides).build(seed=3)
    sizes = {"max_sequences": 2, "max_context": 64, "page_size": 8}
    return Engine(model, **sizes), Engine(model, **sizes, compiled=True)


def same_tokens(arch: str, **options: Any) -> None:
    plain, compiled = engines_for(arch, **options)
    expected = plain.generate(PROMPTS, 40).tokens
    assert compiled.generate(PROMPTS, 40).tokens == expected
    assert compiled.generate(PROMPTS, 40).tokens == expected
    assert compiled.store.allocated_bytes == 0


def test_compiled_decode_of_attention_gives_the_same_tokens() -> None:
    same_tokens("gqa")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("gqa", {"qk_norm": True, "output_gate": True, "learned_sinks": True, "rope_dim": 8}),
        ("cla", {"qk_norm": True, "tied_kv": True, "shared_layers": 1, "rope_dim": 8}),
    ],
)
def test_compiled_decode_of_attention_with_options_gives_the_same_tokens(
    arch: str, options: dict[str, Any]
) -> None:
    same_tokens(arch, **options)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", COMPILED[TODAY::2])
def test_compiled_decode_gives_the_same_tokens(arch: str) -> None:
    same_tokens(arch)


def test_a_sequence_that_ends_before_others_stays_in_the_batch() -> None:
    """In the middle, where the rest would lie in slots that are not adjacent; drawn tokens, too."""
    model = ModelSpec(arch="gqa", scale=ONE_LAYER).build(seed=3)
    options = {"max_sequences": 3, "max_context": 64, "page_size": 8}
    plain, engine = Engine(model, **options), Engine(model, **options, compiled=True)
    prompts = [*PROMPTS, [7, 7, 7, 7, 7]]
    for sampling in (None, Sampling(temperature=1.0, seed=5)):
        free = plain.generate(prompts, 12, sampling).tokens
        stop = free[1][3]
        expected = plain.generate(prompts, 12, sampling, stop=stop)
        assert len(expected.tokens[1]) <= 4 and max(map(len, expected.tokens)) > 4
        seen: list[int] = []
        found = engine.generate(prompts, 12, sampling, stop=stop, on_token=seen.append)
        assert found.tokens == expected.tokens
        assert sorted(seen) == sorted(t for tokens in found.tokens for t in tokens)
        assert engine.store.allocated_bytes == 0


def verified_alike(arch: str, cuts: tuple[int, int, int], *, more: int) -> None:
    """Steps of three tokens with rollbacks between them, sequences of unlike lengths, padding."""
    model = ModelSpec(arch=arch, scale=SCALE).build(seed=3)
    options = {"max_sequences": 3, "max_context": 64, "page_size": 8, "lookback": 3}
    plain, compiled = Engine(model, **options), Engine(model, **options, compiled=True)
    for engine in (plain, compiled):
        engine.prefill([engine.store.add() for _ in cuts], [[1, 2, 3], [5] * 11, [7] * 6])
    generator = torch.Generator().manual_seed(1)

    def step(counts: list[int]) -> None:
        tokens = torch.randint(256, (3, 3), generator=generator)
        new = None if min(counts) == 3 else torch.tensor(counts)
        expected, found = (e.verify([0, 1, 2], tokens, new).logits for e in (plain, compiled))
        for ours, theirs, count in zip(found, expected, counts, strict=True):
            torch.testing.assert_close(ours[:count], theirs[:count], rtol=1e-4, atol=1e-4)

    step([3, 3, 3])
    step([3, 3, 3])
    for engine in (plain, compiled):
        for sequence, tokens in enumerate(cuts):
            engine.store.rollback(sequence, tokens)
    step([3, 3, 3])
    step([3, 0, 2])
    for _ in range(more):
        step([3, 3, 3])
    assert compiled.store.lengths == plain.store.lengths
    assert compiled.compiled is not None and len(compiled.compiled._code) == 2


def test_compiled_verification_gives_the_same_logits() -> None:
    verified_alike("gqa", (0, 3, 1), more=1)


@pytest.mark.slow
def test_compiled_verification_is_right_under_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    verified_alike("mla", (0, 0, 0), more=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", COMPILED[1 - TODAY :: 2])
def test_compiled_verification_of_many_architectures_gives_the_same_logits(arch: str) -> None:
    # Past the window of `SCALE`, whose ring then wraps.
    verified_alike(arch, (2, 0, 3), more=10)


def test_padding_may_reach_beyond_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tables of rotary angles grow by doubling: this one ends where the context does.
    monkeypatch.setattr("kernels.rope.torch._TABLES", {})
    model = ModelSpec(arch="gqa", scale=ONE_LAYER).build(seed=3)
    options = {"max_sequences": 2, "max_context": 255, "page_size": 16}
    plain, compiled = Engine(model, **options), Engine(model, **options, compiled=True)
    tokens, new = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, 0])
    for engine in (plain, compiled):
        engine.prefill([engine.store.add(), engine.store.add()], [[1] * 253, [2] * 253])
        engine.extend_last([0, 1], tokens[:, :1])
    expected, found = (e.verify([0, 1], tokens, new).logits for e in (plain, compiled))
    for b, count in enumerate(new.tolist()):
        torch.testing.assert_close(found[b, :count], expected[b, :count], rtol=1e-4, atol=1e-4)


def test_states_in_any_slots_are_served_and_rows_that_lie_apart_are_refused() -> None:
    options = {"max_sequences": 3, "max_context": 64, "page_size": 8}
    for arch in ("gdn", "gqa"):
        model = ModelSpec(arch=arch, scale=ONE_LAYER).build(seed=3)
        plain, compiled = Engine(model, **options), Engine(model, **options, compiled=True)
        for engine in (plain, compiled):
            slots = [engine.store.add() for _ in range(3)]
            engine.prefill(slots, [[1, 2, 3], [4, 5, 6], [7, 8, 9]])
            engine.extend_last(slots, torch.tensor([[5]] * 3))
        before = [compiled.store.snapshot(s) for s in range(3)]
        allocated = compiled.store.allocated_bytes
        for picked in ([0, 2], [1, 0]):
            tokens = torch.tensor([[5], [6]])
            expected = plain.extend_last(picked, tokens)
            if arch == "gdn":
                torch.testing.assert_close(
                    compiled.extend_last(picked, tokens), expected, rtol=1e-4, atol=1e-4
                )
                continue
            with pytest.raises(UserError, match=r"lie apart.*compiled=False"):
                compiled.extend_last(picked, tokens)
            assert compiled.store.allocated_bytes == allocated
            for slot, layers in enumerate(before):
                for held, now in zip(layers, compiled.store.snapshot(slot), strict=True):
                    assert all(torch.equal(held[name], now[name]) for name in held)


def test_filling_the_last_row_compiles_nothing_anew() -> None:
    model = ModelSpec(arch="gqa", scale=ONE_LAYER).build(seed=3)
    engine = Engine(model, max_context=24, page_size=8, compiled=True)
    times = engine.generate([[1, 2, 3, 4]], 20).step_ms
    assert max(times[8:]) < 500


def test_weights_laid_out_anew_are_noticed() -> None:
    model = ModelSpec(arch="gqa", scale=ONE_LAYER).build(seed=3)
    compiled = Engine(model, max_context=24, compiled=True)
    Engine(model, max_sequences=8, max_context=24)
    with pytest.raises(UserError, match="open a new engine"):
        compiled.generate([[1, 2, 3]], 4)


@pytest.mark.slow
def test_two_compiled_models_take_turns() -> None:
    specs = [ModelSpec(arch=arch, scale=SCALE) for arch in ("gqa", "mqa", "gqa")]
    models = [spec.build(seed=seed) for seed, spec in enumerate(specs)]
    expected = [Engine(model, max_context=24).generate([[1, 2, 3]], 12).tokens for model in models]
    engines = [Engine(model, max_context=24, compiled=True) for model in models]
    for _ in range(2):
        found = [engine.generate([[1, 2, 3]], 12).tokens for engine in engines]
        assert found == expected
