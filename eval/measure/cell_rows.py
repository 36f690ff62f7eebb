"""Rows of a cell from what was measured, and its progress while it trains.

`low` and `high` are a 95 % interval and nothing else. Times of steps follow each other and are not
independent, and three repeats make no interval: their spread is in percentiles of their own.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from archs.backbone import Model
from archs.cost import Cost, Step
from eval.measure.counted import Work
from eval.measure.counters import Figure
from eval.measure.decode import DecodeTiming
from eval.measure.progress import Watch
from eval.predict.machine import Roofline
from eval.predict.roofline import step_ms
from eval.results.rows import Row
from eval.results.statistics import Estimate
from train.loop import StepReport


def reporter(watch: Watch) -> Callable[[StepReport], None]:
    """What shows a training run's progress on a cell's line."""

    def show(report: StepReport) -> None:
        rate = f"{report.tok_per_s:,.0f} tok/s, loss {report.train_loss_nats:.2f}"
        watch.at(report.step / report.steps, rate)

    return show


def estimate_row(measure: str, found: Estimate, **at: Any) -> Row:
    """A row with its interval."""
    return Row(measure=measure, value=found.value, low=found.low, high=found.high, n=found.n, **at)


def median_row(measure: str, times: Sequence[float], **at: Any) -> Row:
    """The median of repeats."""
    return Row(measure=measure, value=statistics.median(times), n=len(times), **at)


def roofline_rows(r: Roofline) -> list[Row]:
    """The rates of this machine; those of products say of how many rows, as a batch."""
    products = [
        Row(measure=measure, value=value, batch=p.rows)
        for p in r.products
        for measure, value in (
            ("product_bytes_per_s", p.bytes_per_s), ("product_launch_us", p.launch_us)
        )
    ]  # fmt: skip
    return [
        Row(measure="copy_bytes_per_s", value=r.copy_bytes_per_s),
        Row(measure="read_bytes_per_s", value=r.read_bytes_per_s),
        Row(measure="matrix_flops_per_s", value=r.matrix_flops_per_s),
        Row(measure="ridge_flop_per_byte", value=r.ridge_flop_per_byte),
        Row(measure="call_us", value=r.call_us),
        *products,
        *load_rows(r.other_load),
    ]


def load_rows(share: float | None, **at: Any) -> list[Row]:
    """What other programs took of the machine meanwhile, where the system tells."""
    return [] if share is None else [Row(measure="other_load", value=share, **at)]


def timing_rows(timing: DecodeTiming, cost: Cost, roofline: Roofline) -> list[Row]:
    """Decode at one batch and context, with what was predicted of a step beside it."""
    at: dict[str, Any] = {"batch": timing.batch, "context": timing.context}
    n = len(timing.step_ms)
    tpot = timing.percentile_ms(50)
    moved_per_s = cost.bytes / (tpot / 1e3)
    done_per_s = cost.flops / (tpot / 1e3)
    return [
        Row(measure="tpot_ms", value=timing.tpot_ms, n=n, **at),
        Row(measure="tpot_p50_ms", value=tpot, n=n, **at),
        Row(measure="tpot_p90_ms", value=timing.percentile_ms(90), n=n, **at),
        Row(measure="tpot_p99_ms", value=timing.percentile_ms(99), n=n, **at),
        Row(measure="output_tok_per_s", value=timing.output_tok_per_s, n=n, **at),
        Row(measure="output_tok_per_s_per_user", value=1e3 / timing.tpot_ms, n=n, **at),
        Row(measure="tpot_pred_ms", value=step_ms(cost, roofline, calls=timing.calls), **at),
        *([] if timing.calls is None else [Row(measure="step_calls", value=timing.calls, **at)]),
        Row(measure="mbu", value=moved_per_s / roofline.peak_bytes_per_s, **at),
        Row(measure="mfu", value=done_per_s / roofline.matrix_flops_per_s, **at),
        Row(measure="step_bytes", value=cost.bytes, **at),
        Row(measure="step_flops", value=cost.flops, **at),
        Row(measure="arith_intensity_pred", value=cost.intensity_flop_per_byte, **at),
        Row(measure="held_bytes", value=timing.state_bytes, **at),
        Row(measure="peak_state_bytes", value=timing.peak_state_bytes, **at),
    ]


def counted_rows(found: Mapping[str, Figure], work: Work) -> list[Row]:
    """What counters say of a step; a figure that is missing is a row with its status and why."""
    return [
        Row(
            measure=measure, value=figure.value, status=figure.status, note=figure.note,
            batch=work.batch, context=work.context,
        )
        for measure, figure in found.items()
    ]  # fmt: skip


def cost_rows(model: Model, context: int) -> list[Row]:
    """What one sequence holds, reads and does in a decode step after `context` tokens."""
    step, specs = model.cost(Step(1, 1, context)), model.state_specs()
    found: dict[str, float] = {
        "state_bytes": model.state_bytes(context),
        "scanned_bytes": sum(s.scanned_bytes(context) for s in specs),
        "gathered_bytes": sum(s.gathered_bytes(context) for s in specs),
        "weight_bytes": step.weight_bytes,
        "step_bytes": step.bytes,
        "step_flops": step.flops,
        "arith_intensity_pred": step.intensity_flop_per_byte,
    }
    if context:
        prefill = model.cost(Step(1, context, 0))
        found["prefill_intensity_pred"] = prefill.intensity_flop_per_byte
    return [Row(measure=m, value=v, batch=1, context=context) for m, v in found.items()]
