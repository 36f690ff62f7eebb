"""The share of this process's cores that other programs take while something is timed.

A time on shared cores is no time of this machine, so every timing records the share.
"""

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

STAT = Path("/proc/stat")
#: The share of its cores from which on a machine counts as busy.
BUSY = 0.1
#: Fields of a core's line that are work: user, nice, system, irq, softirq, steal.
WORK = (1, 2, 3, 6, 7, 8)


class Neighbours:
    """A context; afterwards `share` is what others took, 0 to 1; None if unknown.

    Processes that this one started count as others until they have ended and been waited for.
    """

    share: float | None = None

    def __enter__(self) -> Self:
        self._began_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        elapsed_s, busy_s = time.monotonic() - self._began_s, _busy_s()
        if busy_s is None or self._busy_s is None or elapsed_s <= 0:
            return
        others_s = busy_s - self._busy_s - (_own_s() - self._own_s)
        # The system counts in hundredths of a second, and a core more or less is no neighbour.
        tick_s = 2 / os.sysconf("SC_CLK_TCK")
        cores = len(os.sched_getaffinity(0))
        self.share = min(max(others_s / cores - tick_s, 0.0) / elapsed_s, 1.0)

    @property
    def word(self) -> str:
        """As `word` of the share."""
        return word(self.share)


def word(share: float | None) -> str:
    """A warning about what was timed; "" if the machine was quiet."""
    if share is None or share < BUSY:
        return ""
    return f"busy: other programs took {100 * share:.0f} % of the cores"


def _own_s() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _busy_s() -> float | None:
    """Work of the cores that this process may run on, in seconds since the system started."""
    if not STAT.exists():
        return None
    mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = 0
    for line in STAT.read_text().splitlines():
        fields = line.split()
        if fields and fields[0] in mine:
            ticks += sum(int(fields[i]) for i in WORK)
    return ticks / os.sysconf("SC_CLK_TCK")
