"""A server's steps with drafts: each answer is drafted for, verified and rolled back by itself.

Answers of a batch advance unlike far. What each gets is what `infer.speculate.generate` gives to
its request alone: greedy tokens are those of plain decode, drawn ones have the target's own
distribution, whoever else is served, found in a cache or preempted.
"""

import time
from collections.abc import Sequence

from archs.errors import UserError
from infer.batch import Batch, Changes
from infer.capacity import Capacity
from infer.clock import StepClock
from infer.draft_length import Fixed
from infer.drafts import Drafter
from infer.engine import Engine
from infer.executor import EngineExecutor, Rule
from infer.sequence import Answer
from infer.speculate import Stream, advance, require_fit
from infer.turns import Ran


class SpeculatingExecutor(EngineExecutor):
    """As `EngineExecutor`, several tokens a step where drafts are right (`Policy.drafts`).

    Raises UserError where the engine cannot take K tokens back, where the drafter does not fit it,
    and for one that reads hidden states: of a prefix that was found there are none.
    """

    def __init__(self, engine: Engine, drafter: Drafter, *, drafts: int) -> None:
        # A round drafts from the tokens of the last.
        super().__init__(engine, ahead=False)
        require_fit(engine, drafter, drafts, engine.store.max_context)
        if drafter.read is not None:
            raise UserError(
                "this drafter reads the target's hidden states, which a server does not keep; take "
                "a model or n-grams of the context"
            )
        self.drafter = drafter
        self.drafts = drafts
        self._drafted: dict[Answer, Stream] = {}

    def follow(self, changes: Changes) -> None:
        """As `Executor.follow`."""
        for answer in changes.released:
            stream = self._drafted.pop(answer, None)
            if stream is not None:
                self.drafter.release(stream.sequence)
        super().follow(changes)

    def run(self, batch: Batch, times: int, until_s: float) -> Ran:
        """As `Executor.run`, once; a round for each rule of sampling."""
        # A first token follows from a prompt, in whatever chunks that was read.
        tokens = self._read(self._launch([a for a in batch.decode if a.made == 0], batch))
        alike: dict[Rule, list[Answer]] = {}
        for answer in batch.decode:
            if answer.made:
                alike.setdefault(answer.request.sampling.rule, []).append(answer)
        for members in alike.values():
            tokens |= self._round(members)
        return Ran(1, lambda: tokens)

    def _round(self, answers: Sequence[Answer]) -> dict[Answer, list[int]]:
        streams = [self._stream_of(a) for a in answers]
        sampler = self._sampler(answers[0].request.sampling)
        began = time.perf_counter()
        found, new = advance(
            self.engine, self.drafter, streams, sampler, drafts=self.drafts,
            clock=StepClock(self.engine.device),
        )  # fmt: skip
        self.model_s += time.perf_counter() - began
        self.verified += len(found.kept)
        self.kept += sum(found.kept)
        tokens: dict[Answer, list[int]] = {}
        for answer, stream, made in zip(answers, streams, new, strict=True):
            stop = answer.request.stop
            if stop in made:
                end = made.index(stop) + 1
                self.engine.store.rollback(stream.sequence, len(made) - end)
                made = made[:end]
            tokens[answer] = made
        return tokens

    def _stream_of(self, answer: Answer) -> Stream:
        found = self._drafted.get(answer)
        if found is None:
            sequence, past = self._sequences[answer], [*answer.request.prompt, *answer.tokens]
            self.drafter.begin([sequence], [past[:-1]])
            random = None if answer.request.sampling.greedy else self._stream(answer)
            found = Stream(sequence, past[-1], answer.left, Fixed(self.drafts), random)
            self._drafted[answer] = found
            self.drafter.settle([sequence], [0], [past[-1]])
        return found

    def require(self, capacity: Capacity) -> None:
        """As `Executor.require`."""
        super().require(capacity)
        if capacity.lookback < self.drafts:
            raise UserError(
                f"drafts={self.drafts} with a capacity of lookback={capacity.lookback}: what is "
                f"taken back takes memory, too; make it with lookback={self.drafts}"
            )
