"""Selective copying: markers ask for what lay among the blanks, in order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.errors import UserError
from eval.tasks.selective_copy import BLANK, MARKER, SelectiveCopy
from kernels.loss.cross_entropy import IGNORED


@settings(max_examples=40, deadline=None)
@given(copied=st.integers(1, 12), extra=st.integers(0, 20), seed=st.integers(0, 99))
def test_targets_are_the_tokens_in_their_order(copied: int, extra: int, seed: int) -> None:
    task = SelectiveCopy(vocab=4 + extra, seq_len=2 * copied + extra, copied=copied)
    inputs, targets = task.sequences(5, seed=seed, step=3)
    first = task.seq_len - copied
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert [t for t in x[:first] if t != BLANK] == y[first:]
        assert x[first:] == [MARKER] * copied and MARKER not in x[:first]
        assert y[:first] == [IGNORED] * first


def test_gaps_differ_from_sequence_to_sequence() -> None:
    inputs, _ = SelectiveCopy().sequences(100, seed=0, step=0)
    assert len({tuple(row.nonzero()[:, 0].tolist()) for row in inputs}) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 15}, "at least 2 x copied=8"),
        ({"vocab": 3}, "vocab=3 must be at least 4"),
        ({"copied": 0}, "copied=0 must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SelectiveCopy(**options)  # type: ignore[arg-type]
