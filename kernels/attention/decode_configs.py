"""Which configuration `decode` takes, by head dim, rows, what K and V hold, and GPU."""

from dataclasses import dataclass

import triton

BLOCKS_M = (16, 32, 64)


@dataclass(frozen=True, slots=True)
class Config:
    """Cache rows per tile, warps per program, stages of the load pipeline."""

    tile: int
    warps: int
    stages: int


#: By head dim, M, and whether K and V hold 8 bits.
CONFIGS: dict[tuple[int, int, bool], Config] = {
    (d, m, eight): config
    for eight in (False, True)
    for d, m, config in (
        (32, 16, Config(128, 4, 2) if eight else Config(64, 2, 3)),
        *((32, m, Config(64, 2, 2) if eight else Config(64, 4, 3)) for m in (32, 64)),
        (64, 16, Config(64, 4 if eight else 2, 3)), (64, 32, Config(32 if eight else 64, 4, 3)),
        (64, 64, Config(32, 4, 2) if eight else Config(32, 8, 3)),
        (128, 16, Config(64, 4, 3 if eight else 2)),
        (128, 32, Config(32 if eight else 64, 8, 3)),
        (128, 64, Config(32, 8, 2) if eight else Config(64, 8, 3)),
        *((256, m, Config(64, 8, 2) if eight else Config(32, 8, 3)) for m in (16, 32)),
    )
}  # fmt: skip
#: Where AMD GPUs differ: 64 KiB of shared memory, more registers for programs of 4 warps, and
#: twice the threads to a warp, each to load 16 bytes.
AMD_CONFIGS: dict[tuple[int, int, bool], Config] = {
    **{(32, m, True): Config(64, 2, 2) for m in BLOCKS_M},
    (64, 32, True): Config(64, 4, 2), (64, 64, False): Config(32, 4, 3),
    (64, 64, True): Config(64, 4, 2),
    (128, 32, True): Config(32, 4, 3),
    (128, 64, False): Config(64, 8, 2), (128, 64, True): Config(32, 4, 2),
    (256, 16, True): Config(32, 4, 2), (256, 32, True): Config(32, 4, 2),
}  # fmt: skip
#: Of rows that are keys and values, by head dim and M: a tile's angles lie in registers, too.
TIED_CONFIGS: dict[tuple[int, int], Config] = {
    (32, 16): Config(32, 2, 3), (32, 32): Config(32, 2, 3),
    (64, 16): Config(32, 4, 3), (64, 32): Config(32, 4, 3),
    (128, 16): Config(32, 4, 3), (128, 32): Config(32, 8, 3),
    (256, 16): Config(32, 8, 3),
}  # fmt: skip
AMD_TIED_CONFIGS: dict[tuple[int, int], Config] = {
    (32, 16): Config(64, 2, 2), (32, 32): Config(64, 2, 2),
    (64, 16): Config(64, 4, 2), (64, 32): Config(64, 4, 2),
    (128, 32): Config(32, 4, 2), (256, 16): Config(16, 4, 2),
}  # fmt: skip


def config_of(dim: int, rows: int, *, eight_bit: bool, tied: bool, amd: bool) -> tuple[int, Config]:
    """M and the configuration for this head dim and this many rows of one kv head.

    eight_bit: K and V hold 8 bits; tied: rows are keys and values.
    """
    fits = [m for d, m in TIED_CONFIGS if d == dim] if tied else [min(BLOCKS_M[-1], 8192 // dim)]
    block_m = min(max(fits), max(BLOCKS_M[0], triton.next_power_of_2(rows)))
    if tied:
        config = TIED_CONFIGS[dim, block_m]
        return block_m, AMD_TIED_CONFIGS.get((dim, block_m), config) if amd else config
    key = dim, block_m, eight_bit
    return block_m, AMD_CONFIGS.get(key, CONFIGS[key]) if amd else CONFIGS[key]
