"""A server: requests come in, a scheduler batches them, an executor takes the steps.

There are two executors, and the loop does not tell them apart: an engine (`infer.executor`), and a
clock that advances by what a step is predicted to take (`eval.predict.serving`). Tokens stream:
every step tells who got one.
"""

import math
from collections.abc import Callable, Iterable
from typing import ClassVar, NamedTuple, Protocol

from infer.batch import Batch, Changes
from infer.capacity import Capacity
from infer.scheduler import Scheduler
from infer.sequence import Answer, Ending, Request
from kernels.sampling.nucleus import NO_TOKEN


class Ran(NamedTuple):
    """What came of a step: how many times it was taken, and the new tokens where there are any.

    tokens: by answer, several where drafts were right; where logits do not decide, `NO_TOKEN` is
    the last.
    """

    times: int
    tokens: dict[Answer, list[int]] | None


class Executor(Protocol):
    """Takes the steps that a scheduler asks for, and has the time.

    leaps: whether it takes several that are alike at once.
    """

    leaps: ClassVar[bool]

    def require(self, capacity: Capacity) -> None:
        """Raise UserError unless it has what a scheduler may hand out."""
        ...

    def now_s(self) -> float:
        """Seconds since the server was opened."""
        ...

    def wait(self, until_s: float) -> None:
        """Let the time come; there is nothing to do before."""
        ...

    def run(self, batch: Batch, times: int, until_s: float) -> Ran:
        """Take a step at least once and up to `times` times, until after a point in time."""
        ...

    def follow(self, changes: Changes) -> None:
        """Do to states what was decided about them."""
        ...


class Turn(NamedTuple):
    """A step of the server, taken `times` times in a row.

    got: answers with new tokens, the newest last in `Answer.tokens`, and when each had the one
    before (None: it is the first). ended: those that ended.
    """

    batch: Batch
    began_s: float
    ended_s: float
    times: int
    got: list[tuple[Answer, float | None]]
    ended: list[Answer]


class Server:
    """Serves requests by a scheduler's steps on an executor.

    Raises UserError where the executor has less than the scheduler may hand out.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        executor.require(scheduler.capacity)
        self.scheduler = scheduler
        self.executor = executor
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
        """
        child = self.scheduler.fork(answer)
        child.first_token_s, child.last_token_s = answer.first_token_s, answer.last_token_s
        self._follow()
        return child

    def cancel(self, answer: Answer) -> None:
        """End an answer between two steps; what it held alone becomes free."""
        if answer.ending is None:
            self.scheduler.cancel(answer)
            self._follow()
            answer.ended_s = self.executor.now_s()
            self.cancelled.append(answer)

    def step(self, until_s: float = math.inf) -> Turn | None:
        """One step, or on a clock several that are alike, up to a point in time; None when idle.

        Where the executor fails, all answers are cancelled and nothing stays held.
        """
        try:
            return self._step(until_s)
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
        now_s = executor.now_s()
        if ran.tokens is None:
            done = scheduler.done(batch, ran.times)
        else:
            counts = {answer: len(tokens) for answer, tokens in ran.tokens.items()}
            done = scheduler.done(batch, ran.times, _Endings(ran.tokens), counts)
        got = [(answer, answer.last_token_s) for answer in done.got]
        for answer, before in got:
            answer.last_token_s = now_s
            if before is None:
                answer.first_token_s = now_s
        for answer in done.ended:
            answer.ended_s = now_s
        self._follow()
        return Turn(batch, began_s, now_s, ran.times, got, done.ended)

    def close(self) -> None:
        """Cancel whatever has not ended, and keep nothing."""
        for answer in (*self.scheduler.running, *self.scheduler.waiting):
            self.cancel(answer)
        # Siblings of answers that were cancelled have come into the queue.
        for answer in self.scheduler.waiting:
            self.cancel(answer)
        self.scheduler.clear()
        self._follow()

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


class _Endings:
    """Hands tokens to their answers, and tells who ends with one."""

    def __init__(self, tokens: dict[Answer, list[int]]) -> None:
        self._tokens = tokens

    def __call__(self, answer: Answer) -> Ending | None:
        *before, last = self._tokens[answer]
        answer.tokens += before
        if last == NO_TOKEN:
            answer.made -= 1
            answer.note = "its logits are NaN or infinite: no token follows from them"
            return Ending.FAILED
        answer.tokens.append(last)
        return Ending.STOP if last == answer.request.stop else None
