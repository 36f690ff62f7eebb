"""How much memory is free, and one clear refusal before an allocation that cannot fit."""

from pathlib import Path

import torch

from archs.errors import UserError


class DoesNotFitError(UserError):
    """A request for more memory than there is."""


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
