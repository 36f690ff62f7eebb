"""Compiling Triton kernels ahead of time, for GPUs that need not be here, and reading the result.

Every configuration that a wrapper can pick is a `Variant`. It is compiled with the attributes the
launcher would find (what is divisible by 16), so the code is the code that runs; registers,
spills, shared memory, load width and matrix instructions are read from the compiler's own report.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from kernels.aot.machine_code import read_amdgcn, read_sass

TARGETS: dict[str, GPUTarget] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


#: The most shared memory that one program may have.
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}

#: Where a kernel begins while the one before it ends (`kernels.overlap`).
OVERLAPPING = ("sm_90", "sm_100")

#: `narrow_in_loops` of an op whose loop is over tokens and takes vectors of one token.
TOKEN_LOADS = frozenset({1, 2, 4, 8})


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One configuration of one kernel.

    signature:  Triton types of the arguments that are no constexpr, in any order.
    constexprs: values of those that are.
    divisible:  arguments divisible by 16: pointers that torch aligned, strides, sizes.
    wide_loads: how many global loads of 16 bytes there must be at least (0: none is expected).
    narrow_in_loops: widths below 16 bytes that loads in loops may have; for what, the op says.
    matrix:     whether matrix instructions must appear.
    targets:    those of `TARGETS` on which the wrapper picks it.
    spills:     most bytes that may be spilled: 0, but where the op says why.
    num_stages: None: what Triton takes by itself, which differs between targets.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int | None = None
    wide_loads: int = 1
    narrow_in_loops: frozenset[int] = frozenset()
    matrix: bool = False
    targets: tuple[str, ...] = tuple(TARGETS)
    spills: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What the compiler made of a variant.

    load_bytes counts global loads by their width, loop_load_bytes those in loops. scalar_spills
    (AMD) are scalar registers that were moved to lanes of vector registers, not to memory.
    """

    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bytes: Mapping[int, int] = field(default_factory=dict)
    loop_load_bytes: Mapping[int, int] = field(default_factory=dict)
    matrix_instructions: int = 0
    scalar_spills: int = 0

    def faults(self, variant: Variant) -> list[str]:
        """Why this code must not ship: memory, spills, narrow loads, no matrix unit."""
        found = []
        if self.shared_bytes > SHARED_KIB[self.target] * 1024:
            most = SHARED_KIB[self.target]
            found.append(f"{self.shared_bytes} bytes of shared memory, {most} KiB at most")
        if self.spill_bytes > variant.spills:
            found.append(f"spills {self.spill_bytes} bytes")
        wide = sum(n for width, n in self.load_bytes.items() if width >= 16)
        if wide < variant.wide_loads:
            found.append(f"{wide} loads of 16 bytes, {variant.wide_loads} expected")
        for width, count in sorted(self.loop_load_bytes.items()):
            if width < 16 and width not in variant.narrow_in_loops:
                found.append(f"{count} loads of {width} bytes in loops")
        if variant.matrix and not self.matrix_instructions:
            found.append("no matrix instruction")
        return found


def constants_for(variant: Variant, target: str) -> dict[str, Any]:
    """A variant's constexprs, and OVERLAP where its kernel has one, as launched on a target."""
    overlap = {"OVERLAP": target in OVERLAPPING} if "OVERLAP" in variant.kernel.arg_names else {}
    return {**variant.constexprs, **overlap}


def stages_for(variant: Variant, target: str) -> int:
    """A variant's num_stages, as launched on a target."""
    if variant.num_stages is not None:
        return variant.num_stages
    stages: int = make_backend(TARGETS[target]).parse_options({}).num_stages
    return stages


def compile_ahead(variant: Variant, target: str) -> Report:
    """Compile for one of `TARGETS`. Triton's own errors pass through."""
    names = variant.kernel.arg_names
    signature = {n: variant.signature.get(n, "constexpr") for n in names}
    constants = constants_for(variant, target)
    stages = stages_for(variant, target)
    options: dict[str, Any] = {"num_warps": variant.num_warps, "num_stages": stages}
    options |= {"launch_pdl": True} if constants.get("OVERLAP") else {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (names.index(n),): [["tt.divisibility", 16]] for n in variant.divisible
    }
    amd = TARGETS[target].backend == "hip"
    if amd:
        for name, kind in variant.signature.items():
            if kind.startswith("*"):
                attributes.setdefault((names.index(name),), []).append(["tt.pointer_range", 32])
    source = ASTSource(variant.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    read = _read_amd if amd else _read_nvidia
    found = read(compiled)
    return Report(target=target, shared_bytes=compiled.metadata.shared, **found)


def _read_nvidia(compiled: Any) -> dict[str, Any]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    assert registers and stack
    code = read_sass(sass)
    return {
        "registers": int(registers[1]),
        "spill_bytes": int(stack[1]),
        "load_bytes": code.load_bytes,
        "loop_load_bytes": code.loop_load_bytes,
        "matrix_instructions": code.matrix_instructions,
    }


def _read_amd(compiled: Any) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found, name
        return int(found[1])

    code = read_amdgcn(text)
    return {
        "registers": number("vgpr_count"),
        "spill_bytes": max(4 * number("vgpr_spill_count"), number("private_segment_fixed_size")),
        "scalar_spills": number("sgpr_spill_count"),
        "load_bytes": code.load_bytes,
        "loop_load_bytes": code.loop_load_bytes,
        "matrix_instructions": code.matrix_instructions,
    }


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout
