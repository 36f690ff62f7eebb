"""Checks and cases of the proof on a GPU, in Triton's interpreter, on shapes that it bears."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eval.proof.gpu.case import LIBRARIES, Case, Check, Op, difference, relative_error
from eval.proof.gpu.ops import (
    OPS,
    attention,
    chunk,
    gated_pooling,
    glue,
    pooling,
    product,
    quant,
    recurrent,
    recurrent_rings,
    sparse,
    wkv,
)
from eval.proof.gpu.ops.operands import PAGE, binary, dense, paged
from kernels.decay import torch as decay_scan
from kernels.gated_delta import torch as gdn
from kernels.selective import torch as selective_scan
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")
#: Baselines that a CPU has.
HERE = ("sdpa", "torch", "cublas")
#: Two runs in bf16.
AGREES = 2e-2

#: One check per operation that takes little: the others are slow.
QUICK = {
    "attention_decode": "8/2 d 64 new 3 {'window': 100}",
    "mla_decode": "8 heads 128+16 new 4 latents 2",
    "attention_prefill": "chunk, ragged, d 64",
    "ssm_step": "8x128x64 new 1 bfloat16 normed",
    "gdn_step": "4x128x128 new 1 bfloat16 normed",
    "kda_step": "4x128x128 new 1 bfloat16 normed",
    "gdn2_step": "4x128x128 new 1 bfloat16 normed",
    "product_step": "4x128x128 new 1 bfloat16 normed",
    "linear_step": "4x128x128 new 1 bfloat16 turned normed",
    "selective_step": "512x16 new 4 bfloat16",
    "trapezoid_step": "4x64x32 rank 4 new 1 float32",
    "wkv_step": "4x64x64 new 1 bfloat16",
    "token_shift": "520 new 4",
    "conv_step": "512 new 4",
    "decay_chunk": "2x2x16x32 tokens 65",
    "gdn_chunk": "2x2x16x32 tokens 1",
    "kda_chunk": "2x2x16x32 tokens 1",
    "gdn2_chunk": "2x2x16x32 tokens 1",
    "selective_chunk": "80x16 tokens 1",
    "gemv": "129x200 bfloat16",
    "head_gemv": "3 heads 40 to 200",
    "few_rows": "2 rows 129x200 bfloat16",
    "packed_rows": "2 rows 129x200 int4 g64 bfloat16",
    "project_append": "4/2 heads d 32 of 200",
    "norm_triton": "norms of 64",
    "rope_append": "3 tokens",
    "rope_rotate": "2 tokens",
    "latent_append": "8 heads 96+16",
    "index_append": "4 heads 32 rotary 16",
    "index_scan": "2 heads 32 new 3",
    "rank_topk": "3 of 65",
    "block_append": "2 heads d 32 block 8 new 3",
    "block_scan": "4/2 d 32 block 8 new 3",
    "block_pages": "4/2 d 32 block 8",
    "page_write": "4 tokens",
    "pooled_append": "3 heads d 32 every 4 series 2 new 3",
    "pooled_decode": "8 heads d 64 every 4 picks 40 new 2",
    "conv_chunk": "130 tokens",
    "sample": "9 rows of 1000",
}


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def checks() -> Iterator[object]:
    for op in OPS:
        for check in op.checks:
            quick = QUICK[op.name] == check.name
            marks = [] if quick else [pytest.mark.slow, pytest.mark.timeout(900)]
            yield pytest.param(op, check, id=f"{op.name} {check.name}", marks=marks)


@pytest.mark.parametrize(("op", "check"), list(checks()))
def test_checks_pass_within_their_limits(op: Op, check: Check) -> None:
    pairs = check.run(CPU)
    assert len(pairs) > 0
    for got, expected in pairs:
        assert relative_error(got, expected) <= check.limit


def test_every_operation_has_a_check_here() -> None:
    assert {op.name for op in OPS} == QUICK.keys()
    for op in OPS:
        names = [check.name for check in op.checks]
        assert QUICK[op.name] in names and len(set(names)) == len(names)
        cases = [case.name for case in op.cases]
        assert len(set(cases)) == len(cases)


FP32, BF16 = torch.float32, torch.bfloat16
#: Form, sizes, FLOPs of an element of the state.
STEPS = {
    "ssm": (recurrent.SSM, (2, 32, 16), 5),
    "ssm normed": (recurrent.SSM.normed(flat=True), (2, 32, 16), 5),
    "gdn": (recurrent.GDN, (2, 32, 16), 7),
    "gdn normed": (recurrent.GDN.normed(), (2, 32, 16), 7),
    "kda": (recurrent.KDA, (2, 32, 16), 7),
    "kda normed": (recurrent.KDA.normed(opened="sigmoid"), (2, 32, 16), 7),
    "gdn2 normed": (recurrent.GDN2.normed(opened="sigmoid"), (2, 32, 16), 7),
    "product normed": (recurrent.PRODUCT.normed(), (2, 32, 16), 11),
    "linear": (recurrent.LINEAR, (2, 32, 16), 5),
    "linear turned normed": (recurrent.TURNED.normed(), (2, 32, 16), 5),
    "selective": (recurrent.SELECTIVE, (96, 16), 7),
    "wkv": (wkv.WKV, (2, 32, 16), 7),
}

#: Form, FLOPs of an element of the state, of (2, 32, 16) each.
RINGS = {
    "ssm normed": (recurrent.SSM.normed(flat=True), 5),
    "gdn normed": (recurrent.GDN.normed(), 7),
    "kda normed": (recurrent.KDA.normed(opened="sigmoid"), 7),
    "gdn2 normed": (recurrent.GDN2.normed(opened="sigmoid"), 7),
    "product normed": (recurrent.PRODUCT.normed(), 11),
    "linear turned normed": (recurrent.TURNED.normed(), 5),
    "wkv": (wkv.WKV, 7),
}


def ring_of(name: str) -> tuple[recurrent.Form, int]:
    """A form and the width of its ring's rows."""
    form = RINGS[name][0]
    assert form.row is not None
    return form, form.row(2, 32, 16)


