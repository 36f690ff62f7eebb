"""`decodebench serve`, measured and simulated, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.predict.roofline import resident_bytes
from tests.eval.conftest import Command

pytestmark = pytest.mark.usefixtures("stub_roofline")

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
        assert row["output_tok_per_s_sim"] > 0
        assert row["ttft_p50_sim_ms"] > 0
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


def test_prefixes_are_found_whatever_an_architecture_remembers(
    decodebench: Command, tmp_path: Path
) -> None:
    """Measured: the third of three prompts that begin alike is found up to where they part."""
    path = tmp_path / "alike.toml"
    path.write_text(
        'arrivals = "closed"\nusers = 1\nrequests = 3\nsystems = 1\nsystem_tokens = 40\n'
        "answers = 2\ntemperature = 0.7\nprompt = { mean = 8 }\noutput = { mean = 6 }\n"
    )
    argv = ("--workload", str(path), "--page-size", "8", "--prefix-cache", "--checkpoints", "9")
    outcome = decodebench(
        "serve", "--arch", "gqa,swa,mamba2,gdn:gqa=1:1", "--scale", "tiny", *argv, "--json"
    )
    assert outcome.code == 0
    rows = {row["arch"]: row for row in json.loads(outcome.out)}
    # Of 48 tokens the second answer to each prompt finds 47; rows are found at once, what is not
    # only rows by the third prompt, from where the second had left a checkpoint.
    assert rows["gqa"]["hit_rate"] == pytest.approx((3 * 47 + 2 * 40) / (6 * 48))
    for arch in ("swa", "mamba2", "gdn:gqa=1:1"):
        assert rows[arch]["hit_rate"] == pytest.approx((3 * 47 + 40) / (6 * 48))
        assert rows[arch]["served_requests"] == 3
    assert "prefix_cache=1 checkpoints=9" in rows["gqa"]["options"]
    assert rows["gqa"]["shared_state"] > 0.3
    assert rows["mamba2"]["shared_state"] == 0


def test_drafts_are_verified_in_a_running_batch(decodebench: Command, workload: str) -> None:
    argv = (*TINY, "--workload", workload, "--page-size", "8", "--drafts", "2", "--prefix-cache")
    outcome = decodebench(*argv, "--json")
    assert outcome.code == 0
    for row in json.loads(outcome.out):
        assert row["served_requests"] == 8
        assert 1 <= row["tokens_per_verification"] <= 3
        assert "drafts=2" in row["options"]
        assert "output_tok_per_s_pred" not in row and "output_tok_per_s_sim" not in row


def test_intervals_of_checkpoints_are_compared_and_drawn(
    decodebench: Command, tmp_path: Path
) -> None:
    picture = tmp_path / "prefixes.svg"
    argv = (
        "serve", "--simulate", "--arch", "gqa,gdn", "--scale", "1b", "--memory", "8GiB",
        "--workload", "instructions", "--requests", "60", "--checkpoint-every", "0,256",
    )  # fmt: skip
    outcome = decodebench(*argv, "--prefix-cache", "--plot", str(picture), "--json")
    assert outcome.code == 0
    rows = {(r["arch"], r["checkpoint_every"]): r for r in json.loads(outcome.out)}
    assert rows["gqa", 0]["hit_rate"] == rows["gqa", 256]["hit_rate"] > 0.3
    assert 0 < rows["gdn", 0]["hit_rate"] < rows["gdn", 256]["hit_rate"]
    assert rows["gdn", 0]["cached_state_bytes"] < rows["gdn", 256]["cached_state_bytes"]
    assert "kept of prefixes, GiB" in picture.read_text()
    refused = decodebench(*argv[:-1], "0", "--plot", str(picture))
    assert refused.code == 2
    several = decodebench(*argv[:1], *argv[2:])
    assert several.code == 2


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
        (("--prefix-cache", "--batching", "static"), "prefixes are shared by continuous batches"),
        (("--checkpoint-every", "64"), "checkpoint_every=64 without prefix_cache=true"),
        (("--prefix-cache", "--checkpoint-every", "64,-8"), "checkpoint_every '-8' must be"),
        (("--drafts", "2"), "a clock makes no tokens"),
        (("--checkpoints", "-1"), "checkpoints=-1 must be at least 0"),
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
