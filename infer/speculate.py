"""Speculative decoding: a drafter proposes tokens, the target verifies them in one step.

Greedy drafts are kept as long as they are what the target would have taken; drawn ones by rejection
sampling (arXiv 2211.17192, algorithm 1; arXiv 2302.01318), so the output has the target's own
distribution. Rejected tokens are rolled back, whatever the target remembers: rows, windows,
recurrent states. Free functions over engines: the scheduler of a server calls `advance` as
`generate` does.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backbone import Model
from archs.checks import require_at_least
from archs.errors import UserError
from archs.spec import RECURRENT_LIMIT
from archs.storage import rounds_values
from infer.acceptance import accepted, agreed
from infer.clock import StepClock
from infer.draft_length import DraftLength, Fixed
from infer.drafts import Drafter, Drafts
from infer.engine import Engine
from infer.sampling import Sampler, Sampling, require_tokens


class NotLosslessError(UserError):
    """Verification of several tokens at once would not give the tokens of decode."""


@dataclass(slots=True)
class Stream:
    """A sequence that is being speculated on.

    sequence: its number in the target's store. pending: its newest token, which no state holds yet.
    room: tokens that it may still get; 0: it has ended. random: its own numbers; None where the
    choice is greedy.
    """

    sequence: int
    pending: int
    room: int
    length: DraftLength
    random: torch.Generator | None


@dataclass(frozen=True, slots=True)
class Round:
    """One verification: drafts of each sequence, and how many of them were right."""

    drafted: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(slots=True)
class Speculation:
    """What one batch produced, in how many verifications.

    tokens: the new tokens of each sequence, the first of which came with the prompt. draft_ms,
    verify_ms: of each round. draft_state_bytes: the drafter's, at the end.
    """

    tokens: list[list[int]]
    rounds: list[Round]
    ttft_ms: float
    draft_ms: list[float] = field(default_factory=list)
    verify_ms: list[float] = field(default_factory=list)
    peak_state_bytes: int = 0
    draft_state_bytes: int = 0

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token of a sequence after the first, over the whole batch."""
        made = sum(len(tokens) - 1 for tokens in self.tokens)
        spent = sum(self.draft_ms) + sum(self.verify_ms)
        return spent * len(self.tokens) / made if made else float("nan")

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that a sequence got in a round, the target's own included."""
        made = [kept + 1 for r in self.rounds for kept in r.kept]
        return sum(made) / len(made) if made else float("nan")

    @property
    def acceptance(self) -> float:
        """Share of drafts that were right among those that no wrong one preceded."""
        kept = sum(k for r in self.rounds for k in r.kept)
        wrong = sum(k < d for r in self.rounds for d, k in zip(r.drafted, r.kept, strict=True))
        return kept / (kept + wrong) if kept + wrong else float("nan")

    def acceptance_at(self, position: int) -> float:
        """Share of the drafts at a position, from 1, that were right, all before them included."""
        asked = [
            kept >= position
            for r in self.rounds
            for drafted, kept in zip(r.drafted, r.kept, strict=True)
            if drafted >= position
        ]
        return sum(asked) / len(asked) if asked else float("nan")