def ring_case(name: str) -> Case:
    form, row = ring_of(name)
    return recurrent_rings.ring_case(
        0, form.step, form.make, (2, 32, 16), row, 9, RINGS[name][1], form.others
    )


#: Ours, inputs, sizes, FLOPs of a token, the plain form, and which input is as large as y.
SCANS = {
    "decay": (chunk.decay_chunk, chunk.decay_inputs, (1, 2, 16, 32), chunk.decay_work,
              decay_scan.decay_chunk, 2),
    "gdn": (chunk.gdn_chunk, chunk.gdn_inputs, (2, 2, 16, 32), chunk.gdn_work, gdn.gdn_chunk, 2),
    "kda": (chunk.kda_chunk, chunk.kda_inputs, (2, 2, 16, 32), chunk.kda_work, gdn.gdn_chunk, 2),
    "gdn2": (chunk.kda_chunk, chunk.gdn2_inputs, (2, 2, 16, 32), chunk.kda_work, gdn.gdn_chunk, 2),
    "selective": (chunk.selective_chunk, chunk.selective_inputs, (64, 4), chunk.selective_work,
                  selective_scan.selective_scan, 0),
}  # fmt: skip


def scan_case(name: str, *, backward: bool) -> Case:
    scan, make, sizes, work, plain, _ = SCANS[name]
    others = {"torch": lambda inputs: (lambda: plain(*inputs)[0], inputs)}
    return chunk.scan_case(0, scan, make, sizes, 2, 20, work(sizes), others, backward=backward)


#: Heavily compressed attention, compressed sparse attention, and its indexer.
POOLED = {
    "hca": gated_pooling.Shape(3, 32, 16, 8, 1),
    "csa": gated_pooling.Shape(3, 32, 16, 4, 2),
    "index": gated_pooling.Shape(3, 32, 16, 4, 2, True),
}

