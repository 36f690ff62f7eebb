"""Requests and their answers in the making: what a scheduler moves about.

A request is data. An answer is what the server knows of it: how many of its tokens the state holds,
how many are made, and when. Counts suffice to schedule; tokens are there where an engine makes
them, and on a clock, which makes none, they are missing.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import overload

from archs.checks import at_least
from archs.errors import UserError
from infer.sampling import Sampling


class Ending(StrEnum):
    """Why an answer has ended.

    length: it has all tokens that were asked for. stop: its last token is the stop token.
    cancelled: its user left. refused: it could never fit. failed: no token followed from its
    logits.
    """

    LENGTH = "length"
    STOP = "stop"
    CANCELLED = "cancelled"
    REFUSED = "refused"
    FAILED = "failed"


class Unspoken(Sequence[int]):
    """Tokens of which only the origin is known: enough for a clock.

    pieces: names, and how many tokens of each. Equal names begin with equal tokens.
    """

    def __init__(self, pieces: Sequence[tuple[str, int]]) -> None:
        self.pieces = tuple(pieces)
        self._size = sum(count for _, count in self.pieces)

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, at: int) -> int: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[int]: ...

    def __getitem__(self, at: int | slice) -> int | Sequence[int]:
        raise TypeError("these tokens are not known; run them on a clock")

    def told(self, begin: int, end: int) -> bytes:
        """What tells tokens begin..end from others."""
        found, first = [], 0
        for name, count in self.pieces:
            low, high = max(begin, first), min(end, first + count)
            if low < high:
                found.append(f"{name}:{low - first}-{high - first}")
            first += count
        return ";".join(found).encode()


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a user asks for.

    prompt: tokens; on a clock, which asks only what is equal, `Unspoken` ones will do.
    max_new_tokens: an answer ends there, or with the token `stop`. answers: to the one prompt, each
    with random numbers of its own. arrival_s: on the server's clock. priority: higher ones are
    admitted first and preempted last. name, group: for its user.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    arrival_s: float = 0.0
    stop: int | None = None
    answers: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    name: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise UserError("a prompt is empty; give every request at least one token")
        if not isinstance(self.prompt, Unspoken):
            try:
                array("q", self.prompt)
            except (TypeError, OverflowError) as why:
                raise UserError(
                    f"a prompt is not made of token ids ({why}); give integers"
                ) from None
        at_least(self, 1, "max_new_tokens", "answers")
        at_least(self, 0, "arrival_s")

    @property
    def most_held(self) -> int:
        """Tokens that its state holds at most: nothing is computed from the last one."""
        return len(self.prompt) + self.max_new_tokens - 1


@dataclass(slots=True, eq=False)
class Answer:
    """An answer in the making.

    number: its place in the order of arrival. tokens: the new ones; none on a clock. made: how many
    there are. held: tokens that the state holds, of the prompt and of those. pages: that the
    scheduler has set aside for it alone, of each table; shared: those of prefixes that it uses
    beside; room: tokens that fit into both. hit: tokens of its prompt that were found computed.
    lost: tokens that it held when it was preempted last; recomputed: those of them that were not
    found again, all times together. inherited: of a fork on a clock, names of what it began with.
    leader: the first answer to the same request, None for itself; copy: which answer to it this is.
    copies: of a leader, how many there have been. siblings: of a leader, the others.
    """

    request: Request
    number: int
    tokens: list[int] = field(default_factory=list)
    made: int = 0
    held: int = 0
    pages: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    room: int = 0
    hit: int | None = None
    leader: "Answer | None" = None
    copy: int = 0
    copies: int = 1
    siblings: tuple["Answer", ...] = ()
    inherited: tuple[tuple[str, int], ...] = ()
    preemptions: int = 0
    lost: int = 0
    recomputed: int = 0
    ending: Ending | None = None
    note: str = ""
    admitted_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    ended_s: float | None = None

    @property
    def rank(self) -> tuple[int, int]:
        """The lowest is admitted first and preempted last."""
        return -self.request.priority, self.number

    @property
    def length(self) -> int:
        """Tokens of the prompt, and made."""
        return len(self.request.prompt) + self.made

    @property
    def todo(self) -> int:
        """Tokens that the state does not hold yet; the next one follows when it does."""
        return len(self.request.prompt) + self.made - self.held

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.request.max_new_tokens - self.made

    def next_tokens(self, count: int) -> Sequence[int]:
        """The first `count` tokens that the state does not hold yet."""
        prompt, end = self.request.prompt, self.held + count
        if self.held >= len(prompt):
            first = self.held - len(prompt)
            return self.tokens[first : first + count]
        if end <= len(prompt):
            return prompt[self.held : end]
        return [*prompt[self.held :], *self.tokens[: end - len(prompt)]]

    @property
    def pieces(self) -> tuple[tuple[str, int], ...]:
        """What stands for its tokens where none are made (`Unspoken`): equal answers have equal
        names.
        """
        request = self.request
        name = f"answer {request.name}"
        if not request.sampling.greedy:
            name += f" {request.sampling.seed} {self.copy}"
        began = sum(count for _, count in self.inherited)
        return (*self.inherited, (name, self.made - began))

    @property
    def known(self) -> int:
        """Tokens of the prompt and the answer that can be told from others."""
        prompt = self.request.prompt
        made = self.made if isinstance(prompt, Unspoken) else len(self.tokens)
        return len(prompt) + made

    def told(self, begin: int, end: int) -> bytes:
        """What tells tokens begin..end of the prompt and the answer from others."""
        prompt = self.request.prompt
        if isinstance(prompt, Unspoken):
            if end > len(prompt):
                prompt = Unspoken([*prompt.pieces, *self.pieces])
            return prompt.told(begin, end)
        size = len(prompt)
        tokens = [*prompt[begin:end], *self.tokens[max(0, begin - size) : max(0, end - size)]]
        return array("q", tokens).tobytes()
