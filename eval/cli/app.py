"""The commands of `decodebench` that train, run and time; `eval.cli` runs them."""

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from archs.backends import BACKENDS
from archs.errors import UserError
from eval.cli import compress as cli_compress
from eval.cli import kernels as cli_kernels
from eval.cli import read as cli_read
from eval.cli import serve as cli_serve
from eval.cli import speculate as cli_speculate
from eval.cli.console import err, out
from eval.cli.options import FAILED, leave, parse_duration_s, resolve_device
from eval.cli.options import State as OneState
from eval.cli.show import Json, show, show_timings
from eval.measure.progress import Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 a failure was found, 2 bad input, 3 the time budget ended "
    "(run again), 130 interrupted.",
)

#: How a verdict is shown; None: not measured.
MARKS = {True: ("ok  ", "green"), False: ("FAIL", "red"), None: ("--  ", "yellow")}
#: click's, or that of the copy which newer versions of typer carry.
UsageError: Any = typer.BadParameter.__base__

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Backend = Annotated[str, typer.Option(help="auto, " + ", ".join(BACKENDS) + ".")]

Weights = Annotated[
    list[str] | None,
    typer.Option(help="How weights are stored: bfloat16, int8, int4-g64,head:int8; repeatable."),
]

State = Annotated[
    list[str] | None,
    typer.Option(help="How states are kept: kv:int8,memory:int8-ef, kv:int4-kivi; repeatable."),
]


def _version(wanted: bool) -> None:
    if wanted:
        try:
            number = version("decodebench")
        except PackageNotFoundError:
            number = f"of {Path(__file__).resolve().parents[2]}, not installed"
        out.print(f"decodebench {number}")
        raise typer.Exit


def _failures(results: Path) -> list[str]:
    """The statuses of cells that failed and have not succeeded since."""
    from eval.results.rows import CELL_FAILED
    from eval.results.schema import load_long
    from eval.results.tidy import tidy

    rows = tidy(load_long(results))
    return list(rows.loc[rows["measure"] == CELL_FAILED, "status"])


@app.callback()
def decodebench(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it and exit.")
    ] = False,
) -> None:
    """Compare inference-friendly language-model architectures: train, decode, measure, rank."""


@app.command()
def check(arch: str, seed: int = 0, json_: Json = False) -> None:
    """Run the conformance kit on a registry name, a pattern or a file with one mixer."""
    from eval.proof.conformance import run_checks

    verdicts = []
    for verdict in run_checks(arch, seed):
        verdicts.append({"check": verdict.name, "passed": verdict.passed, "detail": verdict.detail})
        if not json_:
            out.print(Text.assemble(MARKS[verdict.passed], f" {verdict.name}: {verdict.detail}"))
    if json_:
        print(json.dumps(verdicts, indent=2))
    if any(v["passed"] is False for v in verdicts):
        raise typer.Exit(FAILED)


@app.command("new-arch")
def new_arch(name: str, force: bool = False) -> None:
    """Write NAME.py, a commented mixer that passes `check`, to start from."""
    from eval.cli.templates import write_template

    path = write_template(name, force=force)
    out.print(f"wrote {path}; try: decodebench check {path}")


