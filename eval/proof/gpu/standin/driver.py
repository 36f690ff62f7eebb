"""Triton's side of the stand-in: its own compiler for sm_90, launches that are only recorded."""

from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import compiler
from triton.compiler.compiler import make_backend
from triton.runtime import driver

from eval.proof.gpu.standin.device import GPU, Record

TARGET = GPUTarget("cuda", 90, 32)
#: The largest grid in y and z.
MOST_PROGRAMS = 65535


class Compiled:
    """What was compiled: kernels by their hash, and the C sources of launchers, if this Triton has
    any. `compile_s` is the time of compilations that no cache spared.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, dict[str, str]] = {}
        self.launchers: dict[str, dict[str, str]] = {}
        self.compile_s = 0.0
        self.misses = 0


class _Utils:
    def __init__(self, record: Record) -> None:
        self._record = record
        self.launch = None

    def load_binary(self, name: str, *_: object) -> tuple[int, int, int, int, int]:
        self._record.in_capture("load", name)
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {
            "max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536,
            "warpSize": 32, "sm_clock_rate": 1980000, "mem_clock_rate": 2619000,
            "mem_bus_width": 5120,
        }  # fmt: skip


def install(record: Record) -> Compiled:
    """Make Triton compile for the stand-in and record launches: for the whole process, once."""
    made = Compiled()
    # Until 3.6, Triton writes and compiles a launcher in C for every signature.
    generated = hasattr(nvidia, "make_launcher")

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            if generated:
                nvidia.CudaLauncher(source, metadata)
            self.name = metadata.name

        def __call__(self, x: int, y: int, z: int, *_: object) -> None:
            record.launches[self.name] += 1
            if record.capturing:
                record.captured[self.name] += 1
            if not 0 < x < 2**31 or not 0 < y <= MOST_PROGRAMS or not 0 < z <= MOST_PROGRAMS:
                record.faults.append(("grid", f"{self.name} {x} x {y} x {z}"))

    class Driver:
        def __init__(self) -> None:
            self.utils = _Utils(record)
            self.launcher_cls = Launcher

        def get_current_stream(self, _: int = 0) -> int:
            return 0

        def get_current_device(self) -> int:
            return 0

        def get_device_capability(self, _: int = 0) -> tuple[int, int]:
            return 9, 0

        def set_current_device(self, _: int) -> None: ...

        def get_current_target(self) -> GPUTarget:
            return TARGET

        def get_active_torch_device(self) -> torch.device:
            return GPU

        def get_device_interface(self) -> Any:
            return torch.cuda

        def map_python_to_cpp_type(self, kind: str) -> Any:
            return nvidia.ty_to_cpp(kind)

    def launcher_source(src: str, name: str, *_: object, **__: object) -> Any:
        from types import SimpleNamespace

        made.launchers[str(len(made.launchers))] = {"src": src, "name": name}
        return SimpleNamespace(launch=None)

    if generated:
        nvidia.compile_module_from_src = launcher_source
        nvidia.library_dirs = list

    real = compiler.compile

    def compile_kernel(src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        found = real(src, target=target, options=options, **more)
        parsed = make_backend(target or TARGET).parse_options(dict(options or {}))
        made.kernels[found.hash] = {
            "name": found.metadata.name, "src": src.hash(), "options": parsed.hash()
        }  # fmt: skip
        # Kernels that were prepared have machine code alone: they were looked at when compiled.
        waits = "griddepcontrol.wait" in found.asm["ptx"] if "ptx" in found.asm else True
        if found.metadata.launch_pdl and not waits:
            record.faults.append(("overlap", f"{found.metadata.name} begins early, never waits"))
        return found

    def listener(*, metadata: Any, times: Any, cache_hit: bool, **_: object) -> None:
        record.in_capture("compile", metadata["name"])
        if not cache_hit:
            made.misses += 1
            made.compile_s += times.total / 1e6

    import triton.compiler

    compiler.compile = triton.compiler.compile = compile_kernel
    knobs.compilation.listener = listener
    driver.set_active(Driver())
    return made
