"""The engine on our kernels, in Triton's interpreter: the conformance kit, graphs, backends.

Everything an architecture must obey holds on the device's store too, against the torch forms.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from archs.backbone import initialise
from archs.errors import UserError
from archs.formats import Format
from archs.heads import HeadModel
from archs.mixer import asking_losses, losses_left
from archs.ops import libraries
from archs.ops.attention import attend
from archs.registry import HYBRIDS, REGISTRY
from archs.spec import RowSpec, StateSpec
from eval.proof.conformance import CHECK_SCALE, Subject, error_of
from eval.proof.conformance.laws import check_fork, check_padding, check_rollback
from infer import speculate
from infer.drafts import ModelDrafter, PromptLookup
from infer.engine import Engine
from infer.graphs import GraphedStep
from infer.head_drafts import HeadDrafter
from infer.sampling import Sampling
from infer.store import StateStore
from tests.infer.recorded import Again
from tests.kernels.interpreter import interpreted

TOLERANCE = 1e-4
DELTA_OPTIONS = ("gdn(beta_max=2,products=2)", "kda(channel_gates=true)")
ARCHS = (*REGISTRY, *HYBRIDS)
#: Two wide heads instead of four: the interpreter takes its time by programs.
SCALE = replace(CHECK_SCALE, head_dim=64)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@pytest.mark.parametrize("arch", ["linear", "mqa"])
def test_training_under_autocast_keeps_a_wide_stream(arch: str) -> None:
    model = Subject(arch, SCALE).spec.build().use("triton")
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden_states(torch.arange(9)[None])
    hidden.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def subject_of(arch: str, backend: str = "triton", layers: int = 2) -> Subject:
    """Of two layers, or of a period of a hybrid: the interpreter takes as long for each."""
    layers = 4 if arch.endswith("=3:1") else layers
    return Subject(arch, replace(SCALE, n_layers=layers), backend=backend)


def quick(*names: str) -> list[object]:
    """Every architecture, those that are not named marked slow."""
    slow = pytest.mark.slow
    return [a if a in names else pytest.param(a, marks=slow) for a in ARCHS]


@pytest.mark.parametrize("arch", quick("mqa", "swa", "mla", "cla", "linear", "gdn", "mamba2"))
def test_prefill_and_decode_equal_the_torch_form(arch: str) -> None:
    subject = subject_of(arch)
    tokens = subject.tokens(2, 33)
    expected = subject.expected(tokens)
    engine = subject.engine(2, 48)
    slots = [engine.store.add(), engine.store.add()]
    got = subject.run(engine, slots, tokens, [15, 1, 3, 13, 1])
    assert error_of(got, expected) <= TOLERANCE
    assert engine.kernel_backend == "triton"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("check", [check_padding, check_fork, check_rollback])
@pytest.mark.parametrize(
    "arch",
    [
        "swa:gqa=1:1",
        "gdn:gqa=1:1",
        "mla",
        "gta",
        "grouped_latent",
        "nsa",
        "mamba1",
        "mamba2",
        "mamba3",
        *DELTA_OPTIONS,
    ],
)
def test_the_conformance_kit_holds(arch: str, check: Callable[[Subject], object]) -> None:
    verdict = check(subject_of(arch))
    assert verdict.passed, verdict.detail  # type: ignore[attr-defined]


@pytest.mark.parametrize("arch", ["mqa", "swa"])
def test_ragged_padded_batches(arch: str) -> None:
    verdict = check_padding(subject_of(arch))
    assert verdict.passed, verdict.detail


def test_rejected_tokens_leave_no_trace_in_slots() -> None:
    subject = subject_of("linear")
    tokens = subject.tokens(2, 11)
    engine = subject.engine(2, 32, lookback=3)
    slots = [engine.store.add(), engine.store.add()]
    engine.extend(slots, tokens[:, :4])
    engine.extend(slots, tokens.flip(1)[:, :3])
    for slot, back in zip(slots, (3, 3), strict=True):
        engine.store.rollback(slot, back)
    got = subject.run(engine, slots, tokens[:, 4:], [1, 2, 4])
    assert error_of(got, subject.expected(tokens)[:, 4:]) <= TOLERANCE


@pytest.mark.parametrize("arch", [*quick("mqa", "linear"), *DELTA_OPTIONS])
def test_training_form_and_its_gradients(arch: str) -> None:
    subject = subject_of(arch)
    tokens = subject.tokens(1, 19)
    found = {}
    for backend in ("torch", "triton"):
        model = subject.spec.build().use(backend)
        shared = asking_losses()
        logits = model.logits(model.hidden_states(tokens, shared=shared))
        torch.stack([logits.float().square().mean(), *losses_left(shared)]).sum().backward()
        found[backend] = {name: p.grad for name, p in model.named_parameters()}
    for name, expected in found["torch"].items():
        got = found["triton"][name]
        assert expected is not None and got is not None, name
        assert error_of(got, expected) <= 1e-3, name


def graphed(subject: Subject, sequences: int, context: int, **options: int) -> Engine:
    engine = subject.engine(sequences, context, **options)
    engine.graphed = GraphedStep(engine.model, engine.store, recorder=Again)
    return engine


@pytest.mark.parametrize("arch", quick("swa"))
def test_replayed_steps_serve_ragged_lengths_and_changing_batches(arch: str) -> None:
    subject = subject_of(arch)
    tokens = subject.tokens(3, 60)
    expected = subject.expected(tokens)
    engine = graphed(subject, 3, 64)
    slots = [engine.store.add() for _ in range(3)]
    at = [14, 3, 30]
    for b, slot in enumerate(slots):
        engine.extend([slot], tokens[b : b + 1, : at[b]])
    for order in ([0, 1, 2], [2, 0, 1], [0, 1, 2], [0, 2, 1], [1, 2], [2, 1], [1, 2], [1, 2]):
        fed = torch.stack([tokens[b, at[b]] for b in order])[:, None]
        logits = engine.extend_last([slots[b] for b in order], fed)
        for row, b in zip(logits, order, strict=True):
            assert error_of(row, expected[b, at[b]]) <= TOLERANCE
            at[b] += 1


@pytest.mark.parametrize(
    "arch",
    ["gdn", "swa", *(pytest.param(a, marks=pytest.mark.slow) for a in ("mla", "mamba2", "linear"))],
)
def test_speculation_on_kernels_and_replayed_steps(arch: str) -> None:
    """Float32, so a tie may part the two; these seeds have none."""
    subject, prompts = subject_of(arch, layers=1), [[5, 6, 7, 5, 6], [8, 9]]
    plain = subject.engine(2, 32).generate(prompts, 10).tokens
    target, draft = (graphed(subject, 2, 32, lookback=3) for _ in range(2))
    found = speculate.generate(target, PromptLookup(device=target.device), prompts, 10, drafts=3)
    assert found.tokens == plain
    found = speculate.generate(target, ModelDrafter(draft), prompts, 10, drafts=3)
    assert found.tokens == plain
    assert found.tokens_per_verification > 2


@pytest.mark.parametrize(
    "arch",
    ["gdn", *(pytest.param(a, marks=pytest.mark.slow) for a in ("mamba2", "linear", "rwkv7"))],
)
def test_speculation_by_replay_on_kernels_and_replayed_steps(arch: str) -> None:
    """As above; the prompt leaves room in the ring, so steps with inputs held are captured, too."""
    subject, prompts = subject_of(arch, layers=1), [[5, 6, 7, 5, 6], [8, 9]]
    plain = subject.engine(2, 40).generate(prompts, 16).tokens
    target, draft = (graphed(subject, 2, 40, lookback=3, replay=10) for _ in range(2))
    for _ in range(2):
        found = speculate.generate(target, ModelDrafter(draft), prompts, 16, drafts=3)
        assert found.tokens == plain
    assert found.tokens_per_verification > 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gqa", "gdn"])
def test_a_head_drafts_on_kernels_and_replayed_steps(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very drafts of torch, so the hidden states that graphs hand out are the right ones."""
    prompts, drafts = [[5, 6, 7, 5, 6], [8, 9]], 3
    found, drafted = [], []
    for backend in ("torch", "triton"):
        subject = subject_of(arch, backend, layers=1)
        own = subject.spec.head().to_empty(device="cpu")
        initialise(own, 3, 1)
        head = HeadModel(subject.model, own)
        target, draft = (
            Engine(
                model, max_sequences=2, max_context=32, page_size=16, lookback=drafts,
                backend=backend,
            )
            for model in (subject.model, head)
        )  # fmt: skip
        if backend == "triton":
            for engine in (target, draft):
                engine.graphed = GraphedStep(engine.model, engine.store, recorder=Again)
        drafter = HeadDrafter(draft)
        drafted.append(tokens := list[list[int]]())

        def propose(
            *given: Any, _whole: Any = drafter.propose, _tokens: list[list[int]] = tokens
        ) -> Any:
            made = _whole(*given)
            _tokens.extend(made.tokens.tolist())
            return made

        monkeypatch.setattr(drafter, "propose", propose)
        found.append(speculate.generate(target, drafter, prompts, 12, drafts=drafts))
    assert draft.graphed is not None and {key.new_tokens for key in draft.graphed._graphs} == {1, 4}
    assert found[0].tokens == found[1].tokens and drafted[0] == drafted[1]
    assert len({token for tokens in drafted[0] for token in tokens}) > 5


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9)], ids=str)
def test_generation_is_the_same_watched_and_unwatched(sampling: Sampling) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    subject = subject_of("mqa")
    seen: list[int] = []
    watched = subject.engine(2, 32).generate(prompts, 5, sampling, on_token=seen.append)
    unwatched = graphed(subject, 2, 32).generate(prompts, 5, sampling)
    assert watched.tokens == unwatched.tokens and len(seen) == 10
    assert len(unwatched.step_ms) == 4
    if sampling.temperature == 0:
        plain = subject_of("mqa", "torch").engine(2, 32).generate(prompts, 5)
        assert plain.tokens == unwatched.tokens


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_long_step_keeps_no_states_between_its_tokens(backend: str) -> None:
    subject = Subject("linear", SCALE, backend=backend)
    engine = subject.engine(1, 32, lookback=12)
    slot = engine.store.add()
    engine.extend([slot], subject.tokens(1, 10))
    with pytest.raises(UserError, match="rollback of 5 tokens"):
        engine.store.rollback(slot, 5)


