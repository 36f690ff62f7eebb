"""Commands of `decodebench` that train and time nothing: declarations, predictions, records."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from archs.errors import UserError
from eval.cli.console import out
from eval.cli.options import State, Weights
from eval.cli.show import FIT, PREDICTION, Json, lines, show, show_prediction, write_csv

Launch = Annotated[
    float | None,
    typer.Option(help="What every operation costs beside its work; default: as measured."),
]


def archs(json_: Json = False, scale: str = "tiny") -> None:
    """List architectures with their state at a scale."""
    from archs.registry import HYBRIDS, REGISTRY, VARIANTS, ModelSpec, entry_of
    from archs.sizes import get_scale

    shape = get_scale(scale)
    rows = []
    for name in (*REGISTRY, *VARIANTS, *HYBRIDS):
        model = ModelSpec(arch=name, scale=shape).outline()
        specs = model.state_specs()
        summary = "Hybrid."
        if name not in HYBRIDS:
            entry = entry_of(name)
            shared = entry.config is not entry.mixer.Config
            summary = (entry.config if shared else entry.mixer).__doc__ or ""
        rows.append(
            {
                "arch": name,
                "params": sum(p.numel() for p in model.parameters()),
                "mlp_hidden": model.hidden,
                "state_bytes_per_token": sum(s.bytes_per_token for s in specs),
                "state_bytes_fixed": sum(s.fixed_bytes for s in specs),
                "state_bytes_at_16384": model.state_bytes(16384),
                "summary": summary.splitlines()[0],
            }
        )
    if json_:
        print(json.dumps(rows, indent=2))
        return
    said = ("arch", "state_bytes_per_token", "state_bytes_fixed", "state_bytes_at_16384", "summary")
    show([{"scale": scale, **{name: row[name] for name in said}} for row in rows], json_)


def predict(
    arch: Annotated[list[str] | None, typer.Option(help="Default: all.")] = None,
    scale: str = "8b",
    hardware: Annotated[str, typer.Option(help="h100,h200,...,this-machine")] = "h100",
    batch: Annotated[str | None, typer.Option(help="1,8 or 1:512; default: 1.")] = None,
    context: Annotated[str, typer.Option(help="4k,128k or 1k:1m")] = "1k,16k",
    dtype: Annotated[str, typer.Option(help="Of weights and per-token state.")] = "bfloat16",
    launch_us: Launch = None,
    price: Annotated[str, typer.Option(help="$ per hour: 2.5, or h100=2.5,h200=3.2")] = "",
    weights: Weights = "",
    state: State = "",
    replay: Annotated[
        int, typer.Option(help="Compute recurrent states from so many inputs; 0: write them.")
    ] = 0,
    by_op: Annotated[bool, typer.Option(help="One row per operation.")] = False,
    out_file: Annotated[Path | None, typer.Option("--out", help="CSV to write.")] = None,
    picture: Annotated[Path | None, typer.Option(help="png, svg or html to draw.")] = None,
    largest: Annotated[
        bool, typer.Option("--fit", help="The largest batch that fits and keeps --tpot.")
    ] = False,
    tpot: Annotated[str | None, typer.Option(help="Of --fit: time per token, 20ms.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of --fit: of each GPU at most, 80GB; default: all.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Of --fit: most that share a model; default: 8.")
    ] = None,
    reserve: Annotated[
        float | None, typer.Option(help="Of --fit: share of memory kept free; default: 0.1.")
    ] = None,
    json_: Json = False,
) -> None:
    """Decode cost by roofline, no weights needed; with --fit, the best under a latency limit."""
    import pandas as pd

    from archs.registry import HYBRIDS, REGISTRY
    from eval.predict.accelerators import prices_of
    from eval.predict.roofline import parse_counts, predict_ops
    from eval.predict.roofline import predict as predict_steps

    parts = hardware.split(",")
    names = arch or [*REGISTRY, *HYBRIDS]
    if largest:
        if by_op or picture or batch is not None:
            raise UserError("--fit finds the batch; leave out --batch, --by-op and --picture")
        rows = _fit(
            names, tpot, memory, scale=scale, hardware=parts, contexts=parse_counts(context),
            dtype=dtype, launch_us=launch_us, price_per_hour=prices_of(price, parts),
            weights=weights, state=state, replay=replay,
            **{k: v for k, v in (("gpus", gpus), ("reserve", reserve)) if v is not None},
        )  # fmt: skip
        if out_file:
            write_csv(pd.DataFrame(rows), out_file)
        show_prediction(rows, json_, FIT)
        if not json_:
            kept = {str(row["hardware"]): float(str(row["reserve_bytes_per_gpu"])) for row in rows}
            for part, size in kept.items():
                out.print(f"kept free on {part}: {size / 1e9:.3g} GB of each GPU")
        return
    if (tpot, memory, gpus, reserve) != (None,) * 4:
        raise UserError("--tpot, --memory, --gpus and --reserve are of --fit; add --fit")
    batch = batch or "1"
    grid = (names, scale, parts, parse_counts(batch), parse_counts(context))
    if by_op and (price or picture):
        raise UserError("--by-op has no price and no picture; leave out --price and --picture")
    options: dict[str, Any] = {
        "dtype": dtype, "launch_us": launch_us, "weights": weights, "state": state,
        "replay": replay,
    }  # fmt: skip
    if by_op:
        rows = predict_ops(*grid, **options)
    else:
        rows = predict_steps(*grid, price_per_hour=prices_of(price, parts), **options)
    if out_file:
        write_csv(pd.DataFrame(rows), out_file)
    if picture:
        from eval.cli.predicted import draw

        draw(rows, picture)
    show_prediction(rows, json_, PREDICTION)


def _fit(
    names: list[str], tpot: str | None, memory: str | None, **options: Any
) -> list[dict[str, object]]:
    from eval.cli.options import parse_bytes, parse_latency_ms
    from eval.predict.fit import fit

    if tpot is None:
        raise UserError("--fit needs the longest time per token, as in --tpot 20ms")
    memory_bytes = None if memory is None else parse_bytes(memory)
    return fit(names, tpot_ms=parse_latency_ms(tpot), memory_bytes=memory_bytes, **options)


def crossover(
    first: Annotated[str, typer.Argument(help="An architecture...")],
    second: Annotated[str, typer.Argument(help="...and the one it is held against.")],
    scale: Annotated[str | None, typer.Option(help="Default: 8b; of results: all.")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="h100,h200,...,this-machine; default: h100.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="1,8 or 1:512; default: 1,64; of results: all.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and per-token state; default: bfloat16.")
    ] = None,
    weights: Weights = "",
    state: State = "",
    launch_us: Launch = None,
    results: Annotated[list[Path] | None, typer.Option(help="Runs: measured instead.")] = None,
    json_: Json = False,
) -> None:
    """From which context on FIRST decodes faster than SECOND: predicted, or from results."""
    from eval.predict.crossover import either, told
    from eval.predict.roofline import parse_counts
    from eval.report.leaderboard import merge

    rows = either(
        first, second, results=merge(results) if results else None, scale=scale,
        hardware=hardware.split(",") if hardware else None,
        batches=parse_counts(batch) if batch else None, dtype=dtype, launch_us=launch_us,
        weights=weights, state=state,
    )  # fmt: skip
    show(rows if json_ else [told(row) for row in rows], json_)


def isoquality(
    runs: Annotated[list[Path], typer.Argument(help="Runs of the suite `ladder`.")],
    reference: Annotated[str, typer.Option(help="Whose loss all others reach.")] = "gqa",
    scale: str = "1b",
    hardware: Annotated[str, typer.Option(help="h100,h200,...,this-machine")] = "h100",
    batch: Annotated[str, typer.Option(help="1,8 or 1:512")] = "64",
    context: Annotated[str, typer.Option(help="4k,128k or 1k:1m")] = "16k",
    price: Annotated[str, typer.Option(help="$ per hour: 2.5, or h100=2.5,h200=3.2")] = "",
    out_file: Annotated[Path | None, typer.Option("--out", help="CSV to write.")] = None,
    json_: Json = False,
) -> None:
    """At equal loss, what a million tokens cost: a ladder's fit, carried to a deployment shape."""
    import pandas as pd

    from eval.predict.accelerators import prices_of
    from eval.predict.isoquality import iso_quality_cost
    from eval.predict.roofline import parse_counts
    from eval.report.leaderboard import merge

    parts = hardware.split(",")
    rows = iso_quality_cost(
        merge(runs), reference, scale=scale, hardware=parts, batches=parse_counts(batch),
        contexts=parse_counts(context), price_per_hour=prices_of(price, parts),
    )  # fmt: skip
    if out_file:
        write_csv(pd.DataFrame(rows), out_file)
    if json_:
        show(rows, json_)
        return
    # For people, what is said of every row stands once, below.
    said = ("caution", "fits", "reference", "scale")
    show([{k: v for k, v in row.items() if k not in said} for row in rows], json_)
    out.print(f"at the loss that {reference} has at scale {scale}, predicted")
    for caution in dict.fromkeys(str(row["caution"]) for row in rows if row["caution"]):
        out.print(caution, soft_wrap=True)


