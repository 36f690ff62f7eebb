"""Decode timings: correctness comes first, and what is timed is what was asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from archs.backbone import Model, Output
from archs.backends import NoFormError
from archs.gqa import Attention
from archs.linear import LinearAttention
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from archs.state import LayerState
from eval.cli.commands import bench_archs
from eval.measure.agreement import agreement, exact_logits
from eval.measure.decode import (
    DecodeTiming,
    build_to_serve,
    measure_decode,
    measure_ttft_ms,
)
from eval.measure.plan import points
from eval.measure.site import Site
from eval.measure.stages import measure
from eval.measure.suite import Suite
from eval.predict.calls import CountCalls, IdleLayer
from eval.proof.conformance import CHECK_SCALE
from eval.results.point import Point
from eval.results.rows import Status
from infer.compiled import CompiledStep
from infer.engine import Engine
from infer.memory import DoesNotFitError
from infer.rows import RowStep
from kernels.products import gemv
from tests.eval.conftest import Command
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")
TINY = get_scale("tiny")


@pytest.fixture
def model() -> Model:
    return ModelSpec(arch="gqa", scale=replace(TINY, vocab_size=257)).build().eval()


def forget(monkeypatch: pytest.MonkeyPatch, kind: type, *, single: bool) -> None:
    """Break a mixer's extend: for single tokens, as in decode, or for pieces, as in prefill."""
    honest = kind.extend  # type: ignore[attr-defined]

    def extend(self: object, x: Tensor, state: LayerState) -> Tensor:
        wrong = (x.shape[1] == 1) == single
        y: Tensor = honest(self, x, state)
        return 1.5 * y if wrong else y

    monkeypatch.setattr(kind, "extend", extend)


# -- the gate --


@pytest.mark.parametrize("arch", [*REGISTRY, *HYBRIDS])
def test_honest_mixers_agree(arch: str) -> None:
    model = ModelSpec(arch=arch, scale=replace(TINY, vocab_size=257)).build().eval()
    found = agreement(model)
    assert found.holds, found


