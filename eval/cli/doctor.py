"""A diagnosis of this machine: hardware, libraries, baselines, and whose packages are imported."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

from archs.backends import why_unusable
from eval.measure.counters import Counters
from eval.measure.provenance import hardware_name
from eval.predict.machine import measure_roofline
from infer.memory import free_bytes

#: Optional libraries and what they are for.
OPTIONAL = {
    "transformers": "equality tests, real checkpoints",
    "datasets": "hf: corpora",
    "tensorboard": "training curves beside the JSONL log",
    "flash_attn": "baseline",
    "mamba_ssm": "baseline",
    "fla": "baseline",
    "flashinfer": "baseline",
}


def diagnose() -> dict[str, object]:
    """Facts by name, plain values; unusable things say why."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    roofline = measure_roofline(device, dtype)
    free = free_bytes(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "device": str(device),
        "hardware": hardware_name(device),
        "cpu_cores": os.cpu_count(),
        "free_memory_bytes": free,
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bytes_per_s": roofline.copy_bytes_per_s,
        "read_bytes_per_s": roofline.read_bytes_per_s,
        "product_bytes_per_s": roofline.bytes_per_s(1),
        "product_launch_us": roofline.launch_us(1),
        "call_us": roofline.call_us,
        "matrix_flops_per_s": roofline.matrix_flops_per_s,
        "ridge_flop_per_byte": roofline.ridge_flop_per_byte,
        "kernel_backends": _backends(device),
        "counters": Counters(device).usable(),
        "optional": {name: _version(name) or f"absent ({why})" for name, why in OPTIONAL.items()},
        "packages_from": str(Path(__file__).resolve().parents[2]),
    }


#: The library behind each baseline backend.
LIBRARY = {"sdpa": "torch", "flash-attn": "flash_attn", "mamba-ssm": "mamba_ssm", "fla": "fla"}


def _backends(device: torch.device) -> dict[str, str]:
    """Each backend: usable, or why not."""
    compiler = "usable" if shutil.which("c++") else "needs a C++ compiler"
    found = {"torch": "usable", "torch-compile": compiler, "triton": _triton(device)}
    for name, library in LIBRARY.items():
        here = importlib.util.find_spec(library) is not None
        found[name] = found["triton"] if here else f"{library} is not installed"
    return found


def _triton(device: torch.device) -> str:
    """Whether a kernel of ours runs here, tried."""
    if device.type != "cuda":
        return "needs a CUDA device; kernels compile ahead of time (decodebench kernels)"
    reason = why_unusable(device)
    if reason is not None:
        return reason
    try:
        from kernels.norm.rows import rms_norm

        ones = torch.ones(2, 64, device=device, dtype=torch.bfloat16)
        right = bool((rms_norm(ones, ones[0], 0.0) == 1).all())
    except Exception as error:
        # A Triton that cannot compile or launch may fail in any way; that is the finding.
        return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "usable" if right else "gives wrong results on this device"


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return ""
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "present"
