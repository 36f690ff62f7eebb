"""The decode engine: the same tokens however the batch is made up."""

import math
from typing import Any

import pytest
import torch

from archs.backbone import cast
from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from eval.proof.conformance import CHECK_SCALE
from infer.engine import Engine, Generation
from infer.sampling import NoTokenError, Sampler, Sampling

ARCHS = [*REGISTRY, *HYBRIDS]


def engine_for(arch: str, **options: int) -> Engine:
    return Engine(ModelSpec(arch=arch, scale=CHECK_SCALE).build(seed=3), **options)


PROMPTS = [[5, 9, 200, 31, 7], [1], list(range(40, 60))]


@pytest.mark.parametrize("arch", ARCHS)
def test_generate_batched_equals_alone_and_without_state(arch: str) -> None:
    engine = engine_for(arch, max_sequences=3, max_context=64, page_size=8)
    batched = engine.generate(PROMPTS, 12).tokens
    for prompt, tokens in zip(PROMPTS, batched, strict=True):
        assert engine.generate([prompt], 12).tokens[0] == tokens
        assert engine.generate_without_state([prompt], 12).tokens[0] == tokens


def test_generate_leaves_nothing_behind_and_counts_its_steps() -> None:
    engine = engine_for("gqa", max_sequences=3, max_context=64, page_size=8)
    result = engine.generate(PROMPTS, 7)
    assert engine.store.allocated_bytes == 0
    assert len(result.step_ms) == 6
    assert result.ttft_ms > 0
    assert result.peak_state_bytes >= engine.store.declared_bytes(26)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_float64_model_keeps_its_state_in_float64(arch: str) -> None:
    model = cast(ModelSpec(arch=arch, scale=CHECK_SCALE).build(seed=3), torch.float64)
    engine = Engine(model, max_context=64, page_size=5)
    slot = engine.store.add()
    tokens = torch.randint(256, (1, 37), generator=torch.Generator().manual_seed(1))
    pieces = [engine.extend([slot], piece) for piece in tokens.split([19, 1, 1, 12, 4], 1)]
    held = [t for layer in engine.store.snapshot(slot) for t in layer.values()]
    assert {t.dtype for t in held} == {torch.float64}
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=0, atol=1e-6)


def test_a_chunked_prefill_gives_the_same_tokens() -> None:
    whole = engine_for("swa", max_sequences=3, max_context=64)
    pieces = engine_for("swa", max_sequences=3, max_context=64, prefill_chunk=7)
    assert whole.generate(PROMPTS, 6).tokens == pieces.generate(PROMPTS, 6).tokens


def test_sequences_stop_on_their_own() -> None:
    engine = engine_for("gqa", max_sequences=3, max_context=64)
    free = engine.generate(PROMPTS, 10).tokens
    stop = free[2][4]
    for got, all_tokens in zip(engine.generate(PROMPTS, 10, stop=stop).tokens, free, strict=True):
        expected = all_tokens
        if stop in all_tokens:
            expected = all_tokens[: all_tokens.index(stop) + 1]
        assert got == expected
    assert engine.store.allocated_bytes == 0


def test_throughput_counts_what_was_made() -> None:
    """Two sequences, of which one ends after its second token: four tokens in three steps."""
    made = Generation([[5, 0], [5, 6, 7, 8]], ttft_ms=9.0, step_ms=[2.0, 1.0, 1.0])
    assert made.output_tok_per_s == pytest.approx(1e3 * 4 / 4)
    assert made.tpot_ms == pytest.approx(4 / 3)
    assert math.isnan(Generation([[5]], ttft_ms=9.0).output_tok_per_s)