def generate(
    target: Engine,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    drafts: int,
    length: Callable[[], DraftLength] | None = None,
    sampling: Sampling | None = None,
    stop: int | None = None,
) -> Speculation:
    """As `Engine.generate`, several tokens a step where drafts are right.

    drafts: K, the most that are verified at once. length: how many each sequence drafts (None:
    always K). Raises UserError where the target cannot take K tokens back, where the drafter's
    vocabulary or context does not fit, and as `Engine.generate`.
    """
    require_at_least("max_new_tokens", max_new_tokens, 1)
    sampling = sampling or Sampling()
    require_fit(target, drafter, drafts, max(map(len, prompts), default=0) + max_new_tokens - 1)
    sampler = Sampler(sampling, target.device, backend=target.backend)
    randoms = [None] * len(prompts) if sampling.greedy else sampler.streams(prompts)
    out: list[list[int]] = []
    rounds: list[Round] = []
    clock = StepClock(target.device)
    with target.store.sequences(len(prompts)) as sequences:
        begun = list(sequences)
        clock.mark()
        drafter.begin(begun, prompts)
        try:
            first = _first(target, drafter, sampler, begun, prompts, randoms)
            clock.mark()
            streams: list[Stream] = []
            for sequence, token, random in zip(begun, first, randoms, strict=True):
                chosen = Fixed(drafts) if length is None else length()
                room = 0 if token == stop else max_new_tokens - 1
                streams.append(Stream(sequence, token, room, chosen, random))
                out.append([token])
            drafter.settle(begun, [0] * len(begun), first)
            made = dict(zip(begun, out, strict=True))
            # Compiled steps take sequences that lie side by side: who has ended stays, unread.
            stays = target.compiled is not None or drafter.stays
            while any(s.room for s in streams):
                streams = streams if stays else [s for s in streams if s.room]
                found, new = advance(target, drafter, streams, sampler, drafts=drafts, clock=clock)
                rounds.append(found)
                require_tokens([tokens[-1] for tokens in new if tokens])
                for stream, tokens in zip(streams, new, strict=True):
                    if stop in tokens:
                        tokens = tokens[: tokens.index(stop) + 1]
                        stream.room = 0
                    made[stream.sequence] += tokens
            draft_state_bytes = drafter.state_bytes
        finally:
            for sequence in begun:
                drafter.release(sequence)
    ttft_ms, *spans = clock.spans_ms()
    return Speculation(
        out, rounds, ttft_ms, spans[::2], spans[1::2], target.store.peak_bytes, draft_state_bytes
    )


def require_fit(target: Engine, drafter: Drafter, drafts: int, context: int) -> None:
    """Raise UserError unless the drafter can draft for the target, K tokens up to a context.

    Raises NotLosslessError for a target that rounds what it remembers at the end of every step.
    """
    require_at_least("drafts", drafts, 1)
    require_lossless(target.model)
    vocab_size = target.model.vocab_size
    if drafter.vocab_size not in (None, vocab_size):
        raise UserError(
            f"the draft's vocabulary of {drafter.vocab_size} tokens is not the target's of "
            f"{vocab_size}; take a draft with the target's tokenizer"
        )
    reach = target.store.reach(drafts + 1)
    if drafts > reach:
        raise UserError(
            f"drafts={drafts} need a target that takes {drafts} tokens back after a step of "
            f"{drafts + 1}, and this one takes back {reach}; open it with lookback={drafts} "
            f"({RECURRENT_LIMIT - 1} at most where it has windows or recurrent state)"
        )
    if drafts > drafter.most_drafts:
        raise UserError(
            f"drafts={drafts} are more than the draft's engine takes back "
            f"({drafter.most_drafts}); open it with lookback={drafts}"
        )
    if context > drafter.max_context:
        raise UserError(
            f"the draft holds {drafter.max_context} tokens and the target's context reaches "
            f"{context}; open the draft's engine with max_context={context} or more"
        )


def require_lossless(target: Model) -> None:
    """Raise NotLosslessError for a model that rounds what it remembers at the end of every step."""
    if rounds_values(target):
        raise NotLosslessError(
            f"state format '{target.state_format}' is rounded at the end of every step, and a "
            "verification is one step: speculation would give other tokens than decode; keep "
            "recurrent states as they are computed (kv formats may stay)"
        )


