"""The cells of a suite: one method trains, asks or times one architecture and returns its rows."""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from archs.backbone import Model
from archs.backends import AUTO, NoFormError, resolve_backend
from archs.registry import ModelSpec, folder_name, layer_names
from archs.sizes import get_scale
from eval.agreement import agreement
from eval.cell_rows import (
    cost_rows,
    counted_rows,
    estimate_row,
    load_rows,
    median_row,
    reporter,
    roofline_rows,
    timing_rows,
)
from eval.counted import Work
from eval.counters import Counters
from eval.decode import (
    build_to_serve,
    decode_cost,
    measure_ttft_ms,
    measure_what_fits,
)
from eval.hardware import Roofline, measure_roofline, measured_again
from eval.neighbours import Neighbours
from eval.paired import DOCUMENTS
from eval.progress import Watch
from eval.quality import (
    bits_per_byte,
    document_scores,
    loss_by_position,
    mqar_accuracy,
    over_documents,
)
from eval.results import About, Cell, Row, Status
from eval.suite import Suite, TrainPlan
from infer.engine import Engine
from infer.memory import require_memory
from train.corpus import load_corpus
from train.loop import train, training_bytes
from train.mqar import MqarBatches
from train.recipe import Recipe
from train.sweep import sweep
from train.tokenizer import train_or_load
from train.tokens import Batches, TokenSet, prepare

#: Contexts at which state and intensity are predicted for every scale.
COST_CONTEXTS = (0, 256, 1024, 4096, 16384)
SOLVED = 0.99


class CellFailure(RuntimeError):
    """A cell that ended without its figures; `stopped` when only the time budget ended it."""

    def __init__(self, status: Status, about: About, note: str, *, stopped: bool = False) -> None:
        super().__init__(note)
        self.status = status
        self.about = about
        self.stopped = stopped


