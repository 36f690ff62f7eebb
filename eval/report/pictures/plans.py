"""The pictures of a report, each from the long table alone.

A picture is one declarative chart: interactive on the page, and PNG and SVG through vl-convert.
It is drawn for one setting (hardware, scale, dtype, backend), the first one, largest coverage
first, that has what it needs; where none has, there is no chart and `missing` says what was not
measured.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import altair as alt
import pandas as pd

from eval.report.figures import Figures
from eval.report.pictures import (
    charts,
    compression,
    keeping,
    pruning,
    serving,
    speculation,
    tradeoffs,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A chart with its explanation; `chart` is None where `missing` says what it needs."""

    name: str
    title: str
    how_to_read: str
    chart: alt.LayerChart | None
    missing: str = ""


class Plan(NamedTuple):
    """How a picture is made: its builder, what it needs, and how to read it.

    build: a chart, None where something was not measured, or why there is nothing to draw.
    of: timings, speculation and servers have a picture for each machine, tasks one for each,
      declarations one for a setting, models one.
    """

    title: str
    build: Callable[..., alt.LayerChart | str | None]
    needs: str
    how_to_read: str
    of: Literal["timings", "speculation", "servers", "declarations", "models", "tasks"] = "timings"


PLANS: dict[str, Plan] = {
    "quality-state": Plan(
        "Quality against state", charts.quality_against_state, "bits_per_byte and state_bytes",
        "Down is a better model, left is less memory for every sequence served. Outlined points "
        "on the dashed front are beaten by no other in both. Bars are 95 % intervals.",
        of="declarations",
    ),
    "tpot-context": Plan(
        "Latency against context", charts.latency_against_context, "tpot_ms at two contexts",
        "A flat curve is a state that does not grow; a rising one reads more state for every "
        "token. Where curves cross, the better choice changes.",
    ),
    "slope-state": Plan(
        "What a token of context costs", tradeoffs.slope_against_state,
        "tpot_ms at two contexts, state_bytes_per_token and the bandwidth",
        "On the line a step's time grows by exactly the time to read what a token adds to the "
        "state. Above it the machine reads slower than it can; at the left end nothing grows.",
    ),
    "crossings": Plan(
        "Crossovers", tradeoffs.crossings, "tpot_ms and a prediction at two contexts",
        "A row's architecture is faster than a column's from the context shown on (≥), only below "
        "it (<), always, or, in an empty cell, never, within the contexts that were timed. Small: "
        "what the roofline predicts for the same cells.",
    ),
    "throughput-latency": Plan(
        "Throughput against latency", charts.throughput_against_latency, "tpot_ms at two batches",
        "Each curve runs from the smallest batch to the largest. Up is more tokens from the "
        "machine, left is a shorter wait for each user.",
    ),
    "sequences": Plan(
        "How many sequences fit", tradeoffs.sequences_against_context,
        "state_bytes and weight_bytes at two contexts",
        "How many requests of that context can be served at once before memory is full. A flat "
        "curve is a state that does not grow.",
        of="declarations",
    ),
    "no-cache": Plan(
        "What the state saves", tradeoffs.without_state,
        "cached_tpot_ms and nocache_tpot_ms at two contexts",
        "Without its state a model computes the whole prefix again for every token (dashed). The "
        "exponent is that of generating n tokens so, at the steepest part of the curve: 2 where "
        "products with weights dominate, towards 3 where attention does.",
    ),
    "intensity": Plan(
        "Prefill against decode intensity", tradeoffs.intensity_against_context,
        "arith_intensity_pred and prefill_intensity_pred at two contexts",
        "Above the line an accelerator waits for its arithmetic, below for its memory: prefill "
        "(dashed) and decode (solid) of the same model lie on opposite sides.",
        of="declarations",
    ),
    "roofline": Plan(
        "Roofline", charts.roofline, "step_flops, step_bytes and the machine's measured rates",
        "The line is the most that this machine attains: bandwidth on the slope, matrix "
        "rate on the flat. Decode sits far left, bound by memory. The gap up to the line is "
        "overhead. Click an entry of the legend to single it out.",
    ),
    "speculation": Plan(
        "What speculation gains", speculation.speedup_against_drafts,
        "speedup at two numbers of drafts",
        "Above the line drafting pays, below it plain decode is faster. A curve that turns down "
        "drafts more than is accepted; a dashed one that lies lower says that a batch has less "
        "time to give away. The pointer shows what was predicted.",
        of="speculation",
    ),
    "served-simulated": Plan(
        "Servers on a clock against servers", serving.simulated_against_served,
        "output_tok_per_s and output_tok_per_s_sim of servers",
        "Each point is one load and policy: the server's figure over that of the same schedule on "
        "a clock that knows the engine's single steps. At 1 the two agree; throughput should lie "
        "in the dark band (±15 %), the time to the first token in the light one (±25 %). What is "
        "off is the server's own: a host that is late, sequences that lie apart.",
        of="servers",
    ),
    "bits-loss": Plan(
        "What bits of the weights are worth", compression.loss_against_bits,
        "bits_per_byte_ratio of two formats of weights",
        "Each point is a trained model with its weights stored in a format, all bytes counted, "
        "scales and embedding too. On the line it predicts text as well as with plain weights. "
        "Curves that rise early, as memory shrinks to the right, need their bits; a dashed one "
        "below its own solid one chose its codes better than by rounding to nearest.",
        of="models",
    ),
    "time-bytes": Plan(
        "Time against bytes", compression.time_against_bytes,
        "tpot_ms and held_weight_bytes of two formats of weights",
        "Each point is a model in one format, one sequence at the longest context that was timed. "
        "Along the dotted line time falls as bytes do. Points above it spend time on something "
        "else: calls, state, or codes that no product reads packed and that are made dense first.",
        of="models",
    ),
    "bits-rows": Plan(
        "What bits of keys, values and latents are worth", keeping.rows_against_bits,
        "loss_gap_at_position of two formats of rows",
        "Each point is a trained model whose rows of attention are stored in a format, scales "
        "counted, far beyond the trained length. Rows are rounded once, so what they cost does not "
        "grow with every token. A dashed curve below its solid one keeps keys by channel.",
        of="models",
    ),
    "bits-memory": Plan(
        "What bits of a recurrent state are worth", keeping.memory_against_bits,
        "loss_gap_at_position of two formats of recurrent states",
        "The same of recurrent states, which are rounded at every token, what was rounded before "
        "included. Tails of convolutions stay as they are, which limits how much memory is saved. "
        "Dashed: what rounding left is fed back, or rounding goes up or down at random.",
        of="models",
    ),
    "bits-position": Plan(
        "Rounding a state, token by token", keeping.gap_against_position,
        "loss_gap_at_position of recurrent states",
        "Each point is the mean of an octave of positions, held against the same model on the same "
        "text. A curve that rises compounds its errors; one that stays level forgets them as fast "
        "as they come.",
        of="models",
    ),
    "bits-recall": Plan(
        "What bits of the weights are worth in recall", compression.recall_against_bits,
        "compressed_accuracy of two formats of weights, of models that learnt the task",
        "Each point is a model that was trained on the task in full and answers with its weights "
        "in few bits. Text hides such losses: most of its tokens are guessed from the last few. "
        "Dashed: codes were chosen by what the weights are multiplied with.",
        of="models",
    ),
    "bits-recall-state": Plan(
        "What bits of the state are worth in recall", keeping.recall_against_state_bits,
        "compressed_accuracy of two formats of states, of models that learnt the task",
        "The same with rows of attention (dashed), or a recurrent state, in few bits: what must be "
        "recalled lies there, and nowhere else.",
        of="models",
    ),
    "pruned-loss": Plan(
        "Pruned, and trained on", pruning.loss_of_pruned,
        "bits_per_byte_ratio of one way to prune, trained on in two ways",
        "Each point is one architecture, made smaller by the plan of its row. Distilled models are "
        "taught by their parent, those on text are not, those from scratch have the smaller shape "
        "and new weights; all three saw as many tokens. The parent is at 0; left of it is better.",
        of="models",
    ),
    "loss-position": Plan(
        "Loss by position", charts.loss_against_mean, "loss_at_position",
        "Each point is the mean loss of tokens up to that position, from the point before, less "
        "the mean of all architectures there: how hard the text is moves all alike. Below 0 is "
        "better than the others. A curve that falls gains more from its context than they do; one "
        "that rises past the trained length breaks where they do not.",
        of="models",
    ),
    "ladder": Plan(
        "Loss against size", tradeoffs.loss_against_size,
        "three trained sizes of two architectures",
        "How far a curve lies below another, sideways, is how many parameters it saves at equal "
        "loss: what `isoquality` turns into cost.",
        of="models",
    ),
    "tasks": Plan(
        "Synthetic tasks", charts.task, "accuracy",
        "The share of what a task asks that was answered right: recall and copying are what a "
        "small or bounded state gives up first. Thin lines are 95 % intervals.",
        of="tasks",
    ),
    "predicted-measured": Plan(
        "Predicted against measured", charts.predicted_against_measured, "tpot_ms and a prediction",
        "On the diagonal the machine does what the roofline says; the band is ±10 %. Points above "
        "it carry overhead. Click an entry of the legend to single it out.",
    ),
}  # fmt: skip


