"""`decodebench serve`, measured and simulated, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.predict.roofline import resident_bytes
from tests.eval.conftest import Command

TINY = ("serve", "--arch", "gqa,gdn", "--scale", "tiny", "--max-sequences", "3")
WORKLOAD = """
requests = 8
prompt = { kind = "uniform", least = 1, most = 20 }
output = { kind = "uniform", least = 2, most = 12 }
"""


@pytest.fixture
def workload(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(WORKLOAD)
    return str(path)


def test_both_policies_are_measured_beside_their_prediction(
    decodebench: Command, workload: str
) -> None:
    argv = (*TINY, "--workload", workload, "--batching", "continuous,static", "--page-size", "8")
    outcome = decodebench(*argv, "--json")
    assert outcome.code == 0
    rows = json.loads(outcome.out)
    assert [(r["arch"], r["options"].split("batching=")[1]) for r in rows] == [
        ("gqa", "continuous"), ("gqa", "static"), ("gdn", "continuous"), ("gdn", "static"),
    ]  # fmt: skip
    for row in rows:
        assert row["served_requests"] == 8
        assert row["output_tok_per_s"] > 0
        assert row["output_tok_per_s_pred"] > 0
        assert 0 < row["host_share"] < 1
        assert row["ttft_p50_ms"] <= row["ttft_p99_ms"] <= row["e2e_p99_ms"]
        assert row["batching_gain"] > 0
    assert 0 < rows[0]["page_waste"] < rows[0]["page_waste_contiguous"] < 1
    assert "page_waste" not in rows[2]


def test_a_simulation_answers_for_any_part_and_memory(decodebench: Command) -> None:
    argv = ("serve", "--simulate", "--arch", "gqa,mamba2", "--scale", "1b", "--workload", "chat")
    outcome = decodebench(*argv, "--memory", "8GiB", "--rate", "1,4", "--json")
    assert outcome.code == 0
    rows = json.loads(outcome.out)
    assert [(r["arch"], r["arrival_req_per_s"]) for r in rows] == [
        ("gqa", 1.0), ("gqa", 4.0), ("mamba2", 1.0), ("mamba2", 4.0),
    ]  # fmt: skip
    assert all(r["served_requests"] == 200 and not r["saturated"] for r in rows)
    shown = decodebench(*argv, "--hardware", "h100,h200")
    assert shown.code == 0
    assert "h200" in shown.out
    assert "goodput" in shown.out


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("--rate", "0"), "rate '0' must be requests per second above zero"),
        (("--rate", "fast"), "rate 'fast'"),
        (("--memory", "0GiB"), "memory"),
        (("--memory", "much"), "memory"),
        (("--memory", "100MB"), "does not hold the weights"),
        (("--workload", "chats"), "Did you mean 'chat'"),
        (("--workload", "no.csv"), "does not exist"),
        (("--batching", "dynamic"), "Unknown batching 'dynamic'"),
        (("--token-budget", "2"), "token_budget=2 is less than"),
        (("--max-sequences", "-1"), "max_sequences"),
        (("--slo-ttft-ms", "0"), "slo_ttft_ms=0"),
        (("--hardware", "h1000"), "h1000"),
        (("--arch", "gqaa"), "gqaa"),
        (("--max-context", "16", "--allocation", "contiguos"), "contiguos"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    decodebench: Command, argv: tuple[str, ...], told: str
) -> None:
    outcome = decodebench(
        "serve", "--simulate", "--arch", "gqa", "--scale", "1b", "--requests", "20", *argv
    )
    assert outcome.code == 2, outcome.out
    assert told in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_a_memory_that_holds_no_sequence_is_a_row_with_its_reason(decodebench: Command) -> None:
    models = [
        ModelSpec(arch=arch, scale=get_scale("8b")).outline(torch.bfloat16)
        for arch in ("mha", "mamba2")
    ]
    # Beside the weights, a page of 2,048 tokens of mha takes more than some states of mamba2.
    gib = (max(map(resident_bytes, models)) + 600e6) / 2**30
    outcome = decodebench(
        "serve", "--simulate", "--arch", "mha,mamba2", "--scale", "8b", "--memory", f"{gib}GiB",
        "--page-size", "2048", "--json",
    )  # fmt: skip
    without, fits = json.loads(outcome.out)
    assert outcome.code == 0
    assert "do not hold one sequence of 2048 tokens" in without["note"]
    assert "request_per_s" not in without
    assert fits["served_requests"] == 200


def test_a_request_beyond_the_context_is_refused_alone(
    decodebench: Command, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,5\n0,500,5\n0.1,12,3\n")
    argv = ("serve", "--simulate", "--arch", "gqa", "--scale", "1b", "--max-context", "64")
    (row,) = json.loads(decodebench(*argv, "--workload", str(trace), "--json").out)
    assert (row["served_requests"], row["refused_requests"]) == (2, 1)
