"""What a scheduler decides: who runs in a step, and what becomes of state before and after it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from infer.cached import Node, Unit
from infer.ledger import Memory
from infer.prefix import Start
from infer.sequence import Answer

#: Chunks are padded to one step where that computes at most this many times what they hold.
PADDED = 1.25
#: Before anybody has looked.
NOBODY = Memory((), (), ())


@dataclass(slots=True)
class Batch:
    """Who runs in a step.

    decode: answers that are extended by one token. chunks: answers and so many tokens of their
    prompts. memory, grown: who holds how much of it before the step, and after the last of those
    that were taken in a row.
    """

    decode: list[Answer] = field(default_factory=list)
    chunks: list[tuple[Answer, int]] = field(default_factory=list)
    memory: Memory = NOBODY
    grown: Memory = NOBODY

    @property
    def answers(self) -> list[Answer]:
        """All that run in it."""
        return [*self.decode, *(answer for answer, _ in self.chunks)]

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding apart."""
        return len(self.decode) + sum(count for _, count in self.chunks)

    def chunk_groups(self) -> list[list[tuple[Answer, int]]]:
        """The chunks as rectangles: those of about the same length are padded to one step."""
        found: list[list[tuple[Answer, int]]] = []
        held = 0
        for chunk in sorted(self.chunks, key=lambda c: -c[1]):
            if found and found[-1][0][1] * (len(found[-1]) + 1) <= PADDED * (held + chunk[1]):
                found[-1].append(chunk)
                held += chunk[1]
            else:
                found.append([chunk])
                held = chunk[1]
        return found


class Done(NamedTuple):
    """Who got a token in a step, and who ended with it."""

    got: list[Answer]
    ended: list[Answer]


@dataclass(slots=True)
class Changes:
    """What a scheduler has decided about state; in this order.

    kept: parts of pasts to hold from now on, and of whom. twice: pages of answers that are the same
    as kept ones, and of which one will do. released: answers whose own state is needed no more.
    started: answers that begin, and from where. forgotten: parts to let go of.
    """

    kept: list[tuple[Answer, Unit]] = field(default_factory=list)
    twice: list[tuple[Answer, Node]] = field(default_factory=list)
    released: list[Answer] = field(default_factory=list)
    started: list[tuple[Answer, Start]] = field(default_factory=list)
    forgotten: list[Unit] = field(default_factory=list)
