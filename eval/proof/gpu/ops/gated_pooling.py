"""What a step of compressed attention makes beside products on a device, beside torch's forms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.proof.gpu.case import Case, Check, Op, Run
from eval.proof.gpu.ops.operands import PAGE, angles, paged, random, slots
from kernels.norm.torch import l2_norm, rms_norm
from kernels.pooling.append import pooled_append, pooled_append_ref
from kernels.pooling.append_checks import Target
from kernels.pooling.torch import step_parts
from kernels.rope.torch import rotate_last

BF16_LIMIT = 8e-3
EPS = 1e-6
Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Shape:
    """H heads of d channels, r of them rotary, over rows that pool `every` tokens by `series`
    series; index: of an indexer, which keeps no rows of single tokens.
    """

    heads: int
    dim: int
    rotary: int
    every: int
    series: int
    index: bool = False

    @property
    def name(self) -> str:
        """Its numbers."""
        kind = " index" * self.index
        return f"{self.heads} heads d {self.dim} every {self.every} series {self.series}{kind}"


#: Of the 1b scale: heavily compressed attention, the compressed sparse one, and its indexer.
HCA, CSA = Shape(64, 256, 32, 128, 1), Shape(64, 256, 32, 4, 2)
INDEX = Shape(64, 64, 32, 4, 2, True)


def made(s: Shape, lengths: Sequence[int], new: int, device: torch.device) -> dict[str, Any]:
    """Arguments of a step of `new` tokens after `lengths`; all parts are updated in place."""
    wide, batch = s.series * s.dim, len(lengths)
    down = random(batch, new, s.dim + 2 * wide, device=device)
    row, values, gates = down.split((s.dim, wide, wide), -1)
    ends = [n + new for n in lengths]

    def target(rows: list[int]) -> Target:
        table, _, pages = paged([max(1, *rows)] * batch, device)
        pool = torch.zeros(pages * PAGE, s.dim, dtype=torch.bfloat16, device=device)
        return Target(random(s.dim, device=device), pool, table, PAGE)

    read, write = slots(batch, device), torch.full((batch, new), -1, dtype=torch.int32)
    write[:, -1] = torch.arange(batch)
    given: dict[str, Any] = {
        "q": random(batch, new, s.heads, s.dim, device=device), "values": values, "gates": gates,
        "bias": random(s.every, wide, device=device, dtype=torch.float32),
        "part": random(batch, 2, s.series, s.dim, device=device, dtype=torch.float32),
        "pooled": target([end // s.every for end in ends]),
        "cos_sin": angles(max(ends), s.rotary, device),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
        "read": read, "write": write.to(device), "every": s.every, "eps": EPS,
    }  # fmt: skip
    if not s.index:
        given |= {"row": row, "rows": target(ends), "q_eps": s.dim * EPS}
    return given


def check(s: Shape, new: int) -> Callable[[torch.device], Pairs]:
    """Queries, rows of both kinds and parts; groups end within the step and begin with it."""

    def run(device: torch.device) -> Pairs:
        given = made(s, [0, s.every * 2 - 1, s.every], new, device)
        held = {name: _on_cpu(value) for name, value in given.items()}
        asked = {k: v for k, v in held.items() if k not in ("read", "write")}
        expected = pooled_append_ref(**asked)
        pooled_append(**given)
        pairs = [
            (given["q"], expected.q), (given["pooled"].pool, expected.pooled),
            (given["part"], expected.parts[:, -1]),
        ]  # fmt: skip
        if expected.rows is not None:
            pairs.append((given["rows"].pool, expected.rows))
        return pairs

    return run


def _on_cpu(value: Any) -> Any:
    """A copy of a tensor, or of those of a target, for the oracle."""
    if isinstance(value, Target):
        return Target(*(_on_cpu(t) for t in value))
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def case(order: int, s: Shape, batch: int) -> Case:
    """One token for each of `batch` sequences, which completes a group of every one."""

    def build(device: torch.device) -> Mapping[str, Run]:
        given = made(s, [s.every * 2 - 1] * batch, 1, device)
        return {"triton": lambda: _ours(given), "torch": lambda: _by_torch(s, given)}

    wide = s.series * s.dim
    # Queries and parts are read and written, values and gates read; rows are written, those of
    # single tokens read, too.
    each = 4 * s.heads * s.dim + 16 * wide + 4 * wide + (2 if s.index else 6) * s.dim
    return Case(
        name=f"{s.name} bf16 batch {batch}", order=order, moved_bytes=batch * each, flops=0,
        build=build,
    )  # fmt: skip


def _ours(given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    pooled_append(**given)
    return given["q"], given["part"]


def _by_torch(s: Shape, given: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The torch forms of one token; rows are written by index."""
    q, past, part = given["q"], given["lengths"].long(), given["part"]
    at, table = past[:, None], torch.view_as_complex(given["cos_sin"])
    turn = table[at][:, :, None]
    values, gates = (given[n].float().unflatten(-1, (s.series, -1)) for n in ("values", "gates"))
    gates = gates + given["bias"][at % s.every].view_as(gates)
    part.copy_(step_parts(part, values, gates, at, None, s.every)[:, -1])
    mean = rms_norm(part[:, None, 1, 0].to(q.dtype), given["pooled"].weight, EPS)
    first = table[at + 1 - s.every][:, :, None]
    _store(rotate_last(mean[:, :, None], first), given["pooled"], at // s.every)
    if not s.index:
        row = rms_norm(given["row"], given["rows"].weight, EPS)
        _store(rotate_last(row[:, :, None], turn), given["rows"], at)
        q.copy_(l2_norm(q, given["q_eps"]))
    return rotate_last(q, turn), part


def _store(rows: Tensor, to: Target, at: Tensor) -> None:
    page = to.page_table.long().gather(1, at // PAGE)
    to.pool.index_copy_(0, (page * PAGE + at % PAGE).flatten(), rows.flatten(0, 2))


OPS = (
    Op(name="pooled_append",
       checks=[Check(name=f"{s.name} new {new}", limit=BF16_LIMIT, run=check(s, new))
               for s, new in ((Shape(3, 32, 16, 4, 2), 3), (Shape(4, 16, 8, 1, 1, True), 2),
                              (HCA, 1), (HCA, 4), (CSA, 1), (CSA, 4), (INDEX, 4))],
       cases=[case(2, s, batch) for s in (HCA, CSA, INDEX) for batch in (1, 64)]),
)  # fmt: skip
