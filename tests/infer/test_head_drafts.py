"""A head drafts what recomputing from scratch gives, whatever was kept, failed or not read."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.heads import HeadModel
from infer import speculate
from infer.draft_length import Fixed
from infer.drafts import Drafts
from infer.engine import Engine
from infer.head_drafts import HeadDrafter
from infer.pages import StoreFullError
from infer.sampling import Sampler, Sampling
from infer.speculate import Stream, generate
from tests.infer.speculating import CPU, Cycling, double, engine_of, headed, random_prompts
from tests.infer.test_machine import KINDS


@torch.inference_mode()
def drafted_by(head: HeadModel, model: Model, told: list[int], count: int) -> list[int]:
    """What a head drafts after these tokens, all computed anew."""
    hidden = model.hidden_states(torch.tensor([told[:-1]]))
    tokens, found = told[1:], list[int]()
    for _ in range(count):
        states = head.hidden_states(torch.tensor([tokens]), hidden)
        found.append(int(head.logits(states[:, -1]).argmax()))
        tokens, hidden = [*tokens, found[-1]], torch.cat((hidden, states[:, -1:]), 1)
    return found


@pytest.mark.parametrize("context", [96, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_drafts_what_recomputing_gives(
    kind: str, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was kept, in rounds without drafts and up to the last token that fits."""
    model, prompts = double(kind), random_prompts(3, 31)
    head = headed(model)
    drafter = HeadDrafter(engine_of(head, context=context, lookback=5))
    told: dict[int, list[int]] = {}
    settle, propose, asked = drafter.settle, drafter.propose, []

    def settled(sequences: Sequence[int], kept: Sequence[int], tokens: Sequence[int]) -> None:
        for sequence, right, token in zip(sequences, kept, tokens, strict=True):
            known = told.setdefault(sequence, list(prompts[sequence]))
            known += [*drafter._pasts[sequence].drafted[:right], token]
        settle(sequences, kept, tokens)

    def proposed(sequences: Sequence[int], counts: Sequence[int], uniforms: Tensor) -> Drafts:
        drafts = propose(sequences, counts, uniforms)
        for sequence, count, row in zip(sequences, counts, drafts.tokens.tolist(), strict=True):
            assert row[:count] == drafted_by(head, model, told[sequence], count)
            asked.append(count)
        return drafts

    monkeypatch.setattr(drafter, "settle", settled)
    monkeypatch.setattr(drafter, "propose", proposed)
    firsts = iter((0, 3, 7))
    target = engine_of(model)
    target.prefill_chunk = 4
    found = generate(target, drafter, prompts, 48, drafts=5, length=lambda: Cycling(next(firsts)))
    assert found.tokens == engine_of(model).generate(prompts, 48).tokens
    assert set(asked) == set(range(6))


def test_a_round_that_failed_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the drafter's second step, after that which reads what was settled, and in the target."""
    model, (prompt,) = double("state and window"), random_prompts(2, 31)[1:]
    plain = engine_of(model).generate([prompt], 30).tokens[0]
    target, drafter = engine_of(model), HeadDrafter(engine_of(headed(model)))
    sampler, clock = Sampler(Sampling(), CPU), speculate.StepClock(CPU)
    sequence = target.store.add()
    drafter.begin([sequence], [prompt])
    first = int(sampler(target.prefill([sequence], [prompt], read=drafter.read)))
    drafter.settle([sequence], [0], [first])
    stream, made = Stream(sequence, first, 29, Fixed(3), None), [first]

    def fails_at(engine: Engine, call: int) -> None:
        whole, calls = engine.verify, list[int]()

        def failing(*given: Any, **more: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise StoreFullError("no page")
            return whole(*given, **more)

        with monkeypatch.context() as patch, pytest.raises(StoreFullError):
            patch.setattr(engine, "verify", failing)
            speculate.advance(target, drafter, [stream], sampler, drafts=3, clock=clock)

    while stream.room:
        fails_at(target, 1)
        if stream.room > 3:
            # What was settled has been read by now.
            fails_at(drafter.engine, 1)
        _, (new,) = speculate.advance(target, drafter, [stream], sampler, drafts=3, clock=clock)
        made += new
        if stream.room > 3:
            fails_at(drafter.engine, 2)
    assert made == plain


def test_a_prefill_that_is_not_read_is_told() -> None:
    model = double("rows")
    target, drafter = engine_of(model), HeadDrafter(engine_of(headed(model)))
    sequence = target.store.add()
    drafter.begin([sequence], [[1, 2]])
    target.prefill([sequence], [[1, 2]])
    drafter.settle([sequence], [0], [3])
    with pytest.raises(UserError, match="no hidden states of sequence 0; hand its `read` to"):
        drafter.propose([sequence], [2], torch.zeros(1, 2))


def test_a_head_needs_hidden_states_of_its_own_trunk() -> None:
    model = double("rows")
    engine = engine_of(headed(model), sequences=1)
    sequence, tokens = engine.store.add(), torch.tensor([[1, 2]])
    with pytest.raises(UserError, match=r"inputs got hidden states of shape none"):
        engine.verify([sequence], tokens)
    with pytest.raises(
        UserError, match=r"of \[1, 2, 64\] inputs got hidden states of shape \[1, 2, 9"
    ):
        engine.verify([sequence], tokens, hidden=torch.zeros(1, 2, 9))
    with pytest.raises(UserError, match="hidden states are read by heads alone"):
        plain = engine_of(model)
        plain.extend([plain.store.add()], tokens, None, torch.zeros(1, 2, 64))
    with pytest.raises(UserError, match="the draft's engine has lookback=0"):
        HeadDrafter(engine_of(headed(double("delta rule")), lookback=0))
