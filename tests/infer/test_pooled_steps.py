"""Steps that pool tokens on our kernels, in the interpreter; attention is in its torch form."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from archs.ops import pooling
from eval.proof.conformance import Subject, error_of
from eval.proof.conformance.laws import check_fork, check_padding, check_rollback
from kernels.pooling import append as module
from tests.infer.test_device import TOLERANCE, subject_of
from tests.kernels.interpreter import interpreted

#: Launches of a layer in a short step: of rows, and of index keys.
LAUNCHES = {"hca": 1, "csa": 2}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(pooling._ATTEND, "triton", pooling._attend)
    monkeypatch.setitem(pooling._ATTEND_PICKED, "triton", pooling._attend_picked)
    with interpreted():
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The new tokens of each launch."""
    found, honest = list[int](), module.pooled_append

    def append(q: Any, *given: Any, **options: Any) -> None:
        found.append(q.shape[1])
        honest(q, *given, **options)

    monkeypatch.setattr(module, "pooled_append", append)
    return found


@pytest.mark.parametrize("arch", LAUNCHES)
def test_steps_equal_the_torch_form(arch: str, launches: list[int]) -> None:
    """Prompts and long steps have no such launch, short ones have one for each kind of rows."""
    subject, pieces = subject_of(arch), [15, 1, 3, 13, 1, 4, 9, 2]
    tokens = subject.tokens(2, sum(pieces))
    engine = subject.engine(2, 64, lookback=8)
    slots = [engine.store.add(), engine.store.add()]
    got = subject.run(engine, slots, tokens, pieces)
    assert error_of(got, subject.expected(tokens)) <= TOLERANCE
    assert engine.kernel_backend == "triton"
    layers = LAUNCHES[arch] * len(engine.model.layers)
    assert launches == [n for n in pieces if n <= 9 for _ in range(layers)]


@pytest.mark.parametrize("arch", LAUNCHES)
def test_rows_that_are_joined_are_not_written_by_a_launch(arch: str, launches: list[int]) -> None:
    """More than a ring holds: an indexer's keys, which have none, are."""
    subject, pieces = subject_of(arch), [30, 3, 1]
    tokens = subject.tokens(1, sum(pieces))
    engine = subject.engine(1, 64)
    got = subject.run(engine, [engine.store.add()], tokens, pieces)
    assert error_of(got, subject.expected(tokens)) <= TOLERANCE
    layers, kinds = len(engine.model.layers), LAUNCHES[arch]
    assert launches == [3] * (layers * (kinds - 1)) + [1] * (layers * kinds)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("check", [check_padding, check_fork, check_rollback])
@pytest.mark.parametrize("arch", LAUNCHES)
def test_the_conformance_kit_holds(arch: str, check: Callable[[Subject], object]) -> None:
    verdict = check(subject_of(arch))
    assert verdict.passed, verdict.detail  # type: ignore[attr-defined]
