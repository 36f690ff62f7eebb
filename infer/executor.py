"""Takes a server's steps on an engine: sequences follow the scheduler, tokens are made and told."""

import time
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from archs.errors import UserError
from infer.batch import Batch, Changes
from infer.cached import Node, Unit
from infer.capacity import Capacity
from infer.engine import Engine
from infer.kept import Kept, forget, keep, resume, share
from infer.sampling import Sampler, Sampling, stream
from infer.sequence import Answer
from infer.server import Ran

#: `Sampling.rule`.
Rule = tuple[float, float, int]
#: Answers, and their next tokens on the device, int64 [answers].
Chosen = tuple[list[Answer], Tensor]


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
        return Ran(1, self._plain(batch.decode, batch))

    def _plain(self, decode: Sequence[Answer], batch: Batch) -> dict[Answer, list[int]]:
        """The next tokens of answers that decode, and of those whose chunks end their prompt.

        The device is waited for once, when all of the step is under way.
        """
        chosen = self._extend([(answer, 1) for answer in decode]) if decode else []
        for group in batch.chunk_groups():
            chosen += self._extend(group)
        if not chosen:
            return {}
        began = time.perf_counter()
        tokens = torch.cat([tokens for _, tokens in chosen]).tolist()
        self.model_s += time.perf_counter() - began
        answers = [answer for members, _ in chosen for answer in members]
        return {answer: [token] for answer, token in zip(answers, tokens, strict=True)}

    def _extend(self, group: Sequence[tuple[Answer, int]]) -> list[Chosen]:
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
        chosen = self._sample(logits, asked)
        self.model_s += time.perf_counter() - began
        return chosen

    def _sample(self, logits: Tensor, asked: Sequence[tuple[int, Answer]]) -> list[Chosen]:
        """The next tokens of answers whose logits are the rows `at`."""
        alike: dict[Rule, list[tuple[int, Answer]]] = {}
        for at, answer in asked:
            alike.setdefault(answer.request.sampling.rule, []).append((at, answer))
        chosen: list[Chosen] = []
        for members in alike.values():
            sampling = members[0][1].request.sampling
            sampler = self._sampler(sampling)
            rows = logits if len(members) == len(logits) else logits[[at for at, _ in members]]
            uniforms = None
            if not sampling.greedy:
                drawn = [torch.rand(1, generator=self._stream(a)) for _, a in members]
                uniforms = torch.cat(drawn).to(self.engine.device)
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
