"""How long the threads of an operation wait for each other awake; OpenMP reads it as torch loads.

By default they look 300,000 times, which bridges the gaps between operations and takes a core even
where nothing is gained. Beside a program that has one of two cores, every operation then waits for
the scheduler's next turn (4 ms), and a step of many small ones takes a hundred times as long.
Threads that look a thousand times and then sleep are woken at once; on a quiet machine that would
make small steps up to 1.6 times as slow, so there nothing is changed.
"""

import time
from collections.abc import MutableMapping

from eval.predict.neighbours import Neighbours

#: Of GNU's OpenMP, which torch brings.
SPINS = {"GOMP_SPINCOUNT": "1000"}
#: How long others are watched; the system counts in hundredths of a second.
WATCHED_S = 0.1


def wait_briefly_beside_others(environment: MutableMapping[str, str]) -> None:
    """Say so for a process that has not imported torch yet, where other programs have the cores.

    Its rows say that they are busy, as they would otherwise.
    """
    with Neighbours() as others:
        time.sleep(WATCHED_S)
    if others.word:
        environment.update(SPINS)
