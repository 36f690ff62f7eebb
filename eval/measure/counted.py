"""The process that hardware counters profile, which `counters` starts under `ncu`.

Only what runs between the profiler's start and stop is counted: a known piece of work, by which
the counters are calibrated, or steps of a warm decode, launched one by one rather than as a CUDA
graph. What no kernel moves (copies by the driver, such as a step's lengths) is not seen.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch

from archs.checks import parse
from archs.registry import ModelSpec
from eval.measure.decode import Decoding, build_to_serve

#: Steps that run uncounted first, as in `measure_decode`, and steps that are counted.
WARMUP = 3
STEPS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A decode step: which model, how its weights are stored and its state kept (`DecodePlan`),
    how it is run, at which batch and context.
    """

    spec: ModelSpec
    dtype: torch.dtype
    backend: str
    compiled: bool
    batch: int
    context: int
    weights: str = ""
    state: str = ""

    def to_json(self) -> str:
        """One line of text; `from_json` restores the work."""
        dtype = str(self.dtype).removeprefix("torch.")
        return json.dumps({**asdict(self), "dtype": dtype})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` returned."""
        values: dict[str, Any] = json.loads(text)
        spec = parse(ModelSpec, values["spec"], "the work's spec")
        return cls(**{**values, "spec": spec, "dtype": getattr(torch, values["dtype"])})


def copied_bytes(device: torch.device) -> int:
    """Bytes read and written by `copy`: on a GPU far more than its caches hold."""
    return 1 << 31 if device.type == "cuda" else 1 << 20


def product_size(device: torch.device) -> int:
    """Rows of the square matrices of `product`."""
    return 4096 if device.type == "cuda" else 64


@contextmanager
def watched(device: torch.device) -> Iterator[None]:
    """Work in this block is counted on CUDA."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    with torch.cuda.profiler.profile():
        yield
        torch.cuda.synchronize(device)


def copy(device: torch.device) -> None:
    """A kernel that reads and writes half of `copied_bytes` each: signs change, bytes are known.

    A copy as such would be the driver's, which is no kernel.
    """
    source = torch.ones(copied_bytes(device) // 4, dtype=torch.bfloat16, device=device)
    target = torch.neg(source)
    with watched(device):
        torch.neg(source, out=target)


def product(device: torch.device) -> None:
    """A bfloat16 product of square matrices: 2 · `product_size`³ FLOPs."""
    size = product_size(device)
    a, b = torch.randn(2, size, size, device=device).bfloat16()
    out = torch.mm(a, b)
    with watched(device):
        torch.mm(a, b, out=out)


@torch.inference_mode()
def steps(device: torch.device, work: Work) -> None:
    """`STEPS` decode steps of warm work."""
    model = build_to_serve(work.spec, device, work.dtype, work.weights, work.state)
    decode = Decoding(
        model, batch=work.batch, max_context=work.context + WARMUP + STEPS, backend=work.backend,
        compiled=work.compiled, graphs=False,
    )  # fmt: skip
    decode.hold(work.context)
    for _ in range(WARMUP):
        decode.step()
    with watched(device):
        for _ in range(STEPS):
            decode.step()


def main(device_name: str, what: str) -> None:
    """Do the known work of that name, or steps of the work given as JSON."""
    device = torch.device(device_name)
    known = {"copy": copy, "product": product}
    if what in known:
        known[what](device)
    else:
        steps(device, Work.from_json(what))


if __name__ == "__main__":
    main(*sys.argv[1:])
