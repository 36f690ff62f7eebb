"""`decodebench speculate`: trained models measured, or any architectures predicted."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from archs.errors import UserError
from eval.cli.console import err, out
from eval.cli.options import State, leave, resolve_device
from eval.cli.show import Json, show, show_prediction

#: The columns that people see, of predictions and of measurements.
PREDICTED = (
    "arch", "hardware", "batch", "context", "weight_format", "state_format", "draft", "drafts",
    "tokens_per_verification", "speedup_pred", "max_drafts", "rollback_bytes", "note",
)  # fmt: skip
MEASURED = (
    "arch", "state_format", "draft", "drafts", "batch", "context", "acceptance",
    "tokens_per_verification", "speedup", "speedup_pred", "lossless", "rollback_bytes", "status",
    "note",
)  # fmt: skip


def speculate(
    target: Annotated[str, typer.Option(help="A checkpoint to measure, or an architecture.")],
    draft: Annotated[
        str, typer.Option(help="context, layers:N, mtp, a checkpoint, or ARCH@SCALE to predict.")
    ] = "context",
    k: Annotated[str, typer.Option("--k", help="Drafts: 4, 1,2,4 or 1:8.")] = "1:8",
    batch: Annotated[str, typer.Option(help="1,8 or 1:64")] = "1",
    context: Annotated[str | None, typer.Option(help="64,1k; default: 64, predicted 4k.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Measured after each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    adaptive: Annotated[bool, typer.Option(help="Draft what acceptance pays for.")] = False,
    compiled: Annotated[bool, typer.Option(help="Compile the steps first.")] = False,
    replay: Annotated[
        int, typer.Option(help="Compute recurrent states from so many inputs; 0: copy them.")
    ] = 0,
    weights: Annotated[
        str, typer.Option(help="Predicted: how the target's are stored; default: plain.")
    ] = "",
    state: State = "",
    corpus: Annotated[str, typer.Option(help="The text of the prompts.")] = "sotu",
    arch: Annotated[str | None, typer.Option(help="The file the target was trained from.")] = None,
    scale: Annotated[str, typer.Option(help="Predicted: the target's.")] = "8b",
    acceptance: Annotated[float, typer.Option(help="Predicted: of each draft.")] = 0.7,
    hardware: Annotated[str, typer.Option(help="Predicted: h100,...,this-machine")] = "h100",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_: Json = False,
) -> None:
    """Speculative decoding: what is accepted and what it gains, by draft length and batch."""
    from eval.predict.roofline import parse_counts

    ks, batches = parse_counts(k), parse_counts(batch)
    if _is_checkpoint(target):
        if weights:
            raise UserError(
                f"weights '{weights}' are of predictions; a checkpoint has its own, so compress it"
            )
        rows = measured(
            Path(target), draft, ks, batches, parse_counts(context or "64"),
            new_tokens=new_tokens, temperature=temperature, adaptive=adaptive, compiled=compiled,
            replay=replay, state=state, corpus=corpus, arch=arch, device=resolve_device(device),
            quiet=json_,
        )  # fmt: skip
        shown = [{name: row[name] for name in MEASURED if name in row} for row in rows]
        show(rows if json_ else shown, json_)
        for line in () if json_ else best_of(rows):
            out.print(line)
        leave(str(row["status"]) for row in rows)
        return
    from eval.predict.speculation import speculate as predict

    helper, draft_scale = _drafting(draft)
    rows = predict(
        target, helper, scale=scale, draft_scale=draft_scale, acceptance=acceptance,
        hardware=hardware.split(","), batches=batches, contexts=parse_counts(context or "4k"),
        drafts=ks, replay=replay, weights=weights, state=state,
    )  # fmt: skip
    show_prediction(rows, json_, PREDICTED)


def _is_checkpoint(name: str) -> bool:
    return name.endswith(".safetensors") or (Path(name) / "checkpoint.safetensors").is_file()


def _drafting(draft: str) -> tuple[str | None, str | None]:
    from eval.measure.decode_plans import SpeculatePlan

    if _is_checkpoint(draft):
        raise UserError(
            f"draft '{draft}' is a checkpoint and the target an architecture; give the target's "
            "checkpoint, too, to measure both"
        )
    plan = SpeculatePlan(draft=draft)
    if plan.layers:
        raise UserError(f"draft '{draft}' is measured alone; give the target's checkpoint")
    return (draft, None) if plan.head else plan.drafting or (None, None)


def measured(
    target: Path, draft: str, drafts: list[int], batches: list[int], contexts: list[int], *,
    new_tokens: int, temperature: float, adaptive: bool, compiled: bool, replay: int, state: str,
    corpus: str, arch: str | None, device: torch.device, quiet: bool,
) -> list[dict[str, object]]:  # fmt: skip
    """A row per batch, K and context, by our measures' names. Raises UserError."""
    from archs.heads import HEAD
    from eval.measure.decode_plans import CONTEXT, LAYERS, SpeculatePlan
    from eval.measure.plan import corpus_of, require_kinds, speculate_points
    from eval.measure.progress import Progress
    from eval.measure.site import Site
    from eval.measure.stages import measure
    from eval.measure.trained import source_of
    from eval.results.rows import Status
    from train.checkpoint import read_metadata, read_spec
    from train.corpus import check_spec

    check_spec(corpus)
    known = draft in (CONTEXT, HEAD) or draft.startswith(LAYERS)
    plan = SpeculatePlan(
        draft=draft if known else CONTEXT, drafts=tuple(drafts), batches=tuple(batches),
        contexts=tuple(contexts), new_tokens=new_tokens, temperature=temperature,
        adaptive=adaptive, compiled=compiled, replay=replay, state=state,
    )  # fmt: skip
    given = source_of(target, arch)
    spec = read_spec(Path(given.checkpoint), arch)
    require_kinds(spec, [state] if state else [])
    helper = None if known else source_of(Path(draft))
    identity = read_metadata(Path(given.checkpoint)).identity
    text = corpus_of(identity, corpus)
    points = list(
        speculate_points(spec, given, helper, text, plan, identity.recipe.seed, device.type)
    )
    site, progress = Site(None, device), Progress(err, quiet=quiet)
    rows: list[dict[str, object]] = []
    with progress.over(len(points), len(points), len(points)):
        for point in points:
            with progress.cell(f"speculate {point.label}", 1.0) as watch:
                found = measure(point, site, watch)
            words = dict(word.partition("=")[::2] for word in found.about.options.split())
            at = {
                "arch": point.arch, "scale": point.scale, "batch": point.batch, **words,
                "kernel_backend": found.about.kernel_backend,
                "state_format": found.about.state_format,
            }  # fmt: skip
            if found.failure is not None:
                rows.append({**at, "status": found.failure.status, "note": found.failure.note})
                continue
            for context in contexts:
                own = [r for r in found.rows if r.context == context]
                figures = {r.measure: r.value for r in own if r.position is None}
                curve = {
                    f"acceptance_at_{r.position}": r.value for r in own if r.position is not None
                }
                notes = (r.note for r in own if r.measure == "lossless")
                rows.append(
                    {**at, "context": context, **figures, **curve, "status": Status.OK,
                     "note": next(notes, "")}
                )  # fmt: skip
    return rows


def best_of(rows: list[dict[str, object]]) -> list[str]:
    """For each batch and context the K that gains most, or that none does."""
    lines = []
    cells = dict.fromkeys((r["batch"], r["context"]) for r in rows if "speedup" in r)
    for batch, context in cells:
        own = [r for r in rows if (r["batch"], r.get("context")) == (batch, context)]
        best = max(own, key=lambda r: float(str(r["speedup"])))
        gain = float(str(best["speedup"]))
        said = f"K = {best['drafts']} gains most, {gain:.2f}×"
        if gain <= 1:
            said = f"no draft length pays; K = {best['drafts']} loses least, {gain:.2f}×"
        lines.append(f"batch {batch}, context {context}: {said}")
    return lines
