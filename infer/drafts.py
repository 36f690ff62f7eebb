"""Drafters: what proposes the tokens that a target model verifies (`infer.speculate`).

A drafter knows the target's sequences by their numbers in its store. `begin` tells it a prompt,
`propose` asks for drafts, `settle` says how many of them were right and which token came next.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from archs.checks import require_at_least
from archs.errors import UserError
from infer.engine import Engine, Reader
from infer.sampling import Sampler, Sampling, require_tokens


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafted tokens of a batch.

    tokens: int64 [B, K], 0 past a sequence's count. counts: drafts of each sequence.
    probabilities: float64 [B, K, V], which each was drawn from; None: none was drawn, each was
    certain to be proposed.
    """

    tokens: Tensor
    counts: list[int]
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """Proposes tokens for the sequences of a target."""

    #: Tokens that it can draft at once, tokens of its longest sequence, and the vocabulary that it
    #: drafts from (None: any).
    most_drafts: int
    max_context: int
    vocab_size: int | None
    #: Whether its batches must keep all sequences that they began with (compiled steps).
    stays: bool
    #: Gets the target's hidden states, of prompts and of every verification; None: not needed.
    read: Reader | None

    def begin(self, sequences: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """New sequences of the target, with their prompts."""
        ...

    def propose(self, sequences: Sequence[int], counts: Sequence[int], uniforms: Tensor) -> Drafts:
        """At most `counts` drafts for each sequence; uniforms: float32 [B, max(counts)].

        All of them are settled before the next proposal.
        """
        ...

    def settle(self, sequences: Sequence[int], kept: Sequence[int], tokens: Sequence[int]) -> None:
        """Of the last drafts `kept` were right, and `tokens` followed them."""
        ...

    def fork(self, sequence: int, child: int) -> None:
        """`child` has the past of `sequence`."""
        ...

    def release(self, sequence: int) -> None:
        """Forget a sequence."""
        ...

    @property
    def state_bytes(self) -> int:
        """Bytes of state that it holds beside the target's."""
        ...


class EngineDrafter:
    """What drafters share that run an engine: greedy or drawn, token by token.

    Raises UserError where the engine cannot take drafts back.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        self.engine = engine
        self.most_drafts = engine.store.reach(1)
        self.max_context = engine.store.max_context
        self.vocab_size: int | None = engine.model.vocab_size
        self.stays = engine.compiled is not None
        self.read: Reader | None = None
        if self.most_drafts < 1:
            raise UserError(
                f"the draft's engine has lookback={engine.store.lookback} and cannot take a draft "
                "back; open it with lookback=K for K drafts"
            )
        self._sampler = Sampler(sampling or Sampling(), engine.device, backend=engine.backend)

    def _draw(
        self, width: int, uniforms: Tensor, logits_of: Callable[[int, Tensor | None], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens int64 [B, width], -1 where there is none, and what they were drawn from, float64
        [B, width, V]; None where they are greedy.

        logits_of: [B, V] of the drafts at an index, from the last ones [B]; None before the first.
        """
        tokens: list[Tensor] = []
        drawn: list[Tensor] = []
        for i in range(width):
            logits = logits_of(i, tokens[-1].clamp(min=0) if tokens else None)
            if self._sampler.sampling.greedy:
                tokens.append(self._sampler(logits))
            else:
                drawn.append(self._sampler.probabilities(logits))
                tokens.append(self._sampler(logits, uniforms[:, i].contiguous()))
        return torch.stack(tokens, 1), torch.stack(drawn, 1) if drawn else None

    @property
    def state_bytes(self) -> int:
        """As `Drafter.state_bytes`."""
        return self.engine.store.allocated_bytes


class ModelDrafter(EngineDrafter):
    """A smaller model of the same vocabulary drafts token by token.

    Its state lacks the last two tokens of a sequence (the newest draft that was right, and what the
    target made of it), so that every proposal begins with the same two, whatever was kept.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        self._own: dict[int, int] = {}
        self._unread: dict[int, list[int]] = {}
        self._drafted: dict[int, list[int]] = {}

    def begin(self, sequences: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """As `Drafter.begin`, all or none. Raises as `Engine.prefill`, and StoreFullError."""
        begun: list[int] = []
        try:
            for sequence, prompt in zip(sequences, prompts, strict=True):
                self._own[sequence] = self.engine.store.add()
                self._unread[sequence] = [prompt[-1]]
                begun.append(sequence)
            long = [(s, p[:-1]) for s, p in zip(sequences, prompts, strict=True) if len(p) > 1]
            if long:
                self.engine.prefill([self._own[s] for s, _ in long], [p for _, p in long])
        except BaseException:
            for sequence in begun:
                self.release(sequence)
            raise

    def propose(self, sequences: Sequence[int], counts: Sequence[int], uniforms: Tensor) -> Drafts:
        """As `Drafter.propose`, by the draft's own distribution. Raises NoTokenError."""
        self._catch_up(sequences)
        width = max(counts)
        own = [self._own[s] for s in sequences]
        ends = [
            self.engine.store.lengths[o] + len(self._unread[s]) + width - 1
            for o, s in zip(own, sequences, strict=True)
        ]
        # A whole step can be replayed: who needs fewer drafts gets as many, and forgets them.
        read = [width] * len(own) if max(ends) <= self.max_context else list(counts)
        found, drawn = self._draw(
            width, uniforms, lambda index, last: self._logits(sequences, read, index, last)
        )
        rows = found.tolist()
        for sequence, count, fed, row in zip(sequences, counts, read, rows, strict=True):
            require_tokens(row[:count])
            self._drafted[sequence] = row[:fed]
        return Drafts(found.clamp(min=0), list(counts), drawn)

    def _catch_up(self, sequences: Sequence[int]) -> None:
        """Read what rounds without drafts left unread, but for the last two tokens."""
        late = [s for s in sequences if len(self._unread[s]) > 2]
        if late:
            self.engine.prefill([self._own[s] for s in late], [self._unread[s][:-2] for s in late])
        for sequence in late:
            self._unread[sequence] = self._unread[sequence][-2:]

    def _logits(
        self, sequences: Sequence[int], counts: Sequence[int], index: int, last: Tensor | None
    ) -> Tensor:
        """Logits [B, V] of draft `index`, after `last` [B] or what the state lacks.

        Sequences that need no such draft take part without a token.
        """
        own = [self._own[s] for s in sequences]
        if last is None:
            fed = [self._unread[s] if c else [] for s, c in zip(sequences, counts, strict=True)]
            new = [len(tokens) for tokens in fed]
            rows = [[*tokens, *[0] * (max(new) - len(tokens))] for tokens in fed]
            given = torch.tensor(rows, device=self.engine.device)
        else:
            new = [int(count > index) for count in counts]
            given = last[:, None]
        width = given.shape[1]
        valid = None if min(new) == width else torch.tensor(new)
        if width == 1:
            return self.engine.extend_last(own, given, valid)
        logits = self.engine.verify(own, given, valid).logits
        if valid is None:
            return logits[:, -1]
        ends = (valid - 1).clamp(min=0).to(logits.device)
        return logits[torch.arange(len(own), device=logits.device), ends]

    def settle(self, sequences: Sequence[int], kept: Sequence[int], tokens: Sequence[int]) -> None:
        """As `Drafter.settle`."""
        for sequence, right, token in zip(sequences, kept, tokens, strict=True):
            drafted = self._drafted.pop(sequence, [])
            unread = self._unread[sequence]
            if drafted:
                # Read are what it lacked and all drafts but the last.
                self.engine.store.rollback(self._own[sequence], len(drafted) - right)
                unread = [drafted[right - 1] if right else unread[-1]]
            self._unread[sequence] = [*unread, token]

    def fork(self, sequence: int, child: int) -> None:
        """As `Drafter.fork`."""
        self._own[child] = self.engine.store.fork(self._own[sequence])
        self._unread[child] = list(self._unread[sequence])

    def release(self, sequence: int) -> None:
        """As `Drafter.release`."""
        self.engine.store.release(self._own.pop(sequence))
        del self._unread[sequence]
        self._drafted.pop(sequence, None)


@dataclass(slots=True)
class _Past:
    """A sequence's tokens, and where each n-gram of them last ended, its own end apart."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


class PromptLookup:
    """Drafts what followed the last tokens when they last stood in the context.

    The longest n-gram of `longest` to `shortest` tokens that occurs earlier decides (prompt lookup
    decoding; Saxena 2023). No model, no state on the device; nothing is drafted where nothing
    matches.
    """

    def __init__(self, *, longest: int = 3, shortest: int = 1, device: torch.device) -> None:
        require_at_least("shortest", shortest, 1)
        require_at_least("longest", longest, shortest)
        self.longest, self.shortest, self.device = longest, shortest, device
        self.most_drafts = self.max_context = 1 << 30
        self.vocab_size: int | None = None
        self.stays = False
        self.read: Reader | None = None
        self._pasts: dict[int, _Past] = {}
        self._drafted: dict[int, list[int]] = {}

    def begin(self, sequences: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """As `Drafter.begin`."""
        for sequence, prompt in zip(sequences, prompts, strict=True):
            self._pasts[sequence] = _Past()
            self._read(sequence, prompt)

    def propose(self, sequences: Sequence[int], counts: Sequence[int], uniforms: Tensor) -> Drafts:
        """As `Drafter.propose`."""
        found = [self._match(s, count) for s, count in zip(sequences, counts, strict=True)]
        self._drafted.update(zip(sequences, found, strict=True))
        width = max(map(len, found))
        rows = [[*tokens, *[0] * (width - len(tokens))] for tokens in found]
        tokens = torch.tensor(rows, dtype=torch.int64, device=self.device)
        return Drafts(tokens.view(len(rows), width), [len(tokens) for tokens in found])

    def settle(self, sequences: Sequence[int], kept: Sequence[int], tokens: Sequence[int]) -> None:
        """As `Drafter.settle`."""
        for sequence, right, token in zip(sequences, kept, tokens, strict=True):
            self._read(sequence, [*self._drafted.pop(sequence, [])[:right], token])

    def fork(self, sequence: int, child: int) -> None:
        """As `Drafter.fork`."""
        past = self._pasts[sequence]
        self._pasts[child] = _Past(list(past.tokens), dict(past.ends))

    def release(self, sequence: int) -> None:
        """As `Drafter.release`."""
        del self._pasts[sequence]
        self._drafted.pop(sequence, None)

    @property
    def state_bytes(self) -> int:
        """As `Drafter.state_bytes`."""
        return 0

    def _read(self, sequence: int, tokens: Sequence[int]) -> None:
        past = self._pasts[sequence]
        for token in tokens:
            end = len(past.tokens)
            for n in range(self.shortest, min(self.longest, end) + 1):
                past.ends[tuple(past.tokens[end - n :])] = end
            past.tokens.append(token)

    def _match(self, sequence: int, count: int) -> list[int]:
        """What followed the longest match; a copy that reaches the end goes on with itself."""
        past = self._pasts[sequence]
        for n in range(min(self.longest, len(past.tokens)), self.shortest - 1, -1):
            end = past.ends.get(tuple(past.tokens[-n:]))
            if end is not None:
                period = len(past.tokens) - end
                return [past.tokens[end + i % period] for i in range(count)]
        return []
