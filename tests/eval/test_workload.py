"""Workloads as data, and traces as they are published."""

from pathlib import Path

import numpy as np
import pytest

from archs.errors import UserError
from eval.measure.traces import read_trace
from eval.measure.workload import (
    Lengths,
    Users,
    Workload,
    available_workloads,
    load_workload,
    random_voice,
    silent_voice,
)
from infer.sequence import Answer, Ending, Request


def drawn(lengths: Lengths, count: int = 20_000) -> np.ndarray:
    numbers = np.random.default_rng(0)
    return np.array([lengths.draw(numbers) for _ in range(count)])


@pytest.mark.parametrize(
    ("lengths", "mean"),
    [
        (Lengths(mean=7), 7),
        (Lengths(kind="uniform", least=100, most=1024), 562),
        (Lengths(kind="geometric", mean=50), 50),
        (Lengths(kind="lognormal", mean=200, sigma=0.8), 200),
    ],
)
def test_lengths_have_the_mean_they_say(lengths: Lengths, mean: float) -> None:
    found = drawn(lengths)
    assert found.mean() == pytest.approx(mean, rel=0.03)
    assert found.min() >= lengths.least


def test_lengths_are_kept_between_their_bounds() -> None:
    found = drawn(Lengths(kind="lognormal", mean=200, sigma=1.5, least=20, most=400))
    assert found.min() == 20
    assert found.max() == 400


def test_a_workload_is_the_same_whoever_serves_it_and_stretches_with_its_rate() -> None:
    workload = Workload(arrivals="poisson", requests=50, rate_per_s=2.0, systems=3, system_tokens=9)
    slow, fast = workload.conversations(), workload.at_rate(4.0).conversations()
    assert [t.turns for t in slow] == [t.turns for t in fast]
    assert [t.starts_s for t in slow] == pytest.approx([2 * (t.starts_s or 0) for t in fast])
    assert np.diff([t.starts_s or 0 for t in slow]).mean() == pytest.approx(0.5, rel=0.3)
    said = [[*Users(workload, v).due(1e9)] for v in (random_voice(31), silent_voice)]
    assert [len(r.prompt) for r in said[0]] == [len(r.prompt) for r in said[1]]


def test_prompts_of_one_group_open_with_the_same_tokens() -> None:
    workload = Workload(requests=40, systems=2, system_tokens=16)
    prompts = [r.prompt for r in Users(workload, random_voice(1000)).due(0)]
    openings = {tuple(p[:16]) for p in prompts}
    assert len(openings) == 2
    assert len({tuple(p[16:]) for p in prompts}) == 40


def answer_of(request: Request, tokens: list[int]) -> Answer:
    return Answer(request, 0, tokens=tokens, made=len(tokens), ending=Ending.LENGTH)


def test_the_next_turn_brings_all_before_it() -> None:
    workload = Workload(
        requests=1, turns=2, think_s=3.0, prompt=Lengths(mean=4), output=Lengths(mean=5)
    )
    for voice in (random_voice(31), silent_voice):
        users = Users(workload, voice)
        (first,) = users.due(0.0)
        users.ended(answer_of(first, [1, 2, 3, 4, 5]), 10.0)
        assert users.next_s == 13.0
        (second,) = users.due(13.0)
        assert len(second.prompt) == 4 + 5 + 4
        if voice is not silent_voice:
            assert [*second.prompt][:9] == [*first.prompt, 1, 2, 3, 4, 5]
        users.ended(answer_of(second, [1] * 5), 20.0)
        assert users.next_s == float("inf")


def test_a_closed_loop_keeps_its_users_busy() -> None:
    workload = Workload(arrivals="closed", requests=5, users=2, think_s=1.0)
    users = Users(workload, silent_voice)
    sent = [*users.due(0.0)]
    assert len(sent) == 2
    users.ended(answer_of(sent[0], []), 4.0)
    assert users.next_s == 5.0
    assert len([*users.due(5.0)]) == 1


PLAIN = "arrival_s,prompt_tokens,output_tokens"
TRACES = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n",
    "azure2024.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:00.061930+00:00,2399,6\n",
    "burst.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n6,GPT-4,1087,0,1087,API log\n"
    "7.5,GPT-4,3,4,7,API log\n",
    "mooncake.jsonl": '{"timestamp": 0, "input_length": 700, "output_length": 5, '
    '"hash_ids": [0, 1]}\n'
    '{"timestamp": 3000, "input_length": 600, "output_length": 2, "hash_ids": [0, 2]}\n',
}  # fmt: skip


