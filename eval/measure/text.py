"""Train a model on text at the best rate of a sweep, then score held-out text."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from archs.backbone import Model
from archs.checks import parse
from archs.registry import ModelSpec
from eval.measure.cell_rows import estimate_row, reporter
from eval.measure.progress import Watch
from eval.measure.quality import bits_per_byte, document_scores, loss_by_position, over_documents
from eval.measure.site import Failure, Site, about, spec_of
from eval.measure.suite import CorpusPlan, QualityPlan, TrainPlan
from eval.results.paired import DOCUMENTS
from eval.results.point import Point
from eval.results.rows import About, Found, Row, Status
from train.loop import CHECKPOINT_NAME, train
from train.sweep import sweep
from train.tokens import Batches, TokenSet


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """plan: of this point's scale alone; its one seed is that of the sweep."""

    corpus: CorpusPlan
    plan: TrainPlan
    quality: QualityPlan | None = None


@dataclass(frozen=True, slots=True)
class Fitted:
    """A model at the end of its training, where it lies, and the rows that say how it went."""

    spec: ModelSpec
    model: Model
    tokens: TokenSet
    about: About
    rows: list[Row]
    checkpoint: Path


def measure(point: Point, site: Site, watch: Watch) -> Found:
    """Sweep, train, then score held-out text."""
    fitted = fit(point, site, watch)
    options, rows = _options(point), fitted.rows
    if options.quality is not None:
        watch.at(1.0, "score")
        rows = rows + quality_rows(
            fitted.model.eval(), fitted.tokens, options.plan.seq_len, options.quality
        )
    return Found(about=fitted.about, rows=tuple(rows))


def _options(point: Point) -> TextOptions:
    return parse(TextOptions, point.options, f"the options of {point.key}")


def fit(point: Point, site: Site, watch: Watch) -> Fitted:
    """Sweep and train, or take up what was trained. Raises Failure where training fails."""
    options = _options(point)
    plan = options.plan
    spec, rates = spec_of(point), plan.learning_rates
    recipe = plan.recipe(plan.scale, rates[0], point.seed)
    site.require_room(spec, recipe)
    tokens = site.tokens(options.corpus.spec, options.corpus.vocab_size)
    # A small corpus fills less of the vocabulary than was asked for.
    spec = replace(spec, scale=replace(spec.scale, vocab_size=tokens.vocab_size))
    model = site.to_train(spec, recipe, plan.backend)
    trained = about(
        spec, model, corpus=options.corpus.spec, tokens=plan.steps * plan.batch * plan.seq_len,
        kernel_backend=model.backend,
    )  # fmt: skip
    data = Batches(tokens, batch=plan.batch, seq_len=plan.seq_len, seed=point.seed)
    rows: list[Row] = []
    rate, folder = rates[0], site.work_folder(point)
    if len(rates) > 1:
        sweeping = _Sweep(point, site, options, spec, tokens)
        rate, rows = sweeping.best_rate(watch, trained)
        if plan.sweep_steps == plan.steps and point.seed == plan.seeds[0]:
            # The sweep has begun this very run: training goes on where it ended.
            folder = sweeping.folder / f"lr_{rate:g}"
    result = train(
        model, data, plan.recipe(plan.scale, rate, point.seed), folder,
        spec=spec, data_fingerprint=tokens.name, resume_run=site.resume, deadline=site.deadline,
        progress=reporter(watch),
    )  # fmt: skip
    made = [
        Row(measure="train_loss", value=result.train_loss_nats),
        Row(measure="train_tok_per_s", value=result.tok_per_s),
        Row(measure="train_steps", value=result.steps),
        Row(measure="train_s", value=result.seconds),
        Row(measure="learning_rate", value=rate),
    ]
    if result.status != "ok":
        raise Failure(
            Status.NAN, trained, f"training {result.status} at step {result.steps}",
            stopped=result.status == "stopped", withheld=made,
        )  # fmt: skip
    return Fitted(spec, model.eval(), tokens, trained, rows + made, folder / CHECKPOINT_NAME)


class _Sweep:
    """The sweep that all seeds of a model share: that of the first seed, in a folder of its own."""

    def __init__(
        self, point: Point, site: Site, options: TextOptions, spec: ModelSpec, tokens: TokenSet
    ) -> None:
        self.site, self.options, self.spec, self.tokens = site, options, spec, tokens
        self.seed = options.plan.seeds[0]
        first = site.work_folder(replace(point, seed=self.seed))
        self.folder = first.with_name("sweep-" + first.name)

    def best_rate(self, watch: Watch, trained: About) -> tuple[float, list[Row]]:
        """The best rate on development documents, with the curve as rows."""
        plan, site = self.options.plan, self.site
        recipe = plan.recipe(plan.scale, plan.learning_rates[0], self.seed)
        found = sweep(
            lambda: site.to_train(self.spec, recipe, plan.backend),
            Batches(self.tokens, batch=plan.batch, seq_len=plan.seq_len, seed=self.seed), recipe,
            self._score, self.folder,
            spec=self.spec, steps=plan.sweep_steps, data_fingerprint=self.tokens.name,
            progress=reporter(watch), deadline=site.deadline,
        )  # fmt: skip
        if not found.complete:
            raise Failure(Status.ERROR, trained, "stopped in the sweep", stopped=True)
        if found.best is None:
            raise Failure(Status.NAN, trained, "every learning rate of the sweep failed")
        rows = []
        for point in found.curve:
            note = f"learning_rate={point.learning_rate:g}"
            if found.edge and point.learning_rate == found.best:
                note += f", best and {found.edge} of the sweep"
            rows.append(Row(measure="sweep_score", value=point.score, note=note))
        return found.best, rows

    def _score(self, model: Model) -> float:
        quality, plan = self.options.quality, self.options.plan
        limit = None if quality is None else quality.max_tokens or None
        return bits_per_byte(
            model, self.tokens, part="dev", seq_len=plan.seq_len, max_tokens=limit
        ).value


def quality_rows(
    model: Model, tokens: TokenSet, seq_len: int, plan: QualityPlan, *, stored: bool = False
) -> list[Row]:
    """Bits per byte, whole and by document, and loss by position.

    stored: as `document_scores`'.
    """
    limit = plan.max_tokens or None
    read: dict[str, Any] = {"part": "test", "max_tokens": limit, "stored": stored}
    scores = document_scores(model, tokens, seq_len=seq_len, **read)
    rows = [estimate_row("bits_per_byte", over_documents(scores), context=seq_len)]
    rows += [
        Row(measure=DOCUMENTS, value=s.bits / s.size_bytes, n=round(s.size_bytes),
            context=seq_len, position=s.document + 1)
        for s in scores
    ]  # fmt: skip
    if not plan.reach:
        return rows
    curve = loss_by_position(model, tokens, reach=seq_len * plan.reach, **read)
    rows += [estimate_row("loss_at_position", loss, position=at) for at, loss in curve.items()]
    return rows
