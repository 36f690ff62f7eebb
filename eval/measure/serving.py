"""Serving on an engine: a workload under a scheduler, with what a clock predicts of it beside.

Correctness first: extend must equal forward, and some of the greedy answers must be those that the
same engine gives to their requests alone. Policies take turns on one engine. Two clocks run the
same schedule: by the roofline's times, and by those of the engine's own steps, taken beforehand.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal

import torch

from archs.backends import resolve_backend
from archs.checks import parse
from eval.measure.cell_rows import load_rows
from eval.measure.gate import agreed_rows
from eval.measure.progress import Watch
from eval.measure.serve_plan import (
    Served,
    ServePlan,
    batch_sizes,
    loads,
    serve,
    uneven,
)
from eval.measure.served import Limits
from eval.measure.site import Failure, Site, about, spec_of
from eval.measure.ties import tie_gap
from eval.measure.workload import Voice, Workload, random_voice, silent_voice
from eval.predict.calibration import calibrate
from eval.predict.calls import CountCalls
from eval.predict.machine import Roofline
from eval.predict.neighbours import Neighbours
from eval.predict.roofline import resident_bytes
from eval.predict.serving import ClockExecutor, StepTimes
from eval.results.measures import on_clock
from eval.results.point import Point
from eval.results.rows import About, Found, Row, Status
from infer.capacity import Capacity
from infer.drafts import PromptLookup
from infer.engine import Engine
from infer.executor import EngineExecutor
from infer.graphs import CAPTURE_AFTER, bucket
from infer.sequence import Answer, Ending
from infer.speculate import NotLosslessError
from infer.speculating import SpeculatingExecutor

#: Greedy answers that are held to what the engine gives to their requests alone.
CHECKED = 4
#: Figures that a clock's run is compared by.
PREDICTED = ("output_tok_per_s", "ttft_p50_ms", "tpot_p50_ms")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """workload: what the plan's name stood for; trace_digest: of the trace's file, if any."""

    plan: ServePlan
    workload: Workload
    trace_digest: str = ""


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Latencies over requests, throughput, goodput, memory, by policy and arrival rate."""
    options = parse(ServeOptions, point.options, f"the options of {point.key}")
    plan, workload = options.plan, options.workload
    spec = spec_of(point)
    model = site.to_serve(spec, plan.weights, plan.state)
    backend = resolve_backend(plan.backend, site.device)
    capacity = plan.capacity(model, workload, resident_bytes(model))
    told: dict[str, Any] = {"kernel_backend": backend, "options": plan.words()}
    agree = partial(
        site.agreement, spec, model, context=capacity.max_context, batch=capacity.max_sequences,
        backend=backend, compiled=False, replay=0,
    )  # fmt: skip
    agreed_rows(agree, about(spec, model, **told))
    engine = Engine(
        model, max_sequences=capacity.max_sequences, max_context=capacity.max_context,
        page_size=capacity.page_size, pages=capacity.pages, kept=capacity.checkpoints,
        lookback=plan.drafts, backend=backend,
    )  # fmt: skip
    voice = random_voice(model.vocab_size)
    warm_up(engine)
    with Neighbours() as others:
        rated = partial(site.rates_of, [model], batch_sizes(capacity.max_sequences), ran_by=backend)
        rates = rated()
        runs = _Runs(engine, capacity, plan, voice)
        runs.calibrate(rates, shared=plan.shares(workload))
        turns = list(product(range(plan.repeats), plan.batching))
        for number, (_, batching) in enumerate(turns):
            watch.at(number / len(turns), batching)
            try:
                runs.take(batching, workload)
            except NotLosslessError as why:
                raise Failure(Status.UNSUPPORTED, about(spec, model, **told), str(why)) from None
        rates = rated(again=True)
    _require_answers(engine, runs, about(spec, model, **told))
    rows = runs.rows(rates)
    return Found(
        about=about(spec, model, **told), rows=(*rows, *load_rows(others.share)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """One policy at one load.

    host_s: of its steps, neither in the model nor in sampling. each: tokens of a verification; 0:
    nothing was drafted.
    """

    batching: str
    load: Workload
    served: Served
    host_s: float
    each: float

    def figures(self, limits: Limits) -> dict[str, float]:
        """Its measures by name."""
        found = self.served.log.figures(self.served.answers, limits)
        if self.each:
            found["tokens_per_verification"] = self.each
        return found | {"host_share": self.host_s / self.served.log.busy_s}


class _Runs:
    """All runs of a point on one engine."""

    def __init__(self, engine: Engine, capacity: Capacity, plan: ServePlan, voice: Voice) -> None:
        self.engine = engine
        self.capacity = capacity
        self.plan = plan
        self.found: list[_Run] = []
        self._voice = voice
        self._engines_own: StepTimes | None = None

    def calibrate(self, rates: Roofline, *, shared: bool) -> None:
        """Time the engine's steps for the clock that keeps its time."""
        if not self.plan.drafts:
            times = self._times(rates)
            self._engines_own = times.calibrated(
                calibrate(
                    self.engine, times.rectangle_ms, token_budget=self.plan.token_budget,
                    shared=shared,
                )
            )  # fmt: skip

    def _times(self, rates: Roofline) -> StepTimes:
        return StepTimes(
            self.engine.model, rates, max_context=self.capacity.max_context,
            padded=self.engine.graphed is not None, calls=ragged_calls(self.engine),
            to_longest=self.engine.backend == "torch",
        )  # fmt: skip

    def take(self, batching: str, workload: Workload) -> None:
        """Serve the workload by one policy, at each of the plan's loads."""
        executors: list[EngineExecutor] = []

        def run(load: Workload) -> Served:
            executors.append(self._executor())
            policy = self.plan.policy(batching)
            return serve(executors[-1], self.capacity, policy, load, self._voice)

        for load, served in loads(self.plan, workload, run):
            host_s = served.log.busy_s - executors[-1].model_s
            verified, kept = executors[-1].verified, executors[-1].kept
            each = (verified + kept) / verified if verified else 0.0
            self.found.append(_Run(batching, load, served, host_s, each))

    def _executor(self) -> EngineExecutor:
        if not self.plan.drafts:
            return EngineExecutor(self.engine)
        drafter = PromptLookup(device=self.engine.device)
        return SpeculatingExecutor(self.engine, drafter, drafts=self.plan.drafts)

    def rows(self, rates: Roofline) -> list[Row]:
        """The figures of every run, and of the same one on the clocks."""
        # A clock makes no tokens, so it cannot know which drafts are right.
        clocks: dict[Literal["pred", "sim"], StepTimes] = {}
        if self._engines_own is not None:
            clocks = {"pred": self._times(rates), "sim": self._engines_own}
        rows: list[Row] = []
        for words, repeats in self._by_words().items():
            run = repeats[0]
            at: dict[str, Any] = {"batch": self.capacity.max_sequences, "options": words}
            at["n"] = sum(len(r.served.answers) for r in repeats)
            figures = [r.figures(self.plan.limits) for r in repeats]
            rows += [
                Row(measure=name, value=statistics.median(f[name] for f in figures), **at)
                for name in figures[0] if all(name in f for f in figures)
            ]  # fmt: skip
            for clock, times in clocks.items():
                clocked = serve(
                    ClockExecutor(times), self.capacity, self.plan.policy(run.batching), run.load,
                    silent_voice,
                )  # fmt: skip
                predicted = clocked.log.figures(clocked.answers, self.plan.limits)
                rows += [
                    Row(measure=on_clock(name, clock), value=predicted[name], **at)
                    for name in PREDICTED if name in predicted
                ]  # fmt: skip
        return [*rows, *self._gain_rows()]

    def _by_words(self) -> dict[str, list[_Run]]:
        """The repeats of each policy at each load."""
        found: dict[str, list[_Run]] = {}
        for run in self.found:
            found.setdefault(self.plan.words(run.batching, run.load), []).append(run)
        return found

    def _gain_rows(self) -> list[Row]:
        """Continuous over static batching, beside what equal steps would give."""
        rates: dict[str, list[float]] = {}
        for run in self.found:
            made = run.figures(self.plan.limits)["output_tok_per_s"]
            rates.setdefault(run.batching, []).append(made)
        if not {"continuous", "static"} <= rates.keys():
            return []
        pairs = zip(rates["continuous"], rates["static"], strict=True)
        ratios = sorted(continuous / static for continuous, static in pairs)
        lengths = [a.made for a in self.found[0].served.answers if a.ending is Ending.LENGTH]
        at: dict[str, Any] = {"batch": self.capacity.max_sequences, "n": len(ratios)}
        return [
            Row(measure="batching_gain", value=statistics.median(ratios),
                note=f"{ratios[0]:.2f} to {ratios[-1]:.2f}", **at),
            Row(measure="batching_gain_equal_steps", value=uneven(lengths, at["batch"]), **at),
        ]  # fmt: skip


def warm_up(engine: Engine) -> None:
    """Take decode steps of every batch, and chunks: what is compiled or captured is so once."""
    most = len(engine.store.lengths)
    sizes = sorted({bucket(n) for n in range(1, most + 1)}) if engine.graphed else [most]
    steps = CAPTURE_AFTER + 2 if engine.graphed else 2
    for size in (min(size, most) for size in sizes):
        with engine.store.sequences(size) as sequences:
            engine.prefill(sequences, [[0] * (n % 3 + 1) for n in range(size)])
            for _ in range(steps):
                _decode(engine, sequences)


def _decode(engine: Engine, sequences: Sequence[int]) -> None:
    """One token more for each, whichever it is."""
    tokens = torch.zeros(len(sequences), 1, dtype=torch.int64, device=engine.device)
    engine.extend_last(sequences, tokens)


def ragged_calls(engine: Engine) -> int | None:
    """Torch operations of one decode step of unlike sequences; None where it is captured."""
    if engine.device.type != "cpu":
        return None
    most = min(2, len(engine.store.lengths))
    with engine.store.sequences(most) as sequences:
        engine.prefill(sequences, [[0] * (n + 1) for n in range(most)])
        _decode(engine, sequences)
        with CountCalls() as counter:
            _decode(engine, sequences)
    return counter.calls


def _require_answers(engine: Engine, runs: _Runs, told: About) -> None:
    """Raise Failure where answers failed, where none was made, and where a greedy one is not what
    its request gets alone, but for a tie.
    """
    every = [a for run in runs.found for a in run.served.answers]
    failed = [a for a in every if a.ending is Ending.FAILED]
    if failed:
        note = f"{len(failed)} of {len(every)} answers failed: {failed[0].note}"
        raise Failure(Status.NAN, told, note)
    if all(a.ending is Ending.REFUSED for a in every):
        raise Failure(Status.OOM, told, f"no request was served: {every[0].note}")
    answers = [a for a in runs.found[0].served.answers if a.ending is Ending.LENGTH]
    greedy = [a for a in answers if a.request.sampling.greedy]
    for answer in _spread(greedy, CHECKED):
        request = answer.request
        alone = engine.generate([request.prompt], request.max_new_tokens, request.sampling)
        expected = alone.tokens[0]
        parted = next((i for i, t in enumerate(expected) if t != answer.tokens[i]), None)
        if parted is None:
            continue
        before = [*request.prompt, *expected[:parted]]
        gap = tie_gap(engine.model, before, expected[parted], answer.tokens[parted])
        if not gap.is_tie:
            raise Failure(
                Status.INCORRECT, told,
                f"request {request.name} gets token {answer.tokens[parted]} in company and "
                f"{expected[parted]} alone, {parted} tokens after a prompt of "
                f"{len(request.prompt)}; their logits differ by {gap.apart:.1e} of the largest",
            )  # fmt: skip


def _spread(answers: Sequence[Answer], count: int) -> list[Answer]:
    if len(answers) <= count:
        return list(answers)
    return [answers[len(answers) * i // count] for i in range(count)]
