"""The `decodebench` command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from archs.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compare inference-friendly language-model architectures: train, decode, measure, rank.",
)
out = Console()
err = Console(stderr=True, highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]


def resolve_device(name: str) -> Any:
    """The torch device; `auto` is CUDA where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        from archs.errors import unknown_name

        raise unknown_name("device", name, ["auto", "cpu", "cuda"])
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' is not available on this machine; use --device cpu")
    return torch.device(name)


def parse_duration_s(text: str | None) -> float | None:
    """Seconds in `90`, `45s`, `9m` or `2h`. Raises UserError."""
    if text is None:
        return None
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if seconds <= 0:
        raise UserError(f"duration '{text}' must be a positive number of s, m or h, as in 9m")
    return seconds


@app.command()
def archs(json_: Json = False, scale: str = "tiny") -> None:
    """List architectures with their state at a scale."""
    from archs.registry import HYBRIDS, REGISTRY, ModelSpec
    from archs.sizes import get_scale

    shape = get_scale(scale)
    rows = []
    for name in (*REGISTRY, *HYBRIDS):
        model = ModelSpec(arch=name, scale=shape).outline()
        specs = model.state_specs()
        summary = (REGISTRY[name].mixer.__doc__ or "") if name in REGISTRY else "Hybrid."
        rows.append(
            {
                "arch": name,
                "params": sum(p.numel() for p in model.parameters()),
                "mlp_hidden": model.hidden,
                "state_bytes_per_token": sum(s.bytes_per_token for s in specs),
                "state_bytes_fixed": sum(s.fixed_bytes for s in specs),
                "summary": summary.splitlines()[0],
            }
        )
    if json_:
        print(json.dumps(rows, indent=2))
        return
    table = Table("arch", "state bytes per token", "fixed bytes", "", title=f"scale {scale}")
    for row in rows:
        table.add_row(
            str(row["arch"]), f"{row['state_bytes_per_token']:,}", f"{row['state_bytes_fixed']:,}",
            str(row["summary"]),
        )  # fmt: skip
    out.print(table)


@app.command()
def check(arch: str, seed: int = 0, json_: Json = False) -> None:
    """Run the conformance kit on a registry name, a pattern or a file with one mixer."""
    from eval.conformance import run_checks

    verdicts = []
    for verdict in run_checks(arch, seed):
        verdicts.append({"check": verdict.name, "passed": verdict.passed, "detail": verdict.detail})
        if not json_:
            mark = "[green]ok[/]  " if verdict.passed else "[red]FAIL[/]"
            out.print(f"{mark} {verdict.name}: {verdict.detail}", highlight=False)
    if json_:
        print(json.dumps(verdicts, indent=2))
    if not all(v["passed"] for v in verdicts):
        raise typer.Exit(1)


@app.command("new-arch")
def new_arch(name: str, force: bool = False) -> None:
    """Write NAME.py, a commented mixer that passes `check`, to start from."""
    from eval.templates import write_template

    path = write_template(name, force=force)
    out.print(f"wrote {path}; try: decodebench check {path}", highlight=False)


@app.command()
def run(
    suite: Annotated[str, typer.Option(help="A suite's name or TOML file.")] = "tiny",
    out_dir: Annotated[Path | None, typer.Option("--out", help="Run folder.")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="Only these (or a file).")] = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume/--fresh")] = True,
    time_budget: Annotated[str | None, typer.Option(help="Stop cleanly after, e.g. 9m.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the cells and stop.")] = False,
    json_: Json = False,
) -> None:
    """Run a whole suite: train, ask, time, rank, report. A stopped run resumes."""
    from dataclasses import replace

    from eval.leaderboard import rank, to_table, wide
    from eval.progress import Progress
    from eval.report import write_report
    from eval.results import load_long
    from eval.run import plan, run_suite
    from eval.suite import load_suite

    chosen = load_suite(suite)
    if arch:
        chosen = replace(chosen, archs=tuple(arch))
    folder = out_dir or Path("runs") / chosen.name
    where = resolve_device(device)
    if dry_run:
        for item in plan(chosen):
            out.print(item.cell.key, highlight=False)
        return
    finished = run_suite(
        chosen, folder, device=where, fresh=not resume,
        time_budget_s=parse_duration_s(time_budget), progress=Progress(err, quiet=json_),
    )  # fmt: skip
    report_path = write_report(folder)
    table = rank(wide(load_long(folder / "results.csv")))
    paths = {n: str(folder / n) for n in ("leaderboard.csv", "results.csv")}
    if json_:
        print(json.dumps({"finished": finished, **paths, "report": str(report_path)}))
        return
    out.print(to_table(table))
    for path in (*paths.values(), str(report_path)):
        out.print(path, highlight=False, soft_wrap=True)
    if not finished:
        out.print("the time budget ended; run the same command again to go on")


@app.command()
def report(run_dir: Path) -> None:
    """Write a run folder's report.html, leaderboard.csv and plots again from its results."""
    from eval.report import write_report

    out.print(str(write_report(run_dir)), highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point: user errors are one line and exit code 2, Ctrl-C is 130."""
    try:
        _require_own_packages()
        app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; finished cells are kept, run the same command again to go on", 130)


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"decodebench: {message}", markup=False, soft_wrap=True)
    sys.exit(code)


def _require_own_packages() -> None:
    """`kernels` and `eval` are other people's names too: make sure that ours are imported."""
    import importlib.util

    home = Path(__file__).resolve().parent.parent
    for name in ("kernels", "archs", "train", "infer"):
        found = importlib.util.find_spec(name)
        origin = Path(str(found.origin)).resolve() if found and found.origin else None
        if origin is None or home not in origin.parents:
            raise UserError(
                f"package '{name}' is taken from {origin}, not from {home}; uninstall the other "
                "one or use a virtual environment of its own (make run does)"
            )
