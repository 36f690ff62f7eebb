"""What a server and whoever takes its steps tell each other: an executor, and what came of a step.

There are two executors, and a server's loop does not tell them apart: an engine
(`infer.executor`), and a clock that advances by what a step is predicted to take
(`eval.predict.serving`).
"""

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

from infer.batch import Batch, Changes
from infer.capacity import Capacity
from infer.sequence import Answer, Ending
from kernels.sampling.nucleus import NO_TOKEN

#: New tokens by answer, several where drafts were right; `NO_TOKEN` is the last where the logits
#: decide none.
Tokens = dict[Answer, list[int]]


class Ran(NamedTuple):
    """A step that was taken, or is under way on a device.

    times: how often in a row. read: gives the new tokens, and waits until the step is over; None
    where no tokens are made.
    """

    times: int
    read: Callable[[], Tokens] | None


class Executor(Protocol):
    """Takes the steps that a scheduler asks for, and has the time.

    leaps: whether it takes several that are alike at once.
    """

    leaps: ClassVar[bool]

    @property
    def ahead(self) -> bool:
        """Whether a step may be asked for before the tokens of the last are read: it takes them
        from where they were made.
        """
        ...

    def require(self, capacity: Capacity) -> None:
        """Raise UserError unless it has what a scheduler may hand out."""
        ...

    def now_s(self) -> float:
        """Seconds since the server was opened; where it looks ahead, without any wait."""
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

    began_s, ended_s: turns follow one another without overlapping; a step ends when its tokens are
    read. got: answers with new tokens, the newest last in `Answer.tokens`, and when each had the
    one before (None: it is the first). ended: those that ended. held: tokens of all that ran in it,
    after it.
    """

    batch: Batch
    began_s: float
    ended_s: float
    times: int
    got: list[tuple[Answer, float | None]]
    ended: list[Answer]
    held: int

    @classmethod
    def told(
        cls, batch: Batch, began_s: float, now_s: float, times: int, got: Sequence[Answer],
        ended: list[Answer], held: int,
    ) -> "Turn":  # fmt: skip
        """A turn whose tokens were read just now, which its answers are told."""
        before = [(answer, answer.last_token_s) for answer in got]
        for answer, last_s in before:
            answer.last_token_s = now_s
            if last_s is None:
                answer.first_token_s = now_s
        for answer in ended:
            answer.ended_s = now_s
        return cls(batch, began_s, now_s, times, before, ended, held)


class Endings:
    """Hands tokens to their answers, and tells who ends with one."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def __call__(self, answer: Answer) -> Ending | None:
        """The ending that an answer's new tokens bring."""
        *before, last = self._tokens[answer]
        answer.tokens += before
        if last == NO_TOKEN:
            answer.made -= 1
            answer.note = "its logits are NaN or infinite: no token follows from them"
            return Ending.FAILED
        answer.tokens.append(last)
        return Ending.STOP if last == answer.request.stop else None
