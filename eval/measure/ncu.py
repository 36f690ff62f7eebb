"""Nsight Compute's command line (`ncu`): counters summed over the kernels of a process.

`--cache-control none`: with caches flushed before every kernel, as is the default, what one kernel
leaves in L2 for the next would count as traffic. `--profile-from-start off`: the process says what
is counted. Whatever goes wrong is a reason in place of a figure.
"""

import csv
import math
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from eval.measure import child
from eval.results.rows import Status

#: A run under `ncu` that takes longer than this hangs.
PATIENCE_S = 900.0


class NotCountedError(RuntimeError):
    """Why there is no figure, and the status of the row in its place."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def command(metrics: Sequence[str], device: torch.device, what: str) -> list[str]:
    """The ncu command that profiles one workload (see `eval.measure.counted`)."""
    return [
        "ncu", "--target-processes", "application-only", "--profile-from-start", "off",
        "--cache-control", "none", "--clock-control", "none",
        "--csv", "--page", "raw", "--print-units", "base", "--metrics", ",".join(metrics),
        *child.command("eval.measure.counted", str(device), what),
    ]  # fmt: skip


def counted(weights: Mapping[str, int], device: torch.device, what: str) -> float:
    """The weighted sum of counters over all kernels of `what`. Raises NotCountedError."""
    if device.type == "cuda":
        # The other process needs the memory that this one only keeps for later.
        torch.cuda.empty_cache()
    # Figures come with the separators of the locale.
    environment = {**child.environment(), "LC_ALL": "C"}
    with subprocess.Popen(
        command([*weights], device, what), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", env=environment, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=PATIENCE_S)
        except BaseException as stop:
            # ncu alone would leave the process that it watches behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(stop, subprocess.TimeoutExpired):
                reason = f"ncu took longer than {PATIENCE_S:g} s"
                raise NotCountedError(Status.ERROR, reason) from None
            raise
    if "ERR_NVGPUCTRPERM" in out + err:
        raise NotCountedError(
            Status.UNSUPPORTED,
            "counters are not permitted to this user (ERR_NVGPUCTRPERM): have the administrator "
            "load the driver with NVreg_RestrictProfilingToAdminUsers=0",
        )
    if process.returncode:
        reason = f"ncu ended with code {process.returncode}"
        raise NotCountedError(Status.ERROR, ": ".join((reason, *_said(out, err))))
    return sum(weights[name] * total for name, total in parse(out, [*weights]).items())


def _said(out: str, err: str) -> list[str]:
    """The first error of `ncu`, and the last line of the process that it profiled."""
    said = [x for x in (out + err).splitlines() if x.startswith("==ERROR==")][:1]
    said += [x for x in err.splitlines() if x.strip() and not x.startswith("==")][-1:]
    return [" ".join(x.removeprefix("==ERROR==").split())[:200] for x in said]


def parse(text: str, metrics: Sequence[str]) -> dict[str, float]:
    """Counters summed over kernels, from what `ncu --csv` printed: wide, or a counter a row.

    Raises NotCountedError where a kernel has no value for a counter or one of an unknown unit.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(line for line in lines[begin:] if line.startswith('"')))
    kernels = dict.fromkeys(row["ID"] for row in rows if row["ID"])
    if not kernels:
        raise NotCountedError(Status.ERROR, "ncu profiled no kernel")
    cells: dict[tuple[str, str], tuple[str, str]] = {}
    if "Metric Name" in rows[0]:
        for row in rows:
            cells[row["ID"], row["Metric Name"]] = row["Metric Value"], row["Metric Unit"]
    else:
        units = {} if rows[0]["ID"] else rows[0]
        for row in rows:
            for name in metrics:
                cells[row["ID"], name] = row.get(name) or "", units.get(name) or ""
    totals = dict.fromkeys(metrics, 0.0)
    for name in metrics:
        for kernel in kernels:
            value, unit = cells.get((kernel, name), ("", ""))
            number, factor = _number(value), _factor(unit)
            if number is None or factor is None:
                said = f"{value} {unit}".strip() or "nothing"
                reason = f"counter {name} says '{said}': this GPU or this ncu may not have it"
                raise NotCountedError(Status.UNSUPPORTED, reason)
            totals[name] += number * factor
    return totals


def _number(text: str) -> float | None:
    """A number with whatever separators of thousands; None where it is none, as in "n/a"."""
    plain = re.sub(r"[\s'’]", "", text)
    marks = [c for c in plain if c in ",."]
    point = marks[-1] if marks and marks.count(marks[-1]) == 1 else ""
    if point == "," and len(marks) == 1 and re.fullmatch(r"\d{1,3},\d{3}", plain):
        point = ""
    digits = "".join("." if c == point else c for c in plain if c == point or c not in ",.")
    try:
        number = float(digits)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _factor(unit: str) -> float | None:
    """Bytes, instructions or operations of a unit: 1e6 for "Mbyte"; None for any other unit."""
    found = re.fullmatch(r"([kmgt]?)(?:b|byte|inst|ops?|)", unit.strip().lower())
    return None if found is None else 1e3 ** " kmgt".index(found[1] or " ")
