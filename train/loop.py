"""The training loop, one for every token mixer and for text and synthetic tasks alike.

It sees a model, a source of batches that is a pure function of the step, and a recipe. A run
lives in a folder: `metrics.jsonl` (one flushed line per event, keys with units) and
`checkpoint.safetensors`; killed at any moment it resumes from there, on a CPU to the same
weights bit for bit. A run that fails says so by its status and never by an exception:
"nan" when a loss or gradient norm is not finite, "diverged" when the smoothed loss stays above
twice the loss of the first steps for `DIVERGED_STEPS` steps, "stopped" at the deadline.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from archs.backbone import Model
from archs.errors import UserError
from archs.files import refusing
from archs.registry import ModelSpec
from archs.sizes import Scale
from kernels.loss.cross_entropy import IGNORED
from train.checkpoint import Progress, resume, save_checkpoint
from train.heads import LossFunction, attached, loss_of
from train.identity import Identity
from train.metrics import MetricsLog
from train.optim import Optimizer
from train.recipe import Recipe

Status = Literal["ok", "nan", "diverged", "stopped"]
EvalFunction = Callable[[Model], Mapping[str, float]]

CHECKPOINT_NAME = "checkpoint.safetensors"
#: Weight of the past in the smoothed loss (bias-corrected exponential average).
SMOOTHING = 0.95
#: The divergence rule: the average of the first EARLY_STEPS losses, doubled, for this long.
EARLY_STEPS = 10
DIVERGED_STEPS = 50


class Batches(Protocol):
    """A source of batches. The same step always gives the same batch."""

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [B, T]; targets are -100 where nothing is predicted."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """How a run ended. `train_loss_nats` is smoothed; `evaluation` is the last one made."""

    status: Status
    train_loss_nats: float
    steps: int
    tokens: int
    tok_per_s: float
    seconds: float
    evaluation: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What a progress display gets: steps done of steps, smoothed loss, rate."""

    step: int
    steps: int
    train_loss_nats: float
    tok_per_s: float


def training_bytes(spec: ModelSpec, recipe: Recipe) -> int:
    """The least that training holds: weights, gradients and the optimizer's averages.

    Activations come on top.
    """
    averages = {"adamw": 2, "muon": 1}[recipe.optimizer]
    parts = [spec.outline(), *([spec.head()] if recipe.mtp_weight else [])]
    return (2 + averages) * sum(p.nbytes for part in parts for p in part.parameters())


def require_trainable(scale: Scale) -> None:
    """Raise UserError for a shape with experts."""
    if scale.experts:
        raise UserError(
            f"scale '{scale.name}' has experts, whose router is not trained here; train "
            f"'{scale.name.partition('+')[0]}', and name experts in decode, bench and predict"
        )


def train(
    model: Model,
    data: Batches,
    recipe: Recipe,
    run_dir: Path,
    *,
    spec: ModelSpec,
    data_fingerprint: str = "",
    resume_run: bool = True,
    progress: Callable[[StepReport], None] | None = None,
    deadline: float | None = None,
    eval_fn: EvalFunction | None = None,
    enough: Callable[[Mapping[str, float]], bool] | None = None,
    loss_fn: LossFunction | None = None,
) -> TrainResult:
    """Train `model` in place, from the folder's checkpoint if there is one.

    A head that the recipe trains with it lies in the checkpoint alone (`load_head`).
    spec, data_fingerprint: what model and data are, kept in the checkpoint.
    resume_run: False starts over and drops what the folder holds of an earlier run.
    deadline: in `time.monotonic()` seconds; past it the run saves and returns "stopped".
    eval_fn: called every `eval_every` steps and at the end.
    enough: told each evaluation; True ends the run early, well.
    loss_fn: None: the recipe's (`train.heads.loss_of`).
    Raises UserError on batches that do not fit the recipe or the vocabulary, on a checkpoint of
    another run, on a full disk, and as `require_trainable`.
    """
    require_trainable(spec.scale)
    with attached(model, spec, recipe):
        run = _Run(model, data, recipe, run_dir, loss_fn or loss_of(recipe))
        source = spec.source_digest()
        identity = Identity(spec=spec, recipe=recipe, data=data_fingerprint, source=source)
        run.load(identity, resume_run)
        status: Status = "ok"
        solved = enough is not None and enough(run.progress.evaluation)
        if run.progress.step < recipe.steps and not solved:
            try:
                run.open_log()
                status = run.steps(progress, deadline, eval_fn, enough)
                run.log.write("end", status=status, **run.figures())
            finally:
                run.log.close()
    p = run.progress
    return TrainResult(
        status=status,
        train_loss_nats=run.smoothed_loss,
        steps=p.step,
        tokens=p.tokens,
        tok_per_s=run.tok_per_s,
        seconds=p.seconds,
        evaluation=p.evaluation,
    )


