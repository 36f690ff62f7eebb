"""What users send, as data: when requests arrive, how long they are, what they share.

A workload is drawn once from its seed, request by request, whatever serves it: an engine and a
clock get the same lengths at the same times. What a prompt says comes from a `Voice`: token ids for
an engine, their origin for a clock, which asks only what is equal.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

import numpy as np

from archs.checks import at_least, parse, positive
from archs.errors import UserError, unknown_name
from archs.files import read_text, read_toml
from eval.measure.traces import MOONCAKE_BLOCK, Arrival, read_trace
from infer.sampling import Sampling
from infer.sequence import Answer, Ending, Request, Unspoken

WORKLOADS_DIR = Path(__file__).parent / "workloads"
#: The tokens of a named piece of text: its name, and how many.
Voice = Callable[[str, int], Sequence[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """How long something is, in tokens.

    kind: fixed (mean), uniform (least to most), geometric (mean) or lognormal (mean, sigma of the
    logarithm). What is drawn beyond least and most becomes those.
    """

    kind: str = "fixed"
    mean: float = 128
    sigma: float = 1.0
    least: int = 1
    most: int = 1 << 20

    def __post_init__(self) -> None:
        if self.kind not in _DRAWN:
            raise unknown_name("kind of lengths", self.kind, _DRAWN)
        positive(self, "mean")
        at_least(self, 0, "sigma")
        at_least(self, 1, "least", "mean")
        if self.most < self.least:
            raise UserError(f"most={self.most} is below least={self.least}; change one")

    def draw(self, numbers: np.random.Generator) -> int:
        """One length."""
        return min(self.most, max(self.least, round(_DRAWN[self.kind](self, numbers))))


def _lognormal(lengths: Lengths, numbers: np.random.Generator) -> float:
    at = math.log(lengths.mean) - lengths.sigma**2 / 2
    return float(numbers.lognormal(at, lengths.sigma))


_DRAWN: dict[str, Callable[[Lengths, np.random.Generator], float]] = {
    "fixed": lambda lengths, numbers: lengths.mean,
    "uniform": lambda lengths, numbers: int(numbers.integers(lengths.least, lengths.most + 1)),
    "geometric": lambda lengths, numbers: int(numbers.geometric(1 / lengths.mean)),
    "lognormal": _lognormal,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """arrivals: once (all at the start), closed (each of `users` sends the next request when the
    last is answered), poisson (`rate_per_s`), or trace.

    requests: conversations; of a trace at most so many, 0: all. turns: of a conversation, each with
    all before it as its prompt. think_s: between an answer and the next turn, or the next request
    of a user. systems: system prompts of `system_tokens`, one of which opens each prompt (0: none).
    answers: to each prompt, unlike ones where `temperature` is above 0; a conversation goes on with
    the first when all have ended.
    trace: a file (`eval.measure.traces`); rate_per_s then, if given, replaces its pace.
    """

    arrivals: str = "once"
    requests: int = 64
    rate_per_s: float = 0.0
    users: int = 0
    think_s: float = 0.0
    turns: int = 1
    prompt: Lengths = field(default_factory=Lengths)
    output: Lengths = field(default_factory=Lengths)
    systems: int = 0
    system_tokens: int = 0
    answers: int = 1
    trace: str = ""
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arrivals not in ARRIVALS:
            raise unknown_name("arrivals", self.arrivals, ARRIVALS)
        at_least(self, 0 if self.arrivals == "trace" else 1, "requests")
        at_least(self, 1, "turns", "answers")
        at_least(self, 0, "rate_per_s", "users", "think_s", "systems", "system_tokens")
        Sampling(temperature=self.temperature)
        if self.arrivals == "poisson":
            positive(self, "rate_per_s")
        if self.arrivals == "closed":
            at_least(self, 1, "users")
        if bool(self.trace) != (self.arrivals == "trace"):
            raise UserError(
                f"arrivals='{self.arrivals}' with trace='{self.trace}': a trace needs a file, and "
                'a file arrivals="trace"'
            )
        if bool(self.systems) != bool(self.system_tokens):
            raise UserError(
                f"systems={self.systems} with system_tokens={self.system_tokens}: give both, or "
                "neither"
            )

    def at_rate(self, rate_per_s: float) -> "Workload":
        """The same requests, arriving at another mean rate."""
        arrivals = self.arrivals if self.arrivals == "trace" else "poisson"
        return replace(self, arrivals=arrivals, rate_per_s=rate_per_s)

    @property
    def trace_digest(self) -> str:
        """Twelve hex digits of what the trace's file holds; empty without one."""
        if not self.trace:
            return ""
        return hashlib.sha256(read_text(_trace_path(self.trace)).encode()).hexdigest()[:12]

    def conversations(self) -> list["Conversation"]:
        """What is asked, one after the other; the same whoever serves it."""
        numbers = np.random.default_rng(self.seed)
        made = ARRIVALS[self.arrivals](self, numbers)
        return list(made)


