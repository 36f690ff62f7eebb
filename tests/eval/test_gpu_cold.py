"""Times with a cold cache, on a CUDA that only writes down what it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from eval.predict import cold
from tests.eval.fake_gpu import CPU


def test_copies_cover_the_cache_and_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 << 20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties())
    assert cold.copies_for(4 << 20, 8 << 20, CPU) == 50
    assert cold.copies_for(100, 8 << 20, CPU) == cold.MOST_COPIES
    assert cold.copies_for(4 << 30, 8 << 30, CPU) == 2
    assert cold.copies_for(4 << 20, 1 << 30, CPU) == 24
    assert cold.copies_for(4 << 30, 30 << 30, CPU) == 1
    assert cold.copies_for(100, 0, CPU) == cold.MOST_COPIES


class Cuda:
    """What `time_cold` asks of torch.cuda, written down; each event is 4 ms after the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, capturable: bool) -> None:
        self.log: list[str] = []
        self.clock_ms = 0.0
        log, cuda = self.log, self

        class Stream:
            def __init__(self, *_: object) -> None: ...

            def wait_stream(self, _: object) -> None:
                log.append("wait")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                cuda.clock_ms += 4
                self.at_ms = cuda.clock_ms

            def elapsed_time(self, other: Any) -> float:
                return float(other.at_ms - self.at_ms)

        class Graph:
            def replay(self) -> None:
                log.append("replay")

        @contextmanager
        def graph(_: Graph, stream: Stream) -> Iterator[None]:
            log.append("capture")
            yield
            if not capturable:
                raise RuntimeError("operation not permitted when stream is capturing")

        class Properties:
            L2_cache_size = 16

        fakes: dict[str, object] = {
            "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph,
            "stream": lambda _: nullcontext(), "current_stream": Stream,
            "set_stream": lambda _: log.append("restore"),
            "synchronize": lambda _: None, "get_device_properties": lambda _: Properties(),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("capturable", [True, False])
def test_a_call_is_timed_in_a_graph_of_copies_or_after_a_flush(
    monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    cuda = Cuda(monkeypatch, capturable=capturable)
    runs = [lambda n=n: cuda.log.append(f"run {n}") for n in range(2)]
    timing = cold.time_cold(runs, CPU, repeats=3)
    started = ["wait", "run 0", "run 1", "capture", "run 0", "run 1", "restore"]
    # Warmed up for as long as it takes, then timed.
    if capturable:
        assert cuda.log == [*started, *["replay"] * (len(cuda.log) - len(started))]
        assert len(cuda.log) >= len(started) + 4
        assert timing.method == "graph" and timing.median_s == pytest.approx(2e-3)
    else:
        assert cuda.log == [*started, *["run 0"] * (len(cuda.log) - len(started))]
        assert timing.method == "flush" and timing.median_s == pytest.approx(4e-3)
    assert timing.low_s <= timing.median_s * 1.001 and timing.high_s >= timing.median_s * 0.999
