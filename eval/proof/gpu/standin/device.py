"""Torch's side of the stand-in: fake tensors of device cuda, their memory, copies and captures."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

GPU = torch.device("cuda", 0)
MEMORY_BYTES = int(79.1 * 2**30)
#: What code asks of a device's properties: an H100's.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132,
    L2_cache_size=50 << 20, total_memory=MEMORY_BYTES, warp_size=32,
    max_threads_per_multi_processor=2048, shared_memory_per_block_optin=232448, gcnArchName="",
)  # fmt: skip
#: Operations whose result the host waits for.
WAITING = frozenset({"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::is_nonzero"})


@dataclass(slots=True)
class Record:
    """What happened on the stand-in so far.

    launches: kernels of ours by name, all of them and those inside captures. faults: what must not
    be in a capture, as (kind, what). copies: between host and device, outside captures.
    """

    launches: Counter[str] = field(default_factory=Counter)
    captured: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)
    copies: int = 0
    live_bytes: int = 0
    peak_bytes: int = 0
    capturing: int = 0

    def in_capture(self, kind: str, what: str) -> None:
        """Note something that a capture must not hold; elsewhere it is nothing."""
        if self.capturing:
            self.faults.append((kind, what))


class Memory:
    """Bytes of the storages that live fake tensors on the device hold."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._storages: dict[int, list[int]] = {}
        self._seen: set[int] = set()

    def track(self, tensor: Tensor) -> None:
        """Count a tensor's storage until the last tensor on it is gone.

        Raises torch.cuda.OutOfMemoryError beyond the device's memory.
        """
        if id(tensor) in self._seen:
            return
        storage = tensor.untyped_storage()
        key, nbytes = int(storage._cdata), storage.nbytes()
        held = self._storages.setdefault(key, [0, nbytes])
        if not held[0]:
            r = self.record
            if r.live_bytes + nbytes > MEMORY_BYTES:
                del self._storages[key]
                raise torch.cuda.OutOfMemoryError(
                    f"CUDA out of memory on the stand-in: {nbytes / 2**30:.2f} GiB asked for, "
                    f"{(MEMORY_BYTES - r.live_bytes) / 2**30:.2f} GiB free"
                )
            r.live_bytes += nbytes
            r.peak_bytes = max(r.peak_bytes, r.live_bytes)
        held[0] += 1
        self._seen.add(id(tensor))
        weakref.finalize(tensor, self._drop, key, id(tensor))

    def _drop(self, key: int, number: int) -> None:
        self._seen.discard(number)
        held = self._storages[key]
        held[0] -= 1
        if not held[0]:
            self.record.live_bytes -= held[1]
            del self._storages[key]


class Mode(FakeTensorMode):
    """Fake tensors that say what is copied, waited for and allocated."""

    def __init__(self, record: Record) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.record = record
        self.memory = Memory(record)

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        """Run one operation on shapes alone."""
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            if args[0].device.type == "cuda":
                self.record.in_capture("wait", name)
            kind = args[0].dtype
            return False if kind == torch.bool else 0.0 if kind.is_floating_point else 0
        if name in WAITING:
            self.record.in_capture("wait", name)
        if name in ("aten::_to_copy", "aten::copy_"):
            self._copied(name, args, kwargs)
        out = super().dispatch(func, types, args, kwargs)
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, FakeTensor) and t.device.type == "cuda":
                self.memory.track(t)
        return out

    def _copied(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        source = args[0] if name == "aten::_to_copy" else args[1]
        target = kwargs.get("device") if name == "aten::_to_copy" else args[0].device
        if not isinstance(source, Tensor) or target is None:
            return
        kinds = {source.device.type, torch.device(target).type}
        if len(kinds) == 2 and "cuda" in kinds:
            self.record.copies += 1
            self.record.in_capture("copy", f"{name} {tuple(source.shape)}")


class _Stream:
    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, _: object) -> None: ...

    def synchronize(self) -> None: ...


class _Event(_Stream):
    def record(self, *_: object) -> None: ...

    def elapsed_time(self, _: object) -> float:
        return 1.0


class _Graph:
    def replay(self) -> None: ...


def install(record: Record) -> None:
    """Make torch believe in the device: for the whole process, once."""

    @contextmanager
    def graph(*_: object, **__: object) -> Iterator[None]:
        record.capturing += 1
        try:
            yield
        finally:
            record.capturing -= 1

    def synchronize(_: object = None) -> None:
        record.in_capture("wait", "synchronize")

    fakes: dict[str, object] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": lambda _: None, "_lazy_init": lambda: None,
        "get_device_properties": lambda _=None: PROPERTIES,
        "get_device_name": lambda _=None: PROPERTIES.name,
        "get_device_capability": lambda _=None: (PROPERTIES.major, PROPERTIES.minor),
        "mem_get_info": lambda _=None: (MEMORY_BYTES - record.live_bytes, MEMORY_BYTES),
        "memory_allocated": lambda _=None: record.live_bytes,
        "memory_reserved": lambda _=None: record.live_bytes,
        "synchronize": synchronize, "empty_cache": lambda: None, "manual_seed_all": lambda _: None,
        "current_stream": lambda _=None: _Stream(), "set_stream": lambda _: None,
        "Stream": _Stream, "stream": lambda _: nullcontext(), "Event": _Event,
        "CUDAGraph": _Graph, "graph": graph, "graph_pool_handle": lambda: (0, 0),
    }  # fmt: skip
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    fake_tensor.init_gpu_context = lambda _: None  # type: ignore[assignment]
    _mend_tensors(record)


def _mend_tensors(record: Record) -> None:
    """What fake tensors lack: addresses, lists, casts that keep a device without an index."""
    real: Callable[..., Tensor] = torch.tensor

    def tensor(data: Any, *, dtype: Any = None, device: Any = None, **more: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return real(data, dtype=dtype, device=device, **more)
        record.copies += 1
        record.in_capture("copy", "torch.tensor")
        return real(data, dtype=dtype, **more).to(GPU)

    def address(self: Tensor) -> int:
        return 512_000 + int(self.storage_offset()) * self.element_size()

    def nested(shape: Sequence[int]) -> Any:
        return [nested(shape[1:]) for _ in range(shape[0])] if shape else 0

    def to(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for a in args:
            if isinstance(a, torch.device | str):
                device = a
            elif isinstance(a, torch.dtype):
                dtype = a
            elif isinstance(a, Tensor):
                device, dtype = a.device, a.dtype
        kind = self.device.type if device is None else torch.device(device).type
        change: dict[str, Any] = {}
        if kind != self.device.type:
            change["device"] = GPU if kind == "cuda" else torch.device(kind)
        if dtype is not None and dtype != self.dtype:
            change["dtype"] = dtype
        if not change and not kwargs.get("copy"):
            return self
        self.constant = None
        copied: Tensor = torch.ops.aten._to_copy(self, **change)
        return copied

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    torch.tensor = tensor  # type: ignore[assignment]
    torch.Generator = lambda device="cpu": _CPU_GENERATOR()  # type: ignore[assignment,misc]
    vars(torch.nn.functional)["scaled_dot_product_attention"] = attention
    FakeTensor.data_ptr = address  # type: ignore[assignment,method-assign]
    FakeTensor.tolist = lambda self: nested(list(self.shape))  # type: ignore[method-assign]
    FakeTensor.to = to  # type: ignore[method-assign]


_CPU_GENERATOR = torch.Generator
