"""What this machine can do: hardware, libraries, baselines, and whether our packages are ours."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

from eval.hardware import measure_roofline
from eval.results import hardware_name
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
        "product_bytes_per_s": roofline.product_bytes_per_s,
        "matrix_flops_per_s": roofline.matrix_flops_per_s,
        "ridge_flop_per_byte": roofline.ridge_flop_per_byte,
        "kernel_backends": {
            "torch": "usable",
            "torch-compile": "usable" if shutil.which("c++") else "needs a C++ compiler",
            "triton": "compiles ahead of time (decodebench kernels); decode does not use it yet",
        },
        "optional": {name: _version(name) or f"absent ({why})" for name, why in OPTIONAL.items()},
        "packages_from": str(Path(__file__).resolve().parent.parent),
    }


def _version(name: str) -> str:
    if importlib.util.find_spec(name) is None:
        return ""
    try:
        return importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "present"
