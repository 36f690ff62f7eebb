"""Memory is given back when an engine is, not when the garbage collector comes by."""

import gc
import weakref
from contextlib import ExitStack

import pytest
import torch

from archs.registry import ModelSpec
from eval.proof.conformance import CHECK_SCALE
from infer import graphs
from infer.engine import Engine
from infer.memory import DoesNotFitError, free_bytes, require_memory
from tests.kernels.interpreter import interpreted


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("arch", ["gqa", "swa", "gdn", "cla"])
def test_a_finished_engine_frees_its_state_at_once(arch: str, backend: str) -> None:
    model = ModelSpec(arch=arch, scale=CHECK_SCALE).build().eval()
    gc.collect()
    gc.disable()
    try:
        with ExitStack() as stack:
            if backend == "triton":
                stack.enter_context(interpreted())
            engine = Engine(model, max_sequences=2, max_context=64, backend=backend)
            slots = [engine.store.add(), engine.store.add()]
            engine.prefill(slots, [[1, 2, 3], [4, 5]])
            engine.extend_last(slots, torch.tensor([[6], [7]]))
            engine.extend(slots, torch.tensor([[1, 2], [3, 4]]))
            held = weakref.ref(engine.store)
            del engine
            assert held() is None, "the store lives on in a circle of references"
    finally:
        gc.enable()


def test_what_torch_keeps_for_itself_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 20)
    assert free_bytes(torch.device("cuda")) == 60
    require_memory(50, torch.device("cuda"), "a state")
    with pytest.raises(DoesNotFitError, match="a state needs"):
        require_memory(59, torch.device("cuda"), "a state")


def test_a_failed_capture_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["before"]

    class Failing:
        """As torch's: the stream is left alone when ending the capture raises."""

        def __init__(self, graph: object, **options: object) -> None: ...

        def __enter__(self) -> None:
            current[0] = "capturing"

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    with pytest.raises(RuntimeError, match="not permitted"), graphs.capture(object()):
        pass
    assert current == ["before"]
