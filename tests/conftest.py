"""What all tests share: uninitialised memory is NaN, one thread, seeds are fixed."""

import gc
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)
#: Without a GPU the other one writes down, at every call, where it was called from.
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def pytest_collection_finish() -> None:
    """Garbage collection passes by what lives until the end: modules and the tests themselves."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that reading what was never written shows."""
    SEED(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fast_algorithms(poisoned_memory: None) -> None:
    """The algorithms of everyday use, with which compiled code is other code."""
    torch.use_deterministic_algorithms(False)
