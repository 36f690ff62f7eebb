"""A kernel begins while the one before it ends: programmatic dependent launch (Hopper and later).

A decode step is a chain of small kernels, and at each link the memory idles: a launch, the address
arithmetic and the first loads take longer than many of the kernels. A kernel that is launched so
may start as soon as all programs of the one before it have started and said so (`start_next`); what
it reads of others' results, and all that it writes, must come after `wait_for_previous`. Weights
come before: no kernel of a step writes them. Every program of every kernel that is launched so has
to wait, for then each kernel's end implies the end of all before it, and memory that torch's
allocator hands on is free indeed.

PTX: griddepcontrol.launch_dependents and griddepcontrol.wait.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

#: The first compute capability that can.
FROM = (9, 0)


@triton.jit
def start_next(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The next kernel may start once all programs of this one have come here."""
    if OVERLAP:
        cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Until the kernel before this one has ended and what it wrote can be read."""
    if OVERLAP:
        cuda.gdc_wait()


@triton.jit
def fetch(rows, columns, K):  # type: ignore[no-untyped-def]
    """Ask for lines of 128 bytes to come to the second-level cache: of these rows of K elements,
    at these columns or, past the end, at the last eight. NVIDIA's alone."""
    at = rows[:, None] + tl.minimum(columns, K - 8)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@functools.cache
def overlapped(device: torch.device, *, early: bool = True) -> dict[str, bool]:
    """How kernels with an OVERLAP are launched on `device`: keyword arguments of the launch.

    early: whether this kernel may itself begin before the one before it has ended. Programs that
    come while others still run are spread over the multiprocessors as these become free, not
    evenly: right for short ones, wrong for one wave of long ones. On an H100 that saved attention
    a microsecond a layer, cost three where one head's splits had 256 rows, and sixteen with 1,000.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return {"OVERLAP": False}
    if torch.cuda.get_device_capability(device) < FROM:
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True} if early else {"OVERLAP": True}