CASES: dict[str, Case] = {
    "decode": attention.decode_case(0, 2, 130, (4, 2), 64),
    "gemv": product.gemv_case(0, 33, 64),
    "gemv normed gated": product.normed_case(0, 24, 64),
    "project_append": product.project_case(0, 4, 2, 32, 64),
    "few rows": product.few_rows_case(0, 3, 33, 64),
    "few rows gated": product.few_rows_case(0, 3, 34, 64, gated=True),
    "packed rows int4": quant.packed_case(0, 3, 33, 200, quant.INT4),
    "packed rows int8": quant.packed_case(0, 1, 33, 200, quant.INT8),
    "head_gemv": product.head_gemv_case(0, 3, 32, 24, turned=False),
    "head_gemv turned": product.head_gemv_case(0, 3, 32, 24, turned=True),
    "decode split": attention.decode_case(0, 1, 600, (2, 1), 32),
    "mla": attention.mla_case(0, 2, 70, 4, latent=(64, 16)),
    "mla of two tokens": attention.mla_case(0, 1, 130, 4, 2, latent=(64, 16)),
    "pooled": pooling.pooled_case(0, 2, 300, 4, 64, 16),
    "pooled picks": pooling.pooled_case(0, 1, 400, 4, 64, 4, 30),
    "prefill": attention.prefill_case(1, 2, 70, (4, 2), 64),
    "conv": recurrent.conv_case(3, 96),
    "token_shift": wkv.shift_case(3, 96),
    "norm": glue.norm_case(5, 96),
    "swiglu": glue.swiglu_case(5, 96),
    "greedy": glue.greedy_case(3, 1000),
    "rank_topk": sparse.topk_case(0, 3, 200, 17),
    **{f"pooled_append {name}": gated_pooling.case(0, s, 2) for name, s in POOLED.items()},
    **{
        f"{name} {str(dtype)[6:]}": recurrent.step_case(
            0, form.step, form.make, sizes, 2, dtype, flops, form.others
        )
        for name, (form, sizes, flops) in STEPS.items()
        for dtype in (FP32, BF16)
    },
    **{f"{name} ring": ring_case(name) for name in RINGS},
    **{
        f"{name} scan{' and back' * backward}": scan_case(name, backward=backward)
        for name in SCANS
        for backward in (False, True)
    },
}


@pytest.mark.parametrize("name", CASES)
def test_baselines_compute_what_ours_computes_on_the_same_operands(name: str) -> None:
    def build() -> dict[str, object]:
        torch.manual_seed(0)
        return dict(CASES[name].build(CPU))

    runs = build()
    assert next(iter(runs)) == "triton" and set(runs) - {"triton"} <= LIBRARIES.keys()
    ours = runs["triton"]()  # type: ignore[operator]
    compared = set(runs) & set(HERE)
    assert compared
    for other in compared:
        theirs = build()[other]()  # type: ignore[operator]
        assert difference(theirs, ours) <= AGREES, other
        tensors = [theirs] if isinstance(theirs, Tensor) else theirs
        mine = [ours] if isinstance(ours, Tensor) else ours
        assert [t.shape for t in tensors] == [t.shape for t in mine], other  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", CASES)
def test_another_run_reuses_the_operands(name: str) -> None:
    """As in a graph that is replayed: counters are clear again, autograd's graph is made anew."""
    torch.manual_seed(0)
    runs = CASES[name].build(CPU)
    for other in {"triton", *HERE} & set(runs):
        runs[other]()
        again = runs[other]()
        tensors = [again] if isinstance(again, Tensor) else again
        assert all(torch.isfinite(t.float()).all() for t in tensors)  # type: ignore[attr-defined]


def nbytes(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)


