"""Checks in processes of their own: kernels compile side by side, and a fault ends only its own.

A worker is given the names of a few checks, prints a JSON line after each, and ends early where
the device is of no more use to it; what it has not done goes to the next.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import torch

from eval.measure import child
from eval.proof.gpu.case import Check, lost, verdict
from eval.results.rows import Status

#: Checks that a worker is given: neighbours compile the same kernels, and a start takes as long as
#: many checks.
BATCH = 12
#: A check that takes longer than this hangs.
PATIENCE_S = 240.0
#: Exit code of a worker whose device is lost.
LOST = 3

Name = tuple[str, str]
Row = dict[str, object]


def count() -> int:
    """Workers for this machine: each compiles on one core and runs an oracle on another."""
    return max(1, min(8, (os.cpu_count() or 2) // 2))


def spread(
    waiting: Sequence[tuple[str, Check]], device: torch.device, workers: int,
    left_s: Callable[[], float | None],
) -> Iterator[tuple[str, Check, Row]]:  # fmt: skip
    """Verdicts of (operation, check) pairs as they come, until no time is left.

    A check whose process died or hung has an error as its verdict; one that there was no time for
    has none.
    """
    checks = {(op, check.name): check for op, check in waiting}
    names = list(checks)
    batches = [names[i : i + BATCH] for i in range(0, len(names), BATCH)]
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[list[tuple[Name, Row]]]] = [
            pool.submit(_batch, batch, device, left_s) for batch in batches
        ]
        try:
            for future in as_completed(futures):
                for name, row in future.result():
                    yield name[0], checks[name], row
        finally:
            for future in futures:
                future.cancel()


def command(device: torch.device, names: Sequence[Name]) -> list[str]:
    """The command that starts a worker."""
    words = (word for name in names for word in name)
    return child.command("eval.proof.gpu.workers", str(device), *words)


def _batch(
    names: Sequence[Name], device: torch.device, left_s: Callable[[], float | None]
) -> list[tuple[Name, Row]]:
    rows: list[tuple[Name, Row]] = []
    while len(rows) < len(names):
        rest, left = names[len(rows) :], left_s()
        if left is not None and left <= 0:
            break
        patience = PATIENCE_S * len(rest)
        lines, end = _run(command(device, rest), min(patience, left or patience))
        rows += zip(rest, lines, strict=False)
        if len(lines) < len(rest) and (end != f"exit code {LOST}" or not lines):
            if end == "timeout" and left is not None and left < patience:
                break
            row: Row = {"status": Status.ERROR.value, "note": f"its process ended: {end}"}
            rows.append((rest[len(lines)], row))
    return rows


def _run(words: Sequence[str], timeout_s: float) -> tuple[list[Row], str]:
    """The rows that a worker printed, and how it ended."""
    try:
        done = subprocess.run(
            words, capture_output=True, timeout=timeout_s, check=False,
            env=child.environment(),
        )  # fmt: skip
        printed, end = done.stdout, f"exit code {done.returncode}"
        if done.returncode not in (0, LOST):
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            end = f"{end} {last[:200]}".strip()
    except subprocess.TimeoutExpired as late:
        printed, end = late.stdout or b"", "timeout"
    lines = printed.decode(errors="replace").splitlines(keepends=True)
    return [json.loads(x) for x in lines if x.startswith('{"') and x.endswith("}\n")], end


def _main(device_name: str, *words: str) -> int:
    """Run checks by name and print their verdicts."""
    from eval.proof.gpu.ops import OPS

    device = torch.device(device_name)
    torch.set_num_threads(2)
    known = {(op.name, check.name): check for op in OPS for check in op.checks}
    for name in zip(words[::2], words[1::2], strict=True):
        row = verdict(known[name], device)
        print(json.dumps(row), flush=True)
        if row["status"] == Status.ERROR and lost(device):
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
