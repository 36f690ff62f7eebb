"""A step of compressed attention before its attention: against its float64 oracle and the torch
forms, in the interpreter.

Only queries, the rows that are due and the slots that are written may change; everything that may
not be read is NaN or has no page, and whatever else was there must come out bit for bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.pooling.append as module
from archs.csa import CompressedSparseConfig
from archs.hca import HeavilyCompressedConfig
from archs.sizes import SCALES
from kernels.norm.torch import l2_norm, rms_norm
from kernels.pages.write import FLOATS, page_write_ref
from kernels.pooling.append import Appended, pooled_append_ref
from kernels.pooling.append_checks import Target
from kernels.pooling.torch import step_parts, whole_rows_ref
from kernels.rope.torch import rope_table, rotate_last
from tests.kernels.interpreter import interpreted
from tests.kernels.slots import in_place

BF16, F32 = torch.bfloat16, torch.float32
TOLERANCES: dict[torch.dtype, dict[str, Any]] = {
    F32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    BF16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}
#: Slots that no sequence reads come after those.
SPARE = 2


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def target(
    batch: int, dim: int, spans: list[tuple[int, int]], size: int, dtype: torch.dtype,
    held: torch.dtype,
) -> Target:  # fmt: skip
    """Shuffled pages of NaN; entries of pages that have none of the rows `spans` point nowhere."""
    most = max(1, *(-(-end // size) for _, end in spans))
    pages = batch * most + 2
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    for b, (first, end) in enumerate(spans):
        due = torch.arange(first, end) // size
        table[b, [j for j in range(most) if j not in due]] = 10**6
    pool = torch.full((pages * size, dim), torch.nan, dtype=held)
    return Target((torch.rand(dim) + 0.5).to(dtype), pool, table, size)


def operands(
    lengths: tuple[int, ...] = (3, 0, 30), *, tokens: int = 2, every: int = 4, series: int = 1,
    heads: int = 3, widths: tuple[int, int] = (32, 16), page_sizes: tuple[int, int] = (16, 2),
    dtype: torch.dtype = F32, held: torch.dtype | None = None,
    new: tuple[int, ...] | None = None, each: bool = False, index: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """All but queries as columns of a wider projection of NaN; parts of NaN but for those that are
    read. index: as an indexer's.
    """
    dim, rotary = widths
    batch, wide, counts = len(lengths), series * dim, new or (tokens,) * len(lengths)
    down = torch.full((batch, tokens, 16 + dim + 2 * wide), torch.nan, dtype=dtype)
    _, row, values, gates = down.split((16, dim, wide, wide), -1)
    for part in (row, values, gates):
        part.copy_(torch.randn(part.shape) * 2 + 0.5)
        for b, count in enumerate(counts):
            part[b, count:] = torch.nan
    ends = [length + count for length, count in zip(lengths, counts, strict=True)]
    spans = list(zip(lengths, ends, strict=True))
    groups = [(first // every, end // every) for first, end in spans]
    made = held or dtype
    slots = list(range(2, 2 + batch))
    at = in_place(slots, tokens, new, fresh=2 + batch if each else None)
    parts = torch.full((2 + batch + batch * tokens + SPARE, 2, series, dim), torch.nan)
    for slot, length in zip(slots, lengths, strict=True):
        # What a slot of an empty sequence holds is nobody's.
        if length:
            parts[slot] = torch.randn(2, series, dim)
    most = max(lengths) + tokens
    angles = rope_table(most, rotary, 10000.0, torch.device("cpu"))
    given = {
        "q": torch.randn(batch, tokens, heads, dim).to(dtype),
        "values": values, "gates": gates, "bias": torch.randn(every, wide), "part": parts,
        "pooled": target(batch, dim, groups, page_sizes[1], dtype, made),
        "cos_sin": torch.view_as_real(angles)[:most, 0].contiguous(), "lengths": int32(*lengths),
        "every": every, "eps": 1e-3, "new": None if new is None else int32(*new), **at,
    }  # fmt: skip
    if not index:
        given["rows"] = target(batch, dim, spans, page_sizes[0], dtype, made)
        given |= {"row": row, "q_eps": 1e-2}
    return given


def reference(given: dict[str, Any]) -> Appended:
    slots = given["read"].long()
    kept = {k: v for k, v in given.items() if k not in ("read", "write", "each")}
    return pooled_append_ref(**kept | {"part": given["part"][slots]})


def torch_form(given: dict[str, Any]) -> Appended:
    """What a step without this kernel does."""
    q, past, every = given["q"].clone(), given["lengths"].long(), given["every"]
    (batch, tokens), (series, dim) = q.shape[:2], given["part"].shape[2:]
    new = torch.full((batch,), tokens) if given["new"] is None else given["new"].long()
    at, last = past[:, None] + torch.arange(tokens), len(given["cos_sin"]) - 1
    table = torch.view_as_complex(given["cos_sin"])
    angles = table[at.clamp(max=last)][:, :, None]
    if given.get("q_eps") is not None:
        q = l2_norm(q, given["q_eps"])
    raw = (given["values"], given["gates"])
    values, gates = (t.float().unflatten(-1, (series, dim)) for t in raw)
    gates = gates + given["bias"][at % every].view(gates.shape)
    valid = torch.arange(tokens) < new[:, None]
    held = given["part"][given["read"].long()].float()
    parts = step_parts(held, values, gates, at, valid, every)
    to, rows = given["pooled"], given.get("rows")
    into, own = to.pool.clone(), None
    for b in range(batch):
        for i in range(int(new[b])):
            if (at[b, i] + 1) % every:
                continue
            mean = rms_norm(parts[b, i, 1, 0].to(to.weight.dtype), to.weight, given["eps"])
            first = table[at[b, i] - (every - 1)][None, None, None]
            place = int(at[b, i]) // every
            page = int(to.page_table[b, place // to.page_size])
            into[page * to.page_size + place % to.page_size] = rotate_last(
                mean[None, None, None], first
            )[0, 0, 0].to(into.dtype)
    if rows is not None:
        normed = rms_norm(given["row"], rows.weight, given["eps"])
        own = page_write_ref(
            rotate_last(normed[:, :, None], angles)[:, :, 0], rows.pool, rows.page_table,
            given["lengths"], page_size=rows.page_size, new=given["new"],
        )  # fmt: skip
    return Appended(rotate_last(q, angles), into, own, parts)


def close(got: Tensor, expected: Tensor, *dtypes: torch.dtype) -> None:
    loosest = max((got.dtype, *dtypes), key=lambda t: TOLERANCES[t]["rtol"])
    torch.testing.assert_close(
        got.double(), expected.double(), equal_nan=True, **TOLERANCES[loosest]
    )


def assert_equals_the_oracle(given: dict[str, Any]) -> None:
    oracle, by_torch = reference(given), torch_form(given)
    before, dtype = given["part"].clone(), given["q"].dtype
    (batch, tokens), write = given["q"].shape[:2], given["write"]
    with interpreted():
        module.pooled_append(**given)
    new = [tokens] * batch if given["new"] is None else given["new"].tolist()
    slots: dict[int, tuple[int, int]] = {}
    for b, count in enumerate(new):
        for i in range(count):
            if int(write[b, i]) >= 0:
                slots[int(write[b, i])] = (b, i)
    for found in (oracle, by_torch):
        for b, count in enumerate(new):
            close(given["q"][b, :count], found.q[b, :count])
        close(given["pooled"].pool, found.pooled, dtype)
        if found.rows is not None:
            close(given["rows"].pool, found.rows, dtype)
        for slot, (b, i) in slots.items():
            close(given["part"][slot], found.parts[b, i])
    others = [slot for slot in range(len(before)) if slot not in slots]
    torch.testing.assert_close(
        given["part"][others], before[others], equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("every", [1, 2, 4, 128])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("series", [1, 2])
def test_groups_of_every_size(series: int, tokens: int, every: int) -> None:
    """At a sequence's first token, at a group's, within one and at its last."""
    lengths = (0, every, 3 * every - 1, every * 2 + every // 2)
    assert_equals_the_oracle(
        operands(lengths, tokens=tokens, every=every, series=series, each=tokens > 2)
    )


@pytest.mark.parametrize("heads", [1, 7, 40])
@pytest.mark.parametrize("widths", [(32, 16), (7, 2), (8, 8), (24, 10), (64, 4)], ids=str)
@pytest.mark.parametrize("index", [False, True])
def test_heads_and_widths(index: bool, widths: tuple[int, int], heads: int) -> None:
    assert_equals_the_oracle(
        operands((7,), tokens=2, heads=heads, widths=widths, series=1 + index, index=index)
    )


@pytest.mark.parametrize("held", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype: torch.dtype, held: torch.dtype) -> None:
    assert_equals_the_oracle(operands(dtype=dtype, held=held, series=2, tokens=3, each=True))


@pytest.mark.parametrize("page_sizes", [(1, 1), (5, 3), (64, 64)], ids=str)
def test_pages_of_both_kinds(page_sizes: tuple[int, int]) -> None:
    assert_equals_the_oracle(operands((63, 0), tokens=9, every=2, page_sizes=page_sizes))


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("index", [False, True])
def test_padded_tokens_write_nothing(index: bool, each: bool) -> None:
    assert_equals_the_oracle(
        operands((3, 0, 30, 15), tokens=4, new=(4, 0, 1, 2), series=2, each=each, index=index)
    )


def test_values_go_from_slot_to_slot() -> None:
    """As after a fork: what was read stays."""
    given = operands((3, 9), tokens=2)
    given["write"] = int32(-1, 5, -1, 0).view(2, 2)
    assert_equals_the_oracle(given)


@pytest.mark.parametrize("pieces", [(1,) * 21, (4, 4, 4, 4, 4, 1), (2, 3, 1, 4, 3, 4, 1, 3)])
@pytest.mark.parametrize(("every", "series"), [(4, 2), (4, 1), (1, 2), (7, 2), (128, 1)])
def test_any_split_gives_the_rows_of_one_pass(
    pieces: tuple[int, ...], every: int, series: int
) -> None:
    given = operands((20,), tokens=1, every=every, series=series, page_sizes=(16, 4))
    values, gates = torch.randn(2, 1, 21, series * 32).unbind(0)
    to = target(1, 32, [(0, 21 // every)], 4, F32, F32)
    done = 0
    for count in pieces:
        span = slice(done, done + count)
        part = operands((done,), tokens=count, every=every, series=series)
        kept = {name: given[name] for name in ("bias", "cos_sin", "part", "read")}
        write = torch.full((1, count), -1, dtype=torch.int32)
        write[:, -1] = given["read"]
        step = {"values": values[:, span], "gates": gates[:, span], "pooled": to, "write": write}
        with interpreted():
            module.pooled_append(**part | kept | step)
        done += count
    biased = gates + given["bias"][torch.arange(21) % every]
    values, biased = (t.unflatten(-1, (series, -1)) for t in (values, biased))
    means = whole_rows_ref(values, biased, every)[0]
    rows = rms_norm(means.float(), to.weight, 1e-3)
    angles = torch.view_as_complex(given["cos_sin"])[: len(rows) * every : every, None]
    places = torch.arange(len(rows))
    at = to.page_table[0, places // 4].long() * 4 + places % 4
    expected = rotate_last(rows[None, :, None], angles)[0, :, 0]
    close(to.pool[at], expected)


def test_a_token_without_a_page_or_an_angle_stays_outside() -> None:
    given = operands((12, 12), tokens=6)
    whole, due = torch_form(given), torch_form(given | {"new": int32(4, 0)})
    for name in ("rows", "pooled"):
        to = given[name]
        table = to.page_table[:, : 1 if name == "rows" else 2].contiguous()
        table[1] = -1
        given[name] = to._replace(page_table=table)
    before = given["q"].clone()
    given["cos_sin"] = given["cos_sin"][:16].contiguous()
    with interpreted():
        module.pooled_append(**given)
    close(given["q"][:, :4], whole.q[:, :4])
    close(given["q"][:, 4:], l2_norm(before[:, 4:], given["q_eps"]))
    assert due.rows is not None
    close(given["rows"].pool, due.rows)
    close(given["pooled"].pool, due.pooled)
    close(given["part"][given["read"].long()], whole.parts[:, -1])


Change = Callable[[dict[str, Any]], dict[str, Any]]


def of(name: str, **fields: Any) -> Change:
    """The same target but for some fields, each a function of what it was."""
    return lambda a: {
        name: a[name]._replace(**{f: change(getattr(a[name], f)) for f, change in fields.items()})
    }


REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K, H, d\]", lambda a: {"q": a["q"][0]}),
    "q dtype": ("q=.*bfloat16", lambda a: {"q": a["q"].double()}),
    "q heads apart": ("q has strides", lambda a: {"q": torch.zeros(3, 2, 4, 40)[..., :32]}),
    "q overlaps": ("q=.*must not overlap", lambda a: {"q": a["q"][:1, :1].expand(3, 2, -1, -1)}),
    "no heads": ("q=.*must have heads", lambda a: {"q": a["q"][:, :, :0]}),
    "d": ("d=1 must be 2 to 512", lambda a: {"q": torch.zeros(3, 2, 4, 1)}),
    "tokens": ("K=10 new tokens", lambda a: {"q": torch.zeros(3, 10, 4, 32)}),
    "values": (r"values=.*\[3, 2, 32\]", lambda a: {"values": a["values"][..., 1:]}),
    "gates": ("gates=.*float32", lambda a: {"gates": a["gates"].half()}),
    "gates apart": ("gates has strides", lambda a: {"gates": torch.zeros(3, 2, 32, 2)[..., 0]}),
    "bias": (r"bias=.*\[4, 32\]", lambda a: {"bias": a["bias"][:3]}),
    "part": (r"part=.*S 1 or 2", lambda a: {"part": torch.zeros(9, 2, 3, 32)}),
    "part width": (r"part has shape \(9, 2, 1, 16\)", lambda a: {"part": torch.zeros(9, 2, 1, 16)}),
    "part dtype": ("part=.*must be float32", lambda a: {"part": a["part"].half()}),
    "read": ("read is torch.int64", lambda a: {"read": a["read"].long()}),
    "write": (r"write has shape \(3, 1\)", lambda a: {"write": a["write"][:, :1]}),
    "new": (r"new has shape \(2,\)", lambda a: {"new": int32(1, 2)}),
    "lengths": ("lengths is torch.int64", lambda a: {"lengths": a["lengths"].long()}),
    "every": ("every=0 must", lambda a: {"every": 0}),
    "eps": ("eps=-1.0 must", lambda a: {"eps": -1.0}),
    "q_eps": ("q_eps=-1.0 must", lambda a: {"q_eps": -1.0}),
    "row": (r"row=.*\[3, 2, 32\]", lambda a: {"row": a["row"][:, :1]}),
    "rows alone": ("row=None must be given exactly where rows", lambda a: {"row": None}),
    "row alone": (r"row=float32\[3, 2, 32\].*exactly where rows", lambda a: {"rows": None}),
    "cos_sin": ("cos_sin=.*r at most 32", lambda a: {"cos_sin": torch.zeros(40, 17, 2)}),
    "weight": (r"pooled.weight=.*\[32\]", of("pooled", weight=lambda t: t[:16])),
    "pool": (r"rows.pool=.*pages \* 16, 32\]", of("rows", pool=lambda t: t[:, :16])),
    "pool rows": (r"pooled.pool=.*pages \* 5", of("pooled", page_size=lambda _: 5)),
    "page size": ("pooled.page_size=0", of("pooled", page_size=lambda _: 0)),
    "table": ("rows.page_table=.*int32", of("rows", page_table=lambda t: t.long())),
    "device": ("pooled.pool=meta must be on", of("pooled", pool=lambda t: t.to("meta"))),
    "bias device": ("bias=meta must be on", lambda a: {"bias": a["bias"].to("meta")}),
}  # fmt: skip


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands()
    message, change = REFUSALS[case]
    with interpreted():
        monkeypatch.setattr(type(module.pooled_append_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.pooled_append(**given | change(given))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.pooled_append(**operands())


def test_every_scale_is_compiled_ahead() -> None:
    """Heads, width, rotary channels, tokens of a group, series; with and without rows."""
    compiled = {
        (*(v.constexprs[name] for name in "HDRMS"), "row" in v.signature) for v in module.variants()
    }
    for scale in SCALES.values():
        hca = HeavilyCompressedConfig.at(scale, {})
        csa = CompressedSparseConfig.at(scale, {})
        assert (hca.n_heads, hca.dim, hca.rope_dim, hca.every, 1, True) in compiled
        assert (csa.n_heads, csa.dim, csa.rope_dim, csa.every, 2, True) in compiled
        indexer = csa.index_heads, csa.index_dim, csa.rope_dim, csa.every, 2, False
        assert indexer in compiled
