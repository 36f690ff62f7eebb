"""How many threads torch computes with: one, for what is not timed and made of small operations."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Within it one thread, if so: results do not depend on how many run at once, and small
    operations do not wait for each other's threads.
    """
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
