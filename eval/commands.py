"""What the single-purpose commands do: train one, time some, score a checkpoint."""

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from archs.backends import NoFormError, resolve_backend
from archs.checks import require_at_least, require_some
from archs.cost import Cost
from archs.errors import UserError
from archs.files import make_folder
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.agreement import agreement
from eval.counted import Work
from eval.counters import Counters, Figure
from eval.decode import (
    build_to_serve,
    decode_cost,
    measure_ttft_ms,
    measure_what_fits,
)
from eval.neighbours import Neighbours
from eval.progress import Progress
from eval.quality import bits_per_byte, loss_by_position
from infer.memory import require_memory
from train.checkpoint import load_model, read_metadata
from train.corpus import check_spec, load_corpus
from train.loop import StepReport, train, training_bytes
from train.recipe import Recipe
from train.tokenizer import train_or_load
from train.tokens import Batches, TokenSet, prepare

CACHE = Path("runs") / ".cache"


def load_tokens(corpus: str, vocab_size: int, cache: Path = CACHE) -> TokenSet:
    """A corpus tokenized, from the cache where it has been before."""
    text = load_corpus(corpus)
    return prepare(text, train_or_load(text, vocab_size, cache), cache)


def train_one(
    arch: str,
    *,
    scale: str,
    corpus: str,
    vocab_size: int | None,
    seq_len: int | None,
    recipe: Mapping[str, Any],
    out: Path,
    device: torch.device,
    backend: str = "auto",
    resume: bool,
    time_budget_s: float | None,
    console: Console,
) -> dict[str, object]:
    """Train one architecture and score it on held-out text."""
    given = {"vocab_size": vocab_size, "seq_len": seq_len}
    shape = get_scale(scale).with_options({k: v for k, v in given.items() if v is not None})
    plan = Recipe.from_dict({**recipe, "seq_len": shape.seq_len})
    backend = resolve_backend(backend, device)
    outline = ModelSpec(arch=arch, scale=shape).outline()
    require_memory(training_bytes(outline, plan), device, f"training {arch} at scale {scale}")
    make_folder(out)
    with Progress(console).alone(f"read {corpus}"):
        tokens = load_tokens(corpus, shape.vocab_size)
    spec = ModelSpec(arch=arch, scale=replace(shape, vocab_size=tokens.vocab_size))
    model = spec.build(seed=plan.seed, device=str(device)).use(backend)

    def show(report: StepReport) -> None:
        console.print(
            f"step {report.step}/{report.steps}  loss {report.train_loss_nats:.3f}  "
            f"{report.tok_per_s:,.0f} tok/s",
            end="\r" if console.is_terminal else "\n",
        )

    deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    result = train(
        model,
        Batches(tokens, batch=plan.batch, seq_len=plan.seq_len, seed=plan.seed),
        plan, out, spec=spec, data_fingerprint=tokens.name, resume_run=resume, progress=show,
        deadline=deadline,
    )  # fmt: skip
    row: dict[str, object] = {
        "arch": arch, "status": result.status, "steps": result.steps,
        "kernel_backend": model.backend,
        "train_loss": result.train_loss_nats, "train_tok_per_s": result.tok_per_s,
        "checkpoint": str(out / "checkpoint.safetensors"),
    }  # fmt: skip
    if result.status == "ok":
        with Progress(console).alone(f"score {arch}"):
            score = bits_per_byte(model.eval(), tokens, part="test", seq_len=plan.seq_len)
        row["bits_per_byte"] = score.value
    return row


def bench_archs(
    archs: Sequence[str],
    *,
    scale: str,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    prompt: int,
    device: torch.device,
    backend: str = "auto",
    compiled: bool = False,
    counters: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, object]]:
    """Decode timings; an architecture whose extend is wrong gets no latency.

    progress: where to tell which architecture is at work; None: nowhere.
    counters: also bytes and FLOPs of a step, predicted and by the GPU's counters (None where they
      are missing, with `counters_note` saying why).
    backend: one of `archs.backends`; an architecture that it has no form for is "unsupported".
    Contexts whose state does not fit in memory are rows of status "oom". Raises UserError on counts
    that time nothing, on a backend that this device cannot run, and where nothing fits.
    """
    backend = resolve_backend(backend, device)
    for name, values in (("archs", archs), ("batches", batches), ("contexts", contexts)):
        require_some(name, values)
    for name, value, least in (
        ("batches", list(batches), 1), ("contexts", list(contexts), 1), ("steps", steps, 1),
        ("prompt", prompt, 0),
    ):  # fmt: skip
        require_at_least(name, value, least)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[dict[str, object]] = []
    counts = Counters(device) if counters else None
    progress = progress or Progress(Console(), quiet=True)
    with progress.over(len(archs), len(archs), len(archs)):
        for arch in archs:
            with progress.cell(f"bench {arch} at {scale}", 1.0):
                rows += _bench_arch(
                    ModelSpec(arch=arch, scale=get_scale(scale)), batches=batches,
                    contexts=contexts, steps=steps, prompt=prompt, device=device, dtype=dtype,
                    backend=backend, compiled=compiled, counts=counts,
                )  # fmt: skip
    return rows


