"""A server: requests come in, a scheduler batches them, an executor takes the steps.

Tokens stream: every step tells who got one. On an executor that looks ahead (`infer.ahead`) a step
is launched before the tokens of the last are told. The schedule is the same, but for this: an
answer that ends with its stop token stays one step longer, and a request that comes while a step
runs, or follows from an answer that ended in it, may join one step later.
"""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

from infer.ahead import Ahead
from infer.scheduler import Scheduler
from infer.sequence import Answer, Request
from infer.turns import Endings, Executor, Turn


class Server:
    """Serves requests by a scheduler's steps on an executor.

    Raises UserError where the executor has less than the scheduler may hand out.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        executor.require(scheduler.capacity)
        self.scheduler = scheduler
        self.executor = executor
        self._ahead = Ahead(scheduler, executor) if executor.ahead else None
        #: Whoever reads it empties it.
        self.cancelled: list[Answer] = []

    def submit(self, request: Request) -> Answer:
        """Queue a request; its answer fills as steps are taken, or is refused at once.

        Of several answers it is the first, which knows the others.
        """
        answer = self.scheduler.add(request)
        if answer.ending is not None:
            for refused in (answer, *answer.siblings):
                refused.ended_s = max(self.executor.now_s(), request.arrival_s)
        return answer

    def fork(self, answer: Answer) -> Answer:
        """As `Scheduler.fork`: a second answer with the same past, which is shared until they
        differ.

        A step under way is waited for first, and the fork has its token too; of an answer that
        ends with it the fork has what was told of it before.
        """
        runs, made = answer.ending is None, len(answer.tokens)
        told_s = answer.first_token_s, answer.last_token_s
        self._settle()
        if runs and answer.ending is not None:
            child = self.scheduler.fork(answer, made)
        else:
            child = self.scheduler.fork(answer)
            told_s = answer.first_token_s, answer.last_token_s
        child.first_token_s, child.last_token_s = told_s
        self._follow()
        return child

    def cancel(self, answer: Answer) -> None:
        """End an answer between two steps; what it held alone becomes free.

        A step under way is waited for first, and the answer keeps its token; who ends with it has
        ended so.
        """
        if answer.ending is None:
            self._settle()
        if answer.ending is None:
            self.scheduler.cancel(answer)
            self._follow()
            self._note_cancelled(answer)

    def step(self, until_s: float = math.inf) -> Turn | None:
        """One step, or on a clock several that are alike, up to a point in time; None when idle.

        Where the executor fails, all answers are cancelled and nothing stays held.
        """
        try:
            return self._step(until_s) if self._ahead is None else self._ahead.step()
        except BaseException:
            self.close()
            raise

    def _step(self, until_s: float) -> Turn | None:
        scheduler, executor = self.scheduler, self.executor
        batch = scheduler.next()
        self._follow()
        if batch is None:
            return None
        began_s = executor.now_s()
        for answer in batch.answers:
            if answer.admitted_s is None:
                answer.admitted_s = began_s
        ran = executor.run(batch, scheduler.repeats(batch) if executor.leaps else 1, until_s)
        tokens = None if ran.read is None else ran.read()
        now_s = executor.now_s()
        if tokens is None:
            done = scheduler.done(batch, ran.times)
        else:
            counts = {answer: len(made) for answer, made in tokens.items()}
            done = scheduler.done(batch, ran.times, Endings(tokens), counts)
        held = sum(answer.held for answer in batch.answers)
        self._follow()
        return Turn.told(batch, began_s, now_s, ran.times, done.got, done.ended, held)

    def close(self) -> None:
        """Cancel whatever has not ended, and keep nothing; a step under way tells nobody."""
        for answer in () if self._ahead is None else self._ahead.abandon():
            self._note_cancelled(answer)
        for answer in (*self.scheduler.running, *self.scheduler.waiting):
            self.cancel(answer)
        # Siblings of answers that were cancelled have come into the queue.
        for answer in self.scheduler.waiting:
            self.cancel(answer)
        self.scheduler.clear()
        self._follow()

    def _settle(self) -> None:
        """Wait for the step under way, if there is one: `step` returns its turn next.

        Where that fails, all answers are cancelled and nothing stays held.
        """
        if self._ahead is not None:
            try:
                self._ahead.settle()
            except BaseException:
                self.close()
                raise

    def _note_cancelled(self, answer: Answer) -> None:
        answer.ended_s = self.executor.now_s()
        self.cancelled.append(answer)

    def _follow(self) -> None:
        self.executor.follow(self.scheduler.changes())


class Source(Protocol):
    """Where requests come from."""

    @property
    def next_s(self) -> float:
        """When the next one arrives; infinite where none is on its way."""
        ...

    def due(self, now_s: float) -> Iterable[Request]:
        """Those that have arrived."""
        ...

    def ended(self, answer: Answer, now_s: float) -> None:
        """An answer has ended; its user may send another request."""
        ...


def drive(
    server: Server, source: Source, on_turn: Callable[[Turn], object] | None = None
) -> list[Answer]:
    """Serve all requests of a source; the answers in the order of their arrival, forks apart.

    on_turn: called after every step; it may cancel answers and fork them. Whatever ends it early,
    nothing stays held.
    """
    answers: list[Answer] = []
    try:
        while True:
            now_s = server.executor.now_s()
            for request in source.due(now_s):
                first = server.submit(request)
                for answer in (first, *first.siblings):
                    answers.append(answer)
                    if answer.ending is not None:
                        source.ended(answer, now_s)
            turn = server.step(source.next_s)
            if turn is None:
                if source.next_s == math.inf:
                    return answers
                server.executor.wait(source.next_s)
                continue
            for answer in turn.ended:
                source.ended(answer, turn.ended_s)
            if on_turn is not None:
                on_turn(turn)
            while server.cancelled:
                answer = server.cancelled.pop()
                source.ended(answer, turn.ended_s)
    finally:
        server.close()
