"""Which machine this is, and which code."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from eval.results.rows import Provenance


def provenance(config_hash: str, device: torch.device) -> Provenance:
    """This machine and this code, now."""
    try:
        from importlib.metadata import version

        triton_version = version("triton")
    except ModuleNotFoundError:
        triton_version = ""
    driver = ""
    if device.type == "cuda":
        driver = f"CUDA {torch.version.cuda}"
    return Provenance(
        hardware=hardware_name(device),
        driver=driver,
        torch=torch.__version__,
        triton=triton_version,
        commit=_commit(),
        config_hash=config_hash,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def hardware_name(device: torch.device) -> str:
    """GPU name, or CPU model with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """What the file COMMIT says, which whoever copies a tree without git writes; else git.

    "unknown" where git knows no repository of this very tree: one around the place where this is
    installed, or one that GIT_DIR names, is somebody else's.
    """
    root = Path(__file__).parents[2]
    told = root / "COMMIT"
    if told.is_file():
        return told.read_text(encoding="utf-8").strip()
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return "unknown"
    return _git(root, "describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def _git(root: Path, *arguments: str) -> str:
    """What git prints about the tree at `root`, whatever the environment says; "" if it cannot."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=root, env=own, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