class _Run:
    """One run's moving parts."""

    def __init__(
        self, model: Model, data: Batches, recipe: Recipe, run_dir: Path, loss_fn: LossFunction
    ) -> None:
        self.device = model.embedding.weight.device
        if recipe.autocast == "bf16" and self.device.type != "cuda":
            raise UserError(
                f"autocast=bf16 needs a CUDA device, the model is on {self.device.type}; set "
                "autocast = 'none'"
            )
        self.model, self.data, self.recipe, self.loss_fn = model, data, recipe, loss_fn
        self.checkpoint = run_dir / CHECKPOINT_NAME
        self.optimizer = Optimizer(model, recipe)
        self.progress = Progress()
        self.log = MetricsLog(run_dir)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._clock = time.perf_counter()

    def load(self, identity: Identity, resume_run: bool) -> None:
        """Check the first batch, then take up the checkpoint or seed a new run."""
        self.identity = identity
        _check_batch(*self.data.batch_at(0), self.recipe, self.model.vocab_size)
        if resume_run and self.checkpoint.exists():
            self.progress = resume(self.checkpoint, self.model, self.optimizer, identity)
        else:
            with refusing(self.checkpoint, "removed"):
                self.checkpoint.unlink(missing_ok=True)
            torch.manual_seed(self.recipe.seed)

    def open_log(self) -> None:
        """Open the log and write what is running where."""
        identity = self.identity
        self.log.open(after_step=self.progress.step)
        self.log.write(
            "start",
            step=self.progress.step,
            arch=identity.spec.arch,
            scale=identity.spec.scale.name,
            config_hash=identity.config_hash,
            parameters=sum(p.numel() for p in self.model.parameters()),
            device=str(self.device),
            torch=str(torch.__version__),
            loggers=self.log.loggers,
            recipe=self.recipe.to_dict(),
        )

    def steps(
        self,
        progress: Callable[[StepReport], None] | None,
        deadline: float | None,
        eval_fn: EvalFunction | None,
        enough: Callable[[Mapping[str, float]], bool] | None,
    ) -> Status:
        """All remaining steps; returns how they ended."""
        p, r = self.progress, self.recipe
        self.model.train()
        self._clock = time.perf_counter()
        while p.step < r.steps:
            if deadline is not None and time.monotonic() >= deadline:
                failed = self._settle()
                if failed is None and p.step:
                    self._save()
                return failed or "stopped"
            self._pending.append(self._step(*self.data.batch_at(p.step)))
            p.step += 1
            p.tokens += r.batch * r.seq_len
            log, evaluate, save = (
                p.step == r.steps or (every > 0 and p.step % every == 0)
                for every in (r.log_every, r.eval_every, r.checkpoint_every)
            )
            if not (log or evaluate or save):
                continue
            failed = self._settle()
            if failed is not None:
                return failed
            if progress is not None:
                progress(self._report())
            if evaluate and eval_fn is not None:
                self._evaluate(eval_fn)
            solved = evaluate and enough is not None and enough(p.evaluation)
            if save or solved:
                self._save()
            if solved:
                break
            self._clock = time.perf_counter()
        return "ok"

    def _report(self) -> StepReport:
        return StepReport(
            step=self.progress.step,
            steps=self.recipe.steps,
            train_loss_nats=self.smoothed_loss,
            tok_per_s=self.tok_per_s,
        )

    def figures(self) -> dict[str, float]:
        """The run so far, as it is logged."""
        p = self.progress
        return {
            "step": p.step,
            "tokens": p.tokens,
            "smoothed_loss_nats": self.smoothed_loss,
            "tok_per_s": self.tok_per_s,
            "seconds": p.seconds,
        }

    @property
    def smoothed_loss(self) -> float:
        """The bias-corrected average of the losses in nats; nan before the first."""
        seen = self.progress.losses_seen
        return self.progress.average / (1 - SMOOTHING**seen) if seen else float("nan")

    @property
    def tok_per_s(self) -> float:
        """Training tokens per second of training, evaluation and saving apart."""
        return self.progress.tokens / self.progress.seconds if self.progress.seconds else 0.0

    def _step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One update; returns the next token's loss, the gradient norm and the weighted sum of all
        other losses, without waiting for them.
        """
        r = self.recipe
        self.optimizer.take_back()
        total, others = torch.zeros(2, device=self.device).unbind()
        all_targets = int((targets != IGNORED).sum())
        for x, y in zip(inputs.chunk(r.grad_accum), targets.chunk(r.grad_accum), strict=True):
            # A part counts by its targets, so that accumulating changes nothing but memory.
            share = int((y != IGNORED).sum()) / all_targets if all_targets else 1.0
            if not share:
                continue
            with self._autocast():
                losses = self.loss_fn(self.model, x.to(self.device), y.to(self.device))
                loss, beside = losses.next_token, losses.beside
                loss = loss if beside is None else loss + beside
            (loss * share).backward()
            total += losses.next_token.detach() * share
            if beside is not None:
                others += beside.detach() * share
        parameters = [p for p in self.optimizer.parameters if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, r.clip or float("inf"), foreach=True)
        self.optimizer.step(r.learning_rate_at(self.progress.step))
        self.optimizer.zero_grad()
        return total, norm, others

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.recipe.autocast == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _settle(self) -> Status | None:
        """Read the pending losses in one transfer, log the last, say whether the run failed."""
        p = self.progress
        if not self._pending:
            return None
        values = torch.stack([torch.stack(figures) for figures in self._pending]).tolist()
        self._pending.clear()
        now = time.perf_counter()
        p.seconds += now - self._clock
        self._clock = now
        status: Status | None = None
        for loss, norm, others in values:
            if not all(map(math.isfinite, (loss, norm, others))):
                status = "nan"
            elif self._diverges(loss):
                status = "diverged"
            if status is not None:
                break
        self.log.write(
            "step",
            train_loss_nats=loss,
            **({"weighted_other_losses_nats": others} if others else {}),
            grad_norm=norm,
            learning_rate=self.recipe.learning_rate_at(p.step - 1),
            **self.figures(),
        )
        return status

    def _diverges(self, loss: float) -> bool:
        """Take one loss into the averages; True when the divergence rule holds."""
        p = self.progress
        if p.losses_seen < EARLY_STEPS:
            p.early_loss += loss / EARLY_STEPS
        p.losses_seen += 1
        p.average = SMOOTHING * p.average + (1 - SMOOTHING) * loss
        above = p.losses_seen > EARLY_STEPS and self.smoothed_loss > 2 * p.early_loss
        p.steps_above = p.steps_above + 1 if above else 0
        return p.steps_above >= DIVERGED_STEPS

    def _evaluate(self, eval_fn: EvalFunction) -> None:
        backend = self.model.backend
        self.model.eval()
        with torch.no_grad():
            self.progress.evaluation = dict(eval_fn(self.model))
        # An evaluation may have opened an engine, which puts the model where it decodes best.
        self.model.use(backend).train()
        self.optimizer.take_back()
        self.log.write("eval", step=self.progress.step, **self.progress.evaluation)

    def _save(self) -> None:
        save_checkpoint(self.checkpoint, self.model, self.optimizer, self.identity, self.progress)


def _check_batch(inputs: Tensor, targets: Tensor, recipe: Recipe, vocab_size: int) -> None:
    wanted = (recipe.batch, recipe.seq_len)
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if tuple(tensor.shape) != wanted:
            raise UserError(
                f"batch {name} are {tuple(tensor.shape)}, the recipe says batch, seq_len = "
                f"{wanted}; make both agree"
            )
        if int(tensor.max()) >= vocab_size:
            raise UserError(
                f"batch {name} hold token {int(tensor.max())}, the model's vocab_size is "
                f"{vocab_size}; take the tokenizer's vocabulary for the scale"
            )
    if bool((targets == IGNORED).all()):
        raise UserError("the first batch has no target at all (all -100); check the data")
