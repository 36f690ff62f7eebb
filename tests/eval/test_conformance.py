"""The conformance kit over the whole registry, hybrids and files from outside; and its teeth."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from archs.backends import NoFormError
from archs.cost import Cost, Step
from archs.gdn import GatedDeltaNet
from archs.gqa import Attention
from archs.registry import HYBRIDS, REGISTRY
from archs.spec import RowSpec
from archs.state import LayerState
from eval.measure.agreement import Agreement
from eval.proof.conformance import LAWS, Check, Subject, judge, run_checks
from eval.proof.conformance.declared import STEPS
from infer.pools import Pools

DATA = Path(__file__).parents[1] / "data"
BASE = DATA / "tailed_sum.py"
FILES = [str(DATA / f"{name}.py") for name in ("decayed_sum", "tailed_sum", "pooled_rows")]
SUBJECTS = [*REGISTRY, *HYBRIDS, *FILES]


@pytest.fixture(scope="module", params=SUBJECTS, ids=lambda s: Path(s).stem)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


#: What a machine without a GPU can tell.
KERNELS = "triton equals torch"
ANYWHERE = [name for name in LAWS if name != KERNELS]


@pytest.mark.parametrize("law", ANYWHERE)
def test_conformance(subject: Subject, law: str) -> None:
    verdict = judge(subject, law)
    assert verdict.name == law
    assert verdict.passed, f"{verdict.name}: {verdict.detail}"


@pytest.mark.parametrize("law", ANYWHERE)
def test_a_file_whose_mixer_picks_rows_is_held_to_all_laws(law: str) -> None:
    verdict = judge(Subject(str(DATA / "picked_rows.py")), law)
    assert verdict.passed, f"{verdict.name}: {verdict.detail}"


def test_kernels_are_not_measured_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    verdict = judge(Subject("gqa"), KERNELS)
    assert verdict.passed is None and "not measured" in verdict.detail


@pytest.mark.parametrize("refused", [False, True])
def test_a_missing_form_is_not_measured_and_a_refused_shape_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    subject = Subject("gqa")

    def lacks(*_: object, **__: object) -> Agreement:
        raise NoFormError("pooling has no form") from ValueError("rows") if refused else None

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("eval.proof.conformance.laws.resolve_backend", lambda name, device: name)
    monkeypatch.setattr("eval.proof.conformance.laws.agreement", lacks)
    monkeypatch.setattr(type(subject.spec), "build", lambda *_, **__: subject.model)
    verdict = judge(subject, KERNELS)
    assert verdict.passed is (False if refused else None)
    assert "pooling has no form" in verdict.detail


@pytest.mark.parametrize(("error", "passed"), [(1e-2, True), (0.5, False), (float("nan"), False)])
def test_kernels_are_held_to_the_torch_form(
    monkeypatch: pytest.MonkeyPatch, error: float, passed: bool
) -> None:
    subject = Subject("gqa")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("eval.proof.conformance.laws.resolve_backend", lambda name, device: name)
    found = Agreement(error, 0.1)
    monkeypatch.setattr("eval.proof.conformance.laws.agreement", lambda *_, **__: found)
    monkeypatch.setattr(type(subject.spec), "build", lambda *_, **__: subject.model)
    assert judge(subject, KERNELS).passed is passed


# -- broken mixers: one line of a good one changed --

RUN = "return self._run(x, tail, total, None)[0]"
PUT_TAIL = 'state.put("tail", tails[:, -1], tails if state.each else None)'
PUT_SUM = 'state.put("sum", sums[:, -1], sums if state.each else None)'
VALUE = "value = self.value(mixed)"
RETURN = "return self.out(each.to(x.dtype)), each, torch.stack(tails, 1)"
FIXED = "return StateSpec(fixed=(tail, total))"
VECTOR = "vector_flops=4 * step.tokens * self.taps.numel()"
COST = "declared = counted cost"

BROKEN = {
    "future-leak": (
        RUN, RUN.replace("x, tail", "torch.roll(x, -1, 1), tail"), "causality",
        ["layer 0 (TailedSum)", "changing token 23 changes token 22", "1 tokens ahead"],
    ),
    "no-mixing": (
        RUN, "return self.out(self.value(x))", "causality", ["no later token sees"],
    ),
    "tail-forgotten": (
        PUT_TAIL, "pass", "declared state",
        ["layer 0 (TailedSum) declares 'tail', which no step stores"],
    ),
    "tail-stale": (
        PUT_TAIL, 'state.put("tail", state.get("tail"), tails if state.each else None)',
        "split law", ["extend by 17+14: token 17 of", "opens piece 2 (tokens 17 to 30)", "tail"],
    ),
    "wrong-rollback": (
        PUT_SUM, PUT_SUM.replace("sums if", "sums.flip(1) if"), "rollback",
        ["4 tokens drafted after 29, 1 rolled back", "token 0", "`each` of put"],
    ),
    "wrong-shape": (
        RETURN, RETURN.replace("x.dtype))", "x.dtype))[..., :64]"), "forward",
        ["broken.py:", "in forward: returns [2, 9, 64] float32 for x [2, 9, 128]"],
    ),
    "torch-error": (
        "self.taps * torch.cat", "self.taps[:, :7] * torch.cat", "forward",
        ["broken.py:", "in _run: RuntimeError: The size of tensor a (7)"],
    ),
    "undeclared-tensor": (
        PUT_TAIL, f'{PUT_TAIL}\n        state.put("norm", x[:, -1])', "declared state",
        ["broken.py:33 in extend", "no fixed tensor of that name (fixed: tail, sum)"],
    ),
    "surplus-tensor": (
        FIXED, 'spare = FixedSpec(name="spare", shape=(99,), format=Format.of(dtype))\n'
        "        return StateSpec(fixed=(tail, total, spare))", "declared state",
        ["declares 'spare', which no step reads or stores"],
    ),
    "surplus-rows": (
        FIXED, "return StateSpec(rows=(tail,), fixed=(total,))",
        "declared state", ["'tail' in rows is a FixedSpec; declare it as a RowSpec"],
    ),
    "stored-never-read": (
        "torch.cat((tail, x[:, :-1]), 1)", "torch.cat((torch.zeros_like(tail), x[:, :-1]), 1)",
        "declared state", ["declares 'tail', which no step reads"],
    ),
    "broadcast-value": (
        PUT_SUM, 'state.put("sum", sums[:, -1, :1])', "declared state",
        ["state.put('sum') stores [2, 1], declared [2, 128]"],
    ),
    "silent-cast": (
        "format=Format.of(torch.float32)", "format=Format.of(torch.bfloat16)",
        "declared state", ["stores float32 where bfloat16 is declared: a silent cast"],
    ),
    "plain-bytes": (
        "spec = self.kept_spec()", "spec = self.state_spec()", "state in few bits",
        ["layer 0 (TailedSum): cost declares", "count by kept_spec()"],
    ),
    "wider-output": (
        RETURN, RETURN.replace("self.out(each.to(x.dtype))", "self.out(each.to(x.dtype)).double()"),
        "forward", ["returns [2, 9, 128] float64"],
    ),
    "padding": (
        "if valid is not None:", "if False:", "batch and padding invariance",
        ["sequence 0 of 5, 7 and then 3 tokens", "token 7", "state.valid"],
    ),
    "batch-dependence": (
        VALUE, "value = self.value(mixed - mixed.mean(0, keepdim=True))", "batch independence",
        ["a batch of 3: token 0", "forward mixes sequences"],
    ),
    "rounded-away": (
        VALUE, "value = self.value((mixed + 32) - 32)", "bfloat16",
        ["that of float32 with weights and activations rounded once"],
    ),
    "fp16-overflow": (
        VALUE, "value = self.value(mixed * 2**17) / 2**17", "float16",
        ["layer 0 (TailedSum): forward is not finite from token 0", "65504"],
    ),
    "unbounded-growth": (
        PUT_TAIL, f'{PUT_TAIL}\n        self.past = [*getattr(self, "past", []), x.clone()]',
        "undeclared memory", ["layer 0 (TailedSum): self.past", "grows without bound"],
    ),
    "state-outside": (
        PUT_SUM, f"{PUT_SUM}\n        self.kept = sums[:, -1:].mean() + getattr(self, 'kept', 0)\n"
        "        return y + 0 * x + self.kept",
        "split law", ["extend by 31 at once", "extend computes something else than forward"],
    ),
    "no-gradient": (
        "mixed = x + self.taps", "mixed = x + self.taps.detach()", "gradients", ["taps"],
    ),
    "vector-flops": (VECTOR, "vector_flops=0", COST, ["vector_flops 0, counted about"]),
    "state-reads": (
        "state_read_bytes=step.batch * spec.read_bytes(step.context)", "state_read_bytes=0", COST,
        ["layer 0 (TailedSum), batch 2, 1 new tokens", "state_read_bytes 0, counted 2,048"],
    ),
    "state-writes": (
        "state_write_bytes=step.batch * spec.write_bytes()", "state_write_bytes=1", COST,
        ["state_write_bytes 1, counted 2,048"],
    ),
    "weights": (
        "weight_bytes=self.taps.nbytes", "weight_bytes=0", COST,
        ["weight_bytes 131,072, counted 131,584"],
    ),
    "matrix-flops": (
        'linear_cost("out", self.out, step.tokens)', 'linear_cost("out", self.out, step.batch)',
        COST, ["batch 1, 4 new tokens after 20", "matrix_flops 163,840, counted 262,144", "rows"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new", "law", "fragments"), BROKEN.values(), ids=list(BROKEN))
def test_a_broken_mixer_fails_first_where_it_is_broken(
    tmp_path: Path, old: str, new: str, law: str, fragments: list[str]
) -> None:
    text = BASE.read_text()
    assert text.count(old) == 1
    file = tmp_path / "broken.py"
    file.write_text(text.replace(old, new))
    found = next(c for c in run_checks(str(file)) if c.passed is False)
    assert found.name == law, found
    for fragment in fragments:
        assert fragment in found.detail
    assert "\n" not in found.detail


def _verdicts(arch: str) -> dict[str, Check]:
    return {c.name: c for c in run_checks(arch)}


def test_a_mixer_that_raises_is_told_once_and_where(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BASE.read_text().replace("tails[:, -1], tails if", "tails[:, -7], tails if"))
    verdicts = _verdicts(str(file))
    assert [n for n, v in verdicts.items() if v.passed is False] == ["declared state"]
    line = file.read_text()[: file.read_text().index("tails[:, -7]")].count("\n") + 1
    assert f"broken.py:{line} in extend: IndexError" in verdicts["declared state"].detail
    for name in ("split law", "rollback", "declared = counted cost", "bfloat16"):
        assert verdicts[name].passed is None
        assert verdicts[name].detail.startswith("not judged: 'declared state' is broken")
    assert verdicts["causality"].passed and verdicts["gradients"].passed
    assert list(verdicts) == list(LAWS)


def test_a_mixer_that_cannot_be_built_is_told_where(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BASE.read_text().replace("place.d_model, residual=True", "place.size"))
    first, *others = run_checks(str(file))
    assert first.passed is False and "broken.py:22 in __init__: AttributeError" in first.detail
    assert {c.name: c.passed for c in others} == dict.fromkeys(LAWS)


def test_consequences_are_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step that differs breaks one law, and the laws behind it say why they are silent."""
    honest = Attention.extend

    def forgetful(self: Attention, x: Tensor, state: LayerState) -> Tensor:
        return honest(self, x * (1.01 if x.shape[1] == 1 else 1.0), state)

    monkeypatch.setattr(Attention, "extend", forgetful)
    verdicts = _verdicts("gqa")
    assert [n for n, v in verdicts.items() if v.passed is False] == ["split law"]
    assert "its form for single tokens" in verdicts["split law"].detail
    for name in ("batch and padding invariance", "fork, then diverge", "rollback", "bfloat16"):
        assert verdicts[name].detail == "not judged: 'split law' is broken, mend that first"


