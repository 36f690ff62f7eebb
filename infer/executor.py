"""Takes a server's steps on an engine: sequences follow the scheduler, tokens are made and told."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from archs.errors import UserError
from infer.batch import Batch, Changes
from infer.books import staged
from infer.cached import Node, Unit
from infer.capacity import Capacity
from infer.coming import Coming, mark
from infer.engine import Engine
from infer.kept import Kept, forget, keep, resume, share
from infer.sampling import Sampler, Sampling, fed, stream
from infer.sequence import Answer
from infer.turns import Ran, Tokens

#: `Sampling.rule`.
Rule = tuple[float, float, int]
#: Answers, and their next tokens on the device, int64 [answers].
Chosen = tuple[list[Answer], Tensor]


class EngineExecutor:
    """Takes a server's steps on an engine, by the wall clock.

    Every answer has its own sampling parameters and random numbers, which follow from its seed and
    its prompt alone: what it gets depends on nobody else, and equal requests get equal answers.
    ahead: whether steps are launched before the tokens of the last are read, which then go from
    step to step on the device (None: on CUDA).
    Raises UserError for an engine that cannot take answers in and out of a batch.
    """

    leaps: ClassVar[bool] = False

    def __init__(self, engine: Engine, *, ahead: bool | None = None) -> None:
        if engine.compiled is not None:
            raise UserError(
                "compiled=True compiles steps of one fixed batch, and a server's changes at every "
                "step; open the engine without it"
            )
        self.engine = engine
        on_cuda = engine.device.type == "cuda"
        self.ahead = on_cuda if ahead is None else ahead
        #: Whether the host runs ahead of the device, whose own clock then tells what it did.
        self._behind = on_cuda and self.ahead
        self._began: torch.cuda.Event | None = None
        #: What the last step chose, where the next one takes it from there.
        self._last: Coming | None = None
        self._opened_s = time.perf_counter()
        self._sequences: dict[Answer, int] = {}
        self._kept: dict[Unit, Kept] = {}
        self._streams: dict[Answer, torch.Generator] = {}
        self._samplers: dict[Rule, Sampler] = {}
        self._none = torch.empty(0, dtype=torch.int64, device=engine.device)
        #: Seconds in the model and in sampling; all else is the host's. Where it runs ahead, those
        #: that the device took for it: all else it stood still.
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
        """As `Executor.now_s`; waits for the device unless it looks ahead."""
        if self.engine.device.type == "cuda" and not self.ahead:
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
        """As `Executor.run`, once; on CUDA it is under way when this returns."""
        coming = self._launch(batch.decode, batch)
        if self.ahead:
            self._last = coming
        return Ran(1, lambda: self._read(coming))

    def _launch(self, decode: Sequence[Answer], batch: Batch) -> Coming:
        """The next tokens of answers that decode, and of those whose chunks end their prompt."""
        self._began = None
        chosen = self._extend([(answer, 1) for answer in decode]) if decode else []
        for group in batch.chunk_groups():
            chosen += self._extend(group)
        made = [tokens for _, tokens in chosen]
        tokens = made[0] if len(made) == 1 else torch.cat([self._none, *made])
        return Coming([a for members, _ in chosen for a in members], tokens, self._began)

    def _read(self, coming: Coming) -> Tokens:
        """What a step chose; the device is waited for once, when all of the step is under way."""
        with self._timed():
            tokens = coming.read()
        self.model_s += coming.device_s
        return {answer: [token] for answer, token in zip(coming.answers, tokens, strict=True)}

    def _extend(self, group: Sequence[tuple[Answer, int]]) -> list[Chosen]:
        """Read so many tokens of each answer; the next tokens of those that have been read."""
        # Sequences side by side, where they are, may be read without a gather.
        group = sorted(group, key=lambda g: self._sequences[g[0]])
        counts = [count for _, count in group]
        width = max(counts)
        given = self._given(group, width)
        new = None if min(counts) == width else torch.tensor(counts)
        asked = [(at, a) for at, (a, n) in enumerate(group) if a.todo == n and a.ending is None]
        if self._behind and self._began is None:
            self._began = mark(self.engine.device)
        with self._timed():
            logits = self.engine.extend_last([self._sequences[a] for a, _ in group], given, new)
            return self._sample(logits, asked)

    def _given(self, group: Sequence[tuple[Answer, int]], width: int) -> Tensor:
        """The next tokens of each answer on the device, [B, width], padded."""
        device, last = self.engine.device, self._last
        # An answer that has ended and stays in a static batch is extended by any token.
        if last is None or width > 1:
            rows = [[*a.next_tokens(n)] if a.ending is None else [0] * n for a, n in group]
            return staged([row + [0] * (width - len(row)) for row in rows], device)
        answers = [answer for answer, _ in group]
        if answers == last.answers:
            return fed(last.tokens)
        # Who got a token in the last step has it on the device; the host may not know it yet.
        index, known = [], list[int]()
        for answer in answers:
            at = last.places.get(answer)
            if at is None:
                at = len(last.places) + len(known)
                known += answer.next_tokens(1) if answer.ending is None else [0]
            index.append(at)
        sent = staged([*index, *known], device)
        return fed(torch.cat((last.tokens, sent[len(index) :]))[sent[: len(index)]])

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Count the host's time as the model's, where the device's own clock does not tell it."""
        began = time.perf_counter()
        yield
        if not self._behind:
            self.model_s += time.perf_counter() - began

    def _sample(self, logits: Tensor, asked: Sequence[tuple[int, Answer]]) -> list[Chosen]:
        """The next tokens of answers whose logits are the rows `at`."""
        alike: dict[Rule, list[tuple[int, Answer]]] = {}
        for at, answer in asked:
            alike.setdefault(answer.request.sampling.rule, []).append((at, answer))
        chosen: list[Chosen] = []
        for members in alike.values():
            sampling = members[0][1].request.sampling
            sampler = self._sampler(sampling)
            rows = logits
            if len(members) < len(logits):
                rows = logits[staged([at for at, _ in members], self.engine.device)]
            uniforms = None
            if not sampling.greedy:
                drawn = [torch.rand(1, generator=self._stream(a)) for _, a in members]
                uniforms = torch.cat(drawn).to(self.engine.device, non_blocking=True)
            chosen.append(([answer for _, answer in members], sampler(rows, uniforms)))
        return chosen

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