@app.command()
def run(
    suite: Annotated[str, typer.Option(help="A suite's name or TOML file.")] = "tiny",
    out_dir: Annotated[Path | None, typer.Option("--out", help="Run folder.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="Only these (or a file).")] = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume/--fresh")] = True,
    time_budget: Annotated[str | None, typer.Option(help="Stop cleanly after, e.g. 9m.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Models that train at once; default: one a core or GPU."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the points and stop.")] = False,
    json_: Json = False,
) -> None:
    """Run a whole suite: train, ask, time, rank, report. A stopped run resumes."""
    from eval.cli.pages import write_report
    from eval.measure.plan import points
    from eval.measure.processes import default_workers
    from eval.measure.run import has_architecture, run_suite
    from eval.measure.suite import load_suite
    from eval.report.leaderboard import rank, to_table, wide
    from eval.results.schema import load_long

    chosen = load_suite(suite)
    if arch:
        chosen = chosen.only(arch)
    folder = out_dir or Path("runs") / chosen.name
    where = resolve_device(device)
    if dry_run:
        planned = list(points(chosen, where.type))
        if json_:
            show([{"cell": point.key, **asdict(point)} for point in planned], json_)
        for point in () if json_ else planned:
            out.print(point.key, soft_wrap=True)
        return
    finished = run_suite(
        chosen, folder, device=where, fresh=not resume,
        time_budget_s=parse_duration_s(time_budget), workers=workers or default_workers(where),
        progress=Progress(err, quiet=json_),
    )  # fmt: skip
    measured = has_architecture(folder)
    report_path = str(write_report(folder)) if measured else None
    statuses = _failures(folder / "results.csv") if measured else []
    paths = {n: str(folder / n) for n in ("leaderboard.csv", "results.csv")}
    if json_:
        print(json.dumps({"finished": finished, **paths, "report": report_path}))
        leave(statuses, finished=finished)
        return
    if measured:
        out.print(to_table(rank(wide(load_long(folder / "results.csv")))))
        for path in (*paths.values(), report_path):
            out.print(path, soft_wrap=True)
    if not finished:
        out.print("the time budget ended; run the same command again to go on")
    leave(statuses, finished=finished)


@app.command()
def train(
    arch: Annotated[str, typer.Option(help="A name, a pattern or a file.")],
    scale: str = "tiny",
    corpus: str = "sotu",
    vocab_size: Annotated[int | None, typer.Option(help="Default: the scale's.")] = None,
    steps: int = 200,
    batch: int = 8,
    seq_len: Annotated[int | None, typer.Option(help="Default: the scale's.")] = None,
    learning_rate: float = 4e-3,
    optimizer: str = "adamw",
    mtp_weight: Annotated[
        float, typer.Option(help="Weight of a drafting head's loss; 0: no head.")
    ] = 0.0,
    early_exit_layers: Annotated[
        int, typer.Option(help="Also train the first N layers to predict.")
    ] = 0,
    early_exit_weight: Annotated[float, typer.Option(help="Weight of that loss.")] = 0.0,
    seed: int = 0,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Run folder.")] = None,
    device: Device = "auto",
    backend: Backend = "auto",
    resume: Annotated[bool, typer.Option("--resume/--fresh")] = True,
    time_budget: str | None = None,
    json_: Json = False,
) -> None:
    """Train one architecture; a stopped run resumes from its checkpoint."""
    from eval.cli.commands import train_one

    row = train_one(
        arch, scale=scale, corpus=corpus, vocab_size=vocab_size,
        plan={"steps": steps, "batch": batch, "seq_len": seq_len, "optimizer": optimizer,
              "learning_rates": (learning_rate,), "backend": backend, "checkpoint_every": 200,
              "mtp_weight": mtp_weight, "early_exit_layers": early_exit_layers,
              "early_exit_weight": early_exit_weight},
        seed=seed, out=out_dir or Path("runs") / "train", device=resolve_device(device),
        resume=resume, time_budget_s=parse_duration_s(time_budget), console=err,
    )  # fmt: skip
    show([row], json_)
    leave([row["status"]], finished=row["status"] != "stopped")


@app.command()
def bench(
    arch: Annotated[list[str], typer.Option(help="A name, a pattern or a file; repeatable.")],
    scale: str = "70m",
    batch: Annotated[str, typer.Option(help="1,8 or 1:64")] = "1",
    context: Annotated[str, typer.Option(help="256,4k or 1k:16k")] = "256,4k",
    steps: int = 16,
    prompt: Annotated[int, typer.Option(help="Prompt tokens for TTFT; 0: skip.")] = 0,
    backend: Backend = "auto",
    compiled: Annotated[bool, typer.Option(help="Compile the decode step first.")] = False,
    counters: Annotated[
        bool, typer.Option("--counters", help="Bytes and FLOPs by the GPU's counters, too.")
    ] = False,
    replay: Annotated[
        int, typer.Option(help="Compute recurrent states from so many inputs; 0: write them.")
    ] = 0,
    weights: Weights = None,
    state: State = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Time decode over batch x context with random weights."""
    from eval.cli.commands import bench_archs
    from eval.predict.roofline import parse_counts

    rows = bench_archs(
        arch, scale=scale, batches=parse_counts(batch), contexts=parse_counts(context),
        steps=steps, prompt=prompt, device=resolve_device(device), backend=backend,
        compiled=compiled, counters=counters, replay=replay, weights=weights or [""],
        state=state or [""],
        progress=Progress(err, quiet=json_, lines=True),
    )  # fmt: skip
    show_timings(rows, json_, counted=counters)
    leave(row["status"] for row in rows)


@app.command()
def quality(
    checkpoint: Path,
    corpus: str = "sotu",
    max_tokens: Annotated[int | None, typer.Option(help="Default: all held-out tokens.")] = None,
    arch: Annotated[str | None, typer.Option(help="The file it was trained from.")] = None,
    state: OneState = "",
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Bits per byte and loss by position of a trained checkpoint."""
    from eval.cli.commands import score_checkpoint

    rows = score_checkpoint(
        checkpoint, corpus, max_tokens, resolve_device(device), arch, state,
        progress=Progress(err, quiet=json_),
    )  # fmt: skip
    show(rows, json_)
    # A model whose weights are not finite has no score.
    leave("ok" if isfinite(float(str(row["value"]))) else "nan" for row in rows)


for command in (
    cli_read.archs, cli_read.predict, cli_read.crossover,
    cli_read.isoquality, cli_speculate.speculate, cli_compress.compress, cli_serve.serve,
    cli_read.report, cli_read.leaderboard, cli_read.claims, cli_kernels.kernels, cli_read.doctor,
):  # fmt: skip
    app.command()(command)


def run_app() -> int:
    """Run the command that `sys.argv` holds; its exit code, that of Ctrl-C included.

    Raises UserError on options that are wrong.
    """
    try:
        # typer gives back the exit code of a command's typer.Exit, and makes one of Ctrl-C.
        return int(app(standalone_mode=False) or 0)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except UsageError as error:
        message = error.format_message().rstrip().rstrip(".")
        if not message:
            return 2
        command = error.ctx.command_path if error.ctx else "decodebench"
        raise UserError(f"{message}; see {command} --help") from None
