"""Servers whose answers share what they can, on a clock: leaps, and users who change their mind."""

from dataclasses import replace

import pytest

from eval.measure.serve_plan import serve
from eval.measure.workload import Lengths, Users, silent_voice
from eval.predict.serving import ClockExecutor, ConstantTimes
from infer.capacity import Capacity
from infer.pages import TableKey
from infer.policy import Policy
from infer.scheduler import Scheduler
from infer.sequence import Ending
from infer.server import Server, drive
from infer.turns import Turn
from tests.eval.test_serving import LIMITS, SHARING


class Stepwise(ClockExecutor):
    """A clock that takes every step by itself."""

    leaps = False


@pytest.mark.parametrize("slots", [0, 5])
def test_leaps_are_the_steps_they_stand_for_with_prefixes_and_answers(slots: int) -> None:
    # Arrivals off the grid of steps: where both fall together rounding decides.
    output = Lengths(kind="geometric", mean=20, most=40)
    workload = replace(SHARING, requests=80, turns=1, output=output, rate_per_s=71.3)
    key = TableKey(1, None, 0)
    for pages, every in ((30, 0), (44, 8), (80, 16)):
        capacity = Capacity(
            max_sequences=5, max_context=256, page_size=8, pages={key: pages}, slots=slots,
            page_bytes={key: 10}, slot_bytes=70,
        )  # fmt: skip
        policy = Policy(token_budget=64, prefix_cache=True, checkpoint_every=every)
        leaping, single = (
            serve(
                executor(ConstantTimes(1.37)), capacity, policy, workload, silent_voice,
                keep_schedule=True,
            )
            for executor in (ClockExecutor, Stepwise)
        )  # fmt: skip
        assert leaping.log.schedule == single.log.schedule
        figures = [run.log.figures(run.answers, LIMITS) for run in (leaping, single)]
        assert figures[0].keys() == figures[1].keys()
        for name, value in figures[0].items():
            assert value == pytest.approx(figures[1][name], rel=0.05, abs=0.01), name
        assert figures[0]["served_requests"] == 80
        assert figures[0]["recomputed_tokens"] >= 0


def test_users_go_on_when_answers_are_forked_and_cancelled() -> None:
    workload = replace(SHARING, arrivals="closed", users=2, requests=6, rate_per_s=0)
    key = TableKey(1, None, 0)
    capacity = Capacity(max_sequences=5, max_context=256, page_size=8, pages={key: 90})
    server = Server(Scheduler(capacity, Policy(token_budget=64)), ClockExecutor(ConstantTimes(1)))
    turns = 0

    def meddle(turn: Turn) -> None:
        nonlocal turns
        turns += 1
        for answer, before in turn.got:
            if before is None and answer.ending is None and answer.number % 3 == 0:
                server.fork(answer)
            if before is None and answer.number % 7 == 5:
                server.cancel(answer)

    answers = drive(server, Users(workload, silent_voice), meddle)
    talks = {a.request.name.split(".")[0] for a in answers}
    assert talks == {str(n) for n in range(6)}
    assert all(a.ending is not None for a in answers)
    assert any(a.ending is Ending.CANCELLED for a in answers)