def test_padding_may_reach_past_the_last_page() -> None:
    subject = subject_of("mqa")
    tokens = subject.tokens(2, 22)
    engine = subject.engine(2, 16)
    slots = [engine.store.add(), engine.store.add()]
    engine.extend(slots, tokens[:, :14])
    got = engine.extend(slots, tokens[:, 14:20], torch.tensor([2, 1]))
    expected = subject.expected(tokens[:, :16])
    assert error_of(got[0, :2], expected[0, 14:]) <= TOLERANCE
    assert error_of(got[1, :1], expected[1, 14:15]) <= TOLERANCE


def test_an_engine_whose_model_went_elsewhere_says_so() -> None:
    subject = subject_of("mqa")
    engine = subject.engine(1, 32)
    slot = engine.store.add()
    subject.model.use("torch")
    with pytest.raises(UserError, match="was put on backend torch after"):
        engine.extend([slot], torch.zeros(1, 1, dtype=torch.int64))


def test_options_that_exclude_each_other_are_refused() -> None:
    model = Subject("gqa").model
    with pytest.raises(UserError, match="compiled=True"):
        Engine(model, backend="triton", compiled=True)
    with pytest.raises(UserError, match="graphs=True"):
        Engine(model, graphs=True)
    with pytest.raises(UserError, match="page_size=24 must be a multiple of 16"):
        Engine(model, backend="triton", page_size=24)
    with pytest.raises(UserError, match=r"Unknown backend 'tritn'.*'triton'"):
        Engine(model, backend="tritn")


