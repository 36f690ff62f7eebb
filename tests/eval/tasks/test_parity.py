"""Parity: each target says whether the ones so far are odd; longer sequences are asked later on."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.errors import UserError
from eval.tasks.parity import Parity
from kernels.loss.cross_entropy import IGNORED


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 70), first=st.integers(1, 69), seed=st.integers(0, 99))
def test_targets_are_the_parity_of_the_bits_so_far(length: int, first: int, seed: int) -> None:
    first = min(first, length - 1)
    task = Parity(seq_len=length, asked_from=first, longer=0)
    inputs, targets = task.sequences(5, seed=seed, step=3)
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert set(x) <= {0, 1}
        assert y[:first] == [IGNORED] * first
        assert y[first:] == [sum(x[: t + 1]) % 2 for t in range(first, length)]


def test_both_answers_are_equally_likely_everywhere() -> None:
    targets = Parity(longer=0).sequences(4000, seed=0, step=0)[1][:, 1:]
    odd = targets.double().mean(0)
    assert odd.min() > 0.45 and odd.max() < 0.55


def test_longer_sequences_are_asked_past_the_trained_length() -> None:
    task = Parity(seq_len=24, longer=60, steps=7)
    longer = task.beyond()
    assert longer is not None and (longer.seq_len, longer.steps) == (60, 7)
    targets = longer.sequences(3, seed=0, step=0)[1]
    assert (targets[:, :24] == IGNORED).all() and (targets[:, 24:] != IGNORED).all()
    assert longer.beyond() is None and Parity(longer=0).beyond() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 3}, "vocab=3, and bits are 0 and 1"),
        ({"asked_from": 0}, "asked_from=0 must be at least 1"),
        ({"asked_from": 40}, "asked_from=40 leaves nothing to ask in seq_len=40"),
        ({"longer": 40}, "longer=40 must be above seq_len=40"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Parity(**options)