class Conversation(NamedTuple):
    """starts_s: None where it starts when a user is free. turns: tokens of what the user says, and
    of the answer. system: which system prompt opens it; -1: none. blocks: as `Arrival.blocks`.
    """

    number: int
    starts_s: float | None
    turns: tuple[tuple[int, int], ...]
    system: int = -1
    blocks: tuple[int, ...] = ()
    group: str = ""


def _drawn(
    workload: Workload, numbers: np.random.Generator, number: int, at: float | None
) -> Conversation:
    turns = tuple(
        (workload.prompt.draw(numbers), workload.output.draw(numbers))
        for _ in range(workload.turns)
    )
    system = int(numbers.integers(workload.systems)) if workload.systems else -1
    return Conversation(number, at, turns, system)


def _once(workload: Workload, numbers: np.random.Generator) -> Iterator[Conversation]:
    for number in range(workload.requests):
        yield _drawn(workload, numbers, number, 0.0)


def _closed(workload: Workload, numbers: np.random.Generator) -> Iterator[Conversation]:
    for number in range(workload.requests):
        yield _drawn(workload, numbers, number, 0.0 if number < workload.users else None)


def _poisson(workload: Workload, numbers: np.random.Generator) -> Iterator[Conversation]:
    # Gaps of their own numbers, so that another rate stretches the same arrivals.
    gaps = np.random.default_rng((workload.seed, 1)).exponential(size=workload.requests)
    times = np.cumsum(gaps) / workload.rate_per_s
    for number, at in enumerate(times):
        yield _drawn(workload, numbers, number, float(at))


def _traced(workload: Workload, numbers: np.random.Generator) -> Iterator[Conversation]:
    found: list[Arrival] = read_trace(_trace_path(workload.trace))
    found = found[: workload.requests or len(found)]
    pace = 1.0
    if workload.rate_per_s and found[-1].arrival_s:
        pace = (len(found) - 1) / found[-1].arrival_s / workload.rate_per_s
    for number, a in enumerate(found):
        turns = ((max(1, a.prompt_tokens), a.output_tokens),)
        yield Conversation(number, a.arrival_s * pace, turns, -1, a.blocks, a.group)


ARRIVALS: dict[str, Callable[[Workload, np.random.Generator], Iterator[Conversation]]] = {
    "once": _once,
    "closed": _closed,
    "poisson": _poisson,
    "trace": _traced,
}


def random_voice(vocab_size: int, seed: int = 0) -> Voice:
    """Ids drawn evenly from a vocabulary; the same name gives the same beginning."""

    def say(name: str, tokens: int) -> list[int]:
        key = [seed, *name.encode()]
        return np.random.default_rng(key).integers(vocab_size, size=tokens).tolist()

    return say


def silent_voice(name: str, tokens: int) -> Sequence[int]:
    """Tokens of which only the origin is known, for a clock."""
    return Unspoken([(name, tokens)])


def joined(parts: Sequence[Sequence[int]]) -> Sequence[int]:
    """Tokens one after the other; unspoken where any are."""
    unspoken = [p for p in parts if isinstance(p, Unspoken)]
    if unspoken:
        return Unspoken([piece for part in unspoken for piece in part.pieces])
    return [token for part in parts for token in part]