def test_a_library_that_lacks_an_operation_says_so() -> None:
    engine = Engine(Subject("gdn").model, max_context=32, backend="flash-attn")
    slot = engine.store.add()
    with pytest.raises(UserError, match=r"gated delta rule has no form for backend 'flash-attn'"):
        engine.extend([slot], torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_attention_over_rows_of_several_tokens_sees_those_that_are_complete(tokens: int) -> None:
    """Kernels know one row a token: these go to torch's attention, or nobody would be told."""
    pooled = RowSpec(name="kv", shape=(2, 1, 16), format=Format.of(torch.float32), every=3)
    store = StateStore(
        [StateSpec(rows=(pooled,))], max_sequences=2, max_context=64, page_size=16, kernels=True
    )
    pair = [store.add(), store.add()]
    rows = torch.randn(2, 8, 2, 1, 16)
    with store.step(pair, 20, torch.tensor([20, 16])) as step:
        step.layers[0].append("kv", rows[:, :7])
    with store.step(pair, tokens) as step:
        more = -(-tokens // 3)
        fresh = torch.randn(2, more, 2, 1, 16)
        seen = step.layers[0].append("kv", fresh)
        q = torch.randn(2, tokens, 2, 16)
        got = attend(q, seen, backend="triton")
    for b, past in enumerate((20, 16)):
        k, v = torch.cat((rows[b, : past // 3], fresh[b])).unbind(1)
        for t in range(tokens):
            kept = (past + t + 1) // 3
            weights = (q[b, t] @ k[:kept, 0].T / 4).softmax(-1)
            torch.testing.assert_close(got[b, t], weights @ v[:kept, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lookback", [0, 4])
def test_a_library_that_updates_in_place_gets_no_other_slots(lookback: int) -> None:
    """Without this, a state that is read from one slot would be taken from another."""
    spec = Subject("mamba1").model.state_specs()
    store = StateStore(
        spec, max_sequences=1, max_context=64, page_size=16, lookback=lookback, kernels=True
    )
    x = torch.zeros(1, 1, 4)
    with store.step([store.add()], 1) as step:
        if lookback:
            with pytest.raises(UserError, match="mamba-ssm serves neither ragged steps nor states"):
                libraries.single(x, step.layers[0], "ssm", "mamba-ssm")
        else:
            at = libraries.single(x, step.layers[0], "ssm", "mamba-ssm")
            assert at is not None and torch.equal(at.read, at.last)
