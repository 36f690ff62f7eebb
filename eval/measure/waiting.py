"""How long the threads of an operation wait for each other awake; OpenMP reads it as torch loads.

By default they look 300,000 times, which takes a core even where nothing is gained: beside a
program that has one of two cores, every operation then waits for the scheduler's next turn (4 ms),
and a step of many small ones takes a hundred times as long. A thousand looks bridge the gap between
two operations; threads that wait longer sleep, and are woken at once.
"""

from collections.abc import MutableMapping

#: Of GNU's OpenMP, which torch brings. Set whatever the user has set: figures must not differ.
SPINS = {"GOMP_SPINCOUNT": "1000"}


def wait_briefly(environment: MutableMapping[str, str]) -> None:
    """Set it for a process that has not imported torch yet."""
    environment.update(SPINS)
