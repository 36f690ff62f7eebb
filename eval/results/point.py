"""A measurement as a value that hashes itself: what is measured, of which model and where."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from archs.checks import parse

#: Plain data: strings, numbers, booleans, None, and lists and mappings of them.
Plain = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement of one model, or of the machine itself (arch "").

    stage: what is measured; one of `eval.measure.stages.STAGES`.
    scale: the name of the model's shape. batch: sequences; 0 where none play a part.
    device: cpu or cuda. model: an `archs.registry.ModelSpec` as plain data.
    source: digest of the user's architecture files in it. options: the stage's own.
    """

    stage: str
    arch: str = ""
    scale: str = ""
    seed: int = 0
    batch: int = 0
    device: str = "cpu"
    model: Plain = field(default_factory=dict)
    source: str = ""
    options: Plain = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Twelve hex digits of everything above."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    @property
    def key(self) -> str:
        """The name of its rows' file."""
        where = f"{self.scale}/seed{self.seed}/batch{self.batch}"
        return f"{self.stage}/{self.arch}/{where}/{self.digest}"

    @property
    def label(self) -> str:
        """A short name for people."""
        words = [self.stage, self.arch, self.scale and f"@{self.scale}"]
        words += [
            f"batch {self.batch}" if self.batch else "",
            f"seed {self.seed}" * bool(self.seed),
        ]
        return " ".join(filter(None, words))

    def to_json(self) -> str:
        """One line of text; `from_json` restores the point. Equal points give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` returned. Raises UserError on anything else."""
        return parse(cls, json.loads(text), "a point")

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Point) and self.to_json() == other.to_json()
