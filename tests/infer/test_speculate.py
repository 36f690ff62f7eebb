"""Speculation gives the target's tokens (greedy) and its distribution (drawn), whatever drafts."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from archs.spec import RECURRENT_LIMIT
from infer import speculate
from infer.draft_length import Adaptive, DraftLength, Fixed, expected_tokens
from infer.drafts import Drafter, ModelDrafter, PromptLookup
from infer.head_drafts import HeadDrafter
from infer.pages import StoreFullError
from infer.sampling import NoTokenError, Sampler, Sampling
from infer.speculate import Speculation, Stream, generate
from tests.infer.speculating import (
    CPU,
    DRAFTERS,
    MOST,
    Cycling,
    double,
    engine_of,
    headed,
    lively,
    near,
    random_prompts,
)  # fmt: skip
from tests.infer.test_acceptance import VOCAB, chance
from tests.infer.test_machine import KINDS, SCALE, model_of


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_gives_the_targets_tokens(kind: str, drafter: str) -> None:
    model, prompts = double(kind), random_prompts(3, 31)
    plain = engine_of(model, lookback=0).generate(prompts, 40).tokens
    found = generate(engine_of(model), DRAFTERS[drafter](model, 3), prompts, 40, drafts=4)
    assert found.tokens == plain
    assert sum(sum(r.kept) for r in found.rounds) > 0 or drafter == "its first layer"
    # With a window of one row the next token depends on the last alone, and is soon known.
    assert found.acceptance < 1 or kind == "window 1"


@pytest.mark.parametrize("kind", ["state and window", "state and rows", "shared rows"])
def test_lengths_may_differ_within_a_batch(kind: str) -> None:
    model, prompts = double(kind), random_prompts(3, 31)
    plain = engine_of(model).generate(prompts, 50).tokens
    firsts = iter((0, 3, 7))
    drafter = ModelDrafter(engine_of(near(model)))
    found = generate(
        engine_of(model), drafter, prompts, 50, drafts=MOST, length=lambda: Cycling(next(firsts))
    )
    assert found.tokens == plain
    assert {d for r in found.rounds for d in r.drafted} == set(range(MOST + 1))


def test_drafts_of_unlike_numbers_are_made_in_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged steps are never replayed."""
    model, prompts = double("state and rows"), random_prompts(3, 31)
    plain = engine_of(model).generate(prompts, 50).tokens
    draft = engine_of(near(model))
    ragged: list[object] = []
    for name in ("verify", "extend_last"):
        step = getattr(draft, name)

        def watched(
            sequences: Sequence[int], tokens: Tensor, new: Tensor | None = None, *, step: Any = step
        ) -> Tensor:
            ragged.append(new)
            return step(sequences, tokens, new)

        monkeypatch.setattr(draft, name, watched)
    firsts, drafter = iter((0, 3, 7)), ModelDrafter(draft)
    # Prompts differ in length, and are read as they are.
    begin, begun = drafter.begin, []
    monkeypatch.setattr(drafter, "begin", lambda *a: (begin(*a), begun.append(len(ragged))))
    found = generate(
        engine_of(model), drafter, prompts, 50, drafts=MOST, length=lambda: Cycling(next(firsts))
    )
    assert found.tokens == plain
    assert len(ragged) > begun[0] and ragged[begun[0] :] == [None] * (len(ragged) - begun[0])


class Waking:
    """Nothing for longer than a recurrent step is, then drafts."""

    def __init__(self) -> None:
        self.rounds = 0

    def next(self) -> int:
        self.rounds += 1
        return 3 if self.rounds > 2 * RECURRENT_LIMIT else 0

    def saw(self, drafted: int, kept: int) -> None:
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_catches_up_after_rounds_without_drafts(kind: str) -> None:
    model, prompts = double(kind), random_prompts(2, 31)
    plain = engine_of(model).generate(prompts, 50).tokens
    found = generate(
        engine_of(model), ModelDrafter(engine_of(near(model))), prompts, 50, drafts=4, length=Waking
    )
    assert found.tokens == plain
    assert any(map(any, (r.drafted for r in found.rounds)))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*REGISTRY, *HYBRIDS])
