"""Who runs in the next step: admission, chunks of prompts, preemption.

A scheduler counts: sequences, pages and slots that are free, tokens that each answer holds. It
knows neither models nor time, so that one schedule runs on an engine and on a clock. Requests are
admitted by priority and arrival; where pages run dry, the last in this order starts anew later.
"""

from bisect import insort
from collections.abc import Callable, Collection, Mapping
from heapq import heapify, heappop, heappush

from archs.errors import UserError
from infer.batch import Batch, Changes, Done
from infer.capacity import Capacity
from infer.ledger import Ledger
from infer.policy import BATCHING, CONTIGUOUS, Policy
from infer.prefix import Prefixes, Start
from infer.sequence import Answer, Ending, Request


class Scheduler:
    """Continuous batching: answers join and leave at every step.

    Raises UserError where a step's budget does not even take what every sequence decodes.
    """

    def __init__(self, capacity: Capacity, policy: Policy | None = None) -> None:
        self.capacity = capacity
        self.policy = policy or Policy()
        self._width = 1 + self.policy.drafts
        most = capacity.max_sequences * self._width
        if self.policy.token_budget < most:
            raise UserError(
                f"token_budget={self.policy.token_budget} is less than the {most} tokens of "
                f"{capacity.max_sequences} sequences with drafts={self.policy.drafts}, which may "
                "decode at once; raise it, or lower max_sequences"
            )
        if self.policy.allocation == CONTIGUOUS:
            capacity.require_fit(capacity.max_context)
        #: Admitted, by rank.
        self.running: list[Answer] = []
        self.ledger = Ledger(capacity)
        self.prefixes = Prefixes(
            capacity, self.ledger, keeps=self.policy.prefix_cache,
            every=self.policy.checkpoint_every,
        )  # fmt: skip
        self._waiting: list[tuple[tuple[int, int], Answer]] = []
        #: Siblings of answers whose prompt is not read yet.
        self._parked: dict[Answer, tuple[Answer, ...]] = {}
        self._reserve = (*(int(self.policy.reserve * n) for n in capacity.pages.values()), 0)
        self._nothing = (0,) * len(capacity.pages)
        self._changes = Changes()
        self._unlike = False
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
        return tuple(self.ledger.free[:-1])

    def changes(self) -> Changes:
        """What was decided since this was last asked; whoever holds the state follows it."""
        found, self._changes = self._changes, Changes()
        cached = self.prefixes.cached
        found.kept, cached.kept = cached.kept, []
        found.twice, cached.twice = cached.twice, []
        found.forgotten, cached.forgotten = cached.forgotten, []
        return found

    def add(self, request: Request) -> Answer:
        """Queue a request; returns the first of its answers, which knows the others.

        A request that could never fit has ended at once, refused; `note` says why.
        """
        leader = self._new(request)
        leader.siblings = tuple(self._new(request, leader) for _ in range(1, request.answers))
        try:
            self.capacity.require_fit(self._with_drafts(request.most_held - 1))
        except UserError as why:
            for answer in (leader, *leader.siblings):
                answer.ending, answer.note = Ending.REFUSED, str(why)
            return leader
        self._queue(leader)
        self._parked[leader] = leader.siblings
        if not (leader.siblings and self.policy.shares):
            self._let_siblings_in(leader)
        return leader

    def fork(self, answer: Answer, made: int | None = None) -> Answer:
        """A second answer that goes on where one stands between two steps, with random numbers of
        its own. made: it has only so many of its tokens, of one that may have ended since. Raises
        UserError where that is not given for one that has, and where nothing can be shared.
        """
        if made is None and answer.ending is not None:
            raise UserError(
                f"answer {answer.number} has ended ({answer.ending}); fork a running one"
            )
        self.policy.require_shares()
        child = self._new(answer.request, answer.leader or answer)
        child.made = answer.made if made is None else made
        child.tokens = answer.tokens[: child.made]
        child.inherited = answer.pieces if answer.made else ()
        if answer.ending is None and answer in self.running:
            self.prefixes.checkpoint(answer, [child])
        self._queue(child)
        return child

    def cancel(self, answer: Answer) -> None:
        """End an answer, between two steps. One that has ended stays as it is."""
        if answer.ending is None:
            answer.ending = Ending.CANCELLED
            self.drop(answer)

    def drop(self, answer: Answer) -> None:
        """Take out an answer that has ended, wherever it is, between two steps."""
        if answer in self.running:
            self._leave([answer])
            return
        self._waiting = [w for w in self._waiting if w[1] is not answer]
        heapify(self._waiting)
        self.prefixes.leave(answer)
        self._let_siblings_in(answer)
        self._changes.released.append(answer)

    def clear(self) -> None:
        """Forget all prefixes that nobody uses."""
        self.prefixes.cached.clear()

    def next(self) -> Batch | None:
        """The next step; None where there is nothing to do. `done` must follow it."""
        batch = Batch()
        self._unlike = self._make_room()
        if not self._unlike:
            self._admit()
            self._unlike = self.prefixes.settle()
        chunked = []
        for answer in self.running:
            if answer.todo == 1 or answer.ending is not None:
                batch.decode.append(answer)
            else:
                chunked.append(answer)
        if not BATCHING[self.policy.batching]:
            reading = [a for a in batch.decode if a.made == 0 and a.ending is None]
            batch.decode = reading if reading or chunked else batch.decode
        left = self.policy.token_budget - len(batch.decode) * self._width
        for answer in chunked:
            # With drafts, what follows a made token is decided in a round, preempted or not.
            count = min(answer.todo - bool(self.policy.drafts and answer.made), left)
            if count < 1:
                break
            count = self.prefixes.chunk(answer, count)
            batch.chunks.append((answer, count))
            left -= count
        batch.memory = self.ledger.memory
        return batch if batch.tokens else None

    def repeats(self, batch: Batch) -> int:
        """How many times in a row a step could be taken before anybody ends or lacks a page; 1
        where somebody gets a first token, or room was left that nobody was offered yet.
        """
        alike = len(batch.decode) == len(self.running) and not self.policy.drafts
        if not alike or self._unlike or any(a.made == 0 for a in batch.decode):
            return 1
        times = min(a.left for a in batch.decode if a.ending is None)
        while times > 1 and not self.ledger.could_have(self.ledger.more(batch.decode, times)):
            times //= 2
        return max(1, times)

    def done(
        self, batch: Batch, times: int = 1,
        endings: Callable[[Answer], Ending | None] | None = None,
        got: Mapping[Answer, int] | None = None,
    ) -> Done:  # fmt: skip
        """Account for a step that was taken `times` times.

        endings: of answers that got tokens, whether they end with them, before their full length.
        got: how many, where that may be other than `times`.
        """
        told: list[Answer] = []
        for answer in batch.decode:
            count = times if got is None else got.get(answer, times)
            answer.held += count
            if times > 1:
                self._grow(answer, answer.held)
            if answer.ending is None:
                answer.made += count
                told.append(answer)
        for answer, count in batch.chunks:
            answer.held += count
            self._has_read(answer)
            if not answer.todo:
                answer.made += 1
                told.append(answer)
        ended = []
        for answer in told:
            found = None if endings is None else endings(answer)
            if found is not None or answer.left <= 0:
                answer.ending = found or Ending.LENGTH
                ended.append(answer)
        batch.grown = self.ledger.memory
        self._leave(ended)
        return Done(told, ended)

    # -- inside ------------------------------------------------------------------------------

    def _new(self, request: Request, leader: Answer | None = None) -> Answer:
        answer = Answer(
            request, self._count, pages=self._nothing, shared=self._nothing, leader=leader
        )
        self._count += 1
        if leader is not None:
            answer.copy = leader.copies
            leader.copies += 1
        return answer

    def _queue(self, answer: Answer) -> None:
        heappush(self._waiting, (answer.rank, answer))

    def _let_siblings_in(self, leader: Answer) -> None:
        """Those that have waited for a prompt to be read are queued."""
        for answer in self._parked.pop(leader, ()):
            if answer.ending is None:
                self._queue(answer)

    def _has_read(self, answer: Answer) -> None:
        """An answer has read a part of its prompt; perhaps somebody waits for it."""
        if answer in self._parked and answer.held >= len(answer.request.prompt) - 1:
            waiting = [a for a in self._parked[answer] if a.ending is None]
            self.prefixes.checkpoint(answer, waiting)
            self._let_siblings_in(answer)
        self.prefixes.read(answer)

    def _make_room(self) -> bool:
        """Pages for all that need one; who comes last gives way: whether anybody did."""
        at, gone = 0, False
        while at < len(self.running):
            answer = self.running[at]
            grows = answer.todo == 1 and answer.ending is None
            if grows and not self._grow(answer, self._with_drafts(answer.held)):
                last = self.running.pop()
                self._release(last, known=True)
                last.preemptions += 1
                last.lost, last.held = last.held, 0
                self._queue(last)
                gone = True
            else:
                at += 1
        return gone

    def _with_drafts(self, held: int) -> int:
        """Tokens that a sequence which holds so many may hold in a step that decodes."""
        return min(held + self._width, max(held + 1, self.capacity.max_context))

    def _admit(self) -> None:
        if not self._waiting:
            return
        left = self.policy.token_budget - sum(a.todo for a in self.running)
        while self._waiting and len(self.running) < self.capacity.max_sequences and left > 0:
            answer = self._waiting[0][1]
            starts = self.prefixes.starts(answer, alone=not self.running)
            fitting = [start for start in starts if self._fits(answer, start)]
            if not fitting:
                break
            heappop(self._waiting)
            self._start(answer, fitting[0], self._set_aside(answer))
            left -= answer.todo

    def _start(self, answer: Answer, start: Start, tokens: int) -> None:
        """Move an answer from the queue to those that run."""
        self.prefixes.begin(answer, start)
        if answer.hit is None:
            answer.hit = min(start.tokens, len(answer.request.prompt))
        answer.recomputed += max(0, answer.lost - start.tokens)
        answer.lost = 0
        wanted = self.capacity.pages_of(tokens)
        own = tuple([w - s for w, s in zip(wanted, answer.shared, strict=True)])
        taken = self.prefixes.cached.take(self.ledger.with_slot(own))
        assert taken
        self.ledger.runs(self.ledger.with_slot(wanted))
        answer.pages, answer.room = own, self.capacity.room_of(wanted)
        self._changes.started.append((answer, start))
        insort(self.running, answer, key=lambda a: a.rank)
        if answer in self._parked:
            read = len(answer.request.prompt) - 1
            if answer.held < read:
                self.prefixes.ask(answer, read)
            else:
                self._let_siblings_in(answer)

    def _set_aside(self, answer: Answer) -> int:
        """Tokens for which an answer gets pages when it is admitted."""
        if self.policy.allocation == CONTIGUOUS:
            return self.capacity.max_context
        return answer.length

    def _fits(self, answer: Answer, start: Start) -> bool:
        """Whether an answer's memory can be had, and the reserve stays where others run."""
        wanted = self.capacity.pages_of(self._set_aside(answer))
        own = [w - s for w, s in zip(wanted, start.node.shared, strict=True)]
        asked = [self.ledger.with_slot(own), self.prefixes.idle_of(start)]
        if self.running:
            asked.append(self._reserve)
        return self.ledger.could_have(map(sum, zip(*asked, strict=True)))

    def _grow(self, answer: Answer, tokens: int) -> bool:
        """Give an answer pages for so many tokens; False where there are not enough."""
        if tokens <= answer.room:
            return True
        wanted = self.capacity.pages_of(tokens)
        more = self.ledger.more([answer], tokens - answer.held)
        if not self.prefixes.cached.take(more):
            return False
        self.ledger.runs(more)
        answer.pages = tuple([h + m for h, m in zip(answer.pages, more, strict=False)])
        answer.room = self.capacity.room_of(wanted)
        return True

    def _release(self, answer: Answer, *, known: bool) -> None:
        """Take an answer's memory back; known: its past is one that others may go on from."""
        if known and self.policy.prefix_cache:
            self.prefixes.publish(answer)
        self.ledger.give(self.ledger.with_slot(answer.pages))
        whole = [h + s for h, s in zip(answer.pages, answer.shared, strict=True)]
        self.ledger.runs(tuple([-n for n in self.ledger.with_slot(whole)]))
        if known:
            self.prefixes.checkpoint(answer)
        self.prefixes.leave(answer)
        self._changes.released.append(answer)
        answer.pages = answer.shared = self._nothing
        answer.room = 0

    def _leave(self, ended: Collection[Answer]) -> None:
        """Take answers that have ended out of those that run."""
        for answer in ended:
            self._let_siblings_in(answer)
            self._release(answer, known=answer.ending in (Ending.LENGTH, Ending.STOP))
        if ended:
            self.running = [a for a in self.running if a not in ended]


