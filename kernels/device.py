"""The GPU that a wrapper launches on, or the one that its launches are recorded for.

`kernels.aot.recorded` compiles what a wrapper would launch on a GPU that need not be here: there
operands are without memory (device meta), and these questions are answered for that GPU.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from triton import JITFunction

from kernels.checks import form, require


class Gpu(NamedTuple):
    """amd: whether by AMD; capability: CUDA's, a Hopper's where there is no NVIDIA GPU."""

    amd: bool = False
    capability: tuple[int, int] = (9, 0)

    @property
    def family(self) -> str:
        """Whose tiles suit it: Hopper's matrix unit reads operands from shared memory."""
        return "amd" if self.amd else "hopper" if self.capability[0] == 9 else "nvidia"


_recorded_for: Gpu | None = None


def gpu(device: torch.device) -> Gpu:
    """What is known of a device; on a CPU a Hopper stands in."""
    return _recorded_for or _gpu(device, torch.version.hip)


@functools.cache
def _gpu(device: torch.device, hip: str | None) -> Gpu:
    if hip is not None:
        return Gpu(amd=True)
    if device.type != "cuda":
        return Gpu()
    return Gpu(capability=torch.cuda.get_device_capability(device))


def interpreted(kernel: object) -> bool:
    """Whether a kernel runs in Triton's interpreter, which takes tensors on a CPU."""
    return not isinstance(kernel, JITFunction)


def require_gpu(name: str, t: Tensor, kernel: object) -> None:
    """Raise ValueError unless `kernel` can read t: on a GPU, or anywhere in the interpreter."""
    fits = t.is_cuda or interpreted(kernel) or _recorded_for is not None
    require(fits, name, form(t), "is on {}, needs cuda", t.device)


@contextmanager
def recorded_for(target: Gpu) -> Iterator[None]:
    """In the body wrappers are told of this GPU."""
    global _recorded_for
    before, _recorded_for = _recorded_for, target
    try:
        yield
    finally:
        _recorded_for = before