def test_bytes_are_those_of_the_operands() -> None:
    bf16 = dict(dtype=BF16)
    q, kv = torch.empty(2, 1, 4, 64, **bf16), torch.empty(2, 2, 130, 2, 64, **bf16)
    assert CASES["decode"].moved_bytes == nbytes(q, kv, q)
    eight = attention.decode_case(0, 2, 130, (4, 2), 64, kv=torch.int8)
    assert eight.moved_bytes == nbytes(q, kv.to(torch.int8), kv[..., 0].float(), q)
    q, latents = torch.empty(1, 2, 4, 80, **bf16), torch.empty(130, 80, **bf16)
    out = torch.empty(1, 2, 4, 64, **bf16)
    assert CASES["mla of two tokens"].moved_bytes == nbytes(q, latents, out)
    q, kv = torch.empty(2, 70, 4, 64, **bf16), torch.empty(2, 2, 70, 2, 64, **bf16)
    assert CASES["prefill"].moved_bytes == nbytes(q, kv, q)
    # Of 400 tokens, 128 rows of the window, and 30 picked ones with their places.
    q, rows = torch.empty(1, 1, 4, 64, **bf16), torch.empty(128 + 30, 64, **bf16)
    places = torch.empty(30, dtype=torch.int64)
    assert CASES["pooled picks"].moved_bytes == nbytes(q, rows, places, q)
    x = torch.empty(5, 96, **bf16)
    assert CASES["norm"].moved_bytes == 4 * nbytes(x)
    assert CASES["swiglu"].moved_bytes == 3 * nbytes(x)
    assert CASES["greedy"].moved_bytes == nbytes(torch.empty(3, 1000, **bf16))
    x, weight = torch.empty(3, 64, **bf16), torch.empty(34, 64, **bf16)
    assert CASES["few rows gated"].moved_bytes == nbytes(x, weight, torch.empty(3, 17, **bf16))
    # Four whole groups of 64 columns: half a byte a number, and four bytes a group.
    x, y = torch.empty(3, 200, **bf16), torch.empty(3, 33, **bf16)
    assert CASES["packed rows int4"].moved_bytes == nbytes(x, y) + 33 * 4 * (64 // 2 + 4)
    x, y = x[:1], y[:1]
    assert CASES["packed rows int8"].moved_bytes == nbytes(x, y) + 33 * (200 + 2)
    assert CASES["packed rows int8"].flops == 2 * 33 * 200
    x, tail = torch.empty(3, 1, 96, **bf16), torch.empty(3, 3, 96, **bf16)
    weights = torch.empty(96, 4, **bf16), torch.empty(96, **bf16)
    assert CASES["conv"].moved_bytes == nbytes(x, x, tail, tail, *weights)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_bytes_of_steps_are_their_state_twice_inputs_and_outputs(
    name: str, dtype: torch.dtype
) -> None:
    form, sizes, flops = STEPS[name]
    inputs, state = form.make(2, 1, sizes, CPU), torch.empty(2, *sizes, dtype=dtype)
    y = inputs["gate"] if "gate" in inputs else inputs["x" if "x" in inputs else "v"]
    case = CASES[f"{name} {str(dtype)[6:]}"]
    assert case.moved_bytes == nbytes(state, state, y, *inputs.values())
    assert case.flops == flops * state.numel()


@pytest.mark.parametrize("name", POOLED)
def test_bytes_of_pooling_are_those_of_what_a_step_touches(name: str) -> None:
    """Queries and parts twice, rows of single tokens twice, rows of groups once."""
    shape = POOLED[name]
    given = gated_pooling.made(shape, [7, 7], 1, CPU)
    once = nbytes(given["values"], given["gates"], given["values"][..., :32])
    twice = nbytes(given["q"], given["part"])
    if not shape.index:
        twice += nbytes(given["row"])
    assert CASES[f"pooled_append {name}"].moved_bytes == once + 2 * twice


@pytest.mark.parametrize("name", RINGS)
def test_steps_with_a_ring_pass_their_check(name: str) -> None:
    form, row = ring_of(name)
    check = recurrent_rings.check_ring(form.step, form.reference, form.make, (2, 32, 16), row, 2)
    for got, expected in check(CPU):
        assert relative_error(got, expected) <= recurrent.BF16_LIMIT


@pytest.mark.parametrize("name", RINGS)
def test_bytes_of_a_ring_are_its_held_rows_and_a_new_one(name: str) -> None:
    """Of nine sequences, two store their states."""
    form, row = ring_of(name)
    inputs, state = form.make(9, 1, (2, 32, 16), CPU), torch.empty(9 + 2, 2, 32, 16)
    y = inputs["gate"] if "gate" in inputs else inputs["v"]
    rows = torch.empty(9, 8 + 1, row, dtype=BF16)
    case = CASES[f"{name} ring"]
    assert case.moved_bytes == nbytes(state, y, rows, *inputs.values())
    assert case.flops == (RINGS[name][1] + 8 * (RINGS[name][1] - 2)) * 9 * 2 * 32 * 16


@pytest.mark.parametrize("name", SCANS)
def test_bytes_of_scans_are_inputs_outputs_and_gradients(name: str) -> None:
    _, make, sizes, work, _, at = SCANS[name]
    inputs = make(2, 20, sizes, CPU)
    y = inputs[at]
    forward, back = CASES[f"{name} scan"], CASES[f"{name} scan and back"]
    assert forward.moved_bytes == nbytes(*inputs, y)
    assert back.moved_bytes == nbytes(*inputs, y, y, *inputs, *inputs)
    assert back.flops == 3 * forward.flops == 3 * 40 * work(sizes)


def test_flops_of_scans() -> None:
    """Per head and token, N = 16, P = 32, chunks of 64; two a multiply-add."""
    scores, values, state = 64 * 16, 64 * 32, 16 * 32
    assert chunk.decay_work((1, 2, 16, 32)) == 2 * (scores + 2 * values + 2 * 2 * state)
    assert chunk.gdn_work((2, 2, 16, 32)) == 2 * 2 * (2 * scores + values + 3 * state)


def test_flops_of_attention() -> None:
    assert CASES["decode"].flops == 2 * 2 * 2 * 130 * 4 * 64
    assert CASES["mla of two tokens"].flops == 2 * 2 * 4 * 130 * (80 + 64)
    assert CASES["pooled"].flops == 2 * 2 * 2 * 4 * (128 + 300 // 16) * 64
    # Half of the square, and its diagonal is not counted apart.
    assert CASES["prefill"].flops == 2 * 2 * 2 * 4 * 70 * 70 // 2 * 64


def test_a_baseline_that_computes_something_else_is_found() -> None:
    runs = CASES["norm"].build(CPU)
    normed, total = runs["torch"]()  # type: ignore[misc]
    assert difference((normed * 1.1, total), runs["triton"]()) > AGREES
    with pytest.raises(ValueError, match="same shape"):
        difference(normed[:1], total)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    wrong, right = torch.tensor([1.0, bad]), torch.ones(2)
    assert relative_error(wrong, right) == relative_error(right, wrong) == float("inf")
    with pytest.raises(ValueError, match=r"shape \[2\], expected \[2, 1\]"):
        relative_error(right, right[:, None])


def test_dense_rows_are_those_of_the_pages() -> None:
    table, lengths, pages = paged([130, 70], CPU)
    pool = torch.arange(2 * pages * PAGE * 3.0).view(2, -1, 3)
    rows = dense(pool, table, 70)
    assert rows.shape == (2, 2, 70, 3) and rows.is_contiguous()
    for b in range(2):
        for row in (0, 63, 64, 69):
            at = int(table[b, row // PAGE]) * PAGE + row % PAGE
            assert torch.equal(rows[b, :, row], pool[:, at])
    assert lengths.tolist() == [130, 70] and binary(16384) == "16k" and binary(1000) == "1000"
