"""`decodebench serve`: a workload under a scheduler, on an engine here or on a predicted clock."""

from pathlib import Path
from typing import Annotated

import typer

from archs.errors import UserError
from archs.names import names_in
from eval.cli.console import err, out
from eval.cli.options import State, Weights, leave, parse_bytes, resolve_device
from eval.cli.show import Json, show, show_prediction

#: The columns that people see.
COLUMNS = (
    "arch", "hardware", "batching", "arrival_req_per_s", "request_per_s", "goodput_req_per_s",
    "output_tok_per_s", "output_tok_per_s_per_user", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms",
    "tpot_p99_ms", "running_sequences", "max_sequences", "page_waste", "preemptions",
    "checkpoint_every", "hit_rate", "cached_state_bytes", "shared_state", "saturated", "note",
)  # fmt: skip
MEASURED = (
    "arch", "options", "request_per_s", "goodput_req_per_s", "output_tok_per_s",
    "output_tok_per_s_sim", "ttft_p50_ms", "ttft_p50_sim_ms", "tpot_p50_ms", "tpot_p50_sim_ms",
    "running_sequences", "page_waste", "hit_rate", "shared_state", "tokens_per_verification",
    "preemptions", "host_share", "status", "note",
)  # fmt: skip


def serve(
    arch: Annotated[str, typer.Option(help="gqa,gdn,...: names, patterns, files.")],
    workload: Annotated[str, typer.Option(help="A name, a TOML file, or a trace.")] = "chat",
    requests: Annotated[int, typer.Option(help="Of the workload; 0: as many as it says.")] = 0,
    rate: Annotated[
        str | None, typer.Option(help="Requests/s: 1,2,4, or sweep: until it is too much.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measured: policies take turns.")] = 1,
    batching: Annotated[str, typer.Option(help="continuous,static")] = "continuous",
    simulate: Annotated[bool, typer.Option(help="On the predicted clock of --hardware.")] = False,
    hardware: Annotated[str, typer.Option(help="Simulated: h100,...,this-machine")] = "h100",
    scale: Annotated[str | None, typer.Option(help="Default: 70m, simulated 8b.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Of weights and state: 60GiB; simulated, 0.9 of the part's.")
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(help="At once, at most; default: 8, simulated 256.")
    ] = None,
    max_context: Annotated[int, typer.Option(help="0: what the workload needs.")] = 0,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 64,
    token_budget: Annotated[
        int | None, typer.Option(help="Tokens of a step; default: 256, simulated 2048.")
    ] = None,
    allocation: Annotated[str, typer.Option(help="paged, or contiguous.")] = "paged",
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Keep prefixes while there is room.")
    ] = False,
    checkpoint_every: Annotated[
        str, typer.Option(help="Tokens; simulated, several: 0,64,256. 0: where prompts part.")
    ] = "0",
    checkpoints: Annotated[
        int, typer.Option(help="Slots and windows for prefixes, beside those that run.")
    ] = 0,
    drafts: Annotated[int, typer.Option(help="Measured: K of n-grams, verified in each step.")] = 0,
    slo_ttft_ms: Annotated[float, typer.Option(help="Goodput: to the first token.")] = 1000.0,
    slo_tpot_ms: Annotated[float, typer.Option(help="Goodput: per token after it.")] = 100.0,
    host_ms: Annotated[float, typer.Option(help="Simulated: of the host, each step.")] = 0.0,
    weights: Weights = "",
    state: State = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    plot: Annotated[
        Path | None,
        typer.Option(help="Simulated: a picture of a sweep, or of intervals; png, svg or html."),
    ] = None,
    json_: Json = False,
) -> None:
    """Serve a workload: latency, throughput, goodput and memory, by policy and arrival rate."""
    archs = names_in(arch)
    rates = () if rate in (None, "sweep") else tuple(map(_rate, str(rate).split(",")))
    every = [_interval(text) for text in checkpoint_every.split(",")]
    held = None if memory is None else parse_bytes(memory) / 2**30
    if plot is not None:
        from eval.cli.predicted import draw_serving, require_picture

        require_picture(plot)
        if not simulate:
            raise UserError("--plot draws what --simulate gives; add it, or leave the picture out")
    if simulate and drafts:
        raise UserError(
            f"drafts={drafts} with --simulate: a clock makes no tokens, so it cannot know which "
            "drafts are right; leave --simulate out"
        )
    if simulate:
        from eval.measure.simulated import simulate as simulated

        rows = simulated(
            archs, workload, requests=requests, scale=scale or "8b", hardware=hardware.split(","),
            memory_gib=held, max_sequences=max_sequences or 256, max_context=max_context,
            page_size=page_size, token_budget=token_budget or 2048, batching=batching.split(","),
            allocation=allocation, prefix_cache=prefix_cache, checkpoint_every=every,
            checkpoints=checkpoints, rates_per_s=rates, sweep=rate == "sweep",
            slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, host_ms=host_ms, weights=weights,
            state=state,
        )  # fmt: skip
        show_prediction(rows, json_, COLUMNS)
        if plot is not None:
            draw_serving(rows, plot)
        return
    if len(every) > 1:
        raise UserError(
            f"checkpoint_every '{checkpoint_every}': several are for --simulate; measure one at a "
            "time"
        )
    from eval.cli.commands import serve_archs
    from eval.measure.progress import Progress
    from eval.measure.serve_plan import ServePlan

    plan = ServePlan(
        scale=scale or "70m", workload=workload, requests=requests, memory_gib=held or 0.0,
        max_sequences=max_sequences or 8, max_context=max_context, page_size=page_size,
        token_budget=token_budget or 256, batching=tuple(batching.split(",")),
        allocation=allocation, prefix_cache=prefix_cache, checkpoint_every=every[0],
        checkpoints=checkpoints, drafts=drafts, repeats=repeats, rates_per_s=rates,
        sweep=rate == "sweep", slo_ttft_ms=slo_ttft_ms, slo_tpot_ms=slo_tpot_ms, weights=weights,
        state=state,
    )  # fmt: skip
    rows = serve_archs(
        archs, plan, device=resolve_device(device), progress=Progress(err, quiet=json_)
    )
    shown = [{name: row[name] for name in MEASURED if name in row} for row in rows]
    show(rows if json_ else shown, json_)
    if not json_:
        out.print("measured; _sim: the same schedule on a clock of the engine's own steps")
    leave(str(row["status"]) for row in rows)


def _interval(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UserError(f"checkpoint_every '{text}' must be a number of tokens, 0 to 999999999")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise UserError(f"rate '{text}' must be requests per second above zero, or sweep")
    return rate