def _bench_arch(
    spec: ModelSpec,
    *,
    batches: Sequence[int],
    contexts: Sequence[int],
    steps: int,
    prompt: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    compiled: bool,
    counts: Counters | None,
) -> list[dict[str, object]]:
    """The rows of one architecture."""
    model = build_to_serve(spec, device, dtype)
    about: dict[str, object] = {
        "arch": spec.arch, "kernel_backend": "torch-compile" if compiled else backend
    }  # fmt: skip
    try:
        found = agreement(
            model, context=max(contexts), batches=batches, backend=backend, compiled=compiled
        )
    except NoFormError as why:
        return [{**about, "status": "unsupported", "note": str(why)}]
    if not found.holds:
        return [{**about, "status": "incorrect", "agreement_error": found.error}]
    about["scale"] = spec.scale.name
    rows: list[dict[str, object]] = []
    timed: list[tuple[Work, dict[str, object]]] = []
    for batch in batches:
        ttft: list[float] = []
        if prompt:
            _, ttft = measure_ttft_ms(model, batch=batch, prompt=prompt, backend=backend)
        with Neighbours() as others:
            timings, too_long = measure_what_fits(
                model, batch=batch, contexts=contexts, steps=steps, backend=backend,
                compiled=compiled,
            )  # fmt: skip
        rows += [
            {**about, "batch": batch, "context": c, "status": "oom", "note": n}
            for c, n in too_long.items()
        ]
        for t in timings:
            p50 = t.percentile_ms(50)
            row: dict[str, object] = {
                **about, "batch": batch, "context": t.context,
                "tpot_ms": t.tpot_ms, "tpot_p50_ms": p50, "tpot_p99_ms": t.percentile_ms(99),
                "output_tok_per_s": t.output_tok_per_s, "state_bytes": t.state_bytes,
                "status": "ok",
            }  # fmt: skip
            if ttft:
                row["ttft_ms"] = statistics.median(ttft)
            if others.word:
                row["note"] = others.word
            if counts is not None:
                row |= _predicted(decode_cost(model, batch, t.context))
            work = Work(
                spec=spec, dtype=dtype, backend=backend, compiled=compiled, batch=batch,
                context=t.context,
            )  # fmt: skip
            timed.append((work, row))
    if counts is not None:
        # The process that is counted holds the same model again.
        del model
        for work, row in timed:
            row |= _measured(counts.count(work))
    return [*rows, *(row for _, row in timed)]


def _predicted(cost: Cost) -> dict[str, object]:
    return {
        "step_bytes": cost.bytes, "step_flops": cost.flops,
        "arith_intensity_pred": cost.intensity_flop_per_byte,
    }  # fmt: skip


def _measured(found: Mapping[str, Figure]) -> dict[str, object]:
    values: dict[str, object] = {measure: figure.value for measure, figure in found.items()}
    notes = dict.fromkeys(figure.note for figure in found.values() if figure.note)
    return {**values, "counters_note": "; ".join(notes)} if notes else values


def score_checkpoint(
    checkpoint: Path,
    corpus: str,
    max_tokens: int | None,
    device: torch.device,
    arch: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, object]]:
    """Held-out bits per byte and loss by position of a checkpoint's model.

    progress: where to tell that it is at work; None: nowhere.
    arch: the architecture file of a checkpoint that was trained from one.
    Raises UserError when the corpus gives another tokenizer than the model was trained with.
    """
    if max_tokens is not None:
        require_at_least("max_tokens", max_tokens, 1)
    check_spec(corpus)
    if checkpoint.is_dir():
        checkpoint = checkpoint / "checkpoint.safetensors"
    metadata = read_metadata(checkpoint)
    model = load_model(checkpoint, device=str(device), arch=arch).eval()
    scale = metadata.identity.spec.scale
    # A small corpus fills less of the vocabulary than was asked for; the tokens' name keeps that.
    asked = re.match(r"bpe(\d+)-", metadata.identity.data)
    tokens = load_tokens(corpus, int(asked[1]) if asked else scale.vocab_size)
    if metadata.identity.data and metadata.identity.data != tokens.name:
        raise UserError(
            f"'{checkpoint}' was trained on tokens {metadata.identity.data}, corpus '{corpus}' "
            f"gives {tokens.name}; name the corpus it was trained on"
        )
    progress = progress or Progress(Console(), quiet=True)
    with progress.alone(f"score {checkpoint}"):
        whole = bits_per_byte(
            model, tokens, part="test", seq_len=scale.seq_len, max_tokens=max_tokens
        )
        curve = loss_by_position(
            model, tokens, part="test", reach=2 * scale.seq_len, max_tokens=max_tokens
        )
    rows: list[dict[str, object]] = [
        {
            "measure": "bits_per_byte", "position": "", "value": whole.value, "low": whole.low,
            "high": whole.high,
        }
    ]  # fmt: skip
    for position, loss in curve.items():
        rows.append(
            {
                "measure": "loss_at_position", "position": position, "value": loss.value,
                "low": loss.low, "high": loss.high,
            }
        )  # fmt: skip
    return rows
