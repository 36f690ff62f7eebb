"""Decode benchmarks in anybody's pytest suite, with our measures in pytest-benchmark's records.

    @pytest.mark.parametrize("arch", ["gqa", "gdn"])
    def test_decode(decode_bench, arch):
        decode_bench(arch=arch, batch=8, context=4096)

Loaded by pytest where decodebench is installed. A benchmark is one decode step; an architecture
whose decode is not its parallel form is not timed. What is timed runs in a process of its own, so
that nothing of ours is imported here, beside a user's own `eval/` or `train.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

_HOME = Path(__file__).resolve().parent


class DecodeBenchError(ValueError):
    """What was asked for does not exist or does not fit; the message names the remedy."""


class DecodeBench(Protocol):
    """Times one decode step; the figures are in `benchmark.stats` and `benchmark.extra_info`."""

    def __call__(
        self, *, arch: str, batch: int = 1, context: int = 1024, scale: str = "70m",
        device: str = "auto", backend: str = "auto", compiled: bool = False, rounds: int = 16,
        weights: str = "", state: str = "", replay: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        """Returns `extra_info`: our measures by their names.

        arch: a registry name, a pattern or a file; context: tokens held before the first step.
        weights, state: formats that they are stored and kept in (int4-g64; kv:int8,memory:int8-ef).
        replay: inputs in a ring from which recurrent states are computed anew.
        Raises DecodeBenchError on what does not exist or fit; the test fails where decode is
        incorrect and is skipped, saying why, where the backend has no form for the architecture.
        """
        ...


class _Worker:
    """The process that times, started at its first request."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def ask(self, point: dict[str, Any]) -> dict[str, Any]:
        """The answer to a point. Raises DecodeBenchError where the process died of it."""
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join(filter(None, (str(_HOME), os.environ.get("PYTHONPATH"))))
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "eval.cli.bench_worker"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            print(json.dumps(point), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise DecodeBenchError(f"the process that times ended with code {process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def end(self) -> None:
        """Stop the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()


class _Replay:
    """Steps that were timed elsewhere, and the clock that they were timed by, for the records."""

    def __init__(self, step_s: list[float]) -> None:
        self._left = iter(step_s)
        self._now_s = 0.0

    def step(self) -> None:
        """The next step; those that are not recorded may come after the last."""
        self._now_s += next(self._left, 0.0)

    def clock(self) -> float:
        """Seconds."""
        return self._now_s


@pytest.fixture(scope="session")
def decode_bench_worker() -> Iterator[_Worker]:
    """One process for the whole session, which keeps the models that it has built last."""
    worker = _Worker()
    yield worker
    worker.end()


@pytest.fixture
def decode_bench(benchmark: Any, decode_bench_worker: _Worker) -> DecodeBench:
    """A callable that times one decode step of an architecture (see `DecodeBench`)."""

    def run(
        *, arch: str, batch: int = 1, context: int = 1024, scale: str = "70m",
        device: str = "auto", backend: str = "auto", compiled: bool = False, rounds: int = 16,
        weights: str = "", state: str = "", replay: int = 0,
    ) -> dict[str, Any]:  # fmt: skip
        answer = decode_bench_worker.ask(
            {
                "arch": arch, "batch": batch, "context": context, "scale": scale,
                "device": device, "backend": backend, "compiled": compiled, "rounds": rounds,
                "weights": weights, "state": state, "replay": replay,
            }
        )  # fmt: skip
        if "skipped" in answer:
            pytest.skip(answer["skipped"])
        if "failed" in answer:
            pytest.fail(answer["failed"])
        if "error" in answer:
            raise DecodeBenchError(answer["error"])
        again = _Replay(answer["step_s"])
        benchmark.extra_info.update(answer["info"])
        # pytest-benchmark has no other way to take times in.
        benchmark._timer = again.clock
        benchmark.pedantic(again.step, rounds=rounds, iterations=1)
        return dict(benchmark.extra_info)

    return run