@pytest.mark.parametrize("single", [True, False], ids=["decode", "prefill"])
def test_a_wrong_extend_does_not_agree(
    model: Model, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    forget(monkeypatch, Attention, single=single)
    assert not agreement(model).holds


def _shifted(self: RowStep) -> Tensor:
    """Ring positions that are one page off."""
    return RING_POSITIONS(self) - 64


RING_POSITIONS = RowStep._ring_positions


@pytest.mark.usefixtures("stub_roofline")
@pytest.mark.parametrize("arch", ["swa", "swa:gqa=3:1"])
def test_a_ring_that_is_wrong_is_seen_before_it_is_timed(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    at: dict[str, Any] = {
        "scale": "tiny", "batches": [2], "contexts": [16, 4096], "steps": 1, "prompt": 0,
        "device": CPU,
    }  # fmt: skip
    assert [row["status"] for row in bench_archs([arch], **at)] == ["ok", "ok"]
    monkeypatch.setattr(RowStep, "_ring_positions", _shifted)
    [row] = bench_archs([arch], **at)
    assert row["status"] == "incorrect" and float(str(row["agreement_error"])) > 0.01


def test_a_window_with_sinks_is_held_where_it_has_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(
        arch="swa", scale=replace(TINY, vocab_size=257), overrides={"swa": {"sinks": 70}}
    )
    model = spec.build().eval()
    assert agreement(model).holds
    monkeypatch.setattr(RowStep, "_ring_positions", _shifted)
    assert not agreement(model).holds


def test_a_context_without_a_ring_is_not_held_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate costs no more than what is timed: at 48 tokens nothing wraps."""
    monkeypatch.setattr(RowStep, "_ring_positions", _shifted)
    model = ModelSpec(arch="swa", scale=replace(TINY, vocab_size=257)).build().eval()
    assert agreement(model, context=48).holds


def test_the_gate_costs_no_more_at_a_longer_context(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    honest = Model.extend_hidden

    def count(self: Model, tokens: Tensor, states: Any, hidden: None) -> Tensor:
        seen.append(tokens.numel())
        return honest(self, tokens, states, hidden)

    monkeypatch.setattr(Model, "extend_hidden", count)
    totals = []
    for context, batch in ((4096, 3), (131_072, 64)):
        seen.clear()
        assert agreement(model, context=context, batches=(batch,)).holds
        totals.append(sum(seen))
    assert totals[0] == totals[1] < 600


def test_lengths_that_differ_are_held_to_the_truth(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain_mask(self: RowStep) -> tuple[int, Tensor | None]:
        end, mask = VISIBLE(self)
        return end, mask if self.plan.uniform or mask is None else torch.ones_like(mask)

    monkeypatch.setattr(RowStep, "visible_at_home", plain_mask)
    assert not agreement(model).holds
    assert agreement(model, batches=(1,)).holds


VISIBLE = RowStep.visible_at_home


@pytest.mark.parametrize(("batches", "holds"), [((1, 2), True), ((1, 8), False)], ids=str)
def test_the_company_that_is_timed_is_held_to_the_truth(
    model: Model, monkeypatch: pytest.MonkeyPatch, batches: tuple[int, ...], holds: bool
) -> None:
    """Three rows and more are laid out otherwise than one or two."""
    honest = Model.step

    def step(self: Model, tokens: Tensor, *given: Any, every_token: bool) -> Output:
        found = honest(self, tokens, *given, every_token=every_token)
        wrong = len(tokens) > 2 and not every_token
        return found._replace(logits=1.5 * found.logits) if wrong else found

    monkeypatch.setattr(Model, "step", step)
    assert agreement(model, batches=batches).holds is holds


def test_nan_does_not_agree(model: Model) -> None:
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    assert not agreement(model).holds


@pytest.mark.usefixtures("stub_roofline")
def test_a_wrong_mixer_gets_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, LinearAttention, single=True)
    rows = bench_archs(
        ["linear", "gqa"], scale="tiny", batches=[1], contexts=[8], steps=2, prompt=0, device=CPU
    )
    assert [row["status"] for row in rows] == ["incorrect", "ok"]
    assert "tpot_ms" not in rows[0]


@pytest.mark.usefixtures("stub_roofline")
def test_the_printed_table_keeps_columns_apart(
    decodebench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row without latencies must not put its note under another title."""
    forget(monkeypatch, LinearAttention, single=True)
    argv = (
        "--arch",
        "linear",
        "--arch",
        "gqa",
        "--scale",
        "tiny",
        "--context",
        "8",
        "--steps",
        "2",
    )
    lines = decodebench("bench", *argv).out.splitlines()
    assert "latencies withheld" in " ".join(" ".join(lines).split())
    at = next(n for n, line in enumerate(lines) if "token/s" in line)
    end = lines[at].index("token/s") + len("token/s")
    found = {
        line.split()[0]: line[end - len("token/s") : end].strip()
        for line in lines[at:] if line.startswith(("linear ", "gqa "))
    }  # fmt: skip
    assert found["linear"] == "" and float(found["gqa"].replace(",", "")) > 0


def test_a_wrong_mixer_fails_its_point(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(monkeypatch, Attention, single=True)
    [point, *_] = (p for p in points(suite, "cpu") if p.stage == "decode")
    found = measure(point, Site(tmp_path, CPU, cache=tmp_path))
    [row] = found.rows
    assert row.status == Status.INCORRECT and "latencies withheld" in row.note
    error, limit = (row.value or 0.0 for row in found.withheld)
    assert error > limit


def test_files_whose_paths_look_alike_have_folders_of_their_own(
    suite: Suite, tmp_path: Path
) -> None:
    site = Site(tmp_path / "out", CPU, cache=tmp_path)
    archs = ("sub/x.py", "sub_x.py", "sub.x.py", "sub/x.py:gqa=1:1", "gdn:gqa=3:1", "gqa")
    folders = [site.work_folder(Point(arch=a, stage="train", scale="tiny")) for a in archs]
    assert len({folder.parent for folder in folders}) == len(archs)
    assert folders[-2].parent.name == "gdn_gqa_3_1"


# -- timings --


def test_percentiles_lie_between_order_statistics() -> None:
    timing = DecodeTiming(
        batch=1, context=8, step_ms=(4.0, 1.0, 3.0, 2.0), warmup_ms=9.0, state_bytes=1,
        peak_state_bytes=1, calls=None,
    )  # fmt: skip
    assert timing.tpot_ms == 2.5
    assert [timing.percentile_ms(q) for q in (0, 50, 100)] == [1.0, 2.5, 4.0]
    assert timing.percentile_ms(99) == pytest.approx(3.97)
    one = replace(timing, step_ms=(7.0,))
    assert {one.percentile_ms(q) for q in (0, 2.5, 50, 99)} == {7.0}


def test_every_context_is_timed_in_order(model: Model) -> None:
    timings = measure_decode(model, batch=2, contexts=(64, 16, 100), steps=4, compiled=False)
    assert [t.context for t in timings] == [16, 64, 100]
    for timing in timings:
        assert timing.batch == 2
        assert len(timing.step_ms) == 4
        assert all(0 < ms < 1e4 for ms in (*timing.step_ms, timing.warmup_ms))
        pages = -(-timing.context // 64) * 64
        assert timing.state_bytes == model.state_bytes(pages)
        assert timing.peak_state_bytes >= 2 * timing.state_bytes


def test_calls_of_a_step_are_counted_where_it_runs_as_written(model: Model) -> None:
    with torch.inference_mode(), CountCalls() as counted:
        (torch.ones(3) + 1).mul_(2)
    assert counted.calls == 3
    assert 5 < IdleLayer(torch.float32).calls < 30
    first, second = measure_decode(model, batch=2, contexts=(16, 64), steps=2)
    assert first.calls == second.calls is not None
    # Every layer has its products, and a step is no fewer calls than its products.
    assert first.calls > 5 * len(model.layers)


def test_contexts_that_lie_close_together_are_timed_where_they_were_reached(model: Model) -> None:
    """Seven steps at 16 end at 23, beyond 20: the second timing says so."""
    timings = measure_decode(model, batch=1, contexts=(16, 20), steps=4, warmup=3)
    assert [t.context for t in timings] == [16, 23]


def test_recurrent_state_does_not_grow() -> None:
    model = ModelSpec(arch="linear", scale=replace(TINY, vocab_size=257)).build().eval()
    timings = measure_decode(model, batch=1, contexts=(16, 4096), steps=2)
    assert timings[0].state_bytes == timings[1].state_bytes == model.state_bytes(1)


def test_time_to_first_token_is_repeated(model: Model) -> None:
    warmup_ms, times = measure_ttft_ms(model, batch=2, prompt=9, repeats=4)
    assert len(times) == 4
    assert all(0 < ms < 1e4 for ms in (warmup_ms, *times))


def test_a_compiled_step_that_is_wrong_gets_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: CompiledStep, tokens: Tensor, step: Any, *_: None, every_token: bool) -> Output:
        found = self.model.step(tokens, step.layers, every_token=every_token)
        return found._replace(logits=found.logits + 1.0)

    monkeypatch.setattr(CompiledStep, "__call__", wrong)
    rows = bench_archs(
        ["gqa"], scale="tiny", batches=[1], contexts=[16], steps=2, prompt=0, device=CPU,
        compiled=True,
    )  # fmt: skip
    assert [row["status"] for row in rows] == ["incorrect"]


@pytest.mark.slow
def test_nothing_is_compiled_within_the_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps run to the end of the engine's only page, where shapes are special."""
    compiled_at = []
    honest = CompiledStep.__call__

    def watch(self: CompiledStep, *given: Any, every_token: bool) -> Output:
        before = counters["stats"]["unique_graphs"]
        found = honest(self, *given, every_token=every_token)
        compiled_at.append(counters["stats"]["unique_graphs"] > before)
        return found

    monkeypatch.setattr(CompiledStep, "__call__", watch)
    rows = bench_archs(
        ["gqa"], scale="tiny", batches=[1], contexts=[16], steps=2, prompt=0, device=CPU,
        compiled=True,
    )  # fmt: skip
    # torch may know from an earlier model of this process that lengths change, and compile once.
    timed = compiled_at[-6:]
    assert timed[:2] == [False, True]
    assert timed[4:] == [False, False]
    assert rows[0]["kernel_backend"] == "torch-compile"


def test_what_cannot_fit_is_refused_before_it_is_made(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DoesNotFitError, match="lower the batch, the context or the scale"):
        measure_decode(model, batch=1, contexts=(10**12,), steps=2)
    spec = ModelSpec(arch="gqa", scale=TINY)
    weight_bytes = sum(p.nbytes for p in spec.outline().parameters())
    monkeypatch.setattr("infer.memory.free_bytes", lambda _: weight_bytes)
    with pytest.raises(DoesNotFitError, match="gqa at scale tiny needs"):
        build_to_serve(spec, CPU, torch.float32)
    monkeypatch.setattr("infer.memory.free_bytes", lambda _: 2 * weight_bytes)
    assert build_to_serve(spec, CPU, torch.float32).vocab_size == TINY.vocab_size


def test_a_shape_that_kernels_refuse_has_no_form(model: Model) -> None:
    with pytest.raises(NoFormError, match=r"backend 'triton' refuses the shape: .*needs"):
        agreement(model, backend="triton")


def test_an_error_of_the_torch_forms_is_not_taken_for_a_refusal(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("a mistake")

    monkeypatch.setattr(Engine, "prefill", fails)
    with pytest.raises(ValueError, match=r"^a mistake$"):
        agreement(model)


@pytest.mark.parametrize("arch", ["gqa", "linear"])
def test_sixteen_bits_may_cost_what_they_cost_the_torch_forms(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = replace(TINY, vocab_size=257)
    model = ModelSpec(arch=arch, scale=scale).build(dtype=torch.bfloat16).eval()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    found = agreement(model)
    assert found.holds and found.error > 1e-3, "rounding to bfloat16 must show"
    assert {p.dtype for p in model.parameters()} <= {torch.bfloat16, torch.float32}
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}
    # A tenth more than there should be is more than rounding.
    forget(monkeypatch, {"gqa": Attention, "linear": LinearAttention}[arch], single=True)
    assert not agreement(model).holds


def test_the_truth_is_the_forward_of_the_same_weights_in_float32(model: Model) -> None:
    ids = torch.randint(257, (2, 9))
    with torch.inference_mode():
        got = exact_logits(model, ids, 3)
        torch.testing.assert_close(got, model(ids)[:, 3:], rtol=1e-5, atol=1e-5)
        half = model.bfloat16()
        wide = exact_logits(half, ids, 3)
        assert wide.dtype == torch.float32
        torch.testing.assert_close(wide, half.float()(ids)[:, 3:], rtol=1e-5, atol=1e-5)


def test_steps_of_one_sequence_are_held_to_the_truth_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: a CPU's layout for one row would be none that the kernel takes.
    monkeypatch.setattr("archs.backbone.column_major", lambda *_: False)
    model = ModelSpec(arch="gqa", scale=replace(CHECK_SCALE, n_layers=1)).build().eval()
    with interpreted():
        assert agreement(model, context=37, backend="triton").holds
        honest = gemv.gemv
        monkeypatch.setattr(gemv, "gemv", lambda x, w: 1.1 * honest(x, w))
        assert not agreement(model, context=37, backend="triton").holds