class Workshop:
    """What the cells of one run share: corpus, tokens, roofline, device, deadline."""

    def __init__(
        self, suite: Suite, out: Path, device: torch.device, deadline: float | None
    ) -> None:
        self.suite = suite
        self.out = out
        self.device = device
        self.deadline = deadline
        self._roofline: Roofline | None = None
        bf16 = device.type == "cuda"
        #: Weights in training are float32; what is served on a GPU is bfloat16.
        self.serving_dtype = torch.bfloat16 if bf16 else torch.float32

    @cached_property
    def tokens(self) -> TokenSet:
        """The suite's corpus, tokenized once and cached beside all runs."""
        plan = self.suite.corpus
        cache = self.out.parent / ".cache"
        corpus = load_corpus(plan.spec)
        tokenizer = train_or_load(corpus, plan.vocab_size, cache)
        return prepare(corpus, tokenizer, cache)

    @property
    def roofline(self) -> Roofline:
        """This machine's rates, with products of the suite's batches, measured once per run; its
        ceilings the highest of those measured then and beside each timing since.
        """
        if self._roofline is None:
            batches = {b for plan in self.suite.decode for b in plan.batches}
            self._roofline = measure_roofline(self.device, self.serving_dtype, sorted(batches))
        return self._roofline

    @cached_property
    def counters(self) -> Counters:
        """The device's counters, calibrated once per run."""
        return Counters(self.device)

    def _about(self, arch: str, model: Model, **more: Any) -> About:
        names = layer_names(arch, len(model.blocks))
        return About(
            pattern=" ".join(names),
            params=sum(p.numel() for p in model.parameters()),
            dtype=str(model.embedding.weight.dtype).removeprefix("torch."),
            **more,
        )

    # -- machine and prediction ----------------------------------------------------------------

    def hardware(self, watch: Watch) -> tuple[About, list[Row]]:
        """The measured rates of this machine."""
        about = About(dtype=str(self.roofline.dtype).removeprefix("torch."))
        return about, roofline_rows(self.roofline)

    def cost(self, cell: Cell, watch: Watch) -> tuple[About, list[Row]]:
        """State and intensity from the declarations alone."""
        model = self.suite.model(cell.arch, get_scale(cell.scale)).outline(self.serving_dtype)
        specs = model.state_specs()
        rows = [
            Row(measure="state_bytes_per_token", value=sum(s.bytes_per_token for s in specs)),
            Row(measure="state_bytes_fixed", value=sum(s.fixed_bytes for s in specs)),
            Row(measure="mlp_hidden", value=model.hidden),
        ]
        for context in COST_CONTEXTS:
            rows += cost_rows(model, context)
        return self._about(cell.arch, model), rows

    # -- training and quality ------------------------------------------------------------------

    def train(self, cell: Cell, watch: Watch) -> tuple[About, list[Row]]:
        """Sweep, train, then score held-out text."""
        plan = self.suite.train
        assert plan is not None
        tokens = self.tokens
        spec = self.suite.trained_model(cell.arch, cell.scale, tokens.vocab_size)
        rates = plan.rates_at(cell.scale)
        model = self._to_train(spec, plan.recipe(cell.scale, rates[0], cell.seed))
        about = self._about(
            cell.arch, model, corpus=self.suite.corpus.spec,
            tokens=plan.steps * plan.batch * plan.seq_len, kernel_backend=model.backend,
        )  # fmt: skip
        data = Batches(tokens, batch=plan.batch, seq_len=plan.seq_len, seed=cell.seed)
        rows: list[Row] = []
        rate, folder = rates[0], self._folder(cell)
        if len(rates) > 1:
            rate = self._best_rate(cell, spec, plan, watch, about, rows)
            if plan.sweep_steps == plan.steps and cell.seed == plan.seeds[0]:
                # The sweep has made this very run: it is taken up where it ended.
                folder = self._sweep_folder(cell) / f"lr_{rate:g}"
        result = train(
            model, data, plan.recipe(cell.scale, rate, cell.seed), folder,
            spec=spec, data_fingerprint=tokens.name, deadline=self.deadline,
            progress=reporter(watch),
        )  # fmt: skip
        if result.status != "ok":
            raise CellFailure(
                Status.NAN, about, f"training {result.status} at step {result.steps}",
                stopped=result.status == "stopped",
            )  # fmt: skip
        rows += [
            Row(measure="train_loss", value=result.train_loss_nats),
            Row(measure="train_tok_per_s", value=result.tok_per_s),
            Row(measure="train_s", value=result.seconds),
            Row(measure="learning_rate", value=rate),
        ]
        return about, rows + self._quality(model.eval(), plan)

    def _to_train(self, spec: ModelSpec, recipe: Recipe) -> Model:
        """A new model. Raises DoesNotFitError where its training would not fit in memory."""
        wanted = training_bytes(spec.outline(), recipe)
        require_memory(wanted, self.device, f"training {spec.arch} at scale {spec.scale.name}")
        model = spec.build(seed=recipe.seed, device=str(self.device))
        return model.use(resolve_backend(AUTO, self.device))

    def _best_rate(
        self, cell: Cell, spec: ModelSpec, plan: TrainPlan, watch: Watch, about: About,
        rows: list[Row],
    ) -> float:  # fmt: skip
        """The sweep's best rate on development documents, with its curve as rows."""
        seed, rates = plan.seeds[0], plan.rates_at(cell.scale)
        data = Batches(self.tokens, batch=plan.batch, seq_len=plan.seq_len, seed=seed)
        recipe = plan.recipe(cell.scale, rates[0], seed)
        found = sweep(
            lambda: self._to_train(spec, recipe),
            data, recipe,
            lambda model: self._dev_score(model, plan),
            self._sweep_folder(cell),
            spec=spec, steps=plan.sweep_steps, data_fingerprint=self.tokens.name,
            progress=reporter(watch), deadline=self.deadline,
        )  # fmt: skip
        if not found.complete:
            raise CellFailure(Status.ERROR, about, "stopped in the sweep", stopped=True)
        if found.best is None:
            raise CellFailure(Status.NAN, about, "every learning rate of the sweep failed")
        for point in found.curve:
            note = f"learning_rate={point.learning_rate:g}"
            if found.edge and point.learning_rate == found.best:
                note += f", best and {found.edge} of the sweep"
            rows.append(Row(measure="sweep_score", value=point.score, note=note))
        return found.best

    def _dev_score(self, model: Model, plan: TrainPlan) -> float:
        quality = self.suite.quality
        limit = None if quality is None else quality.max_tokens
        return bits_per_byte(
            model, self.tokens, part="dev", seq_len=plan.seq_len, max_tokens=limit
        ).value

    def _quality(self, model: Model, plan: TrainPlan) -> list[Row]:
        quality = self.suite.quality
        if quality is None:
            return []
        scores = document_scores(
            model, self.tokens, part="test", seq_len=plan.seq_len, max_tokens=quality.max_tokens
        )
        rows = [estimate_row("bits_per_byte", over_documents(scores), context=plan.seq_len)]
        rows += [
            Row(measure=DOCUMENTS, value=s.bits / s.size_bytes, n=round(s.size_bytes),
                context=plan.seq_len, position=s.document + 1)
            for s in scores
        ]  # fmt: skip
        reach = plan.seq_len * quality.reach
        curve = loss_by_position(
            model, self.tokens, part="test", reach=reach, max_tokens=quality.max_tokens
        )
        for position, loss in curve.items():
            rows.append(estimate_row("loss_at_position", loss, position=position))
        return rows

    def mqar(self, cell: Cell, watch: Watch) -> tuple[About, list[Row]]:
        """Recall, trained until it is solved or the steps end, at each rate until one solves it.

        When to stop and which rate to take is decided on development sequences.
        """
        plan = self.suite.mqar
        assert plan is not None
        spec, task = self.suite.mqar_model(cell.arch), plan.task
        data = MqarBatches(task, plan.batch, cell.seed)
        best: tuple[float, Model, int, float] | None = None
        about = self._about(
            cell.arch, spec.outline(), corpus="mqar",
            kernel_backend=resolve_backend(AUTO, self.device),
        )  # fmt: skip
        for rate in plan.learning_rates:
            recipe = plan.recipe(rate, cell.seed)
            model = self._to_train(spec, recipe)
            result = train(
                model, data, recipe, self._folder(cell) / f"lr_{rate:g}",
                spec=spec, data_fingerprint=str(task), deadline=self.deadline,
                progress=reporter(watch),
                eval_fn=lambda m: {
                    "accuracy": mqar_accuracy(
                        m, task, part="dev", sequences=128, seed=cell.seed
                    ).value
                },
                enough=lambda found: found.get("accuracy", 0.0) >= SOLVED + 0.003,
            )  # fmt: skip
            if result.status == "stopped":
                raise CellFailure(Status.ERROR, about, "stopped", stopped=True)
            if result.status != "ok":
                continue
            chosen_by = mqar_accuracy(
                model.eval(), task, part="dev", sequences=plan.test_sequences, seed=cell.seed
            ).value
            if best is None or chosen_by > best[0]:
                best = chosen_by, model, result.steps, rate
            if chosen_by >= SOLVED:
                break
        if best is None:
            raise CellFailure(Status.NAN, about, "training failed at every learning rate")
        _, model, steps, rate = best
        accuracy = mqar_accuracy(
            model, task, part="test", sequences=plan.test_sequences, seed=cell.seed
        )
        about = replace(about, tokens=steps * plan.batch * plan.seq_len)
        rows = [
            estimate_row("mqar_accuracy", accuracy, context=plan.seq_len),
            Row(measure="learning_rate", value=rate),
        ]
        if accuracy.value >= SOLVED:
            rows.append(Row(measure="mqar_steps_to_99", value=steps))
        return about, rows

    # -- serving ---------------------------------------------------------------------------------

    def decode(self, cell: Cell, watch: Watch) -> tuple[About, list[Row]]:
        """Correctness first, then decode over contexts, prefill, and the no-state baseline."""
        plan = self.suite.decode[cell.section]
        spec = self.suite.model(cell.arch, get_scale(plan.scale))
        model = build_to_serve(spec, self.device, self.serving_dtype)
        backend = resolve_backend(plan.backend, self.device)
        label = "torch-compile" if plan.compiled else backend
        about = self._about(cell.arch, model, kernel_backend=label)
        try:
            agreed = agreement(
                model, context=max(plan.contexts), batches=(cell.batch,), backend=backend,
                compiled=plan.compiled,
            )  # fmt: skip
        except NoFormError as why:
            raise CellFailure(Status.UNSUPPORTED, about, str(why)) from None
        if not agreed.holds:
            raise CellFailure(Status.INCORRECT, about, agreed.why_not)
        watch.at(0.1, "correct")
        rows = [Row(measure="agreement_error", value=agreed.error)]
        with Neighbours() as others:
            timings, too_long = measure_what_fits(
                model, batch=cell.batch, contexts=plan.contexts, steps=plan.steps, backend=backend,
                compiled=plan.compiled,
            )  # fmt: skip
            self._roofline = measured_again(self.roofline, self.device)
        rows += load_rows(others.share, batch=cell.batch)
        rows += [
            Row(measure="tpot_ms", status=Status.OOM, batch=cell.batch, context=context, note=note)
            for context, note in too_long.items()
        ]
        if label != "torch":
            rows.append(Row(measure="compile_s", value=timings[0].warmup_ms / 1e3,
                            batch=cell.batch, context=timings[0].context))  # fmt: skip
        for timing in timings:
            cost = decode_cost(model, timing.batch, timing.context)
            rows += timing_rows(timing, cost, self.roofline)
        rate = f"{1e3 * cell.batch / timings[0].tpot_ms:.0f} tok/s"
        watch.at(0.7, ", ".join(filter(None, (rate, others.word))))
        if plan.prompt:
            warmup_ms, times = measure_ttft_ms(
                model, batch=cell.batch, prompt=plan.prompt, backend=backend
            )
            rows += [
                median_row("ttft_ms", times, batch=cell.batch, context=plan.prompt),
                Row(measure="compile_s", value=warmup_ms / 1e3, batch=cell.batch,
                    context=plan.prompt),
            ]  # fmt: skip
        if plan.no_cache and cell.batch == min(plan.batches):
            short = [context for context in plan.contexts if context not in too_long]
            rows += self._baseline_rows(model, short, plan.no_cache, cell.batch, backend)
        if plan.counters:
            del model
            watch.at(0.9, "counters")
            for timing in timings:
                work = Work(
                    spec=spec, dtype=self.serving_dtype, backend=backend, compiled=plan.compiled,
                    batch=timing.batch, context=timing.context,
                )  # fmt: skip
                rows += counted_rows(self.counters.count(work), work)
        return about, rows

    def _baseline_rows(
        self, model: Model, contexts: list[int], count: int, batch: int, backend: str
    ) -> list[Row]:
        """The next `count` tokens after each context, with and without the state."""
        generator = torch.Generator().manual_seed(1)
        rows = []
        for context in contexts:
            ids = torch.randint(model.vocab_size, (batch, context), generator=generator).tolist()
            engine = Engine(
                model, max_sequences=batch, max_context=context + count, backend=backend
            )
            kept = engine.generate(ids, count)
            bare = engine.generate_without_state(ids, count)
            at: dict[str, Any] = {"batch": batch, "context": context}
            rows += [
                median_row("cached_tpot_ms", kept.step_ms, **at),
                median_row("nocache_tpot_ms", bare.step_ms, **at),
            ]
        return rows

    def _folder(self, cell: Cell) -> Path:
        return self._folder_of(cell.arch, f"{cell.stage}-{cell.scale}-seed{cell.seed}")

    def _sweep_folder(self, cell: Cell) -> Path:
        return self._folder_of(cell.arch, f"sweep-{cell.scale}")

    def _folder_of(self, arch: str, name: str) -> Path:
        return self.out / "cells" / folder_name(arch) / name
