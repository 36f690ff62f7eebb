"""A whole suite, point by point; resumable at any of them.

A point that was measured is in a file of its own and is not measured again (`eval.results.folder`);
a failed one is a row with its status. Models train side by side, each in a process of one thread
(`eval.measure.processes`): on a CPU one on each core, on a GPU as many as are asked for.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import tomli_w
import torch

from archs.errors import UserError
from archs.files import refusing, write
from eval.measure.plan import points, weight
from eval.measure.processes import side_by_side
from eval.measure.progress import Progress
from eval.measure.provenance import provenance
from eval.measure.site import Site
from eval.measure.stages import measure
from eval.measure.suite import Suite
from eval.measure.threads import one_thread
from eval.results.contents import require_corpus, worth_another_try
from eval.results.folder import POINTS, TABLE, Results
from eval.results.lock import only_writer
from eval.results.point import Point
from eval.results.rows import TRAINED, About, Found
from eval.results.schema import load_long

#: What a run folder may hold of ours: the only names that --fresh removes. The configuration is
#: the last of them, so that a folder emptied in part is still known as ours.
OWN_NAMES = (
    "results.csv", "leaderboard.csv", "report.html", "errors.log", "contents.json", "cells",
    "plots", "points", "config.toml",
)  # fmt: skip


def prepare_folder(suite: Suite, out: Path, *, fresh: bool) -> None:
    """Make or check the run folder. Raises UserError when it belongs to something else."""
    config = out / "config.toml"
    with refusing(out, "written"):
        if out.exists() and any(out.iterdir()) and not config.exists():
            raise UserError(f"'{out}' is not empty and not a run folder; choose another --out")
        if (out / TABLE).exists() and not (out / POINTS).exists() and not fresh:
            raise UserError(
                f"'{out}' holds results of an earlier version of this program, which cannot be "
                "gone on with; choose another --out, or --fresh to replace them"
            )
        if fresh:
            _remove_own(out)
        (out / POINTS).mkdir(parents=True, exist_ok=True)
        write(config, f"# config_hash = {suite.config_hash}\n" + tomli_w.dumps(suite.as_toml()))


def _remove_own(out: Path) -> None:
    for name in OWN_NAMES:
        target = out / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def run_suite(
    suite: Suite, out: Path, *, device: torch.device, fresh: bool = False,
    time_budget_s: float | None = None, workers: int = 1, progress: Progress,
) -> bool:  # fmt: skip
    """Measure what is not measured yet; True when all points are, False when the budget ended.

    workers: how many processes train at once; what is timed runs alone.
    Raises UserError on a folder that another process writes to, bad input, or a full disk.
    """
    deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    with only_writer(out):
        prepare_folder(suite, out, fresh=fresh)
        results = Results(out, provenance(suite.config_hash, device))
        wanted = list(points(suite, device.type))
        site = Site(out, device, cache=out.parent / ".cache", deadline=deadline)
        again = [p for p in wanted if worth_another_try(results.held(p), results.provenance.commit)]
        for point in again:
            results.drop(point)
        if again:
            progress.console.print(f"{len(again)} points that failed are measured again")
        waiting = [point for point in wanted if results.held(point) is None]
        if any(point.stage == "train" for point in waiting):
            # Workers find the text tokenized, too: each would do it anew.
            corpus, vocab_size = suite.corpus.spec, suite.corpus.vocab_size
            require_corpus(out, corpus, vocab_size, site.tokens(corpus, vocab_size).name)
        weights = {point: weight(point, suite.trained_scales) for point in waiting}
        results.merge(wanted)
        with progress.over(sum(weights.values()), len(waiting), len(wanted)):
            for point, found in _finished(site, waiting, weights, workers, progress):
                if found.stopped:
                    return False
                results.record(point, found)
                # Whoever looks at a run that goes on, or was killed, finds what is finished.
                results.merge(wanted)
    return True


def _finished(
    site: Site, waiting: Sequence[Point], weights: dict[Point, float], workers: int,
    progress: Progress,
) -> Iterator[tuple[Point, Found]]:  # fmt: skip
    """Each point as it ends, with what was found."""
    on_cpu = site.device.type == "cpu"
    for trained, group in groupby(waiting, lambda point: point.stage in TRAINED):
        several = list(group)
        if trained and workers > 1:
            yield from side_by_side(several, weights, site, workers, progress)
            continue
        for point in several:
            if site.late:
                yield point, Found(about=About(), rows=(), stopped=True)
                return
            alone = trained and on_cpu
            with progress.cell(point.label, weights[point]) as watch, one_thread(alone):
                found = measure(point, site, watch)
            yield point, found


def has_architecture(out: Path) -> bool:
    """Whether a run folder holds a row of an architecture."""
    results = out / "results.csv"
    return results.exists() and bool((load_long(results)["arch"] != "").any())
