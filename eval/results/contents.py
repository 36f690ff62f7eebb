"""The text behind a run folder's figures, which may change, and failures worth another try.

A corpus that now holds other text ends the run: figures of two texts must not stand in one column,
and only the user knows which of them is meant.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from archs.checks import parse
from archs.errors import UserError
from archs.files import read_text, write
from eval.results.folder import Line
from eval.results.rows import CELL_FAILED, Status

NAME = "contents.json"
#: Failures that may have been the machine's: such cells always run again.
PASSING = (Status.ERROR, Status.OOM)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contents:
    """tokens: the names of those that were trained on, by corpus and size of the vocabulary."""

    tokens: dict[str, str] = field(default_factory=dict)

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


def require_corpus(out: Path, corpus: str, vocab_size: int, tokens: str) -> None:
    """Keep the name of a corpus's tokens; raises UserError where others were trained on before."""
    held, known = Contents.of(out), f"{corpus} {vocab_size}"
    before = held.tokens.get(known, tokens)
    if before != tokens:
        raise UserError(
            f"the corpus '{corpus}' holds other text than when '{out}' was begun (tokens {tokens}, "
            f"then {before}); restore it, choose another --out, or --fresh to replace the results"
        )
    replace(held, tokens={**held.tokens, known: tokens}).write(out)


def worth_another_try(lines: Sequence[Line] | None, commit: str) -> bool:
    """Whether a point failed and may end otherwise now: by luck, or since the code is another."""
    if not lines or lines[0]["measure"] != CELL_FAILED:
        return False
    changed = lines[0]["commit"] != commit or commit.endswith("-dirty")
    return changed or lines[0]["status"] in PASSING
