"""Who runs in the next step: admission, chunks of prompts, preemption.

A scheduler counts: sequences and pages that are free, tokens that each answer holds. It knows
neither models nor tensors nor time, so that one schedule runs on an engine and on a clock. Requests
are admitted in order of priority and arrival; where pages run dry, the answer that is last in this
order gives up its own and is computed anew later.
"""

from bisect import insort
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import ClassVar, NamedTuple

from archs.checks import at_least
from archs.errors import UserError, unknown_name
from infer.capacity import Capacity
from infer.sequence import Answer, Ending, Request

#: Chunks are padded to one step where that computes at most this many times what they hold.
PADDED = 1.25
#: How rows are set aside: page by page as they come, or for the longest context at once.
PAGED, CONTIGUOUS = "paged", "contiguous"


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """How a server batches.

    batching: continuous (answers join and leave at every step) or static (a batch runs until its
    last answer has ended; who has ended stays in it, as in a padded batch). token_budget: tokens of
    a step at most, decoded ones first; prompts are cut into chunks to keep it. reserve: share of
    the pages that an admission leaves free, for those that run to grow into. allocation: paged, or
    contiguous: the longest context is set aside for each sequence.
    """

    batching: str = "continuous"
    token_budget: int = 512
    reserve: float = 0.02
    allocation: str = PAGED

    def __post_init__(self) -> None:
        if self.batching not in SCHEDULERS:
            raise unknown_name("batching", self.batching, SCHEDULERS)
        if self.allocation not in (PAGED, CONTIGUOUS):
            raise unknown_name("allocation", self.allocation, (PAGED, CONTIGUOUS))
        at_least(self, 1, "token_budget")
        if not 0 <= self.reserve < 1:
            raise UserError(f"reserve={self.reserve} must be a share from 0 to below 1")


