"""A trained head of the target drafts for it: one layer over the target's own hidden states.

The head has rows or state of its own, one for each position whose next token is known
(`archs.heads`). A proposal first reads what the last verification settled, with the target's hidden
states, which gives the first draft; each further one reads the draft before it with the head's own
hidden state, and is forgotten: the target's are read in their place in the next round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from archs.backbone import Output
from archs.errors import UserError
from archs.spec import RECURRENT_LIMIT
from infer.drafts import Drafts, EngineDrafter
from infer.engine import Engine
from infer.sampling import Sampling, require_tokens


@dataclass(slots=True)
class _Past:
    """What the head knows of a target's sequence.

    own: its number in the head's store. prompt: tokens whose predecessors' hidden states are still
    to come. hidden: [n, D] of the target's newest tokens, whose next tokens are still to come.
    unread: tokens, and hidden states [n, D] of their predecessors, that the state lacks.
    last: logits [V] and hidden state [D] that the head gave for the newest token it has read.
    drafted: tokens of the last proposal.
    """

    own: int
    prompt: list[int]
    hidden: Tensor
    unread: list[int] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    last: Output | None = None
    drafted: list[int] = field(default_factory=list)


class HeadDrafter(EngineDrafter):
    """A head drafts, token by token after the first. engine: of a `HeadModel`."""

    def __init__(self, engine: Engine, sampling: Sampling | None = None) -> None:
        super().__init__(engine, sampling)
        self.read = self._read
        # Tokens of a step of which all but one can be taken back.
        self._most = min(engine.store.lookback or RECURRENT_LIMIT, RECURRENT_LIMIT - 1) + 1
        self._pasts: dict[int, _Past] = {}

    def begin(self, sequences: Sequence[int], prompts: Sequence[Sequence[int]]) -> None:
        """As `Drafter.begin`, all or none. Raises StoreFullError."""
        begun: list[int] = []
        weight = self.engine.model.embedding.weight
        try:
            for sequence, prompt in zip(sequences, prompts, strict=True):
                nothing = weight.new_empty(0, weight.shape[1])
                self._pasts[sequence] = _Past(self.engine.store.add(), list(prompt[1:]), nothing)
                begun.append(sequence)
        except BaseException:
            for sequence in begun:
                self.release(sequence)
            raise

    @torch.inference_mode()
    def _read(self, sequences: Sequence[int], hidden: Tensor, counts: Sequence[int]) -> None:
        """Hidden states [B, K, D] of tokens that the target has just read, `counts` of them each.

        Those of a prompt, whose next tokens are known, go into the state at once.
        """
        known: list[int] = []
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            past = self._pasts[sequence]
            known.append(min(count, len(past.prompt)))
            if count:
                # They may be a replayed graph's, which the next step overwrites.
                past.hidden = hidden[row, known[-1] : count].clone()
        if not any(known):
            return
        pasts = [self._pasts[s] for s in sequences]
        width = max(known)
        rows = [[*p.prompt[:n], *[0] * (width - n)] for p, n in zip(pasts, known, strict=True)]
        tokens = torch.tensor(rows, device=self.engine.device)
        new = None if min(known) == width else torch.tensor(known)
        self.engine.extend_last([p.own for p in pasts], tokens, new, hidden[:, :width])
        for past, count in zip(pasts, known, strict=True):
            del past.prompt[:count]

    @torch.inference_mode()
    def propose(self, sequences: Sequence[int], counts: Sequence[int], uniforms: Tensor) -> Drafts:
        """As `Drafter.propose`, by the head's own distribution.

        Where it fails, or the round after it, the same can be proposed again. Raises NoTokenError,
        and UserError for a sequence whose hidden states were not read.
        """
        pasts, width = [self._pasts[s] for s in sequences], max(counts)
        self._require_read(sequences, counts)
        newest = self._settled(pasts)
        own, lengths = [p.own for p in pasts], self.engine.store.lengths
        before = [lengths[o] for o in own]
        whole = max(before) + width - 1 <= self.max_context

        def logits_of(index: int, last: Tensor | None) -> Tensor:
            nonlocal newest
            if last is not None:
                new = None if whole else torch.tensor([int(count > index) for count in counts])
                found = self.engine.verify(own, last[:, None], new, newest.hidden[:, None])
                newest = Output(found.logits[:, 0], found.hidden[:, 0])
            return newest.logits

        try:
            found, drawn = self._draw(width, uniforms, logits_of)
        finally:
            for sequence, length in zip(own, before, strict=True):
                self.engine.store.rollback(sequence, lengths[sequence] - length)
        for past, count, row in zip(pasts, counts, found.tolist(), strict=True):
            require_tokens(row[:count])
            past.drafted = row[:count]
        return Drafts(found.clamp(min=0), list(counts), drawn)

    def _require_read(self, sequences: Sequence[int], counts: Sequence[int]) -> None:
        for sequence, count in zip(sequences, counts, strict=True):
            past = self._pasts[sequence]
            if count and not past.unread and past.last is None:
                raise UserError(
                    f"the head has no hidden states of sequence {sequence}; hand its `read` to the "
                    "target's prefill"
                )

    def _settled(self, pasts: Sequence[_Past]) -> Output:
        """Read what was settled since the last proposal; logits [B, V] of the first drafts, and
        the head's hidden states [B, D] there.
        """
        store = self.engine.store
        self._catch_up(pasts)
        unread = [len(p.unread) for p in pasts]
        if any(unread):
            own, most = [p.own for p in pasts], max(unread)
            longest = max(store.lengths[o] for o in own)
            if self.engine.compiled is not None or self.engine.graphed is not None:
                # All steps take one form.
                most = self._most if longest + self._most <= self.max_context else most
            # Who lacks less reads as much, and forgets it: a whole step can be replayed.
            whole = min(unread) > 0 and longest + most <= self.max_context
            rows = [[*p.unread, *[0] * (most - n)] for p, n in zip(pasts, unread, strict=True)]
            states = [torch.cat(p.states) if p.states else p.hidden[:0] for p in pasts]
            hidden = pad_sequence(states, batch_first=True)
            found = self.engine.verify(
                own, torch.tensor(rows, device=self.engine.device),
                None if whole else torch.tensor(unread),
                F.pad(hidden, (0, 0, 0, most - hidden.shape[1])),
            )  # fmt: skip
            for i, (past, count) in enumerate(zip(pasts, unread, strict=True)):
                store.rollback(past.own, most - count if whole else 0)
                if count:
                    at = count - 1
                    # They may be a replayed graph's, which the next step overwrites.
                    past.last = Output(found.logits[i, at].clone(), found.hidden[i, at].clone())
                    past.unread, past.states = [], []
        known = next(p.last for p in pasts if p.last is not None)
        # One that has ended and stays may never have been read.
        last = [p.last or known for p in pasts]
        return Output(torch.stack([o.logits for o in last]), torch.stack([o.hidden for o in last]))

    def _catch_up(self, pasts: Sequence[_Past]) -> None:
        """Read what rounds without drafts left unread, but for what one step takes."""
        for past in pasts:
            late = len(past.unread) - self._most
            if late > 0:
                hidden, tokens = torch.cat(past.states), torch.tensor([past.unread[:late]])
                tokens = tokens.to(self.engine.device)
                self.engine.extend_last([past.own], tokens, None, hidden[None, :late])
                past.unread, past.states = past.unread[late:], [hidden[late:]]

    def settle(self, sequences: Sequence[int], kept: Sequence[int], tokens: Sequence[int]) -> None:
        """As `Drafter.settle`."""
        for sequence, right, token in zip(sequences, kept, tokens, strict=True):
            past = self._pasts[sequence]
            # One that has ended and stays was not read.
            if len(past.hidden):
                past.unread += [*past.drafted[:right], token]
                past.states.append(past.hidden[: right + 1])
            past.hidden, past.drafted = past.hidden[:0], []

    def fork(self, sequence: int, child: int) -> None:
        """As `Drafter.fork`."""
        past = self._pasts[sequence]
        own = self.engine.store.fork(past.own)
        self._pasts[child] = _Past(
            own, list(past.prompt), past.hidden, list(past.unread), list(past.states), past.last
        )

    def release(self, sequence: int) -> None:
        """As `Drafter.release`."""
        self.engine.store.release(self._pasts.pop(sequence).own)
