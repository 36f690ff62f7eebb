"""Decode of one batch over contexts: correctness first, then latency, prefill and baselines."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from archs.backbone import Model, replays
from archs.backends import resolve_backend
from archs.checks import parse
from eval.measure.cell_rows import counted_rows, load_rows, median_row, timing_rows
from eval.measure.counted import Work
from eval.measure.decode import decode_cost, measure_ttft_ms, measure_what_fits
from eval.measure.decode_plans import DecodePlan
from eval.measure.gate import agreed_rows
from eval.measure.progress import Watch
from eval.measure.site import Site, about, serving_dtype, spec_of
from eval.predict.neighbours import Neighbours
from eval.predict.roofline import resident_bytes
from eval.results.point import Point
from eval.results.rows import Found, Row, Status, Steps
from infer.engine import Engine


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Latency is measured only of a model whose extend equals its parallel form."""
    plan = parse(DecodePlan, point.options, f"the options of {point.key}")
    spec, batch = spec_of(point), point.batch
    model = site.to_serve(spec, plan.weights, plan.state)
    backend = resolve_backend(plan.backend, site.device)
    label = "torch-compile" if plan.compiled else backend
    options = f"replay={plan.replay}" if replays(model, plan.replay) else ""
    served = about(spec, model, kernel_backend=label, options=options)
    agree = partial(
        site.agreement, spec, model, context=max(plan.contexts), batch=batch, backend=backend,
        compiled=plan.compiled, replay=plan.replay,
    )  # fmt: skip
    rows = agreed_rows(agree, served)
    watch.at(0.1, "correct")
    with Neighbours() as others:
        timings, too_long = measure_what_fits(
            model, batch=batch, contexts=plan.contexts, steps=plan.steps, backend=backend,
            compiled=plan.compiled, replay=plan.replay,
        )  # fmt: skip
        rates = site.rates_of([model], (batch,), ran_by=label, again=True)
    rows += load_rows(others.share, batch=batch)
    rows += [
        Row(measure="tpot_ms", status=Status.OOM, batch=batch, context=context, note=note)
        for context, note in too_long.items()
    ]
    if label != "torch":
        rows.append(Row(measure="compile_s", value=timings[0].warmup_ms / 1e3,
                        batch=batch, context=timings[0].context))  # fmt: skip
    for timing in timings:
        cost = decode_cost(model, timing.batch, timing.context, plan.replay)
        rows += timing_rows(timing, cost, rates)
        rows.append(Row(measure="held_weight_bytes", value=resident_bytes(model),
                        batch=batch, context=timing.context))  # fmt: skip
    rate = f"{1e3 * batch / timings[0].tpot_ms:.0f} tok/s"
    watch.at(0.7, ", ".join(filter(None, (rate, others.word))))
    if plan.prompt:
        warmup_ms, times = measure_ttft_ms(model, batch=batch, prompt=plan.prompt, backend=backend)
        at: dict[str, Any] = {"batch": batch, "context": plan.prompt}
        rows += [
            median_row("ttft_ms", times, **at),
            Row(measure="prefill_compile_s", value=warmup_ms / 1e3, **at),
        ]
    if plan.no_cache:
        short = [context for context in plan.contexts if context not in too_long]
        rows += _baseline_rows(model, short, plan.no_cache, batch, backend)
    if plan.counters:
        # The profiled process loads the same model a second time.
        del model
        site.release()
        watch.at(0.9, "counters")
        for timing in timings:
            work = Work(
                spec=spec, dtype=serving_dtype(site.device), weights=plan.weights, state=plan.state,
                backend=backend, compiled=plan.compiled, batch=batch, context=timing.context,
            )  # fmt: skip
            rows += counted_rows(site.counters.count(work), work)
    steps = tuple(Steps(context=t.context, step_ms=t.step_ms) for t in timings)
    return Found(about=served, rows=tuple(rows), steps=steps)


def _baseline_rows(
    model: Model, contexts: Sequence[int], count: int, batch: int, backend: str
) -> list[Row]:
    """The next `count` tokens after each context, with and without the state."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for context in contexts:
        ids = torch.randint(model.vocab_size, (batch, context), generator=generator).tolist()
        engine = Engine(model, max_sequences=batch, max_context=context + count, backend=backend)
        kept = engine.generate(ids, count)
        bare = engine.generate_without_state(ids, count)
        at: dict[str, Any] = {"batch": batch, "context": context}
        rows += [
            median_row("cached_tpot_ms", kept.step_ms, **at),
            median_row("nocache_tpot_ms", bare.step_ms, **at),
        ]
    return rows