def test_a_state_that_differs_behind_equal_outputs_is_found(
    tmp_path: Path,
) -> None:
    text = BASE.read_text().replace(
        PUT_SUM, 'state.put("sum", sums[:, -1] + 0.0)\n        state.put("tail", x[:, :1])'
    )
    file = tmp_path / "broken.py"
    file.write_text(text.replace("x + self.taps * torch.cat", "x + 0 * self.taps * torch.cat"))
    found = judge(Subject(str(file)), "split law")
    assert found.passed is False
    assert "outputs agree, but layer 0 (TailedSum) remembers another 'tail'" in found.detail


# -- a cost that lies --

LIES = {
    "state_read_bytes": ("attention", 0), "state_write_bytes": ("attention", 0),
    "weight_bytes": ("attention out", 0), "vector_flops": ("attention", 0),
    "matrix_flops": ("attention", 0), "rows": ("q, k, v", 1),
}  # fmt: skip


@pytest.mark.parametrize("factor", [0, 3])
@pytest.mark.parametrize("field", LIES)
def test_a_cost_that_lies_in_one_field_fails(
    monkeypatch: pytest.MonkeyPatch, field: str, factor: int
) -> None:
    honest = Attention.cost
    name, _ = LIES[field]

    def lying(self: Attention, step: Step) -> Cost:
        return Cost(
            tuple(
                replace(op, **{field: factor * getattr(op, field)}) if op.name == name else op
                for op in honest(self, step).ops
            )
        )

    monkeypatch.setattr(Attention, "cost", lying)
    found = judge(Subject("gqa"), COST)
    assert found.passed is False
    assert "layer 0 (Attention), batch 2, 1 new tokens after 33" in found.detail
    assert field in found.detail


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_arithmetic_of_the_delta_rule_grows_with_tokens_not_with_their_square(
    step: tuple[int, int, int],
) -> None:
    batch, context, new = step
    mixer = Subject("gdn").mixers[0]
    assert isinstance(mixer, GatedDeltaNet)
    conv = next(op for op in mixer.cost(Step(batch, new, context)).ops if op.name == "short conv")
    channels, width = mixer.conv_weight.shape
    assert conv.vector_flops == batch * new * channels * (2 * width + 5)


def test_pools_of_twice_the_rows_are_counted_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Pools._rows

    def doubled(self: Pools, tensor: RowSpec, *, codes: bool) -> Tensor:
        pool = honest(self, tensor, codes=codes)
        return torch.cat((pool, pool), -2)

    monkeypatch.setattr(Pools, "_rows", doubled)
    subject = Subject("gqa")
    found = judge(subject, "declared = allocated bytes")
    assert found.passed is False
    store = subject.engine(1, 8, page_size=1).store
    with torch.inference_mode():
        store.commit(store.begin([store.add()], 3))
    assert store.allocated_bytes == 2 * store.declared_bytes(3)
    assert (
        f"declared {2 * store.declared_bytes(1)}, tensors hold {4 * store.declared_bytes(1)}"
        in (found.detail)
    )