def test_a_thousand_tokens_alone_and_in_ragged_batches(arch: str) -> None:
    # As few layers as the pattern has.
    scale = SCALE.with_options({"n_layers": 4 if arch in HYBRIDS else 2})
    model = ModelSpec(arch=arch, scale=scale, hidden=16).build(seed=7).eval()
    model = lively(model)
    prompts = random_prompts(3, 31)
    context = 1000 + max(map(len, prompts))
    plain = engine_of(model, context=context).generate(prompts, 1000).tokens
    lengths: dict[int, list[DraftLength]] = {1: [Cycling(0)], 3: [Cycling(0), Fixed(3), Fixed(8)]}
    drafters: dict[int, Drafter] = {
        1: PromptLookup(device=CPU), 3: ModelDrafter(engine_of(near(model, 0.03), context=context))
    }  # fmt: skip
    for count, drafter in drafters.items():
        turns = iter(lengths[count])
        found = generate(
            engine_of(model, sequences=count, context=context), drafter, prompts[:count], 1000,
            drafts=MOST, length=lambda turns=turns: next(turns),
        )  # fmt: skip
        assert found.tokens == plain[:count]


def test_the_batch_ends_sequence_by_sequence_and_at_the_stop_token() -> None:
    model, prompts = double("delta rule"), random_prompts(3, 31)
    plain = engine_of(model).generate(prompts, 40).tokens
    stop = plain[1][7]
    wanted = engine_of(model).generate(prompts, 40, stop=stop).tokens
    found = generate(engine_of(model), PromptLookup(device=CPU), prompts, 40, drafts=4, stop=stop)
    assert found.tokens == wanted
    target = engine_of(model)
    assert generate(target, PromptLookup(device=CPU), prompts, 1, drafts=4).tokens == [
        row[:1] for row in plain
    ]
    assert target.store.allocated_bytes == 0


def test_a_full_context_is_filled_to_its_last_token() -> None:
    model, prompts = double("state and window"), random_prompts(3, 31)
    most = 24 + max(map(len, prompts)) - 1
    plain = engine_of(model, context=most).generate(prompts, 24).tokens
    drafter = ModelDrafter(engine_of(near(model), context=most))
    assert generate(engine_of(model, context=most), drafter, prompts, 24, drafts=8).tokens == plain
    assert drafter.engine.store.allocated_bytes == 0


def test_forks_speculate_apart() -> None:
    model, prompt = double("state and rows"), random_prompts(2, 31)[1]
    for make in DRAFTERS.values():
        target, drafter = engine_of(model), make(model, 3)
        plain = engine_of(model).generate([prompt], 30).tokens[0]
        sampler, clock = Sampler(Sampling(), CPU), speculate.StepClock(CPU)
        sequence = target.store.add()
        drafter.begin([sequence], [prompt])
        first = int(sampler(target.prefill([sequence], [prompt], read=drafter.read)))
        drafter.settle([sequence], [0], [first])
        streams = [Stream(sequence, first, 29, Fixed(3), None)]
        made = [[first]]
        while any(s.room for s in streams):
            if len(made[0]) > 9 and len(streams) == 1:
                streams.append(speculate.fork(target, drafter, streams[0], None))
                made.append(list(made[0]))
            _, new = speculate.advance(target, drafter, streams, sampler, drafts=3, clock=clock)
            for tokens, more in zip(made, new, strict=True):
                tokens += more
        assert made == [plain, plain]


# -- drawn tokens ----------------------------------------------------------------------------------


def markov() -> Model:
    """A model whose next token depends on the last one alone: windows of one row."""
    scale = SCALE.with_options({"vocab_size": VOCAB})
    spec = ModelSpec(arch="swa", scale=scale, overrides={"swa": {"window": 1}}, hidden=16)
    return spec.build(seed=2).eval()


