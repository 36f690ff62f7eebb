"""Points of a suite that serve: their names, their repeats, and what makes one fail."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from archs.gqa import Attention
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.measure.plan import serve_point
from eval.measure.serve_plan import ServePlan
from eval.measure.site import Site
from eval.measure.stages import measure
from eval.results.point import Point
from eval.results.rows import Found, Status, records
from infer.executor import Chosen, EngineExecutor
from infer.sequence import Answer
from kernels.sampling.nucleus import NO_TOKEN
from tests.eval.synthetic import HERE

pytestmark = pytest.mark.usefixtures("stub_roofline")


def test_plans_that_differ_have_other_words(tmp_path: Path) -> None:
    assert PLAN.words() == "workload=uneven-short requests=6"
    assert "token_budget=64" in replace(PLAN, token_budget=64).words().split()
    file = tmp_path / "a b" / "mine.toml"
    file.parent.mkdir()
    file.write_text("requests = 2\n")
    assert replace(PLAN, workload=str(file), requests=0).words() == "workload=mine.toml"


def test_another_trace_under_the_same_name_is_another_point(tmp_path: Path) -> None:
    trace, digests = tmp_path / "t.csv", []
    for tokens in (3, 4):
        trace.write_text(f"arrival_s,prompt_tokens,output_tokens\n0,5,{tokens}\n")
        plan = replace(PLAN, workload=str(trace), requests=0)
        point = serve_point(ModelSpec(arch="gqa", scale=get_scale("tiny")), plan, "cpu")
        digests.append(point.digest)
    assert digests[0] != digests[1]


PLAN = ServePlan(
    scale="tiny", workload="uneven-short", requests=6, max_sequences=3,
    batching=("continuous", "static"), repeats=2,
)  # fmt: skip


def measured(arch: str = "gqa") -> Found:
    point = serve_point(ModelSpec(arch=arch, scale=get_scale("tiny")), PLAN, "cpu")
    again = Point.from_json(point.to_json())
    assert again == point
    return measure(again, Site(None, torch.device("cpu")))


def test_figures_are_medians_over_repeats_of_policies_that_take_turns() -> None:
    found = measured()
    assert found.failure is None
    rows = {(row.options, row.measure): row for row in found.rows}
    words = [f"workload=uneven-short requests=6 batching={b}" for b in PLAN.batching]
    assert {options for options, _ in rows} == {None, *words}
    assert rows[words[0], "output_tok_per_s"].n == 12
    assert rows[None, "batching_gain"].n == 2
    assert " to " in rows[None, "batching_gain"].note
    lines = records(
        serve_point(ModelSpec(arch="gqa", scale=get_scale("tiny")), PLAN, "cpu"), found, HERE
    )
    assert {line["options"] for line in lines} == {"workload=uneven-short requests=6", *words}


def test_a_mixer_whose_extend_is_wrong_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attention, "extend", lambda self, x, state: x)
    failure = measured().failure
    assert failure is not None
    assert failure.status == Status.INCORRECT


def test_an_answer_that_depends_on_its_company_fails_the_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = EngineExecutor._sample

    def confused(
        self: EngineExecutor, logits: torch.Tensor, asked: Sequence[tuple[int, Answer]]
    ) -> list[Chosen]:
        # The logits of a neighbour, as if a page had been lent twice.
        return [(members, tokens.flip(0)) for members, tokens in sample(self, logits, asked)]

    monkeypatch.setattr(EngineExecutor, "_sample", confused)
    failure = measured().failure
    assert failure is not None
    assert failure.status == Status.INCORRECT
    assert "in company and" in failure.note


@pytest.mark.parametrize(
    ("arch", "drafts", "status"),
    [("gqa", 0, Status.OK), ("gdn", 0, Status.OK), ("gqa", 2, Status.OK),
     ("gdn", 2, Status.UNSUPPORTED)],
)  # fmt: skip
def test_states_in_few_bits_are_served_and_drafted_for_where_that_loses_nothing(
    arch: str, drafts: int, status: Status
) -> None:
    """Answers are those of their requests alone, but for what the codes themselves leave open."""
    plan = replace(
        PLAN, state="kv:int4-g32,memory:int4", drafts=drafts, batching=("continuous",), repeats=1
    )
    point = serve_point(ModelSpec(arch=arch, scale=get_scale("tiny")), plan, "cpu")
    found = measure(point, Site(None, torch.device("cpu")))
    assert found.failure is None if status == Status.OK else found.failure is not None
    if found.failure is not None:
        assert found.failure.status == status
        assert "'memory:int4' is rounded at the end of every step" in found.failure.note
    assert found.about.state_format == {"gqa": "kv:int4-g32", "gdn": "memory:int4"}[arch]


def test_answers_that_fail_fail_the_point(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(
        self: EngineExecutor, logits: torch.Tensor, asked: Sequence[tuple[int, Answer]]
    ) -> list[Chosen]:
        return [([answer for _, answer in asked], torch.full((len(asked),), NO_TOKEN))]

    monkeypatch.setattr(EngineExecutor, "_sample", without)
    failure = measured().failure
    assert failure is not None
    assert failure.status == Status.NAN
    assert "24 of 24 answers failed" in failure.note
