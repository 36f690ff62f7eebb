"""What the single-purpose commands do: train one, time some, score a checkpoint."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from eval.measure import measure
from eval.measure.site import CACHE, Site
from eval.measure.steps import by_context
from eval.plan import decode_point
from eval.progress import Progress
from eval.quality import bits_per_byte, loss_by_position
from eval.results.rows import Status
from eval.suite import DecodePlan
from infer.memory import require_memory
from train.checkpoint import load_model, read_metadata
from train.corpus import check_spec, load_corpus
from train.loop import StepReport, train, training_bytes
from train.recipe import Recipe
from train.tokenizer import train_or_load
from train.tokens import Batches, TokenSet, prepare


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
    """Decode timings, a row per architecture, batch and context (`eval.measure.steps`).

    An architecture whose extend is wrong gets no latency: its row says "incorrect".
    progress: where to tell which architecture is at work; None: nowhere.
    counters: also bytes and FLOPs of a step by the GPU's counters.
    backend: one of `archs.backends`; an architecture that it has no form for is "unsupported".
    Contexts whose state does not fit in memory are rows of status "oom". Raises UserError on counts
    that time nothing, on a backend that this device cannot run, and where nothing fits.
    """
    resolve_backend(backend, device)
    for name, values in (("archs", archs), ("batches", batches), ("contexts", contexts)):
        require_some(name, values)
    plan = DecodePlan(
        scale=scale, batches=tuple(batches), contexts=tuple(contexts), steps=steps, prompt=prompt,
        compiled=compiled, backend=backend, counters=counters,
    )  # fmt: skip
    site = Site(None, device, rows=batches)
    wanted = [
        decode_point(ModelSpec(arch=arch, scale=get_scale(scale)), plan, batch, device.type)
        for arch, batch in product(archs, batches)
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
