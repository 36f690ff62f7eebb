"""The public Python API: what notebooks and scripts need, as pandas tables.

    from eval.cli import api
    from eval.report import plot

    results = api.load_results("runs/tiny")
    api.leaderboard(results)
    plot.quality_against_state(results)

Tables carry the Measures' names (`eval.results.measures`); every function raises
`archs.errors.UserError` on bad input, with the remedy in its message.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from archs.registry import HYBRIDS, REGISTRY
from eval.cli.commands import bench_archs
from eval.cli.console import err
from eval.cli.options import resolve_device
from eval.measure.processes import default_workers
from eval.measure.progress import Progress
from eval.measure.run import run_suite
from eval.measure.suite import load_suite
from eval.predict import roofline as prediction
from eval.predict.crossover import either
from eval.predict.fit import MOST_GPUS, RESERVE
from eval.predict.fit import fit as largest_batches
from eval.predict.isoquality import iso_quality_cost
from eval.proof.claims import claims as check_claims
from eval.report.leaderboard import merge, rank, wide
from eval.results.schema import load_long

__all__ = [
    "bench", "claims", "compare", "crossover", "fit", "isoquality", "leaderboard", "load_results",
    "predict", "predict_ops",
]  # fmt: skip


def compare(
    archs: Sequence[str],
    *,
    suite: str = "tiny",
    out: str | Path = "runs/compare",
    device: str = "cpu",
    fresh: bool = False,
) -> pd.DataFrame:
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
    archs: Sequence[str],
    *,
    scale: str = "70m",
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (256, 4096),
    steps: int = 16,
    prompt: int = 0,
    device: str = "cpu",
    backend: str = "auto",
    compiled: bool = False,
    counters: bool = False,
) -> pd.DataFrame:
    """Decode timings with random weights; an architecture that is incorrect gets no latency.

    counters: also bytes and FLOPs of a step by an NVIDIA GPU's counters.
    """
    rows = bench_archs(
        list(archs), scale=scale, batches=batches, contexts=contexts, steps=steps, prompt=prompt,
        device=resolve_device(device), backend=backend, compiled=compiled, counters=counters,
    )  # fmt: skip
    return pd.DataFrame(rows)


def predict(
    archs: Iterable[str],
    *,
    scale: str = prediction.SCALE,
    hardware: Sequence[str] = ("h100",),
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = prediction.CONTEXTS,
    dtype: str = "bfloat16",
    launch_us: float | None = None,
    price_per_hour: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """Decode cost by roofline, without weights: a row per arch, hardware, batch and context.

    launch_us: what every operation costs beside its work; None: as measured (`launches_from`).
    """
    rows = prediction.predict(
        archs, scale, hardware, batches, contexts, dtype=dtype, launch_us=launch_us,
        price_per_hour=price_per_hour,
    )  # fmt: skip
    return pd.DataFrame(rows)


def fit(
    archs: Iterable[str] = (*REGISTRY, *HYBRIDS),
    *,
    tpot_ms: float,
    scale: str = prediction.SCALE,
    hardware: Sequence[str] = ("h100",),
    contexts: Sequence[int] = prediction.CONTEXTS,
    memory_bytes: float | None = None,
    gpus: int = MOST_GPUS,
    reserve: float = RESERVE,
    dtype: str = "bfloat16",
    launch_us: float | None = None,
    price_per_hour: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """The largest batch that fits in memory within `tpot_ms` per token, the best first.

    One row per arch, hardware and context, on the number of GPUs (up to `gpus`, which share the
    model) that gives most tokens per second and GPU, or the least $ where all prices are given.
    Rows that no batch answers say which bound is exceeded and by how much (`eval.predict.fit`).
    """
    rows = largest_batches(
        archs, tpot_ms=tpot_ms, scale=scale, hardware=hardware, contexts=contexts,
        memory_bytes=memory_bytes, gpus=gpus, reserve=reserve, dtype=dtype, launch_us=launch_us,
        price_per_hour=price_per_hour,
    )  # fmt: skip
    return pd.DataFrame(rows)


def predict_ops(
    archs: Iterable[str],
    *,
    scale: str = prediction.SCALE,
    hardware: Sequence[str] = ("h100",),
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = prediction.CONTEXTS,
    dtype: str = "bfloat16",
    launch_us: float | None = None,
) -> pd.DataFrame:
    """The same by operation, with the batch from which each is bound by compute."""
    rows = prediction.predict_ops(
        archs, scale, hardware, batches, contexts, dtype=dtype, launch_us=launch_us
    )
    return pd.DataFrame(rows)


def crossover(
    first: str,
    second: str,
    *,
    results: pd.DataFrame | None = None,
    scale: str | None = None,
    hardware: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    dtype: str | None = None,
    launch_us: float | None = None,
) -> pd.DataFrame:
    """From which context on `first` decodes faster than `second`.

    With `results` from the steps timed there, by scale, hardware, batch and backend (of `scale` and
    `batches` alone where they are given); without, by the roofline: of 8b on an H100 at batches of
    1 and 64 where nothing else is said.
    """
    rows = either(
        first, second, results=results, scale=scale, hardware=hardware, batches=batches,
        dtype=dtype, launch_us=launch_us,
    )  # fmt: skip
    return pd.DataFrame(rows)


def isoquality(
    results: pd.DataFrame,
    *,
    reference: str = "gqa",
    scale: str = "1b",
    hardware: Sequence[str] = ("h100",),
    batches: Sequence[int] = (64,),
    contexts: Sequence[int] = (16384,),
    price_per_hour: Mapping[str, float] | None = None,
) -> pd.DataFrame:
    """What decoding costs at the loss that `reference` has: a ladder's fit, an architecture a row.

    results: a run of the suite `ladder`, or any with three trained sizes of each architecture.
    """
    rows = iso_quality_cost(
        results, reference, scale=scale, hardware=hardware, batches=batches, contexts=contexts,
        price_per_hour=price_per_hour,
    )  # fmt: skip
    return pd.DataFrame(rows)


def claims(results: pd.DataFrame) -> pd.DataFrame:
    """The textbook's claims with what these results say: supported, conditional or refuted."""
    return pd.DataFrame([asdict(claim) for claim in check_claims(results)])