def report(run_dir: Path) -> None:
    """Write a run folder's report.html, leaderboard.csv and plots again from its results."""
    from eval.cli.pages import write_report

    out.print(str(write_report(run_dir)), soft_wrap=True)


def leaderboard(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run folders or results CSV files.")
    ] = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Wide CSV to write.")] = None,
    page: Annotated[Path | None, typer.Option(help="HTML page to write.")] = None,
    by: Annotated[
        str | None, typer.Option(help="Column to rank by; default bits per byte.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only say which rows of the CSVs are unsound.")
    ] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the CSV's schema.")] = False,
    json_: Json = False,
) -> None:
    """Merge runs into one ranked table, a wide CSV and a page."""
    from eval.report.leaderboard import merge, rank, to_table, wide
    from eval.results.schema import document

    if schema:
        print(document(), end="")
        return
    if check:
        _check(runs or [], json_)
        return
    long = merge(runs or [])
    table = rank(wide(long), by)
    if page is not None:
        from eval.cli.pages import write_page

        write_page(long, page, by)
    if out_file is not None:
        write_csv(table, out_file)
    if json_:
        print(table.to_json(orient="records", indent=2))
    else:
        out.print(to_table(table))


def _check(runs: list[Path], json_: bool) -> None:
    """Say what is wrong with which row; exit code 1 where something is."""
    from eval.report.leaderboard import merge
    from eval.results.schema import check_long

    files = [run / "results.csv" if run.is_dir() else run for run in runs]
    faults = [
        {"file": str(file), "row": fault.line, "fault": fault.what}
        for file in files
        for fault in check_long(file)
    ]
    if json_:
        print(json.dumps(faults, indent=2))
    else:
        for fault in faults:
            out.print(
                f"{fault['file']} row {fault['row']}: {fault['fault']}",
                soft_wrap=True,
            )  # fmt: skip
    if faults:
        raise typer.Exit(1)
    long = merge(files)
    if not json_:
        cells, archs = long["cell"].nunique(), long["arch"].replace("", None).nunique()
        out.print(f"sound: {len(long)} figures of {cells} cells, {archs} architectures")


def claims(
    runs: Annotated[list[Path], typer.Argument(help="Run folders or results CSV files.")],
    json_: Json = False,
) -> None:
    """What the results say about the textbook's claims on decode."""
    from dataclasses import asdict

    from eval.proof.claims import claims as check_claims
    from eval.report.leaderboard import merge

    show([asdict(claim) for claim in check_claims(merge(runs))], json_)


def doctor(json_: Json = False) -> None:
    """What this machine can do, and which libraries and baselines are usable."""
    from eval.cli.doctor import diagnose

    facts = diagnose()
    if json_:
        print(json.dumps(facts, indent=2))
        return
    for line in lines(facts):
        out.print(line)
