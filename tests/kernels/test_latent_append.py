"""Latent rows into pages against their float64 oracle and the torch form, in the interpreter.

Only valid queries and the pool rows of new tokens may change; everything that may not be read is
NaN or has no page, and whatever else was there must come out bit for bit.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.latent.append as module
from kernels.latent.append import latent_append_ref
from kernels.norm.torch import rms_norm
from kernels.pages.write import FLOATS, page_write_ref
from kernels.rope.torch import rope_table, rotate
from tests.kernels.interpreter import interpreted

TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float16: {"rtol": 2e-3, "atol": 1e-5},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-5},
}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def operands(
    lengths: tuple[int, ...] = (3, 0, 30),
    *,
    tokens: int = 2,
    heads: int = 4,
    widths: tuple[int, int] = (64, 16),
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    held: torch.dtype | None = None,
    new: tuple[int, ...] | None = None,
    groups: int = 0,
    normed: bool = True,
) -> dict[str, Any]:
    """Queries and rows as columns of wider projections of NaN; a pool of NaN, shuffled pages.

    groups: of latents whose key lies apart; 0: one, beside its key.
    """
    latent, rotary = widths
    several = (groups,) if groups else ()
    held = held or dtype
    batch, most = len(lengths), -(-(max(lengths) + tokens) // page_size)
    pages = batch * most + 2
    up = torch.full((batch, tokens, heads * (rotary + 8)), torch.nan, dtype=dtype)
    columns = 48 + max(groups, 1) * latent + rotary
    down = torch.full((batch, tokens, columns), torch.nan, dtype=dtype)
    q = up[..., 8 * heads :].unflatten(-1, (heads, rotary))
    key, row = down[..., 48 : 48 + rotary], down[..., 48 + rotary :]
    row = row.unflatten(-1, (groups, latent)) if groups else row
    for part in (q, key, row):
        part.copy_(torch.randn(part.shape))
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    for b, length in enumerate(lengths):
        count = tokens if new is None else new[b]
        for part in (key, row):
            part[b, count:] = torch.nan
        written = torch.arange(length, length + count) // page_size
        table[b, [j for j in range(most) if j not in written]] = 10**6
    angles = rope_table(max(lengths) + tokens, rotary, 10000.0, torch.device("cpu"))
    angles = torch.view_as_real(angles)[: max(lengths) + tokens, 0].contiguous()
    rows, width = pages * page_size, latent if groups else latent + rotary
    # Latent heads have spare rows between them.
    pool = torch.full((*several, rows + 8 * (groups > 0), width), torch.nan, dtype=held)
    return {
        "q": q, "key": key, "latent": row,
        "weight": torch.rand(*several, latent).to(dtype) + 0.5 if normed else None,
        "cos_sin": angles, "page_table": table, "lengths": int32(*lengths),
        "pool": pool[..., :rows, :], "page_size": page_size,
        "keys": torch.full((rows, rotary), torch.nan, dtype=held) if groups else None,
        "eps": 1e-3, "new": None if new is None else int32(*new),
    }  # fmt: skip


def torch_form(given: dict[str, Any]) -> dict[str, Tensor]:
    """What a step without this kernel does: norm, rotation, one row, the paged write."""
    q, key, past = given["q"].clone(), given["key"].clone(), given["lengths"].long()
    at = (past[:, None] + torch.arange(q.shape[1])).clamp(max=len(given["cos_sin"]) - 1)
    angles = given["cos_sin"][at][:, :, None]
    rotate(q, angles)
    rotate(key[:, :, None], angles)
    rows = given["latent"]
    if given["weight"] is not None:
        rows = rms_norm(rows, given["weight"], given["eps"])
    pages = {name: given[name] for name in ("page_table", "lengths", "page_size", "new")}
    if given["keys"] is None:
        return {"q": q, "pool": page_write_ref(torch.cat((rows, key), -1), given["pool"], **pages)}
    pools = {"pool": rows, "keys": key}
    return {"q": q, **{n: page_write_ref(rows, given[n], **pages) for n, rows in pools.items()}}


def assert_equals_the_oracle(given: dict[str, Any]) -> None:
    oracle = dict(zip(("q", "pool", "keys"), latent_append_ref(**given), strict=False))
    assert len(oracle) == 2 + (given["keys"] is not None)
    by_torch, valid = torch_form(given), torch.ones(given["q"].shape[:2], dtype=torch.bool)
    if given["new"] is not None:
        valid = torch.arange(valid.shape[1]) < given["new"][:, None]
    before = {n: given[n].clone() for n in ("key", "latent")}
    with interpreted():
        module.latent_append(**given)
    for name, expected in oracle.items():
        got, form = given[name], by_torch[name]
        if name == "q":
            got, expected, form = got[valid], expected[valid], form[valid]
        loosest = max((given["q"].dtype, got.dtype), key=lambda t: TOLERANCES[t]["rtol"])
        for other in (expected, form.double()):
            torch.testing.assert_close(got.double(), other, equal_nan=True, **TOLERANCES[loosest])
    for name, expected in before.items():
        torch.testing.assert_close(given[name], expected, equal_nan=True, rtol=0, atol=0)


#: Rows whose key lies apart: latents, and tied rows, which no norm meets.
APART = [pytest.param(True, id="latents"), pytest.param(False, id="tied")]


@pytest.mark.parametrize("page_size", [1, 5, 16, 64])
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_positions_and_shuffled_pages(tokens: int, page_size: int) -> None:
    assert_equals_the_oracle(operands((63, 0), tokens=tokens, page_size=page_size))


@pytest.mark.parametrize("heads", [1, 7, 40])
@pytest.mark.parametrize("widths", [(32, 16), (96, 10), (256, 32), (512, 64), (7, 2)], ids=str)
def test_heads_and_widths(heads: int, widths: tuple[int, int]) -> None:
    assert_equals_the_oracle(operands((100,), tokens=1, heads=heads, widths=widths))


@pytest.mark.parametrize("normed", APART)
@pytest.mark.parametrize(("tokens", "page_size"), [(1, 64), (3, 5), (65, 16)])
@pytest.mark.parametrize("groups", [1, 2, 9])
def test_keys_apart(groups: int, tokens: int, page_size: int, normed: bool) -> None:
    how = {"tokens": tokens, "page_size": page_size, "groups": groups, "normed": normed}
    assert_equals_the_oracle(operands((63, 0), **how))


@pytest.mark.parametrize("normed", APART)
@pytest.mark.parametrize("widths", [(48, 16), (128, 64), (512, 64), (7, 2)], ids=str)
def test_widths_of_keys_apart(widths: tuple[int, int], normed: bool) -> None:
    assert_equals_the_oracle(operands((100,), tokens=1, widths=widths, groups=3, normed=normed))


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("held", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(dtype: torch.dtype, held: torch.dtype, groups: int) -> None:
    assert_equals_the_oracle(operands(dtype=dtype, held=held, groups=groups))


@pytest.mark.parametrize("groups", [0, 3])
def test_padded_tokens_are_not_written(groups: int) -> None:
    assert_equals_the_oracle(operands((3, 0, 30, 15), tokens=3, new=(3, 0, 1, 2), groups=groups))


@pytest.mark.parametrize("groups", [0, 2])
def test_a_token_without_a_page_or_an_angle_stays_outside(groups: int) -> None:
    given = operands((14, 14), tokens=6, groups=groups)
    before, expected = given["q"].clone(), torch_form(given)
    first = torch_form(given | {"new": int32(2, 0)})
    given["page_table"] = given["page_table"][:, :1].contiguous()
    given["page_table"][1, 0] = -1
    given["cos_sin"] = given["cos_sin"][:18].contiguous()
    with interpreted():
        module.latent_append(**given)
    torch.testing.assert_close(given["q"][:, :4], expected["q"][:, :4])
    assert torch.equal(given["q"][:, 4:], before[:, 4:])
    for name in first.keys() - {"q"}:
        torch.testing.assert_close(given[name], first[name], equal_nan=True)


def test_a_token_past_the_angles_keeps_its_key_as_it_is() -> None:
    given = operands((4,), tokens=1)
    given["cos_sin"] = given["cos_sin"][:4].contiguous()
    with interpreted():
        module.latent_append(**given)
    row = int(given["page_table"][0, 0]) * 16 + 4
    assert torch.equal(given["pool"][row, 64:], given["key"][0, 0])


def test_an_empty_batch_launches_nothing() -> None:
    given = operands()
    for name in ("q", "key", "latent", "page_table", "lengths"):
        given[name] = given[name][:0]
    with interpreted():
        module.latent_append(**given)
    assert given["pool"].isnan().all()


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K, H, r\]", lambda a: {"q": a["q"][0]}),
    "q dtype": ("q=.*bfloat16", lambda a: {"q": a["q"].double()}),
    "q heads apart": ("q=.*strides", lambda a: {"q": torch.zeros(3, 2, 4, 24)[..., :16]}),
    "q overlaps": ("q=.*strides", lambda a: {"q": torch.zeros(1, 2, 4, 16).expand(3, -1, -1, -1)}),
    "no heads": ("q=.*tokens and heads", lambda a: {"q": a["q"][:, :, :0]}),
    "r": ("r=3 must be even", lambda a: {"q": torch.zeros(3, 2, 4, 3)}),
    "key": (r"key=.*\[3, 2, 16\]", lambda a: {"key": a["key"][:, :1]}),
    "key dtype": ("key=.*float32", lambda a: {"key": a["key"].half()}),
    "latent rank": (r"latent=.*\[B, K, R\]", lambda a: {"latent": a["latent"][0]}),
    "latent strides": (
        "latent=.*contiguous",
        lambda a: {"latent": torch.zeros(3, 2, 128)[..., ::2]},
    ),
    "weight": (r"weight=.*\[64\]", lambda a: {"weight": a["weight"][:32]}),
    "no latents": (r"latent=.*\[B, K, R\]", lambda a: {"latent": a["latent"][..., :0]}),
    "weight rows": (r"weight=.*\[64\]", lambda a: {"weight": a["weight"].expand(2, -1)}),
    "eps": ("eps=-1.0 must", lambda a: {"eps": -1.0}),
    "cos_sin": ("cos_sin=.*8, 2", lambda a: {"cos_sin": a["cos_sin"][:, :4]}),
    "pool width": (r"pool=.*pages \* 16, 80\]", lambda a: {"pool": a["pool"][:, :64]}),
    "pool rows": (r"pool=.*pages \* 96", lambda a: {"page_size": 96}),
    "pool dtype": ("pool=.*float", lambda a: {"pool": a["pool"].to(torch.int8)}),
    "table": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "new": (r"new=.*\[3\]", lambda a: {"new": int32(1, 2)}),
    "device": ("pool=meta must be on", lambda a: {"pool": a["pool"].to("meta")}),
    "keys beside one latent": (r"latent=.*\[B, K, G, R\]", lambda a: {"keys": a["pool"][:, 64:]}),
}
#: Of three latents whose key lies apart.
REFUSALS_APART: dict[str, tuple[str, Change]] = {
    "keys missing": (r"latent=.*\[B, K, R\]", lambda a: {"keys": None}),
    "no groups": (r"latent=.*\[B, K, G, R\]", lambda a: {"latent": a["latent"][:, :, :0]}),
    "groups apart": (
        r"latent=.*\[3, 2, 3, 64\], each token contiguous",
        lambda a: {"latent": torch.zeros(3, 2, 3, 80)[..., :64]},
    ),
    "weight": (r"weight=.*\[3, 64\]", lambda a: {"weight": a["weight"][0]}),
    "pool heads": (r"pool=.*\[3, pages \* 16, 64\]", lambda a: {"pool": a["pool"][:2]}),
    "pool rows": (r"pool=.*pages \* 96", lambda a: {"page_size": 96}),
    "pool dtype": ("pool=.*float", lambda a: {"pool": a["pool"].to(torch.int8)}),
    "pool strides": (
        "pool=.*contiguous",
        lambda a: {"pool": a["pool"].repeat(1, 1, 2)[..., :64]},
    ),
    "keys rows": (r"keys=.*must be contiguous", lambda a: {"keys": a["keys"][:16]}),
    "keys width": (r"keys=.*, 16\]", lambda a: {"keys": a["keys"][:, :8].contiguous()}),
    "keys dtype": ("keys=.*float32", lambda a: {"keys": a["keys"].half()}),
    "keys strides": ("keys=.*contiguous", lambda a: {"keys": a["keys"].repeat(1, 2)[:, :16]}),
    "keys device": ("keys=meta must be on", lambda a: {"keys": a["keys"].to("meta")}),
}
CASES = {
    **{name: (0, *case) for name, case in REFUSALS.items()},
    **{f"apart, {name}": (3, *case) for name, case in REFUSALS_APART.items()},
}


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, message, change = CASES[case]
    given = operands(groups=groups)
    changed = given | change(given)
    with interpreted():
        monkeypatch.setattr(type(module.latent_append_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.latent_append(**changed)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.latent_append(**operands())