def pictures(long: pd.DataFrame, names: Iterable[str] = tuple(PLANS)) -> list[Picture]:
    """The named pictures of a long table, by default all; one a machine for latencies."""
    figures = Figures(long)
    drawn = []
    for name, plan in ((name, PLANS[name]) for name in names):
        found, reasons = [], []
        for machine, settings in _settings(figures, plan):
            for setting in settings:
                made = plan.build(figures, *setting)
                if isinstance(made, alt.LayerChart):
                    found.append((machine, made))
                    break
                if made is not None:
                    reasons.append(made)
        for place, (machine, chart) in enumerate(found):
            suffix = "-" + re.sub(r"\W+", "-", machine).strip("-").lower() if place else ""
            drawn.append(
                Picture(
                    name=name + suffix, title=plan.title, how_to_read=plan.how_to_read, chart=chart
                )
            )
        if not found:
            drawn.append(
                Picture(
                    name=name, title=plan.title, how_to_read=plan.how_to_read, chart=None,
                    missing="; ".join(reasons) or f"not measured: it needs {plan.needs}",
                )
            )  # fmt: skip
    return drawn


def _settings(f: Figures, plan: Plan) -> Iterable[tuple[str, Sequence[tuple[object, ...]]]]:
    """By machine or task, where it matters, the further arguments to try a plan's builder with."""
    if plan.of == "models":
        return [("", [()])]
    if plan.of == "tasks":
        return [(task, [(task,)]) for task in f.tasks]
    if plan.of == "declarations":
        return [("", [(s,) for s in f.declared_settings])]
    apart = {"speculation": f.speculated_settings, "servers": f.served_settings}
    timed = apart.get(plan.of, f.settings)
    machines = dict.fromkeys(s.hardware for s in timed)
    return [(m, [(s,) for s in timed if s.hardware == m]) for m in machines]
