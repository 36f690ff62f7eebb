"""What the compiler makes of our Triton kernels, for GPUs that need not be here."""

from collections.abc import Sequence
from types import ModuleType

from archs.errors import unknown_name
from kernels import attention_decode, conv_step, gdn_step, linear_step, selective_step, ssm_step
from kernels.ahead import TARGETS, compile_ahead

#: Every op with a Triton kernel: a module with `variants()` and `default_variant()`.
OPS: dict[str, ModuleType] = {
    "attention_decode": attention_decode,
    "conv_step": conv_step,
    "gdn_step": gdn_step,
    "linear_step": linear_step,
    "selective_step": selective_step,
    "ssm_step": ssm_step,
}


def kernel_table(targets: Sequence[str], *, every: bool) -> list[dict[str, object]]:
    """One row per op, configuration and target: registers, spills, loads, matrix instructions.

    every: all configurations that the wrappers can pick, not the default ones alone.
    Raises UserError on an unknown target.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS)
    rows: list[dict[str, object]] = []
    for op, module in OPS.items():
        for variant in module.variants() if every else [module.default_variant()]:
            for target in targets:
                found = compile_ahead(variant, target)
                loads = sorted(found.load_bytes.items(), reverse=True)
                rows.append(
                    {
                        "op": op, "variant": variant.name, "target": target,
                        "registers": found.registers, "spill_bytes": found.spill_bytes,
                        "scalar_spills": found.scalar_spills,
                        "shared_bytes": found.shared_bytes,
                        "loads": " ".join(f"{n}x{width}B" for width, n in loads),
                        "matrix_instructions": found.matrix_instructions,
                        "faults": "; ".join(found.faults(variant)),
                    }
                )  # fmt: skip
    return rows