def test_public_traces_are_read_as_they_are(tmp_path: Path) -> None:
    for name, text in TRACES.items():
        (tmp_path / name).write_text(text)
    azure = read_trace(tmp_path / "azure.csv")
    assert [(a.prompt_tokens, a.output_tokens) for a in azure] == [(4808, 10), (3180, 8)]
    assert azure[1].arrival_s == pytest.approx(0.052)
    assert read_trace(tmp_path / "azure2024.csv")[1].arrival_s == pytest.approx(0.052)
    burst = read_trace(tmp_path / "burst.csv")
    assert [(a.arrival_s, a.group) for a in burst] == [(0.0, "ChatGPT"), (2.5, "GPT-4")]
    mooncake = read_trace(tmp_path / "mooncake.jsonl")
    assert mooncake[1].arrival_s == 3.0
    assert mooncake[1].blocks == (0, 2)


def test_prompts_of_a_trace_share_the_blocks_it_names(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(TRACES["mooncake.jsonl"])
    first, second = Users(load_workload(str(path)), random_voice(500)).due(9.0)
    assert (len(first.prompt), len(second.prompt)) == (700, 600)
    assert first.prompt[:512] == second.prompt[:512]
    assert first.prompt[512:600] != second.prompt[512:600]


def test_a_trace_keeps_its_shape_at_another_rate() -> None:
    bursts = load_workload("bursts.csv")
    talks, faster = bursts.conversations(), bursts.at_rate(10.0).conversations()
    assert len(talks) == 120
    times, others = ([t.starts_s or 0.0 for t in found] for found in (talks, faster))
    assert others[-1] == pytest.approx(119 / 10)
    assert np.corrcoef(times, others)[0, 1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", f"{PLAIN}\n0,5,2\n1,-5,2\n", "line 3: prompt_tokens=-5"),
        ("a.csv", f"{PLAIN},user\n0,5,2,7\n", "Unknown column 'user'"),
        ("a.csv", "when,prompt_tokens,output_tokens\n0,5,2\n", "nearest lacks arrival_s"),
        ("a.csv", f"{PLAIN}\n0,5\n", "not as many values"),
        ("a.csv", f"{PLAIN}\nnan,5,2\n", "must be finite"),
        ("a.csv", f"{PLAIN}\n0,5.5,2\n", "whole number of tokens"),
        ("a.csv", f"{PLAIN}\n", "no request that was answered"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,2\n", "line 2"),
        ("a.jsonl", "{bad\n", "line 1: is no JSON"),
        ("a.jsonl", "[1]\n", "is no JSON object"),
        ("a.jsonl", '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": 3}',
         "is no list of integers"),
    ],
)  # fmt: skip
def test_a_trace_that_is_off_is_refused_by_its_line(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"arrivals": "poisson"}, "rate_per_s=0.0 must be positive"),
        ({"arrivals": "closed"}, "users=0 must be at least 1"),
        ({"arrivals": "trace"}, "a trace needs a file"),
        ({"arrivals": "often"}, "Unknown arrivals 'often'"),
        ({"requests": 0}, "requests=0 must be at least 1"),
        ({"systems": 2}, "give both, or neither"),
        ({"temperature": -1.0}, "temperature=-1.0"),
    ],
)
def test_workloads_that_cannot_be_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Workload(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "zipf"}, "Unknown kind of lengths 'zipf'"),
        ({"mean": 0}, "mean=0 must be positive"),
        ({"least": 9, "most": 3}, "most=3 is below least=9"),
    ],
)
def test_lengths_that_cannot_be_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Lengths(**options)  # type: ignore[arg-type]


def test_what_ships_can_be_read() -> None:
    assert {"chat", "uneven", "longtail", "turns"} <= set(available_workloads())
    for name in available_workloads():
        assert load_workload(name).conversations()


def test_unknown_workloads_are_refused_with_their_names() -> None:
    with pytest.raises(UserError, match="Unknown workload 'chats'"):
        load_workload("chats")