@pytest.mark.parametrize(
    ("temperature", "by_head"), [(0.4, False), (1.0, False), (2.0, False), (1.0, True)]
)
def test_whole_generations_have_the_targets_distribution(temperature: float, by_head: bool) -> None:
    model = markov()
    sampling = Sampling(temperature=temperature, top_p=0.95, seed=3)
    batch, tokens = 500, 201
    draft = headed(model) if by_head else near(model, 0.3)
    engine = engine_of(draft, sequences=batch, context=tokens + 8, page_size=8)
    drafter = (HeadDrafter if by_head else ModelDrafter)(engine, sampling)
    target = engine_of(model, sequences=batch, context=tokens + 8, page_size=8)
    found = generate(target, drafter, [[0]] * batch, tokens, drafts=4, sampling=sampling)
    assert 0.1 < found.acceptance < 0.99
    made = torch.tensor(found.tokens)
    before, after = made[:, :-1].flatten(), made[:, 1:].flatten()
    assert len(after) >= 100_000
    with torch.no_grad():
        logits = model(torch.arange(VOCAB)[:, None])[:, 0]
    exact = Sampler(sampling, CPU).probabilities(logits)
    for v in before.unique().tolist():
        assert chance(after[before == v], exact[v]) > 1e-5


def test_what_is_drawn_does_not_depend_on_company() -> None:
    model, prompts = double("delta rule"), random_prompts(3, 31)
    sampling = Sampling(temperature=1.0, seed=4)

    def drawn(own: list[list[int]]) -> Speculation:
        drafter = ModelDrafter(engine_of(near(model)), sampling)
        return generate(engine_of(model), drafter, own, 20, drafts=3, sampling=sampling)

    together = drawn(prompts).tokens
    assert together == [drawn([prompt]).tokens[0] for prompt in prompts]
    assert together == drawn(prompts).tokens


# -- figures, lengths, bad input -------------------------------------------------------------------


def test_figures_of_a_speculation() -> None:
    rounds = [speculate.Round((3, 2), (3, 0)), speculate.Round((3,), (1,))]
    found = Speculation([[0] * 7, [0] * 2], rounds, 5.0, draft_ms=[1.0, 2.0], verify_ms=[3.0, 4.0])
    assert found.tokens_per_verification == pytest.approx(7 / 3)
    assert found.acceptance == pytest.approx(4 / 6)
    assert [found.acceptance_at(i) for i in (1, 2, 3)] == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert found.tpot_ms == pytest.approx(10 * 2 / 7)


def test_the_last_draft_that_is_right_makes_one_more_token() -> None:
    model = double("rows")
    found = generate(
        engine_of(model), ModelDrafter(engine_of(model)), random_prompts(1, 31), 41, drafts=4
    )
    assert found.acceptance == 1
    assert found.tokens_per_verification == 5 == expected_tokens(1.0, 4)
    assert len(found.rounds) == 8


def test_an_adaptive_length_follows_what_is_accepted() -> None:
    length = Adaptive([1 + 0.1 * k for k in range(9)])
    for _ in range(20):
        length.saw(4, 4)
    assert length.next() == 8
    # A step of one more token that costs as much as two plain ones is never worth its tokens.
    assert replace(length, costs=[1, 1.1, 1.2, 4, 5]).next() == 2
    for _ in range(40):
        length.saw(4, 0)
    assert length.next() == 0
    for _ in range(16):
        length.saw(0, 0)
    assert length.next() == 1
    assert expected_tokens(0.5, 3) == pytest.approx((1 - 0.5**4) / (1 - 0.5))


def test_lookup_copies_what_followed_the_longest_match() -> None:
    lookup = PromptLookup(longest=3, shortest=2, device=CPU)
    lookup.begin([4, 9], [[1, 2, 3, 4, 5, 9, 2, 3], [7, 7, 7]])
    drafts = lookup.propose([4, 9], [3, 5], torch.empty(2, 5))
    assert drafts.counts == [3, 5]
    assert drafts.tokens.tolist() == [[4, 5, 9, 0, 0], [7, 7, 7, 7, 7]]
    lookup.settle([4, 9], [1, 0], [8, 1])
    assert lookup.propose([4, 9], [3, 3], torch.empty(2, 3)).counts == [0, 0]
    lookup.fork(4, 5)
    lookup.settle([5], [0], [2])
    lookup.settle([5], [0], [3])
    assert lookup.propose([5], [2], torch.empty(1, 2)).tokens.tolist() == [[4, 8]]


