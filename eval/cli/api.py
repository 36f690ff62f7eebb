"""The public Python API: what notebooks and scripts need, as pandas tables.

    from eval.cli import api
    from eval.report import plot

    results = api.load_results("runs/tiny")
    api.leaderboard(results)
    plot.quality_against_state(results)

Tables carry the Measures' names (`eval.results.measures`); every function raises
`archs.errors.UserError` on bad input, with the remedy in its message.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ParamSpec

import pandas as pd

from eval.cli.commands import bench_archs
from eval.cli.console import err
from eval.cli.options import resolve_device
from eval.measure.processes import default_workers
from eval.measure.progress import Progress
from eval.measure.run import run_suite
from eval.measure.simulated import simulate as simulate_servers
from eval.measure.suite import load_suite
from eval.predict import roofline
from eval.predict.crossover import either
from eval.predict.fit import fit as largest_batches
from eval.predict.isoquality import iso_quality_cost
from eval.predict.speculation import speculate as predict_speculation
from eval.proof.claims import claims as check_claims
from eval.report.leaderboard import merge, rank, wide
from eval.results.schema import load_long

__all__ = [
    "bench", "claims", "compare", "crossover", "fit", "isoquality", "leaderboard", "load_results",
    "predict", "predict_ops", "simulate", "speculate",
]  # fmt: skip

P = ParamSpec("P")


def compare(
    archs: Sequence[str], *, suite: str = "tiny", out: str | Path = "runs/compare",
    device: str = "cpu", fresh: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Run a suite over `archs` (names, patterns, files) and return the long table of results.

    suite: a shipped name or a TOML file. A folder `out` of the same comparison resumes.
    device: cpu, cuda, or auto for a GPU where there is one.
    """
    chosen = load_suite(suite).only(archs)
    folder, where = Path(out), resolve_device(device)
    run_suite(
        chosen, folder, device=where, fresh=fresh, workers=default_workers(where),
        progress=Progress(err),
    )  # fmt: skip
    return load_long(folder / "results.csv")


def load_results(*runs: str | Path) -> pd.DataFrame:
    """The long table of run folders or results CSV files, one measurement a row."""
    return merge([Path(run) for run in runs])


def leaderboard(results: pd.DataFrame, *, by: str | None = None) -> pd.DataFrame:
    """One architecture a row, ranked by quality or by the column `by` where intervals decide."""
    return rank(wide(results), by)


def bench(
    archs: Sequence[str], *, scale: str = "70m", batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (256, 4096), steps: int = 16, prompt: int = 0, device: str = "cpu",
    backend: str = "auto", compiled: bool = False, counters: bool = False, replay: int = 0,
    weights: Sequence[str] = ("",), state: Sequence[str] = ("",),
) -> pd.DataFrame:  # fmt: skip
    """Decode timings with random weights; an architecture that is incorrect gets no latency.

    counters: also bytes and FLOPs of a step by an NVIDIA GPU's counters. replay: inputs in a ring
    from which recurrent states are computed anew; 0: they are written at every step. weights:
    formats that weights are stored in, such as int4-g64; "": plain numbers. state: those that
    states are kept in, such as kv:int8,memory:int8-ef; "": as they are computed.
    """
    rows = bench_archs(
        list(archs), scale=scale, batches=batches, contexts=contexts, steps=steps, prompt=prompt,
        device=resolve_device(device), backend=backend, compiled=compiled, counters=counters,
        replay=replay, weights=weights, state=state,
    )  # fmt: skip
    return pd.DataFrame(rows)


def _table(name: str, rows: Callable[P, Iterable[Any]]) -> Callable[P, pd.DataFrame]:
    """A function of the cost model that returns a table: same arguments, text and errors."""

    @functools.wraps(rows)
    def table(*args: P.args, **options: P.kwargs) -> pd.DataFrame:
        return pd.DataFrame(rows(*args, **options))

    returned = inspect.signature(rows).replace(return_annotation=pd.DataFrame)
    vars(table).update(__signature__=returned)
    table.__name__ = table.__qualname__ = name
    return table


predict = _table("predict", roofline.predict)
predict_ops = _table("predict_ops", roofline.predict_ops)
fit = _table("fit", largest_batches)
crossover = _table("crossover", either)
isoquality = _table("isoquality", iso_quality_cost)
speculate = _table("speculate", predict_speculation)
simulate = _table("simulate", simulate_servers)


def claims(results: pd.DataFrame) -> pd.DataFrame:
    """The textbook's claims with what these results say: supported, conditional or refuted."""
    return pd.DataFrame([asdict(claim) for claim in check_claims(results)])
