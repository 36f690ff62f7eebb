"""Bytes that a step is seen to read of a state: each once, gathers by what they return."""

import torch

from eval.proof.conformance.tally import Tally


def test_gathers_of_a_state_that_is_read_whole_add_nothing() -> None:
    rows, at = torch.randn(6, 4), torch.tensor([1, 1, 5])

    def read(*, whole: bool, gathers: bool) -> int:
        held = rows.clone()
        with Tally([]) as tally:
            tally.watch_state(held)
            if gathers:
                held[at].sum()
            (held if whole else held[:2]).mul(2.0)
        return tally.state_read_bytes

    assert read(whole=False, gathers=False) == 2 * 16
    assert read(whole=False, gathers=True) == (2 + 3) * 16
    assert read(whole=True, gathers=False) == read(whole=True, gathers=True) == 6 * 16
