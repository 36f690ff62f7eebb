"""What the compiler makes of our Triton kernels, for GPUs that need not be here."""

from collections.abc import Mapping, Sequence
from types import ModuleType

from archs.errors import unknown_name
from kernels import (
    attention_decode,
    attention_prefill,
    conv_chunk,
    conv_step,
    decay_chunk,
    gdn_chunk,
    gdn_step,
    gemv,
    linear_step,
    mla_decode,
    norm_triton,
    page_write,
    rope_append,
    rope_rotate,
    sample,
    selective_chunk,
    selective_step,
    split_combine,
    ssm_step,
)
from kernels.ahead import TARGETS, compile_ahead

#: Every op with a Triton kernel: a module with `variants()` and `default_variant()`.
OPS: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        attention_decode, attention_prefill, conv_chunk, conv_step, decay_chunk, gdn_chunk,
        gdn_step, gemv, linear_step, mla_decode, norm_triton, page_write, rope_append,
        rope_rotate, sample, selective_chunk, selective_step, split_combine, ssm_step,
    )
}  # fmt: skip


def kernel_table(
    targets: Sequence[str], *, every: bool, ops: Sequence[str] = ()
) -> list[dict[str, object]]:
    """One row per op, configuration and target: registers, spills, loads, matrix instructions.

    every: all configurations that the wrappers can pick, not the default ones alone.
    ops: only these. Raises UserError on an unknown target or op.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS)
    for op in ops:
        if op not in OPS:
            raise unknown_name("operation", op, OPS)
    rows: list[dict[str, object]] = []
    for op, module in OPS.items():
        if ops and op not in ops:
            continue
        for variant in module.variants() if every else [module.default_variant()]:
            for target in [t for t in targets if t in variant.targets]:
                found = compile_ahead(variant, target)
                rows.append(
                    {
                        "op": op, "variant": variant.name, "target": target,
                        "registers": found.registers, "spill_bytes": found.spill_bytes,
                        "scalar_spills": found.scalar_spills,
                        "shared_bytes": found.shared_bytes,
                        "loads": _loads(found.load_bytes),
                        "loads_in_loops": _loads(found.loop_load_bytes),
                        "matrix_instructions": found.matrix_instructions,
                        "faults": "; ".join(found.faults(variant)),
                    }
                )  # fmt: skip
    return rows


def _loads(by_width: Mapping[int, int]) -> str:
    """How many of each width in bytes, the widest first."""
    return " ".join(f"{n}x{width}B" for width, n in sorted(by_width.items(), reverse=True))
