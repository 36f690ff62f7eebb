"""MQAR: every query's answer was given before; a window can miss the pair."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.errors import UserError
from eval.tasks.mqar import Mqar
from kernels.loss.cross_entropy import IGNORED


@settings(max_examples=40, deadline=None)
@given(pairs=st.integers(1, 12), extra=st.integers(0, 20), seed=st.integers(0, 99))
def test_every_query_has_the_answer_that_was_given(pairs: int, extra: int, seed: int) -> None:
    task = Mqar(vocab=2 * pairs + 2 + extra, seq_len=4 * pairs + 2 * extra, pairs=pairs)
    inputs, targets = task.sequences(5, seed=seed, step=3)
    half = task.vocab // 2
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        keys, values = x[0 : 2 * pairs : 2], x[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= k < half for k in keys) and all(half <= v < task.vocab for v in values)
        answers = dict(zip(keys, values, strict=True))
        asked = [t for t, target in enumerate(y) if target != IGNORED]
        assert len(asked) == pairs and min(asked) >= 2 * pairs
        assert all(t % 2 == 0 and answers[x[t]] == y[t] for t in asked)


def test_a_small_power_crowds_queries_behind_the_pairs() -> None:
    places = {}
    for power in (0.01, 1.0):
        task = Mqar(vocab=256, seq_len=128, pairs=4, power_a=power)
        _, targets = task.sequences(400, seed=0, step=0)
        places[power] = (targets != IGNORED).nonzero()[:, 1].double().mean().item()
    assert places[0.01] < 40 < 60 < places[1.0]


def test_most_pairs_lie_beyond_the_tiny_suites_window() -> None:
    task = Mqar()
    inputs, targets = task.sequences(200, seed=0, step=0)
    near = total = 0
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        for t, target in enumerate(y):
            if target != IGNORED:
                near += t - (x.index(x[t]) + 1) < task.window
                total += 1
    assert near / total < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 31}, "must be even"),
        ({"pairs": 9}, "at least 4 x pairs=9"),
        ({"vocab": 16}, "too few keys"),
        ({"power_a": 0.0}, "must be positive"),
    ],
)
def test_impossible_tasks_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mqar(**options)  # type: ignore[arg-type]