@dataclass(slots=True)
class Batch:
    """Who runs in a step.

    decode: answers that are extended by one token. chunks: answers and so many tokens of their
    prompts. preempted: answers that have lost their state before it.
    """

    decode: list[Answer] = field(default_factory=list)
    chunks: list[tuple[Answer, int]] = field(default_factory=list)
    preempted: list[Answer] = field(default_factory=list)

    @property
    def answers(self) -> list[Answer]:
        """All that run in it."""
        return [*self.decode, *(answer for answer, _ in self.chunks)]

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding apart."""
        return len(self.decode) + sum(count for _, count in self.chunks)

    def chunk_groups(self) -> list[list[tuple[Answer, int]]]:
        """The chunks as rectangles: those of about the same length are padded to one step."""
        found: list[list[tuple[Answer, int]]] = []
        held = 0
        for chunk in sorted(self.chunks, key=lambda c: -c[1]):
            if found and found[-1][0][1] * (len(found[-1]) + 1) <= PADDED * (held + chunk[1]):
                found[-1].append(chunk)
                held += chunk[1]
            else:
                found.append([chunk])
                held = chunk[1]
        return found


class Done(NamedTuple):
    """Who got a token in a step, who ended with it, and whose state is needed no more."""

    got: list[Answer]
    ended: list[Answer]
    released: list[Answer]


class Scheduler:
    """Continuous batching: answers join and leave at every step.

    Raises UserError where a step's budget does not even take one token of every sequence.
    """

    #: Whether answers decode while prompts of others are still being read.
    mixes: ClassVar[bool] = True

    def __init__(self, capacity: Capacity, policy: Policy | None = None) -> None:
        self.capacity = capacity
        self.policy = policy or Policy()
        if self.policy.token_budget < capacity.max_sequences:
            raise UserError(
                f"token_budget={self.policy.token_budget} is less than the {capacity.max_sequences}"
                " sequences that may decode at once; raise it, or lower max_sequences"
            )
        if self.policy.allocation == CONTIGUOUS:
            capacity.require_fit(capacity.max_context)
        #: Admitted, by rank.
        self.running: list[Answer] = []
        self._waiting: list[tuple[tuple[int, int], Answer]] = []
        self._free = list(capacity.pages.values())
        self._kept = [int(self.policy.reserve * n) for n in self._free]
        self._count = 0

    @property
    def waiting(self) -> list[Answer]:
        """Not admitted yet, or preempted; those that come first stand first."""
        return [answer for _, answer in sorted(self._waiting, key=lambda w: w[0])]

    @property
    def queued(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self._waiting

    @property
    def free_pages(self) -> tuple[int, ...]:
        """Pages of each table that nobody has."""
        return tuple(self._free)

    def add(self, request: Request) -> Answer:
        """Queue a request. One that could never fit has ended at once, refused; `note` says why."""
        answer = Answer(request, self._count, pages=(0,) * len(self._free))
        self._count += 1
        try:
            self.capacity.require_fit(request.most_held)
        except UserError as why:
            answer.ending, answer.note = Ending.REFUSED, str(why)
            return answer
        heappush(self._waiting, (answer.rank, answer))
        return answer

    def cancel(self, answer: Answer) -> list[Answer]:
        """End an answer wherever it is, between two steps; returns those whose state is needed no
        more. One that has ended stays as it is.
        """
        if answer.ending is not None:
            return []
        answer.ending = Ending.CANCELLED
        if answer in self.running:
            return self._leave([answer])
        self._waiting = [w for w in self._waiting if w[1] is not answer]
        heapify(self._waiting)
        return []

    def next(self) -> Batch | None:
        """The next step; None where there is nothing to do. `done` must follow it."""
        batch = Batch()
        self._make_room(batch)
        if not batch.preempted:
            self._admit()
        left = self.policy.token_budget
        chunked = []
        for answer in self.running:
            if answer.todo == 1 or answer.ending is not None:
                batch.decode.append(answer)
            else:
                chunked.append(answer)
        if not self.mixes:
            reading = [a for a in batch.decode if a.made == 0 and a.ending is None]
            batch.decode = reading if reading or chunked else batch.decode
        left -= len(batch.decode)
        for answer in chunked:
            count = min(answer.todo, left)
            if count < 1:
                break
            batch.chunks.append((answer, count))
            left -= count
        return batch if batch.tokens else None

    def repeats(self, batch: Batch) -> int:
        """How many times in a row a step could be taken before anybody ends or lacks a page, while
        nobody new arrives; 1 where somebody gets a first token.
        """
        if batch.chunks or len(batch.decode) < len(self.running):
            return 1
        if any(a.made == 0 for a in batch.decode):
            return 1
        times = min(a.left for a in batch.decode if a.ending is None)
        while times > 1 and not self._room_for(batch.decode, times):
            times //= 2
        return max(1, times)

    def done(
        self, batch: Batch, times: int = 1, endings: Callable[[Answer], Ending | None] | None = None
    ) -> Done:
        """Account for a step that was taken `times` times.

        endings: of answers that got a token, whether they end with it, before their full length.
        """
        got = []
        for answer in batch.decode:
            answer.held += times
            if times > 1:
                self._grow(answer, answer.held)
            if answer.ending is None:
                answer.made += times
                got.append(answer)
        for answer, count in batch.chunks:
            answer.held += count
            if not answer.todo:
                answer.made += 1
                got.append(answer)
        ended = []
        for answer in got:
            found = None if endings is None else endings(answer)
            if found is None and answer.left <= 0:
                found = Ending.LENGTH
            if found is not None:
                answer.ending = found
                ended.append(answer)
        return Done(got, ended, self._leave(ended))

    # -- inside ------------------------------------------------------------------------------

    def _make_room(self, batch: Batch) -> None:
        """A page for every answer that needs one; who comes last gives way."""
        at = 0
        while at < len(self.running):
            answer = self.running[at]
            grows = answer.todo == 1 and answer.ending is None
            if grows and not self._grow(answer, answer.held + 1):
                last = self.running.pop()
                self._release(last)
                last.preemptions += 1
                last.recomputed += last.held
                last.held = 0
                heappush(self._waiting, (last.rank, last))
                batch.preempted.append(last)
            else:
                at += 1

    def _admit(self) -> None:
        left = self.policy.token_budget - sum(a.todo for a in self.running)
        while self._waiting and len(self.running) < self.capacity.max_sequences and left > 0:
            answer = self._waiting[0][1]
            if not self._fits(self._set_aside(answer)):
                break
            heappop(self._waiting)
            self._start(answer, self._set_aside(answer))
            left -= answer.todo

    def _start(self, answer: Answer, tokens: int) -> None:
        """Move an answer from the queue to those that run."""
        taken = self._grow(answer, tokens)
        assert taken
        insort(self.running, answer, key=lambda a: a.rank)

    def _set_aside(self, answer: Answer) -> int:
        """Tokens for which an answer gets pages when it is admitted."""
        if self.policy.allocation == CONTIGUOUS:
            return self.capacity.max_context
        return answer.length

    def _fits(self, tokens: int) -> bool:
        """Whether pages for so many tokens are free, and the reserve stays where others run."""
        kept = self._kept if self.running else [0] * len(self._free)
        wanted = self.capacity.pages_of(tokens)
        return all(f - w >= k for f, w, k in zip(self._free, wanted, kept, strict=True))

    def _grow(self, answer: Answer, tokens: int) -> bool:
        """Give an answer pages for so many tokens; False where there are not enough."""
        if tokens <= answer.room:
            return True
        wanted = self.capacity.pages_of(tokens)
        more = [w - h for w, h in zip(wanted, answer.pages, strict=True)]
        if any(m > f for m, f in zip(more, self._free, strict=True)):
            return False
        self._free = [f - m for f, m in zip(self._free, more, strict=True)]
        answer.pages, answer.room = wanted, self.capacity.room_of(wanted)
        return True

    def _room_for(self, answers: Collection[Answer], times: int) -> bool:
        """Whether all of them could be extended by so many tokens."""
        more = [0] * len(self._free)
        for answer in answers:
            if answer.held + times > answer.room:
                wanted = self.capacity.pages_of(answer.held + times)
                more = [m + w - h for m, w, h in zip(more, wanted, answer.pages, strict=True)]
        return all(m <= f for m, f in zip(more, self._free, strict=True))

    def _release(self, answer: Answer) -> None:
        self._free = [f + h for f, h in zip(self._free, answer.pages, strict=True)]
        answer.pages, answer.room = (0,) * len(self._free), 0

    def _leave(self, ended: Collection[Answer]) -> list[Answer]:
        """Take answers that have ended out of those that run; returns those that are out."""
        for answer in ended:
            self._release(answer)
        if ended:
            self.running = [a for a in self.running if a.ending is None]
        return list(ended)


class StaticScheduler(Scheduler):
    """Static batching: a batch is filled with those that wait and runs until its last answer ends.

    Who has ended stays and is computed on, unread, so pages for the longest answer are set aside
    for everybody, and nobody is preempted.
    """

    mixes: ClassVar[bool] = False

    def _admit(self) -> None:
        if self.running:
            return
        chosen: list[Answer] = []
        longest, wanted = 0, [0] * len(self._free)
        while self._waiting and len(chosen) < self.capacity.max_sequences:
            answer = self._waiting[0][1]
            longest_then = max(longest, answer.request.max_new_tokens)
            # A longer answer makes everybody's share larger.
            added = [answer] if longest_then == longest else [*chosen, answer]
            base = wanted if longest_then == longest else [0] * len(self._free)
            lengths = [self._set_aside_beside(a, longest_then) for a in added]
            then = [
                sum(pages)
                for pages in zip(base, *map(self.capacity.pages_of, lengths), strict=True)
            ]
            fits = all(w <= f for w, f in zip(then, self._free, strict=True))
            ends = max(len(a.request.prompt) for a in (*chosen, answer)) + longest_then - 1
            if ends > self.capacity.max_context or not fits:
                break
            heappop(self._waiting)
            chosen.append(answer)
            longest, wanted = longest_then, then
        for answer in chosen:
            self._start(answer, self._set_aside_beside(answer, longest))

    def _set_aside_beside(self, answer: Answer, longest: int) -> int:
        """Tokens for an answer in a batch whose longest one gets so many new tokens."""
        if self.policy.allocation == CONTIGUOUS:
            return self.capacity.max_context
        return len(answer.request.prompt) + longest - 1

    def _leave(self, ended: Collection[Answer]) -> list[Answer]:
        if any(a.ending is None for a in self.running):
            return []
        return super()._leave(list(self.running))


SCHEDULERS: dict[str, type[Scheduler]] = {"continuous": Scheduler, "static": StaticScheduler}
