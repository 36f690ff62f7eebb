"""How many tokens to draft: always as many, or what the acceptance of the last rounds pays for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from archs.checks import require_at_least
from archs.errors import UserError
from archs.spec import RECURRENT_LIMIT


class DraftLength(Protocol):
    """How many tokens to draft next for one sequence."""

    def next(self) -> int:
        """Drafts of the next round."""
        ...

    def saw(self, drafted: int, kept: int) -> None:
        """The last round's drafts, and how many of them were right."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always as many."""

    drafts: int

    def next(self) -> int:
        """As `DraftLength.next`."""
        return self.drafts

    def saw(self, drafted: int, kept: int) -> None:
        """As `DraftLength.saw`."""


#: Plain rounds after which an adaptive sequence drafts one token again.
PROBE = 16


@dataclass(slots=True)
class Adaptive:
    """The length that pays most at the acceptance of the last rounds.

    costs: time of a round of k drafts over that of one without, k from 0 to the most that are
    drafted. A sequence whose drafts do not pay is decoded plainly and tries again after `PROBE`
    rounds.
    """

    costs: Sequence[float]
    #: Weights of rounds fall by this factor; the estimate starts at one half.
    memory: float = 0.9
    tried: float = 1.0
    right: float = 0.5
    idle: int = 0

    def next(self) -> int:
        """As `DraftLength.next`: the k of most expected tokens per time."""
        chosen = max(range(len(self.costs)), key=self._gain)
        if chosen == 0 and self.idle >= PROBE:
            return 1
        return chosen

    def saw(self, drafted: int, kept: int) -> None:
        """As `DraftLength.saw`."""
        if not drafted:
            self.idle += 1
            return
        self.idle = 0
        self.tried = self.memory * self.tried + kept + (kept < drafted)
        self.right = self.memory * self.right + kept

    def _gain(self, k: int) -> float:
        return expected_tokens(self.right / self.tried, k) / self.costs[k]


def require_drafts(drafts: Sequence[int]) -> None:
    """Raise UserError unless each K is a number of drafts that any target's step can take back."""
    for k in drafts:
        require_at_least("drafts", k, 1)
        if k >= RECURRENT_LIMIT:
            raise UserError(
                f"drafts={k} are more than a step can take back; take at most {RECURRENT_LIMIT - 1}"
            )


def expected_tokens(acceptance: float, drafts: int) -> float:
    """Tokens of one verification where each draft is right with this probability, independently:
    (1 - α^(K+1)) / (1 - α) (arXiv 2211.17192, eq. 1).
    """
    return float(sum(acceptance**i for i in range(drafts + 1)))