def test_sampling_is_repeatable_and_follows_its_distribution() -> None:
    sampling = Sampling(temperature=0.7, top_p=0.8, seed=4)
    logits = torch.randn(1, 50)
    sampler = Sampler(sampling, torch.device("cpu"))
    p = sampler.probabilities(logits)[0]
    uniforms = sampler.uniforms([[1, 2]], 20_000)
    assert uniforms is not None and torch.equal(uniforms, sampler.uniforms([[1, 2]], 20_000))
    draws = sampler(logits.expand(20_000, -1), uniforms[:, 0])
    counts = torch.bincount(draws, minlength=50) / 20_000
    assert (counts - p).abs().max() < 0.02
    assert not counts[p == 0].any()
    full = (logits / 0.7).softmax(-1)[0].sort(descending=True).values
    kept = int((p > 0).sum())
    assert full[:kept].sum() >= 0.8 > full[: kept - 1].sum()


def test_what_is_sampled_depends_on_no_company() -> None:
    sampling = Sampling(temperature=1.0, top_p=0.95, seed=3)
    engine = engine_for("gqa", max_sequences=4, max_context=32)
    one, two, three = [5, 6, 7], [8, 9], [10, 11, 12, 13]

    def of(*prompts: list[int], **how: Any) -> list[list[int]]:
        return engine.generate(list(prompts), 8, sampling, **how).tokens

    alone = {tuple(p): of(p)[0] for p in (one, two, three)}
    assert of(three, one, two) == [alone[tuple(p)] for p in (three, one, two)]
    first, other, again = of(two, one, two)
    assert (first, other) == (alone[tuple(two)], alone[tuple(one)])
    assert again != first, "equal prompts get samples of their own"
    stop = alone[tuple(two)][2]
    shortened = of(two, one, stop=stop)[1]
    free = alone[tuple(one)]
    assert shortened == (free[: free.index(stop) + 1] if stop in free else free)


@pytest.mark.parametrize("watch", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9)], ids=str)
def test_logits_that_decide_no_token_are_an_error(sampling: Sampling, watch: bool) -> None:
    engine = engine_for("gqa", max_context=32)
    with torch.no_grad():
        engine.model.norm.weight.fill_(torch.nan)
    seen: list[int] = []
    with pytest.raises(NoTokenError, match="sequence 0 are NaN or infinite"):
        engine.generate([[1, 2]], 4, sampling, on_token=seen.append if watch else None)
    with pytest.raises(NoTokenError, match="sequence 0 are NaN"):
        engine.generate_without_state([[1, 2]], 4)
    assert seen == [] and engine.store.allocated_bytes == 0


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf},
     {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": math.nan}],
)  # fmt: skip
def test_sampling_rejects_impossible_values(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be"):
        Sampling(**bad)


def test_bad_prompts_and_lengths_are_refused() -> None:
    engine = engine_for("gqa", max_context=16)
    with pytest.raises(UserError, match="prompt is empty"):
        engine.generate([[]], 4)
    with pytest.raises(UserError, match="max_new_tokens=0"):
        engine.generate([[1]], 0)
    with pytest.raises(UserError, match="exceeds max_context=16"):
        engine.generate([[1] * 20], 4)
    assert engine.store.allocated_bytes == 0
    with pytest.raises(UserError, match="one length"):
        engine.generate_without_state([[1], [1, 2]], 4)


@pytest.mark.parametrize("page_size", [1, 2, 5])
@pytest.mark.parametrize(("window", "sinks"), [(2, 1), (4, 3), (3, 6), (5, 0)])
def test_a_short_sequence_beside_a_long_one_sees_what_it_sees_alone(
    window: int, sinks: int, page_size: int
) -> None:
    overrides = {"swa": {"window": window, "sinks": sinks}}
    model = ModelSpec(arch="swa", scale=CHECK_SCALE, overrides=overrides).build(seed=3)
    options = {"max_context": 64, "page_size": page_size}
    tokens = torch.randint(256, (2, 40 + 12), generator=torch.Generator().manual_seed(1))
    together, alone = Engine(model, max_sequences=2, **options), Engine(model, **options)
    slots = [together.store.add(), together.store.add()]
    together.extend(slots[:1], tokens[:1, :40])
    short = alone.store.add()
    for at in range(12):
        fed = torch.stack((tokens[0, 40 + at], tokens[1, at]))[:, None]
        beside = together.extend_last(slots, fed)[1]
        torch.testing.assert_close(beside, alone.extend_last([short], fed[1:])[0])
