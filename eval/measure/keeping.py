"""A trained model with its state kept in few bits: what that costs, by position, and what it takes.

Text goes through a store as it would be decoded: rounding a recurrent state compounds with every
token, and the parallel form would not show it. Each format is held against the state as it is
computed, window by window.
"""

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

from archs.backbone import Model
from archs.backends import resolve_backend
from archs.checks import parse
from archs.state_formats import StateFormat
from archs.storage import keep
from eval.measure.cell_rows import estimate_row
from eval.measure.compressing import ratio_row, timed_alone
from eval.measure.decode_plans import CompressPlan
from eval.measure.progress import Watch
from eval.measure.quality import (
    document_scores,
    gap_by_position,
    nats_by_position,
    over_documents,
)
from eval.measure.site import Failure, Site, about, fitting
from eval.measure.suite import CorpusPlan, QualityPlan
from eval.measure.threads import one_thread
from eval.measure.trained import Source, trained
from eval.results.point import Point
from eval.results.rows import Found, Row


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepOptions:
    """plan: of one format."""

    source: Source
    corpus: CorpusPlan
    plan: CompressPlan
    quality: QualityPlan


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Bits per byte, loss by position, bytes and time per token with the state in the format."""
    options = parse(KeepOptions, point.options, f"the options of {point.key}")
    plan, limit = options.plan, options.quality.max_tokens or None
    given = trained(options.source, options.corpus, site, watch)
    model, seq_len = given.model, given.spec.scale.seq_len
    read: dict[str, Any] = {"tokens": given.tokens, "part": "test", "max_tokens": limit}
    reach = {"reach": seq_len * plan.reach, **read}
    with one_thread():
        before = document_scores(model, seq_len=seq_len, **read)
        nats = nats_by_position(model, **reach)
    numbers = state_numbers(model, seq_len)
    backend = resolve_backend(plan.backend, site.device)
    label: dict[str, Any] = {
        "kernel_backend": backend,
        "corpus": options.corpus.spec,
        "tokens": given.seen,
    }
    kept_as(model, plan.state[0], partial(about, given.spec, **label))
    told = about(given.spec, model, **label)
    watch.at(0.2, "score")
    with one_thread():
        after = document_scores(model, seq_len=seq_len, stored=True, **read)
        watch.at(0.4, "score by position")
        gaps = gap_by_position(nats, nats_by_position(model, stored=True, **reach))
    at: dict[str, Any] = {"batch": 1, "context": seq_len}
    rows = [
        estimate_row("compressed_bits_per_byte", over_documents(after), context=seq_len),
        ratio_row(before, after),
        *(estimate_row("loss_gap_at_position", gap, position=end) for end, gap in gaps.items()),
        Row(measure="state_bytes", value=model.state_bytes(seq_len), **at),
        state_bits(model, seq_len, numbers),
    ]
    watch.at(0.9, "decode")
    try:
        rows += timed_alone(model, given.spec, plan, site, backend, told)
    except Failure as failure:
        # What the numbers are worth does not depend on the step that reads them.
        (why,) = failure.found.rows
        rows.append(replace(why, measure="tpot_ms", **at))
    return Found(about=told, rows=tuple(rows))


def kept_as(model: Model, state: str, told: Any) -> Model:
    """The model with its state in a format, in place.

    told: describes a model. Raises Failure where the format does not fit the state.
    """
    with fitting(lambda: replace(told(model), state_format=state)):
        return keep(model, StateFormat.named(state))


def state_bits(model: Model, context: int, numbers: int) -> Row:
    """Bits of memory for each of so many numbers that a sequence remembers, scales included."""
    held = model.state_bytes(context)
    return Row(measure="bits_per_state_number", value=8 * held / numbers, context=context)


def state_numbers(model: Model, context: int) -> int:
    """Numbers that one sequence of so many tokens remembers, of a state as it is computed."""
    specs = model.state_specs()
    rows = sum(t.held_pages(context, 1) * prod(t.shape) for s in specs for t in s.rows)
    return rows + sum(prod(t.shape) for s in specs for t in s.fixed)