def test_bad_input_is_one_line() -> None:
    model, prompts = model_of("delta rule"), [[1, 2]]
    lookup = PromptLookup(device=CPU)
    with pytest.raises(UserError, match="drafts=9 need a target that takes 9 tokens back"):
        generate(engine_of(model, lookback=9), lookup, prompts, 4, drafts=9)
    with pytest.raises(UserError, match="takes back 2; open it with lookback=3"):
        generate(engine_of(model, lookback=2), lookup, prompts, 4, drafts=3)
    with pytest.raises(UserError, match="drafts=0 must be at least 1"):
        generate(engine_of(model), lookup, prompts, 4, drafts=0)
    other = ModelSpec(arch="gqa", scale=get_scale("nano")).build()
    with pytest.raises(UserError, match="vocabulary of 4096 tokens is not the target's of 31"):
        generate(engine_of(model), ModelDrafter(engine_of(other)), prompts, 4, drafts=3)
    short = ModelDrafter(engine_of(model, context=8))
    with pytest.raises(UserError, match="draft holds 8 tokens and the target's context reaches 11"):
        generate(engine_of(model), short, prompts, 10, drafts=3)
    with pytest.raises(UserError, match="cannot take a draft back"):
        ModelDrafter(engine_of(model, lookback=0))
    few = ModelDrafter(engine_of(model, lookback=2))
    with pytest.raises(UserError, match="more than the draft's engine takes back"):
        generate(engine_of(model), few, prompts, 4, drafts=3)
    with pytest.raises(UserError, match="top_k=-1"):
        Sampling(temperature=1.0, top_k=-1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_engines_speculate(fast_algorithms: None) -> None:
    model, prompts = double("rows"), random_prompts(2, 31)
    plain = engine_of(model).generate(prompts, 16).tokens
    target = engine_of(model, sequences=2, compiled=True)
    assert generate(target, PromptLookup(device=CPU), prompts, 16, drafts=3).tokens == plain
    assert ModelDrafter(engine_of(model, sequences=2, compiled=True)).stays
    drafters = [
        HeadDrafter(engine_of(headed(model), sequences=2, compiled=compiled))
        for compiled in (False, True)
    ]
    # The first sequence ends before the other, and stays in the batch.
    for stop in (None, plain[0][5]):
        asked: dict[str, Any] = {"drafts": 3, "stop": stop}
        expected = generate(engine_of(model), drafters[0], prompts, 16, **asked)
        found = generate(target, drafters[1], prompts, 16, **asked)
        assert found.tokens == expected.tokens and drafters[1].stays
        assert found.rounds == expected.rounds and found.acceptance > 0


def test_a_draft_without_room_for_the_batch_leaves_nothing_behind() -> None:
    model, prompts = model_of("rows"), random_prompts(3, 31)
    target, drafter = engine_of(model), ModelDrafter(engine_of(model, sequences=2))
    with pytest.raises(StoreFullError, match="all 2 sequences are in use"):
        generate(target, drafter, prompts, 4, drafts=2)
    assert drafter.engine.store.allocated_bytes == target.store.allocated_bytes == 0
    assert generate(target, drafter, prompts[:2], 4, drafts=2).tokens


def test_weights_that_are_not_finite_make_no_token() -> None:
    model = deepcopy(model_of("rows"))
    with torch.no_grad():
        model.embedding.weight[0] = float("nan")
    target = engine_of(model)
    with pytest.raises(NoTokenError):
        generate(target, PromptLookup(device=CPU), [[1, 2, 1]], 4, drafts=2)
    assert target.store.allocated_bytes == 0
