"""Where one curve of times comes to lie under another, between the contexts that are known."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

ALWAYS, NEVER = "always", "never"


class Crossing(NamedTuple):
    """Where the first of two is faster.

    verdict: "from" or "until" `context`, the last at which the order turns, or "always" or "never",
    without one. earlier: the contexts at which it turns before, ascending.
    """

    verdict: str
    context: int | None
    earlier: tuple[int, ...] = ()

    def told(self, number: Callable[[int], str], *, below: str, on: str, to: str) -> str:
        """The contexts at which the first is faster: `below`, `on` and `to` are templates of spans
        that begin at no crossing, end at none, and lie between two; "" without a crossing.
        """
        if self.context is None:
            return ""
        marks = [number(context) for context in (*self.earlier, self.context)]
        spans = []
        if self.verdict == "from":
            spans.append(on.format(marks.pop()))
        while len(marks) > 1:
            last = marks.pop()
            spans.append(to.format(marks.pop(), last))
        if marks:
            spans.append(below.format(marks.pop()))
        return ", ".join(reversed(spans))


def turns(ahead: Sequence[bool]) -> list[int]:
    """The places at which the order is another than one place before."""
    return [i for i in range(1, len(ahead)) if ahead[i] != ahead[i - 1]]


def crossing(ahead: Sequence[bool], at: Callable[[int], int]) -> Crossing:
    """Of whether the first is ahead by place; `at` says which context place i turned at."""
    found = [at(i) for i in turns(ahead)]
    if not found:
        return Crossing(ALWAYS if ahead[0] else NEVER, None)
    return Crossing("from" if ahead[-1] else "until", found[-1], tuple(found[:-1]))


def between(contexts: Sequence[int], gaps: Sequence[float]) -> Crossing:
    """Interpolated, from the first's time less the second's by context."""

    def at(i: int) -> int:
        share = gaps[i - 1] / (gaps[i - 1] - gaps[i])
        return round(contexts[i - 1] + share * (contexts[i] - contexts[i - 1]))

    return crossing([gap < 0 for gap in gaps], at)
