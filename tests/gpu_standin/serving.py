"""A server on the stand-in, in a process of its own: what it asks of the device, in order, as JSON.

`python -m tests.gpu_standin.serving`. The engine is a store and books as on a GPU, with no layers.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from eval.proof.gpu.standin.load import load


def main() -> int:
    """Serve, and print the order of launches, reads and waits."""
    load()
    import torch
    import torch._dynamo

    from eval.proof.gpu.standin import device

    told: list[str] = []
    record = device.Record()
    device.install(record)

    class Event(device._Event):
        """An event that says when the host waits for it."""

        def __init__(self, *_: object, **__: object) -> None:
            told.append("event")

        def synchronize(self) -> None:
            told.append("wait for an event")

    class Watched(device.Mode):
        """Notes whatever the host waits for the device in."""

        def dispatch(
            self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
            kwargs: Mapping[str, Any] | None = None,
        ) -> Any:  # fmt: skip
            name, kwargs = func._schema.name, kwargs or {}
            if name in device.WAITING:
                told.append(name)
            if name == "aten::_local_scalar_dense" and args[0].device.type == "cuda":
                told.append(name)
            if name == "aten::copy_" and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                crosses(args[1], args[0].device)
            if name == "aten::index" and args[0].device.type == "cuda":
                for index in args[1]:
                    crosses(index, args[0].device)
            return super().dispatch(func, types, args, kwargs)

    def crosses(source: Any, target: Any) -> None:
        """Note a copy between host and device that the host waits for."""
        if source is None:
            return
        if {source.device.type, torch.device(target).type} == {"cpu", "cuda"}:
            told.append(f"copy {tuple(source.shape)} that waits")

    fake, make = torch._subclasses.FakeTensor, torch.tensor
    lists, put = fake.tolist, fake.to

    def tolist(self: Any) -> Any:
        if self.is_cuda:
            told.append("list that waits")
        return lists(self)

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = put(self, *args, **kwargs)
        if not kwargs.get("non_blocking"):
            crosses(self, found.device)
        return found

    def tensor(data: Any, *, device: Any = None, **more: Any) -> Any:
        found = make(data, **more)
        return found if device is None else found.to(device)

    vars(torch)["tensor"] = tensor
    fake.tolist, fake.to = tolist, to  # type: ignore[method-assign,assignment]
    vars(torch.cuda)["Event"] = Event
    vars(torch.cuda)["synchronize"] = lambda _=None: told.append("wait for the device")
    with Watched(record):
        print(json.dumps(_serve(told, device.GPU)))
    return 0


def _serve(told: list[str], device: Any) -> dict[str, Any]:
    import torch

    from archs.registry import ModelSpec
    from archs.sizes import get_scale
    from infer.capacity import Capacity
    from infer.engine import Engine
    from infer.executor import EngineExecutor
    from infer.policy import Policy
    from infer.sampling import Sampling
    from infer.scheduler import Scheduler
    from infer.sequence import Request
    from infer.server import Server
    from infer.store import StateStore

    specs = ModelSpec(arch="gdn:gqa=3:1", scale=get_scale("70m")).outline(torch.bfloat16)
    capacity = Capacity.of(specs.state_specs(), max_sequences=4, max_context=256, page_size=16)
    store = StateStore(
        specs.state_specs(), max_sequences=4, max_context=256, page_size=16, pages=capacity.pages,
        device=device, kernels=True,
    )  # fmt: skip

    class NoModel:
        compiled = graphed = None
        backend = "torch"

        def __init__(self) -> None:
            self.store, self.device = store, device

        def extend_last(
            self, sequences: Sequence[int], tokens: torch.Tensor, new: torch.Tensor | None = None
        ) -> torch.Tensor:
            assert tokens.is_cuda
            with store.step(sequences, tokens.shape[1], new) as step:
                step.send(4)
            told.append("step")
            return torch.zeros(len(sequences), 8, device=device)

    executor = EngineExecutor(cast(Engine, NoModel()))
    server = Server(Scheduler(capacity, Policy(token_budget=16)), executor)
    drawn = Sampling(temperature=0.8)
    for n in range(3):
        server.submit(Request(prompt=[1] * (n + 1), max_new_tokens=20))
    server.submit(Request(prompt=[1] * 40, max_new_tokens=20, sampling=drawn))
    turns = []
    while True:
        told.clear()
        turn = server.step()
        if turn is None:
            break
        groups = len(turn.batch.chunk_groups()) + bool(turn.batch.decode)
        turns.append({"told": list(told), "groups": groups, "got": len(turn.got)})
    return {"ahead": executor.ahead, "turns": turns, "model_s": executor.model_s}


if __name__ == "__main__":
    sys.exit(main())