class StaticScheduler(Scheduler):
    """Static batching: a batch is filled with those that wait and runs until its last answer ends.

    Who has ended stays and is computed on, unread, so pages for the longest answer are set aside
    for everybody, and nobody is preempted.
    """

    def _admit(self) -> None:
        if self.running:
            return
        chosen: list[Answer] = []
        longest, wanted = 0, list(self._nothing)
        while self._waiting and len(chosen) < self.capacity.max_sequences:
            answer = self._waiting[0][1]
            longest_then = max(longest, answer.request.max_new_tokens)
            # A longer answer makes everybody's share larger.
            added = [answer] if longest_then == longest else [*chosen, answer]
            base = wanted if longest_then == longest else self._nothing
            lengths = [self._set_aside_beside(a, longest_then) for a in added]
            then = [
                sum(pages)
                for pages in zip(base, *map(self.capacity.pages_of, lengths), strict=True)
            ]
            fits = self.ledger.has((*then, 0))
            ends = max(len(a.request.prompt) for a in (*chosen, answer)) + longest_then - 1
            if ends > self.capacity.max_context or not fits:
                break
            heappop(self._waiting)
            chosen.append(answer)
            longest, wanted = longest_then, then
        for answer in chosen:
            self._start(answer, self.prefixes.nothing, self._set_aside_beside(answer, longest))

    def _set_aside_beside(self, answer: Answer, longest: int) -> int:
        """Tokens for an answer in a batch whose longest one gets so many new tokens."""
        if self.policy.allocation == CONTIGUOUS:
            return self.capacity.max_context
        return len(answer.request.prompt) + longest - 1

    def _leave(self, ended: Collection[Answer]) -> None:
        if all(a.ending is not None for a in self.running):
            super()._leave(list(self.running))


SCHEDULERS: dict[str, type[Scheduler]] = {"continuous": Scheduler, "static": StaticScheduler}
