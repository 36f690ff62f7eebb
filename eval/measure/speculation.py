"""Speculative decoding of trained models on held-out text: what is accepted, and what it gains.

Plain decode and speculation run in turn, in one process; greedy tokens are compared one by one.
Where they part, the target's exact logits say whether by a tie within rounding: verification and
decode sum in other orders. Any other difference makes the point incorrect, and no speed is given.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from archs.backbone import Model, cast, first_layers, replays
from archs.backends import resolve_backend
from archs.checks import parse
from archs.cost import Step
from archs.errors import UserError
from archs.heads import HeadModel
from eval.measure.cell_rows import load_rows, median_row
from eval.measure.decode_plans import SpeculatePlan
from eval.measure.keeping import kept_as
from eval.measure.progress import Watch
from eval.measure.site import Failure, Site, about, served_dtype
from eval.measure.suite import CorpusPlan
from eval.measure.ties import tie_gap
from eval.measure.trained import Source, Trained, trained
from eval.predict.calls import CountCalls
from eval.predict.machine import Roofline
from eval.predict.neighbours import Neighbours
from eval.predict.roofline import step_ms
from eval.predict.speculation import first_tokens
from eval.results.point import Point
from eval.results.rows import About, Found, Row, Status
from infer.draft_length import Adaptive, DraftLength, Fixed, expected_tokens
from infer.drafts import Drafter, EngineDrafter, ModelDrafter, PromptLookup
from infer.engine import Engine, Generation
from infer.head_drafts import HeadDrafter
from infer.sampling import Sampling
from infer.speculate import NotLosslessError, Speculation, generate, require_fit
from train.tokens import TokenSet

#: Plain decode and speculation after a warm-up, in turn.
REPEATS = 3
#: A warm-up is repeated, at most so often, while steps of new shapes are captured in it.
WARM_UPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculateOptions:
    """draft: None: what the plan names: the context, the target's layers or its head. plan: of this
    point's batch and drafts.
    """

    target: Source
    draft: Source | None
    corpus: CorpusPlan
    plan: SpeculatePlan


class _Subject:
    """A target and its drafter at one batch, K and sampling."""

    def __init__(
        self, options: SpeculateOptions, target: Trained, draft: Trained | None, batch: int,
        site: Site,
    ) -> None:  # fmt: skip
        plan = options.plan
        self.model, self.draft = target.model, None if draft is None else draft.model
        if plan.layers:
            self.draft = first_layers(target.model, plan.layers)
        if plan.head:
            self.draft = target.head()
        if plan.state and self.draft is not None:
            kept_as(self.draft, plan.state, partial(about, target.spec))
        self.batch, self.drafts, self.new_tokens = batch, plan.drafts[0], plan.new_tokens
        self.adaptive = plan.adaptive
        self.sampling = Sampling(temperature=plan.temperature)
        self.compiled, self.replay = plan.compiled, plan.replay
        self.backend = resolve_backend(plan.backend, site.device)

    def engine(self, model: Model, context: int, lookback: int) -> Engine:
        """An engine for the batch, up to a context and the tokens that follow."""
        return Engine(
            model, max_sequences=self.batch,
            # Room for drafts beyond the last token, so that no last step is of another form.
            max_context=context + self.new_tokens + self.drafts,
            lookback=lookback, replay=self.replay if lookback else 0, backend=self.backend,
            compiled=self.compiled,
        )  # fmt: skip

    def drafter(self, context: int) -> Drafter:
        """The draft of these sequences."""
        if self.draft is None:
            return PromptLookup(device=self.model.embedding.weight.device)
        drafting = HeadDrafter if isinstance(self.draft, HeadModel) else ModelDrafter
        return drafting(self.engine(self.draft, context, self.drafts), self.sampling)

    def runs(self, prompts: Sequence[Sequence[int]], watch: Watch) -> "_Runs":
        """Both ways in turn; what they warm up with is not among the results."""
        context = len(prompts[0])
        plain, target = self.engine(self.model, context, 0), self.engine(
            self.model, context, self.drafts
        )  # fmt: skip
        drafter = self.drafter(context)
        require_fit(target, drafter, self.drafts, context + self.new_tokens - 1)
        own = [drafter.engine] if isinstance(drafter, EngineDrafter) else []
        engines = [plain, target, *own]
        graphs = [e.graphed for e in engines if e.graphed is not None]

        def speculated(length: Callable[[], DraftLength] | None) -> Speculation:
            return generate(
                target, drafter, prompts, self.new_tokens, drafts=self.drafts,
                sampling=self.sampling, length=length,
            )  # fmt: skip

        length: Callable[[], DraftLength] | None = None

        def both() -> tuple[Generation, Speculation]:
            return plain.generate(prompts, self.new_tokens, self.sampling), speculated(length)

        watch.at(0.0, f"context {context}")
        for _ in range(WARM_UPS):
            prepared_s = sum(g.prepare_s for g in graphs)
            both()
            if sum(g.prepare_s for g in graphs) == prepared_s:
                break
        if self.adaptive:
            costs = round_costs([speculated(partial(Fixed, k)) for k in range(self.drafts + 1)])
            length = partial(Adaptive, costs)
        found = []
        for repeat in range(REPEATS):
            watch.at((repeat + 1) / (REPEATS + 1), f"context {context}")
            found.append(both())
        return _Runs(target, drafter, [p for p, _ in found], [s for _, s in found])


def round_costs(by_drafts: Sequence[Speculation]) -> list[float]:
    """Time of a round of k drafts over that of one without, from speculations with k at most.

    A drafter may find fewer than it is asked for: what was never drafted is interpolated.
    """
    spent: dict[int, list[float]] = {}
    for found in by_drafts:
        for made, draft_ms, verify_ms in zip(
            found.rounds, found.draft_ms, found.verify_ms, strict=True
        ):
            spent.setdefault(max(made.drafted), []).append(draft_ms + verify_ms)
    drafted = sorted(spent)
    times = np.interp(
        range(len(by_drafts)), drafted, [statistics.median(spent[k]) for k in drafted]
    )
    return [float(ms / times[0]) for ms in times]


@dataclass(frozen=True, slots=True)
class _Runs:
    target: Engine
    drafter: Drafter
    plain: list[Generation]
    speculated: list[Speculation]

    @property
    def ratios(self) -> list[float]:
        """Plain time per token over speculative, run by run."""
        return [p.tpot_ms / s.tpot_ms for p, s in zip(self.plain, self.speculated, strict=True)]


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Acceptance, tokens of a verification, speed-up beside the predicted one, by context."""
    options = parse(SpeculateOptions, point.options, f"the options of {point.key}")
    plan, batch = options.plan, point.batch
    target = trained(options.target, options.corpus, site, watch)
    draft = None if options.draft is None else trained(options.draft, options.corpus, site, watch)
    if draft is not None and draft.tokens.name != target.tokens.name:
        raise UserError(
            f"the draft was trained on tokens {draft.tokens.name}, the target on "
            f"{target.tokens.name}; take a draft with the target's tokenizer"
        )
    for given in filter(None, (target, draft)):
        cast(given.model, served_dtype(given.model, site.device))
    if plan.state:
        kept_as(target.model, plan.state, partial(about, target.spec))
    subject = _Subject(options, target, draft, batch, site)
    told = about(
        target.spec, target.model, corpus=options.corpus.spec, tokens=target.seen,
        kernel_backend="torch-compile" if plan.compiled else subject.backend,
        options=_words(plan, draft, target.model),
    )  # fmt: skip
    models = [given.model for given in (target, draft) if given is not None]
    rows: list[Row] = []
    for context in plan.contexts:
        prompts = excerpts(target.tokens, batch, context, plan.new_tokens)
        with Neighbours() as others:
            try:
                runs = subject.runs(prompts, watch)
            except NotLosslessError as why:
                raise Failure(Status.UNSUPPORTED, told, str(why)) from None
            rates = site.rates_of(
                models, (batch, batch * (subject.drafts + 1)), ran_by=told.kernel_backend,
                again=True,
            )  # fmt: skip
        at: dict[str, Any] = {"batch": batch, "context": context}
        rows += _compared(subject, runs, prompts, told, at)
        rows += _figures(subject, runs, rates, at)
        rows += load_rows(others.share, **at)
    return Found(about=told, rows=tuple(rows))