def advance(
    target: Engine, drafter: Drafter, streams: Sequence[Stream], sampler: Sampler, *, drafts: int,
    clock: StepClock,
) -> tuple[Round, list[list[int]]]:  # fmt: skip
    """One round: draft, verify, keep, roll back. Returns what came of it and the new tokens.

    drafts: K, the most for a sequence. Streams without room take part unread; the last token of one
    whose logits do not decide it is `NO_TOKEN`. Raises as `Engine.verify`.
    """
    sequences = [s.sequence for s in streams]
    counts = [min(drafts, s.length.next(), s.room - 1) if s.room else 0 for s in streams]
    uniforms = torch.stack([_numbers(s.random, drafts) for s in streams]).to(target.device)
    if any(counts):
        proposed = drafter.propose(sequences, counts, uniforms[:, 1 : 1 + max(counts)])
    else:
        proposed = Drafts(torch.empty(len(streams), 0, dtype=torch.int64), counts)
    clock.mark()
    counts, width = proposed.counts, max(proposed.counts)
    if width and (target.compiled is not None or target.graphed is not None):
        # One code and one graph for all rounds, instead of one for each length.
        width = drafts
    given = F.pad(proposed.tokens, (0, width - proposed.tokens.shape[1])).to(target.device)
    pending = torch.tensor([[s.pending] for s in streams], device=target.device)
    # A whole step can be replayed, so what is drafted less is padded, and forgotten afterwards.
    longest = max(target.store.lengths[s] for s in sequences) + width + 1
    whole = longest <= target.store.max_context and all(s.room for s in streams)
    fed = [width + 1 if whole else n + 1 for n in counts]
    fed = [n if s.room else 0 for s, n in zip(streams, fed, strict=True)]
    new = None if whole else torch.tensor(fed)
    logits, hidden = target.verify(sequences, torch.cat((pending, given), 1), new)
    if drafter.read is not None:
        drafter.read(sequences, hidden, fed)
    if sampler.sampling.greedy:
        kept, last = agreed(sampler, logits, given, counts)
    else:
        kept, last = accepted(
            sampler, logits, given, counts, proposed.probabilities, uniforms[:, 1 + drafts :],
            uniforms[:, 0].contiguous(),
        )  # fmt: skip
    live = [i for i, s in enumerate(streams) if s.room]
    rows = given.tolist()
    made: list[list[int]] = [[] for _ in streams]
    for i in live:
        stream = streams[i]
        target.store.rollback(stream.sequence, fed[i] - 1 - kept[i])
        stream.length.saw(counts[i], kept[i])
        stream.pending = last[i]
        stream.room -= kept[i] + 1
        made[i] = [*rows[i][: kept[i]], last[i]]
    # A sequence that has ended and stays takes back what was drafted beside the others'.
    drafter.settle(sequences, [len(m[:-1]) for m in made], [s.pending for s in streams])
    clock.mark()
    return Round(tuple(counts[i] for i in live), tuple(kept[i] for i in live)), made


def fork(
    target: Engine, drafter: Drafter, stream: Stream, random: torch.Generator | None
) -> Stream:
    """A second sequence with the same past and numbers of its own. Raises StoreFullError."""
    child = target.store.fork(stream.sequence)
    try:
        drafter.fork(stream.sequence, child)
    except BaseException:
        target.store.release(child)
        raise
    return Stream(child, stream.pending, stream.room, copy(stream.length), random)


def _first(
    target: Engine, drafter: Drafter, sampler: Sampler, sequences: Sequence[int],
    prompts: Sequence[Sequence[int]], randoms: Sequence[torch.Generator | None],
) -> list[int]:  # fmt: skip
    logits = target.prefill(sequences, prompts, read=drafter.read)
    uniforms = None
    if not sampler.sampling.greedy:
        uniforms = torch.cat([torch.rand(1, generator=r) for r in randoms]).to(target.device)
    first = sampler(logits, uniforms).tolist()
    require_tokens(first)
    return first


def _numbers(random: torch.Generator | None, drafts: int) -> Tensor:
    """A round's numbers of one sequence [2K + 1]: for the target's own token, for the drafts, and
    whether each is kept. A sequence draws as many whatever happens.
    """
    size = 2 * drafts + 1
    return torch.zeros(size) if random is None else torch.rand(size, generator=random)
