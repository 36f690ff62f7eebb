"""A server: requests come in, a scheduler batches them, an executor takes the steps.

There are two executors, and the loop does not tell them apart: an engine (`EngineExecutor`), and a
clock that advances by what a step is predicted to take (`eval.predict.serving`). Tokens stream:
every step tells who got one.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from archs.errors import UserError
from infer.batch import Batch, Changes
from infer.cached import Node, Unit
from infer.capacity import Capacity
from infer.engine import Engine
from infer.kept import Kept, forget, keep, resume, share
from infer.sampling import Sampler, Sampling, stream
from infer.scheduler import Scheduler
from infer.sequence import Answer, Ending, Request
from kernels.sampling.nucleus import NO_TOKEN

#: `Sampling.rule`.
Rule = tuple[float, float, int]


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


class EngineExecutor:
    """Takes a server's steps on an engine, by the wall clock.

    Every answer has its own sampling parameters and random numbers, which follow from its seed and
    its prompt alone: what it gets depends on nobody else, and equal requests get equal answers.
    Raises UserError for an engine that cannot take answers in and out of a batch.
    """

    leaps: ClassVar[bool] = False

    def __init__(self, engine: Engine) -> None:
        if engine.compiled is not None:
            raise UserError(
                "compiled=True compiles steps of one fixed batch, and a server's changes at every "
                "step; open the engine without it"
            )
        self.engine = engine
        self._opened_s = time.perf_counter()
        self._sequences: dict[Answer, int] = {}
        self._kept: dict[Unit, Kept] = {}
        self._streams: dict[Answer, torch.Generator] = {}
        self._samplers: dict[Rule, Sampler] = {}
        #: Seconds in the model and in sampling; all else is the host's.
        self.model_s = 0.0
        #: Verifications of single answers, and drafts that were right in them.
        self.verified = self.kept = 0

    def require(self, capacity: Capacity) -> None:
        """As `Executor.require`."""
        store = self.engine.store
        tables = {key: table.n_pages for key, table in store.tables.items()}
        spare = [values.spare for values in (store.slots, store.rings) if values is not None]
        has = (
            len(store.lengths) >= capacity.max_sequences
            and store.page_size == capacity.page_size
            and store.max_context >= capacity.max_context
            and tables.keys() == capacity.pages.keys()
            and all(tables[key] >= count for key, count in capacity.pages.items())
            and bool(spare) == bool(capacity.slots)
            and all(n >= capacity.checkpoints for n in spare)
        )
        if not has:
            raise UserError(
                f"the engine's store does not hold what the scheduler may hand out ({capacity}); "
                "open it with max_sequences, max_context, page_size, pages and kept="
                f"{capacity.checkpoints} of the capacity, and make that by `Capacity.of`"
            )

    def now_s(self) -> float:
        """As `Executor.now_s`; waits for the device."""
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return time.perf_counter() - self._opened_s

    def wait(self, until_s: float) -> None:
        """As `Executor.wait`."""
        time.sleep(max(0.0, until_s - self.now_s()))

    def follow(self, changes: Changes) -> None:
        """As `Executor.follow`."""
        store = self.engine.store
        for answer, unit in changes.kept:
            self._kept[unit] = self._keep(self._sequences[answer], unit)
        for answer, node in changes.twice:
            share(store, self._sequences[answer], self._kept[node])
        for answer in changes.released:
            sequence = self._sequences.pop(answer, None)
            if sequence is not None:
                store.release(sequence)
            if answer.ending is not None:
                self._streams.pop(answer, None)
        for answer, start in changes.started:
            point = [] if start.point is None else [start.point]
            units: list[Unit] = [*point, *start.node.path()]
            self._sequences[answer] = resume(store, [self._kept[unit] for unit in units[::-1]])
        for unit in changes.forgotten:
            forget(store, self._kept.pop(unit))

    def _keep(self, sequence: int, unit: Unit) -> Kept:
        store = self.engine.store
        if isinstance(unit, Node):
            end = unit.depth * store.page_size
            return keep(store, sequence, end - store.page_size, end, whole=False)
        begin = unit.node.depth * store.page_size
        return keep(store, sequence, begin, unit.tokens, whole=True)

    def run(self, batch: Batch, times: int, until_s: float) -> Ran:
        """As `Executor.run`, once."""
        tokens = self._decode(batch.decode) if batch.decode else {}
        for group in batch.chunk_groups():
            tokens |= self._extend(group)
        return Ran(1, tokens)

    def _decode(self, answers: Sequence[Answer]) -> dict[Answer, list[int]]:
        """The next tokens of answers."""
        return self._extend([(answer, 1) for answer in answers])

    def _extend(self, group: Sequence[tuple[Answer, int]]) -> dict[Answer, list[int]]:
        """Read so many tokens of each answer; the next tokens of those that have been read."""
        # Sequences side by side, where they are, may be read without a gather.
        group = sorted(group, key=lambda g: self._sequences[g[0]])
        counts = [count for _, count in group]
        width = max(counts)
        # An answer that has ended and stays in a static batch is extended by any token.
        rows = [[*a.next_tokens(n)] if a.ending is None else [0] * n for a, n in group]
        given = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        new = None if min(counts) == width else torch.tensor(counts)
        asked = [(at, a) for at, (a, n) in enumerate(group) if a.todo == n and a.ending is None]
        began = time.perf_counter()
        logits = self.engine.extend_last(
            [self._sequences[a] for a, _ in group], given.to(self.engine.device), new
        )
        tokens = self._sample(logits, asked)
        self.model_s += time.perf_counter() - began
        return tokens

    def _sample(
        self, logits: Tensor, asked: Sequence[tuple[int, Answer]]
    ) -> dict[Answer, list[int]]:
        """The next tokens of answers whose logits are the rows `at`."""
        alike: dict[Rule, list[tuple[int, Answer]]] = {}
        for at, answer in asked:
            alike.setdefault(answer.request.sampling.rule, []).append((at, answer))
        tokens: dict[Answer, list[int]] = {}
        for members in alike.values():
            sampling = members[0][1].request.sampling
            sampler = self._sampler(sampling)
            rows = logits if len(members) == len(logits) else logits[[at for at, _ in members]]
            uniforms = None
            if not sampling.greedy:
                drawn = [torch.rand(1, generator=self._stream(a)) for _, a in members]
                uniforms = torch.cat(drawn).to(self.engine.device)
            chosen = sampler(rows, uniforms).tolist()
            tokens |= {a: [token] for (_, a), token in zip(members, chosen, strict=True)}
        return tokens

    def _sampler(self, sampling: Sampling) -> Sampler:
        found = self._samplers.get(sampling.rule)
        if found is None:
            found = Sampler(sampling, self.engine.device, backend=self.engine.backend)
            self._samplers[sampling.rule] = found
        return found

    def _stream(self, answer: Answer) -> torch.Generator:
        found = self._streams.get(answer)
        if found is None:
            request = answer.request
            self._streams[answer] = found = stream(
                request.sampling.seed, request.prompt, answer.copy
            )
        return found