def _words(plan: SpeculatePlan, draft: Trained | None, target: Model) -> str:
    by = plan.draft if draft is None else f"{draft.spec.arch}@{draft.spec.scale.name}"
    words = [f"draft={by}", f"drafts={plan.drafts[0]}"]
    words += ["adaptive"] * plan.adaptive
    words += [f"replay={plan.replay}"] if replays(target, plan.replay) else []
    words += [f"temperature={plan.temperature:g}"] if plan.temperature else []
    return " ".join(words)


def excerpts(tokens: TokenSet, batch: int, context: int, following: int) -> list[list[int]]:
    """Prompts of `context` tokens from held-out text, spread evenly; as many more tokens follow.

    Raises UserError where the text is too short.
    """
    held = np.asarray(tokens.held_out)
    room = len(held) - context - following
    if room < 0:
        raise UserError(
            f"the held-out text has {len(held)} tokens, a prompt of {context} and {following} "
            "after it need more; take a shorter context or a longer corpus"
        )
    starts = [room * i // max(1, batch - 1) for i in range(batch)]
    return [held[start : start + context].astype(np.int64).tolist() for start in starts]


def _compared(
    subject: _Subject, runs: _Runs, prompts: Sequence[Sequence[int]], told: About,
    at: dict[str, Any],
) -> list[Row]:  # fmt: skip
    """The share of sequences with the very tokens of plain decode. Raises Failure for a difference
    that is no tie.
    """
    if not subject.sampling.greedy:
        return []
    ties, same = [], 0
    for prompt, plain, ours in zip(
        prompts, runs.plain[-1].tokens, runs.speculated[-1].tokens, strict=True
    ):
        parted = next((i for i in range(len(plain)) if plain[i] != ours[i]), None)
        if parted is None:
            same += 1
            continue
        gap = tie_gap(subject.model, [*prompt, *plain[:parted]], plain[parted], ours[parted])
        if not gap.is_tie:
            raise Failure(
                Status.INCORRECT, told,
                f"speculation gives token {ours[parted]} where plain decode gives {plain[parted]}, "
                f"{parted} tokens after a prompt of {len(prompt)}; their logits differ by "
                f"{gap.apart:.1e} of the largest",
            )  # fmt: skip
        ties.append(f"a tie at token {parted} (logits {gap.apart:.1e} apart)")
    note = "; ".join(ties[:3])
    return [Row(measure="lossless", value=same / len(prompts), n=len(prompts), note=note, **at)]


def _figures(subject: _Subject, runs: _Runs, rates: Roofline, at: dict[str, Any]) -> list[Row]:
    last, ratios, drafts = runs.speculated[-1], sorted(runs.ratios), subject.drafts
    rounds = [d for r in last.rounds for d in r.drafted]
    held = subject.model.state_bytes(at["context"], lookback=drafts, replay=subject.replay)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    times = _predicted(subject, runs, rates, at["context"])
    made, mean_drafts = last.tokens_per_verification, statistics.fmean(rounds)
    rows = [
        Row(measure="speedup", value=statistics.median(ratios), n=len(ratios), note=spread, **at),
        Row(measure="speedup_pred", value=times.plain_ms * made / times.round_ms(mean_drafts),
            **at),
        Row(measure="tokens_per_verification", value=made, n=len(rounds), **at),
        Row(measure="drafts_per_verification", value=mean_drafts, n=len(rounds), **at),
        median_row("plain_tpot_ms", [p.tpot_ms for p in runs.plain], **at),
        median_row("speculative_tpot_ms", [s.tpot_ms for s in runs.speculated], **at),
        median_row("draft_ms", last.draft_ms, **at),
        median_row("verify_ms", last.verify_ms, **at),
        Row(measure="rollback_bytes", value=held - subject.model.state_bytes(at["context"]), **at),
        Row(measure="draft_state_bytes", value=last.draft_state_bytes / subject.batch, **at),
    ]  # fmt: skip
    if any(rounds):
        rows += [
            Row(measure="acceptance", value=last.acceptance, n=sum(rounds), **at),
            Row(measure="tokens_per_verification_pred",
                value=expected_tokens(last.acceptance, drafts), **at),
        ]  # fmt: skip
    rows += [
        Row(measure="acceptance_at_position", value=last.acceptance_at(i), position=i,
            n=sum(d >= i for d in rounds), **at)
        for i in range(1, drafts + 1) if any(d >= i for d in rounds)
    ]  # fmt: skip
    return rows


@dataclass(frozen=True, slots=True)
class _Times:
    """Predicted milliseconds of a plain step, of the first draft, which reads what the last round
    settled, of each further one, and of a verification.
    """

    plain_ms: float
    first_ms: float
    draft_ms: float
    verify_ms: float

    def round_ms(self, drafts: float) -> float:
        return min(drafts, 1) * self.first_ms + max(drafts - 1, 0) * self.draft_ms + self.verify_ms


def _predicted(subject: _Subject, runs: _Runs, rates: Roofline, context: int) -> _Times:
    batch, drafts = subject.batch, subject.drafts
    after = context + subject.new_tokens // 2
    plain = Step(batch, 1, after)
    verified = Step(batch, drafts + 1, after, drafts, subject.replay)
    first_ms = draft_ms = 0.0
    if subject.draft is not None:
        assert isinstance(runs.drafter, EngineDrafter)
        engine, model = runs.drafter.engine, subject.draft
        # Steps of one form read as many whatever was kept.
        formed = engine.compiled is not None or engine.graphed is not None
        made = drafts + 1 if formed else round(runs.speculated[-1].tokens_per_verification)

        def drafting_ms(tokens: int) -> float:
            cost = model.cost(Step(batch, tokens, after, drafts, subject.replay), all_logits=True)
            return step_ms(cost, rates, calls=_calls(engine, batch, tokens))

        first_ms, draft_ms = drafting_ms(first_tokens(model, made)), drafting_ms(1)
    return _Times(
        step_ms(subject.model.cost(plain), rates, calls=_calls(runs.target, batch, 1)),
        first_ms,
        draft_ms,
        step_ms(
            subject.model.cost(verified, all_logits=True), rates,
            calls=_calls(runs.target, batch, drafts + 1),
        ),
    )  # fmt: skip


def _calls(engine: Engine, batch: int, tokens: int) -> int | None:
    """Torch operations of one step as written; None where it is compiled or captured."""
    if engine.device.type != "cpu" or engine.compiled is not None:
        return None
    given = torch.zeros(batch, tokens, dtype=torch.int64)
    hidden = None
    if isinstance(engine.model, HeadModel):
        weight = engine.model.embedding.weight
        hidden = weight.new_zeros(batch, tokens, weight.shape[1])
    with engine.store.sequences(batch) as sequences:
        # The second step finds inputs held, where states are replayed.
        engine.verify(sequences, given, hidden=hidden)
        with CountCalls() as counter:
            engine.verify(sequences, given, hidden=hidden)
    return counter.calls
