"""What a run folder's figures came from beside its configuration: files that may change meanwhile.

An architecture file that was edited makes the cells of its architecture stale: they go, with their
checkpoints, and run again. A corpus that now holds other text ends the run: figures of two texts
must not stand in one column, and only the user knows which of them is meant.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from archs.checks import parse
from archs.errors import UserError
from archs.files import read_text, write
from archs.registry import folder_name, source_digest
from eval.results import CELL_FAILED, Results, Status

NAME = "contents.json"
#: Failures that may have been the machine's: such cells always run again.
PASSING = (Status.ERROR, Status.OOM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """corpus: the name of the tokens that were trained on; sources: digests by architecture."""

    corpus: str = ""
    sources: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, out: Path) -> "Contents":
        """What the folder holds. Raises UserError where its file is damaged."""
        path = out / NAME
        if not path.exists():
            return cls()
        try:
            return parse(cls, json.loads(read_text(path)), str(path))
        except ValueError as error:
            raise UserError(
                f"'{path}' is damaged ({error}); restore it, or --fresh to start over"
            ) from error

    def write(self, out: Path) -> None:
        """Keep it in the folder."""
        write(out / NAME, json.dumps(asdict(self), indent=1) + "\n")


def take_up(out: Path, results: Results, archs: Iterable[str]) -> list[str]:
    """Make a folder's results those of today's files and of failures that stand; what was dropped,
    in words. Raises UserError where a file cannot be read.
    """
    held = Contents.of(out)
    now = {arch: digest for arch in archs if (digest := source_digest(arch))}
    edited = {arch for arch in now if held.sources.get(arch, now[arch]) != now[arch]}
    for arch in edited:
        shutil.rmtree(out / "cells" / folder_name(arch), ignore_errors=True)
    told = []
    stale = results.drop(lambda line: line["arch"] in edited)
    if stale:
        names = ", ".join(sorted(edited))
        told.append(f"{stale} cells run again: {names} changed since")
    failed = results.drop(_worth_another_try(results.provenance.commit))
    if failed:
        told.append(f"{failed} cells that failed run again")
    replace(held, sources={**held.sources, **now}).write(out)
    return told


def require_corpus(out: Path, tokens: str) -> None:
    """Keep the name of the tokens; raises UserError where others were trained on before."""
    held = Contents.of(out)
    if held.corpus and held.corpus != tokens:
        raise UserError(
            f"the corpus holds other text than when '{out}' was begun (tokens {tokens}, then "
            f"{held.corpus}); restore it, choose another --out, or --fresh to replace the results"
        )
    replace(held, corpus=tokens).write(out)


def _worth_another_try(commit: str) -> Callable[[dict[str, str]], bool]:
    """Cells that may end otherwise now: by luck, or since the code is another."""

    def failed(line: dict[str, str]) -> bool:
        if line["measure"] != CELL_FAILED:
            return False
        changed = line["commit"] != commit or commit.endswith("-dirty")
        return changed or line["status"] in PASSING

    return failed
