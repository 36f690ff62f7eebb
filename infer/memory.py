"""How much memory is free, one clear refusal before an allocation that cannot fit, and what the
allocator does with memory that a step has used.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from archs.errors import UserError

#: Options of mallopt (malloc.h), and the largest block that glibc does not map by itself.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 32 << 20
MOST = 2**31 - 1


class DoesNotFitError(UserError):
    """A request for more memory than there is."""


@cache
def keep_freed() -> bool:
    """Let this process keep blocks of up to 32 MiB that it frees; False where no glibc is.

    By itself glibc gives them back or keeps them, as the heap happens to lie: gathering the rows of
    six sequences, layer by layer into new memory, took 16 ms or 70 ms, the kernel's clearing pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, MOST))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device in bytes; None where the system does not tell."""
    if device.type == "cuda":
        # What torch keeps for later allocations is free to them.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def require_memory(wanted_bytes: int, device: torch.device, what: str) -> None:
    """Raise DoesNotFitError when `wanted_bytes` for `what` do not fit in the free memory."""
    free = free_bytes(device)
    if free is not None and wanted_bytes > 0.9 * free:
        raise DoesNotFitError(
            f"{what} needs {wanted_bytes / 2**30:.2f} GiB but {free / 2**30:.2f} GiB of "
            f"{device.type} memory are free (10 % is kept back); "
            "lower the batch, the context or the scale"
        )
