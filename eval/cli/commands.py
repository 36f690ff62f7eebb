"""The bodies of the single-purpose commands: train one, time some, score a checkpoint."""

import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from archs.backends import resolve_backend
from archs.checks import require_at_least, require_some
from archs.errors import UserError
from archs.files import make_folder
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.measure.decode_plans import DecodePlan
from eval.measure.plan import decode_point, quality_point, serve_point, train_point
from eval.measure.progress import Progress, Watch
from eval.measure.serve_plan import ServePlan
from eval.measure.site import Site
from eval.measure.stages import measure
from eval.measure.steps import by_context, by_options
from eval.measure.suite import CorpusPlan, QualityPlan, TrainPlan
from eval.results.paired import DOCUMENTS
from eval.results.rows import Status
from train.corpus import check_spec


class _Lines(Watch):
    """How far training is, on one line of a terminal, or line by line."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def at(self, fraction: float, text: str = "") -> None:
        """The point is `fraction` done."""
        self.console.print(
            f"{100 * fraction:3.0f} %  {text}", end="\r" if self.console.is_terminal else "\n"
        )


def train_one(
    arch: str, *, scale: str, corpus: str, vocab_size: int | None, plan: Mapping[str, Any],
    seed: int, out: Path, device: torch.device, resume: bool, time_budget_s: float | None,
    console: Console,
) -> dict[str, object]:  # fmt: skip
    """Train one architecture and score it on held-out text; its checkpoint lies in `out`.

    plan: fields of a `TrainPlan`. Raises UserError on bad input and where memory does not suffice.
    """
    shape = get_scale(scale)
    given = {"vocab_size": vocab_size, "seq_len": plan["seq_len"]}
    shape = shape.with_options({k: v for k, v in given.items() if v is not None})
    asked = TrainPlan(**{**plan, "scale": scale, "seq_len": shape.seq_len, "seeds": (seed,)})
    resolve_backend(asked.backend, device)
    text = CorpusPlan(spec=corpus, vocab_size=shape.vocab_size)
    point = train_point(
        ModelSpec(arch=arch, scale=shape), text, asked, QualityPlan(max_tokens=0, reach=0),
        seed, device.type,
    )  # fmt: skip
    make_folder(out)
    deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    site = Site(None, device, deadline=deadline, checkpoint_folder=out, resume=resume)
    found = measure(point, site, _Lines(console))
    failure = found.failure
    if failure is not None and failure.status == Status.OOM:
        raise UserError(failure.note)
    status = "stopped" if found.stopped else Status.OK if failure is None else failure.status
    figures = {row.measure: row.value for row in (*found.rows, *found.withheld)}
    row: dict[str, object] = {
        "arch": arch, "status": str(status), "steps": round(figures.get("train_steps") or 0),
        "kernel_backend": found.about.kernel_backend, "train_loss": figures.get("train_loss"),
        "train_tok_per_s": figures.get("train_tok_per_s"),
        "checkpoint": str(out / "checkpoint.safetensors"),
    }  # fmt: skip
    return row if failure is not None else {**row, "bits_per_byte": figures["bits_per_byte"]}


def bench_archs(
    archs: Sequence[str], *, scale: str, batches: Sequence[int], contexts: Sequence[int],
    steps: int, prompt: int, device: torch.device, backend: str = "auto", compiled: bool = False,
    counters: bool = False, replay: int = 0, weights: Sequence[str] = ("",),
    state: Sequence[str] = ("",), progress: Progress | None = None,
) -> list[dict[str, object]]:  # fmt: skip
    """Decode timings, a row per architecture, batch and context (`eval.measure.steps`).

    An architecture whose extend is wrong gets no latency: its row says "incorrect".
    progress: where to tell which architecture is at work; None: nowhere.
    counters: also bytes and FLOPs of a step by the GPU's counters.
    replay: inputs in a ring from which recurrent states are computed anew; 0: none.
    weights, state: formats that weights are stored and states kept in, one after the other; "": as
    `DecodePlan`'s.
    backend: one of `archs.backends`; an architecture that it has no form for is "unsupported".
    Contexts whose state does not fit in memory are rows of status "oom". Raises UserError on counts
    that time nothing, on a backend that this device cannot run, and where nothing fits.
    """
    resolve_backend(backend, device)
    lists = {"archs": archs, "batches": batches, "contexts": contexts, "weights": weights,
             "state": state}  # fmt: skip
    for name, values in lists.items():
        require_some(name, values)
    plans = [
        DecodePlan(
            scale=scale, batches=tuple(batches), contexts=tuple(contexts), steps=steps,
            prompt=prompt, compiled=compiled, backend=backend, counters=counters, replay=replay,
            weights=stored, state=kept,
        )
        for stored, kept in product(weights, state)
    ]  # fmt: skip
    site = Site(None, device)
    wanted = [
        decode_point(ModelSpec(arch=arch, scale=get_scale(scale)), plan, batch, device.type)
        for arch, plan, batch in product(archs, plans, batches)
    ]
    rows: list[dict[str, object]] = []
    progress = progress or Progress(Console(), quiet=True)
    with progress.over(len(wanted), len(wanted), len(wanted)):
        for point in wanted:
            with progress.cell(f"bench {point.label}", 1.0) as watch:
                rows += by_context(point, measure(point, site, watch))
                if point is wanted[-1] and all(row["status"] == Status.OOM for row in rows):
                    raise UserError(str(rows[0]["note"]))
    return rows


def serve_archs(
    archs: Sequence[str], plan: ServePlan, *, device: torch.device,
    progress: Progress | None = None,
) -> list[dict[str, object]]:  # fmt: skip
    """A workload served by each architecture with random weights: a row for each policy and rate.

    progress: where to tell which architecture is at work; None: nowhere. Raises UserError on a
    backend that this device cannot run, and where nothing fits in memory.
    """
    resolve_backend(plan.backend, device)
    require_some("archs", archs)
    wanted = [
        serve_point(ModelSpec(arch=arch, scale=get_scale(plan.scale)), plan, device.type)
        for arch in archs
    ]
    site, progress = Site(None, device), progress or Progress(Console(), quiet=True)
    rows: list[dict[str, object]] = []
    with progress.over(len(wanted), len(wanted), len(wanted)):
        for point in wanted:
            with progress.cell(f"serve {point.label}", 1.0) as watch:
                rows += by_options(point, measure(point, site, watch))
    if all(row["status"] == Status.OOM for row in rows):
        raise UserError(str(rows[0]["note"]))
    return rows


def score_checkpoint(
    checkpoint: Path, corpus: str, max_tokens: int | None, device: torch.device,
    arch: str | None = None, state: str = "", progress: Progress | None = None,
) -> list[dict[str, object]]:  # fmt: skip
    """Held-out bits per byte and loss by position of a checkpoint's model.

    progress: where to tell that it is at work; None: nowhere.
    arch: the architecture file of a checkpoint that was trained from one. state: the format that
    its state is kept in while text is read as it would be decoded; "": the parallel form reads.
    Raises UserError when the corpus gives another tokenizer than the model was trained with, and
    where the state does not take its format.
    """
    if max_tokens is not None:
        require_at_least("max_tokens", max_tokens, 1)
    check_spec(corpus)
    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoint.safetensors"
    point = quality_point(
        checkpoint, corpus, QualityPlan(max_tokens=max_tokens or 0), device.type, arch, state
    )
    progress = progress or Progress(Console(), quiet=True)
    with progress.over(1, 1, 1), progress.cell(f"score {checkpoint}", 1.0) as watch:
        found = measure(point, Site(None, device), watch)
    if found.failure is not None:
        raise UserError(found.failure.note)
    return [
        {
            "measure": row.measure, "position": row.position or "", "value": row.value,
            "low": row.low, "high": row.high,
        }
        for row in found.rows if row.measure != DOCUMENTS
    ]  # fmt: skip
