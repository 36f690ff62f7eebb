"""A whole suite, cell by cell: train, ask, time, record; resumable at any point.

A cell is what is recorded as one (an architecture trained with one seed, decoded at one scale and
batch, …). A finished cell is in `results.csv` and is not run again; a failed one is a row with
its status. Cells go stage by stage, so that a short time budget leaves every architecture with
the same columns. Models train side by side, each in a process of one thread (`eval.processes`):
on a CPU one on each core, on a GPU as many as are asked for.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import tomli_w
import torch

from archs.errors import UserError
from archs.files import read_text, refusing, write
from eval.cells import Workshop
from eval.contents import require_corpus, take_up
from eval.lock import only_writer
from eval.plan import Planned, guarded, plan
from eval.processes import Found, side_by_side
from eval.progress import Progress
from eval.results import TRAINED, About, Results, provenance
from eval.schema import load_long
from eval.suite import Suite

#: What a run folder may hold of ours: the only names that --fresh removes. The configuration is
#: the last of them, so that a folder emptied in part is still known as ours.
OWN_NAMES = (
    "results.csv", "leaderboard.csv", "report.html", "errors.log", "contents.json", "cells",
    "plots", "config.toml",
)  # fmt: skip


def prepare_folder(suite: Suite, out: Path, *, fresh: bool) -> None:
    """Make or check the run folder. Raises UserError when it belongs to something else."""
    config = out / "config.toml"
    with refusing(out, "written"):
        if out.exists() and any(out.iterdir()) and not config.exists():
            raise UserError(f"'{out}' is not empty and not a run folder; choose another --out")
        if fresh:
            _remove_own(out)
        out.mkdir(parents=True, exist_ok=True)
        text = f"# config_hash = {suite.config_hash}\n" + tomli_w.dumps(suite.as_toml())
        if config.exists():
            held = read_text(config)
            if held != text:
                raise UserError(
                    f"'{out}' belongs to another configuration ({_hash_in(held)}, this is "
                    f"{suite.config_hash}); choose another --out, or --fresh to replace it"
                )
        else:
            write(config, text)


def _remove_own(out: Path) -> None:
    for name in OWN_NAMES:
        target = out / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _hash_in(text: str) -> str:
    first = text.partition("\n")[0]
    return first.rpartition(" ")[2] or "unreadable"


def run_suite(
    suite: Suite,
    out: Path,
    *,
    device: torch.device,
    fresh: bool = False,
    time_budget_s: float | None = None,
    workers: int = 1,
    progress: Progress,
) -> bool:
    """Run what is not done yet; True when all cells are recorded, False when the budget ended.

    workers: how many processes train at once; what is timed runs alone.
    Raises UserError on a folder of another configuration or one that another process writes to,
    bad input, or a full disk.
    """
    deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    with only_writer(out):
        prepare_folder(suite, out, fresh=fresh)
        results = Results(out / "results.csv", provenance(suite.config_hash, device))
        for told in take_up(out, results, suite.archs):
            progress.console.print(told, markup=False)
        workshop = Workshop(suite, out, device, deadline)
        planned = plan(workshop)
        waiting = [p for p in planned if not results.done(p.cell)]
        if any(item.cell.stage == "train" for item in waiting):
            # Workers find the text tokenized, too: each would do it anew.
            require_corpus(out, workshop.tokens.name)
        with progress.over(sum(p.weight for p in waiting), len(waiting), len(planned)):
            for item, (about, rows) in _finished(workshop, waiting, workers, progress):
                if rows is None:
                    return False
                results.append(item.cell, about, rows)
    return True


def _finished(
    workshop: Workshop, waiting: Sequence[Planned], workers: int, progress: Progress
) -> Iterator[tuple[Planned, Found]]:
    """Each cell as it ends, with its rows: None where the time budget ended before."""
    on_cpu = workshop.device.type == "cpu"
    for trained, group in groupby(waiting, lambda item: item.cell.stage in TRAINED):
        items = list(group)
        if trained and workers > 1:
            yield from side_by_side(
                items, workshop.out, workshop.device, workshop.deadline, workers, progress
            )
            continue
        for item in items:
            if workshop.deadline is not None and time.monotonic() >= workshop.deadline:
                yield item, (About(), None)
                return
            with progress.cell(item.label, item.weight) as watch, _threads(trained and on_cpu):
                found = guarded(item, watch, workshop.out)
            yield item, found


@contextmanager
def _threads(one: bool) -> Iterator[None]:
    """One thread, if so: a model trains to the same weights however many run at once."""
    before = torch.get_num_threads()
    if one:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_architecture(out: Path) -> bool:
    """Whether a run folder holds a row of an architecture."""
    results = out / "results.csv"
    return results.exists() and bool((load_long(results)["arch"] != "").any())
