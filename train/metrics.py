"""The log of a run: `metrics.jsonl`, one event a line, and TensorBoard where it is installed.

Every line is flushed, so a kill loses at most the line being written; a resumed run drops the
lines past its checkpoint and writes them again. Keys carry their units; a number that is not
finite is null, as JSON has no other word for it.
"""

import json
import math
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from archs.errors import UserError
from archs.files import make_folder, read, refused, refusing


class MetricsLog:
    """Appends events to the log of one run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "metrics.jsonl"
        #: What is written to, for the header line.
        self.loggers = ["jsonl"]
        self._file: TextIOWrapper | None = None
        self._board: Any = None

    def open(self, *, after_step: int) -> None:
        """Begin, or go on after `after_step` steps; later or broken lines are dropped."""
        kept = []
        if after_step and self.path.exists():
            for event in read_metrics(self.path):
                if event.get("step", 0) <= after_step:
                    kept.append(json.dumps(event) + "\n")
        make_folder(self.path.parent)
        with refusing(self.path, "written"):
            self._file = self.path.open("w", buffering=1, encoding="utf-8")
            self._file.writelines(kept)
            self._file.flush()
        if find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            with refusing(self.path.parent, "written"):
                self._board = SummaryWriter(
                    str(self.path.parent / "tensorboard"), purge_step=after_step
                )
            self.loggers = ["jsonl", "tensorboard"]

    def write(self, event: str, **values: Any) -> None:
        """One line. Raises UserError when the disk refuses."""
        if self._file is None:
            raise RuntimeError("the log is not open; call open first")
        clean = {k: None if _not_finite(v) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps({"event": event, **clean}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{refused(error, self.path, 'written')}; finished checkpoints are untouched"
            ) from error
        if self._board is not None and event in ("step", "eval"):
            for key, value in values.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(f"{event}/{key}", value, values["step"])

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The events of a log, up to a line that a kill cut short or that is none of ours."""
    events = []
    for line in read(path).decode("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            break
        if not (isinstance(event, dict) and isinstance(event.get("step", 0), int)):
            break
        events.append(event)
    return events


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
