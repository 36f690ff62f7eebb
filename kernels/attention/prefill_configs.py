"""Which configuration `prefill` takes, by head dims, rows, pages and GPU."""

from dataclasses import dataclass

import torch
import triton

from kernels.device import gpu

BLOCKS_M = (16, 64, 128)


@dataclass(frozen=True, slots=True)
class Config:
    """Cache rows per tile, warps per program, stages of the load pipeline."""

    tile: int
    warps: int
    stages: int


#: By the head dims of keys and values, up to powers of two, and M.
CONFIGS: dict[tuple[int, int, int], Config] = {
    (*widths, m): config
    for widths, *configs in (
        ((32, 32), Config(64, 4, 3), Config(64, 4, 3), Config(64, 4, 3)),
        ((64, 32), Config(64, 4, 3), Config(64, 4, 3), Config(64, 8, 3)),
        ((64, 64), Config(64, 4, 3), Config(64, 4, 3), Config(64, 8, 3)),
        ((128, 64), Config(64, 4, 3), Config(64, 8, 3), Config(64, 8, 3)),
        ((128, 128), Config(64, 4, 3), Config(64, 8, 3), Config(64, 8, 3)),
        ((256, 128), Config(64, 4, 2), Config(32, 8, 3), Config(32, 8, 2)),
        ((256, 256), Config(32, 8, 2), Config(32, 8, 2)),
    )
    for m, config in zip(BLOCKS_M, configs, strict=False)
}
#: Where the rows of a tile lie on several pages: the address of each takes registers, too.
SMALL_PAGE_CONFIGS: dict[tuple[int, int, int], Config] = {
    (32, 32, 128): Config(64, 8, 2), (64, 64, 64): Config(64, 8, 3),
    (128, 128, 128): Config(32, 8, 3), (256, 128, 64): Config(64, 8, 2),
    (256, 256, 16): Config(32, 4, 2),
}  # fmt: skip
#: Where three stages of tiles spill before Hopper; on it they are a fifth faster than two.
AMPERE_CONFIGS: dict[tuple[int, int, int], Config] = {(128, 128, 128): Config(64, 8, 2)}
#: Where AMD GPUs differ: 64 KiB of shared memory, and more registers for programs of 4 warps.
AMD_CONFIGS: dict[tuple[int, int, int], Config] = {
    (64, 32, 128): Config(64, 4, 3), (128, 128, 16): Config(64, 4, 2),
    (128, 128, 64): Config(64, 4, 2), (128, 128, 128): Config(64, 4, 2),
    (256, 128, 64): Config(64, 4, 2), (256, 128, 128): Config(32, 4, 2),
    (256, 256, 64): Config(32, 4, 2),
}  # fmt: skip


def family_of(device: torch.device) -> str:
    """The GPU's family, by which its configurations differ."""
    amd, capability = gpu(device)
    return "amd" if amd else "ampere" if capability < (9, 0) else "hopper"


def config_of(
    dim: int, v_dim: int, rows: int, page_size: int, *, family: str
) -> tuple[int, Config]:
    """M and the configuration for these head dims and this many rows of one kv head."""
    width, v_width = (max(32, triton.next_power_of_2(d)) for d in (dim, v_dim))
    width, v_width = max(width, v_width), max(v_width, width // 2)
    fits = [m for m in BLOCKS_M if (width, v_width, m) in CONFIGS]
    key = (width, v_width, next((m for m in fits if m >= rows), fits[-1]))
    config = CONFIGS[key]
    if family == "amd":
        config = AMD_CONFIGS.get(key, config)
    elif page_size % config.tile:
        config = SMALL_PAGE_CONFIGS.get(key, config)
    elif family == "ampere":
        config = AMPERE_CONFIGS.get(key, config)
    return key[2], config
