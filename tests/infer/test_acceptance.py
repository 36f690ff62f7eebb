"""Rejection sampling keeps the target's distribution; a wrong rule does not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from infer.acceptance import accepted
from infer.sampling import Sampler, Sampling

CPU = torch.device("cpu")

VOCAB = 6


def chains() -> tuple[Tensor, Tensor]:
    """Logits of the next token by the last one, of a target and of a draft: [V, V] each."""
    generator = torch.Generator().manual_seed(3)
    target = 1.5 * torch.randn(VOCAB, VOCAB, generator=generator)
    return target, target + torch.randn(VOCAB, VOCAB, generator=generator)


def chance(tokens: Tensor, expected: Tensor) -> float:
    """The p-value of counts under a distribution (χ²); 0 where it excludes one of them."""
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    wanted = expected * len(tokens)
    possible = wanted > 0
    if (counts[~possible] > 0).any():
        return 0.0
    freedom = int(possible.sum()) - 1
    if freedom == 0:
        return 1.0
    statistic = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    half = torch.tensor(freedom / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


SAMPLINGS = [
    Sampling(temperature=0.5), Sampling(temperature=1.0), Sampling(temperature=1.7),
    Sampling(temperature=1.0, top_p=0.8), Sampling(temperature=1.3, top_k=3),
    Sampling(temperature=1.3, top_k=4, top_p=0.9),
]  # fmt: skip
NAMES = [f"t{s.temperature} p{s.top_p} k{s.top_k}" for s in SAMPLINGS]


def least_chance(sampling: Sampling, rule: Callable[..., object], certain: bool) -> float:
    """The smallest `chance` of the first two tokens over 120,000 rounds, by the token before."""
    target, draft = chains()
    sampler, count, drafts = Sampler(sampling, CPU), 120_000, 3
    generator = torch.Generator().manual_seed(11)
    last = torch.randint(VOCAB, (count,), generator=generator)
    tokens, from_rows = [last], []
    for _ in range(drafts):
        q = sampler.probabilities(draft[tokens[-1]])
        if certain:
            q = torch.zeros_like(q).scatter_(1, q.argmax(1, keepdim=True), 1.0)
        from_rows.append(q)
        tokens.append(torch.multinomial(q, 1, generator=generator).squeeze(1))
    logits, drafted = target[torch.stack(tokens, 1)], torch.stack(tokens[1:], 1)
    numbers = torch.rand(count, drafts + 1, generator=generator)
    found = rule(
        sampler, logits, drafted, [drafts] * count,
        None if certain else torch.stack(from_rows, 1), numbers[:, 1:], numbers[:, 0].contiguous(),
    )  # fmt: skip
    kept, end = (torch.tensor(part) for part in found)  # type: ignore[attr-defined]
    first = torch.where(kept > 0, drafted[:, 0], end)
    second = torch.where(kept > 1, drafted[:, 1], end)
    exact = sampler.probabilities(target)
    chances = [chance(first[last == v], exact[v]) for v in range(VOCAB)]
    chances += [
        chance(second[(kept > 0) & (first == v)], exact[v])
        for v in range(VOCAB) if int(((kept > 0) & (first == v)).sum()) > 200
    ]  # fmt: skip
    return min(chances)


@pytest.mark.parametrize("certain", [False, True], ids=["drawn drafts", "certain drafts"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
def test_drawn_tokens_have_the_targets_distribution(sampling: Sampling, certain: bool) -> None:
    assert least_chance(sampling, accepted, certain) > 1e-5


def keeps_all(sampler: Sampler, logits: Tensor, drafts: Tensor, counts: list[int], *more: Tensor):  # type: ignore[no-untyped-def]
    last = sampler(logits[:, -1], more[-1])
    return counts, last.tolist()


def draws_from_p(*given: object):  # type: ignore[no-untyped-def]
    """The rule with p in place of max(p - q, 0)."""
    sampler, logits, *_, uniform = given
    kept, _ = accepted(*given)  # type: ignore[arg-type]
    rows = torch.arange(len(kept))
    last = sampler(logits[rows, torch.tensor(kept)], uniform)  # type: ignore[operator, index]
    return kept, last.tolist()


@pytest.mark.parametrize("rule", [keeps_all, draws_from_p])
def test_wrong_rules_are_seen(rule: Callable[..., object]) -> None:
    for certain in (False, True):
        assert least_chance(Sampling(temperature=1.0), rule, certain) < 1e-20
