"""Servers on a clock and on an engine: one schedule, and figures that can be computed by hand."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from archs.backbone import Model
from archs.cost import Step
from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from eval.measure.serve_plan import Served, ServePlan, loads, longest, serve, typical, uneven
from eval.measure.served import Limits, weighted_percentile
from eval.measure.simulated import simulate
from eval.measure.workload import Lengths, Workload, random_voice, silent_voice
from eval.predict.accelerators import hardware_of
from eval.predict.roofline import step_ms
from eval.predict.serving import ClockExecutor, ConstantTimes, StepTimes
from infer.batch import Batch
from infer.capacity import Capacity
from infer.engine import Engine
from infer.executor import EngineExecutor
from infer.policy import Policy
from infer.turns import Executor, Ran

LIMITS = Limits(ttft_ms=1000, tpot_ms=50)
H100 = hardware_of("h100", "bfloat16", (1, 2, 4, 8), None).roofline
SMALL = get_scale("tiny").with_options(
    {"d_model": 64, "head_dim": 32, "n_layers": 2, "vocab_size": 31, "seq_len": 16}
)


def outline(arch: str, scale: str = "70m") -> Model:
    return ModelSpec(arch=arch, scale=get_scale(scale)).outline(torch.bfloat16)


def on_constant_steps(workload: Workload, batching: str, batch: int) -> Served:
    capacity = Capacity(max_sequences=batch, max_context=longest(workload), page_size=64)
    executor = ClockExecutor(ConstantTimes(10.0))
    return serve(executor, capacity, Policy(batching=batching), workload, silent_voice)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        # E[max of 32] / E of uniform 100..1024; of a geometric about the harmonic number of 32.
        (Lengths(kind="uniform", least=100, most=1024), (100 + 925 * 32 / 33 - 0.5) / 562),
        (Lengths(kind="geometric", mean=200), sum(1 / n for n in range(1, 33))),
    ],
)
def test_continuous_batching_gains_what_the_oracle_says(lengths: Lengths, expected: float) -> None:
    workload = Workload(requests=32 * 500, prompt=Lengths(mean=1), output=lengths)
    rates = {}
    for batching in ("continuous", "static"):
        served = on_constant_steps(workload, batching, 32)
        rates[batching] = served.log.figures(served.answers, LIMITS)["output_tok_per_s"]
    gain = rates["continuous"] / rates["static"]
    made = [talk.turns[0][1] for talk in workload.conversations()]
    assert uneven(made, 32) == pytest.approx(expected, rel=0.02)
    assert gain == pytest.approx(expected, rel=0.03)


def test_figures_of_two_requests_by_hand() -> None:
    workload = Workload(requests=2, prompt=Lengths(mean=1), output=Lengths(mean=5))
    served = on_constant_steps(workload, "continuous", 1)
    found = served.log.figures(served.answers, Limits(ttft_ms=30, tpot_ms=10))
    # One after the other: tokens at 10..50 ms, and at 60..100 ms.
    assert found["output_tok_per_s"] == pytest.approx(100)
    assert found["request_per_s"] == pytest.approx(20)
    assert found["goodput_req_per_s"] == pytest.approx(10)
    assert found["ttft_p50_ms"] == pytest.approx(35)
    assert found["tpot_p50_ms"] == found["itl_p99_ms"] == pytest.approx(10)
    assert found["e2e_p99_ms"] == pytest.approx(99.5)
    assert found["queue_p50_ms"] == pytest.approx(25)
    assert found["running_sequences"] == 1
    assert found["preemptions"] == found["refused_requests"] == 0


def test_paging_lets_more_than_twice_as_many_requests_run() -> None:
    model, at_once = outline("gqa", "1b"), {}
    for allocation in ("paged", "contiguous"):
        plan = ServePlan(
            scale="1b", workload="longtail", requests=2000, memory_gib=4, max_sequences=256,
            allocation=allocation, token_budget=2048,
        )  # fmt: skip
        capacity = plan.capacity(model, plan.load, 3 << 30)
        served = serve(
            ClockExecutor(ConstantTimes(10.0)), capacity, plan.policy("continuous"), plan.load,
            silent_voice,
        )  # fmt: skip
        found = served.log.figures(served.answers, LIMITS)
        at_once[allocation] = found["running_sequences"]
        if allocation == "paged":
            assert found["page_waste"] < 0.15
            assert found["page_waste_contiguous"] > 0.5
    assert at_once["paged"] > 2 * at_once["contiguous"]


@pytest.mark.parametrize("arch", [*REGISTRY, *HYBRIDS])
def test_ragged_steps_take_the_mean_of_uniform_ones(arch: str) -> None:
    model = outline(arch)
    times = StepTimes(model, H100, max_context=4096, padded=False)

    def uniform(batch: int, new: int, context: int) -> float:
        return step_ms(model.cost(Step(batch, new, context)), H100)

    assert times.rectangle_ms([1024, 1024], 1) == pytest.approx(uniform(2, 1, 1024), rel=1e-6)
    ragged = [0, 100, 700, 4000]
    mean = np.mean([uniform(4, 1, n) for n in ragged])
    assert times.rectangle_ms(ragged, 1) == pytest.approx(mean, rel=0.01)
    # Between the lengths of chunks that times are made of.
    assert times.rectangle_ms([512], 100) == pytest.approx(uniform(1, 100, 512), rel=0.02)
    steps = sum(times.rectangle_ms([n, n + 50], 1) for n in range(200, 300))
    assert times.decode_ms([200, 250])(100) == pytest.approx(steps, rel=1e-6)


class OnClock(EngineExecutor):
    """An engine's tokens at a clock's times."""

    def __init__(self, engine: Engine, clock: ClockExecutor, *, ahead: bool = False) -> None:
        super().__init__(engine, ahead=ahead)
        self._clock = clock

    def now_s(self) -> float:
        return self._clock.now_s()

    def wait(self, until_s: float) -> None:
        self._clock.wait(until_s)

    def run(self, batch: Batch, times: int, until_s: float) -> Ran:
        found = super().run(batch, times, until_s)
        self._clock.run(batch, 1, until_s)
        return found


POISSON = Workload(
    arrivals="poisson", rate_per_s=400.0, requests=30, systems=2, system_tokens=5,
    prompt=Lengths(kind="geometric", mean=9, most=40),
    output=Lengths(kind="geometric", mean=12, most=40),
)  # fmt: skip
#: Conversations that begin alike, of which every turn has two answers.
SHARING = replace(
    POISSON, requests=12, turns=2, answers=2, temperature=0.8, system_tokens=21, think_s=0.01,
    prompt=Lengths(kind="geometric", mean=6, most=12),
    output=Lengths(kind="geometric", mean=8, most=16),
)  # fmt: skip


def engine_in(
    sequences: float, arch: str, workload: Workload, checkpoints: int = 0
) -> tuple[Engine, Capacity]:
    """An engine with memory for so many sequences at full length, and what it may hand out."""
    model = ModelSpec(arch=arch, scale=SMALL, hidden=16).build(seed=1).eval()
    capacity = Capacity.of(
        model.state_specs(), max_sequences=4, max_context=128, page_size=8, checkpoints=checkpoints,
        memory_bytes=sequences * model.state_bytes(128), typical_tokens=typical(workload),
    )  # fmt: skip
    engine = Engine(
        model, max_sequences=capacity.max_sequences, max_context=128, page_size=8,
        pages=capacity.pages, kept=capacity.checkpoints,
    )  # fmt: skip
    return engine, capacity


def of_one_schedule(
    executors: tuple[Executor, Executor], capacity: Capacity, policy: Policy, workload: Workload
) -> list[Served]:
    """Runs on a clock and on an engine, held to have one schedule and answers of one length."""
    runs = [
        serve(executor, capacity, policy, workload, voice, keep_schedule=True)
        for executor, voice in zip(executors, (silent_voice, random_voice(31)), strict=True)
    ]
    assert runs[0].log.schedule == runs[1].log.schedule
    assert len(runs[0].log.schedule) > 50
    for clocked, made in zip(runs[0].answers, runs[1].answers, strict=True):
        assert len(made.tokens) == made.made == clocked.made
    return runs


@pytest.mark.parametrize(
    ("policy", "workload"),
    [
        (Policy(token_budget=24, reserve=0), POISSON),
        (Policy(batching="static", token_budget=24, reserve=0), POISSON),
        (Policy(token_budget=24, reserve=0), SHARING),
        (Policy(token_budget=24, prefix_cache=True, checkpoint_every=16), SHARING),
    ],
    ids=["continuous", "static", "answers", "prefixes"],
)
@pytest.mark.parametrize("arch", ["gqa", "mamba2", "gdn:gqa=1:1", "swa"])
def test_an_engine_and_a_clock_run_the_same_schedule(
    arch: str, policy: Policy, workload: Workload
) -> None:
    engine, capacity = engine_in(7.5, arch, workload, checkpoints=3)
    times = StepTimes(engine.model, H100, max_context=128, host_ms=0.4)
    executors = ClockExecutor(times), OnClock(engine, ClockExecutor(times))
    runs = of_one_schedule(executors, capacity, policy, workload)
    for clocked, made in zip(runs[0].answers, runs[1].answers, strict=True):
        assert made.ended_s == pytest.approx(clocked.ended_s)
        assert made.first_token_s == pytest.approx(clocked.first_token_s)
    figures = [run.log.figures(run.answers, LIMITS) for run in runs]
    for name in ("output_tok_per_s", "itl_p50_ms", "running_sequences"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=0.02)
    assert figures[0].get("hit_rate", 0) == figures[1].get("hit_rate", 0)
    if policy.prefix_cache:
        assert figures[0]["hit_rate"] > 0.3
        assert figures[0]["cached_state_bytes"] == pytest.approx(
            figures[1]["cached_state_bytes"], rel=0.05
        )
    if workload is SHARING and arch == "gqa":
        assert 0 < figures[0]["shared_state"] < 1


@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("arch", ["gqa", "gdn:gqa=1:1", "swa"])
def test_an_engine_that_looks_ahead_runs_the_schedule_of_a_clock(arch: str, batching: str) -> None:
    """Of requests that come at once; later ones come in the middle of steps."""
    workload = replace(POISSON, arrivals="once", rate_per_s=0.0)
    policy = Policy(batching=batching, token_budget=24, reserve=0)
    engine, capacity = engine_in(3.5, arch, workload)
    times = StepTimes(engine.model, H100, max_context=128)
    executors = ClockExecutor(times), OnClock(engine, ClockExecutor(times), ahead=True)
    runs = of_one_schedule(executors, capacity, policy, workload)
    figures = [run.log.figures(run.answers, LIMITS) for run in runs]
    for name in ("output_tok_per_s", "running_sequences", "held_tokens", "preemptions"):
        assert figures[0][name] == pytest.approx(figures[1][name], rel=0.05)


@pytest.mark.slow
def test_a_hundred_thousand_requests_take_less_than_a_minute() -> None:
    workload = Workload(
        arrivals="poisson", rate_per_s=25.0, requests=100_000,
        prompt=Lengths(kind="lognormal", mean=300, most=3000),
        output=Lengths(kind="lognormal", mean=120, most=1000),
    )  # fmt: skip
    model = outline("gqa", "1b")
    capacity = Capacity.of(
        model.state_specs(), max_sequences=64, max_context=4096, page_size=64,
        memory_bytes=8e9, typical_tokens=400,
    )  # fmt: skip
    times = StepTimes(model, H100, max_context=4096)
    began = time.process_time()
    served = serve(ClockExecutor(times), capacity, Policy(), workload, silent_voice)
    assert time.process_time() - began < 60
    found = served.log.figures(served.answers, LIMITS)
    assert found["served_requests"] == 100_000
    assert found["request_per_s"] == pytest.approx(25.0, rel=0.02)


def test_a_sweep_ends_over_the_largest_throughput() -> None:
    plan = ServePlan(scale="70m", workload="chat", requests=300, max_sequences=8, sweep=True)

    def run(load: Workload) -> Served:
        return on_constant_steps(load, "continuous", 8)

    found = [*loads(plan, plan.load, run)]
    assert [served.saturated for _, served in found] == [False] * (len(found) - 1) + [True]
    assert len(found) > 3
    rates = [load.rate_per_s for load, _ in found]
    assert rates == sorted(rates)


def test_weighted_percentiles_are_those_of_the_repeated_values() -> None:
    values, weights = np.array([3.0, 1.0, 2.0]), np.array([2, 5, 3])
    repeated = np.sort(np.repeat(values, weights))
    for q in (10, 50, 80, 90, 99):
        expected = repeated[int(np.ceil(q / 100 * 10)) - 1]
        assert weighted_percentile(values, weights, q) == expected


def test_more_memory_serves_more_and_less_is_never_faster() -> None:
    rates = [
        float(
            str(simulate(["gqa"], "longtail", requests=512, memory_gib=gib)[0]["output_tok_per_s"])
        )
        for gib in (16, 18, 24)
    ]
    assert rates[0] < rates[1] < rates[2]


def test_a_sweep_in_which_nobody_is_served_says_why() -> None:
    with pytest.raises(UserError, match=r"no request of the workload was served.*max_context=64"):
        simulate(["gqa"], "uneven", scale="1b", max_context=64, sweep=True)
