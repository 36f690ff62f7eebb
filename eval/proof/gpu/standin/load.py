"""Loads the C++ side of the stand-in, before torch looks for its device; imports no torch."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from archs.errors import UserError

SOURCE = Path(__file__).with_name("guard.cpp")


def load() -> None:
    """Compile `guard.cpp` against this torch and load it.

    Raises UserError without a C++ compiler, with a torch that has CUDA, and where torch is loaded.
    """
    if "torch" in sys.modules:
        raise UserError("the stand-in must be loaded before torch; start a process of its own")
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise UserError("torch is not installed")
    home = Path(found.origin).parent
    if (home / "lib" / "libtorch_cuda.so").exists():
        raise UserError(
            "this torch has CUDA of its own; the stand-in needs a CPU build, in an environment of "
            "its own"
        )
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise UserError("the stand-in needs a C++ compiler; install g++ or clang")
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(home / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        done = subprocess.run(
            [compiler, "-std=c++20", "-shared", "-fPIC", "-O1", str(SOURCE), f"-I{home}/include",
             f"-I{home}/include/torch/csrc/api/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu",
             "-o", str(library)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise UserError(f"the stand-in does not compile: {done.stderr.strip()[-300:]}")
        ctypes.CDLL(str(library))
