"""Requests and their answers in the making: what a scheduler moves about.

A request is data. An answer is what the server knows of it: how many of its tokens the state holds,
how many are made, and when. Counts suffice to schedule; tokens are there where an engine makes
them, and on a clock, which makes none, they are missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a user asks for.

    prompt: tokens; on a clock, which looks at none, anything of that length (a range, say).
    max_new_tokens: the answer ends there, or with the token `stop`. arrival_s: on the server's
    clock. priority: higher ones are admitted first and preempted last. name, group: for its user.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    arrival_s: float = 0.0
    stop: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    priority: int = 0
    name: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise UserError("a prompt is empty; give every request at least one token")
        at_least(self, 1, "max_new_tokens")
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
    scheduler has set aside for it, of each table; room: tokens that fit into them. recomputed:
    tokens that were held when it was preempted, all times together.
    """

    request: Request
    number: int
    tokens: list[int] = field(default_factory=list)
    made: int = 0
    held: int = 0
    pages: tuple[int, ...] = ()
    room: int = 0
    preemptions: int = 0
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