class Users:
    """Sends a workload's requests as they fall due, and the next ones as answers end."""

    def __init__(self, workload: Workload, voice: Voice) -> None:
        self._workload = workload
        self._voice = voice
        self._due: list[tuple[float, int, int, Request]] = []
        self._idle: list[Conversation] = []
        #: Whose turn a request is, by its name.
        self._turns: dict[str, tuple[Conversation, int]] = {}
        #: How many of its answers have not ended.
        self._open: dict[str, int] = {}
        for talk in workload.conversations():
            if talk.starts_s is None:
                self._idle.append(talk)
            else:
                self._push(talk, 0, talk.starts_s, ())
        self._idle.reverse()

    @property
    def next_s(self) -> float:
        """When the next request arrives; infinite where none is on its way."""
        return self._due[0][0] if self._due else math.inf

    def due(self, now_s: float) -> Iterator[Request]:
        """Requests that have arrived."""
        while self._due and self._due[0][0] <= now_s:
            yield heappop(self._due)[3]

    def ended(self, answer: Answer, now_s: float) -> None:
        """An answer has ended; when all to its prompt have, its user thinks, and goes on."""
        request = answer.request
        if answer.leader is not None and answer not in answer.leader.siblings:
            # A fork: it was not the user who asked for it.
            return
        self._open[request.name] -= 1
        if self._open[request.name]:
            return
        del self._open[request.name]
        talk, turn = self._turns.pop(request.name)
        at = now_s + self._workload.think_s
        first = answer.leader or answer
        if first.ending is Ending.LENGTH and turn + 1 < len(talk.turns):
            said: Sequence[int] = first.tokens
            if isinstance(request.prompt, Unspoken):
                said = Unspoken(first.pieces)
            self._push(talk, turn + 1, at, joined([request.prompt, said]))
        elif self._idle:
            self._push(self._idle.pop(), 0, at, ())

    def _push(self, talk: Conversation, turn: int, at: float, past: Sequence[int]) -> None:
        asked, answered = talk.turns[turn]
        request = Request(
            name=f"{talk.number}.{turn}", group=talk.group,
            prompt=joined([past or self._opening(talk), self._said(talk, turn, asked)]),
            max_new_tokens=answered, arrival_s=at, answers=self._workload.answers,
            sampling=Sampling(temperature=self._workload.temperature, seed=talk.number),
        )  # fmt: skip
        self._turns[request.name] = talk, turn
        self._open[request.name] = request.answers
        heappush(self._due, (at, talk.number, turn, request))

    def _opening(self, talk: Conversation) -> Sequence[int]:
        if talk.system < 0:
            return ()
        return self._voice(f"system {talk.system}", self._workload.system_tokens)

    def _said(self, talk: Conversation, turn: int, tokens: int) -> Sequence[int]:
        if not talk.blocks:
            return self._voice(f"user {talk.number} {turn}", tokens)
        said: list[Sequence[int]] = []
        left = tokens
        for block in talk.blocks:
            said.append(self._voice(f"block {block}", min(MOONCAKE_BLOCK, left)))
            left -= len(said[-1])
        # A trace may name fewer blocks than its prompt is long.
        return joined([*said, self._voice(f"user {talk.number}", left)])


def _trace_path(name: str) -> Path:
    shipped = WORKLOADS_DIR / name
    return shipped if shipped.is_file() and not Path(name).exists() else Path(name)


def available_workloads() -> dict[str, Path]:
    """Workloads that ship with the program, by name."""
    return {p.stem: p for p in sorted(WORKLOADS_DIR.glob("*.toml"))}


def load_workload(name_or_path: str) -> Workload:
    """A workload by name, from a TOML file, or the trace in a CSV or JSONL file.

    Raises UserError on anything that is off.
    """
    path = Path(name_or_path)
    if path.suffix in (".csv", ".jsonl", ".json"):
        return Workload(arrivals="trace", trace=str(path), requests=0)
    if path.suffix != ".toml":
        known = available_workloads()
        if name_or_path not in known:
            raise unknown_name("workload", name_or_path, known)
        path = known[name_or_path]
    return parse(Workload, read_toml(path, "workload"), str(path))
