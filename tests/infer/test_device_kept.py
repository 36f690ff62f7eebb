"""States in few bits on our kernels, in Triton's interpreter, against torch's forms of the same."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from archs.backbone import Model
from archs.backends import NoFormError
from archs.registry import ModelSpec
from archs.state_formats import StateFormat
from archs.storage import keep
from eval.proof.conformance import CHECK_SCALE, error_of
from infer.engine import Engine
from infer.graphs import GraphedStep
from tests.infer.recorded import Again
from tests.kernels.interpreter import interpreted

SCALE = replace(CHECK_SCALE, head_dim=64, n_layers=2)
#: A number that falls to the other side of a half gets another code.
ROWS, VALUES = 2e-3, 5e-3
MEMORIES = ("gdn", "linear", "mamba1", "mamba2", "kda", "rwkv7")
PIECES = (15, 1, 3, 13, 1, 1)
TOKENS = sum(PIECES)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def kept(arch: str, state: str) -> Model:
    return keep(ModelSpec(arch=arch, scale=SCALE).build(seed=3).eval(), StateFormat.named(state))


def engine_of(model: Model, backend: str, **options: int) -> Engine:
    wanted = {"max_sequences": 3, "max_context": 64, "page_size": 16, **options}
    return Engine(model, backend=backend, **wanted)  # type: ignore[arg-type]


def ids(batch: int, tokens: int = TOKENS) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, SCALE.vocab_size, (batch, tokens), generator=draw)


def read(engine: Engine, tokens: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits of all tokens, and what is held of the first sequence after them."""
    slots = [engine.store.add() for _ in tokens]
    found = torch.cat([engine.extend(slots, part) for part in tokens.split(list(PIECES), 1)], 1)
    assert engine.store.allocated_bytes == len(tokens) * engine.store.declared_bytes(TOKENS)
    return found, engine.store.snapshot(slots[0])


@pytest.mark.parametrize(
    ("arch", "state"),
    [
        *((arch, f"kv:{number}") for arch in ("mqa", "swa", "cla") for number in ("int8", "fp8")),
        *((arch, "memory:bfloat16") for arch in MEMORIES),
        ("gdn:gqa=1:1", "kv:int8,memory:bfloat16"),
        ("gqa(learned_sinks=true)", "kv:int8"),
        ("swa(window=9,sinks=2,learned_sinks=true)", "kv:fp8"),
        ("cla(tied_kv=true,qk_norm=true)", "kv:int8"),
        ("cla(tied_kv=true,learned_sinks=true)", "kv:fp8"),
    ],
)
def test_kernels_read_what_torch_reads(arch: str, state: str) -> None:
    """Long steps and short ones, a window that is full, pages that end in a step."""
    model, tokens = kept(arch, state), ids(2)
    (expected, there), (found, here) = (
        read(engine_of(model, backend), tokens) for backend in ("torch", "triton")
    )
    assert error_of(found, expected) <= (VALUES if "memory" in state else ROWS)
    exact = engine_of(kept(arch, ""), "torch")
    assert error_of(found, read(exact, tokens)[0]) > 1e-5
    for ours, theirs in zip(here, there, strict=True):
        for name, value in ours.items():
            assert value.shape == theirs[name].shape and value.dtype == theirs[name].dtype
            assert error_of(value, theirs[name]) <= 2e-2


@pytest.mark.parametrize("arch", ["mqa", "swa"])
def test_codes_and_scales_are_forked_taken_back_and_seen_in_company(arch: str) -> None:
    model, tokens = kept(arch, "kv:int8"), ids(3)
    expected, _ = read(engine_of(model, "torch"), tokens)
    engine = engine_of(model, "triton", max_sequences=4, lookback=3)
    first, second, third = (engine.store.add() for _ in range(3))
    engine.extend([first, second], tokens[:2, :9])
    child = engine.store.fork(first)
    engine.extend([first, second], tokens[1:, 9:12])
    for sequence in (first, second):
        engine.store.rollback(sequence, 3)
    engine.extend([third], tokens[2:, :20])
    ragged = torch.tensor([4, 2, 4])
    padded = torch.stack([tokens[0, 9:13], tokens[1, 9:13], tokens[2, 20:24]])
    found = engine.extend([child, second, third], padded, ragged)
    for row, b, at, count in ((0, 0, 9, 4), (1, 1, 9, 2), (2, 2, 20, 4)):
        assert error_of(found[row, :count], expected[b, at : at + count]) <= ROWS
    found = engine.extend([first], tokens[:1, 9:10])
    assert error_of(found, expected[:1, 9:10]) <= ROWS


@pytest.mark.parametrize(
    ("arch", "state"),
    [("mqa", "kv:int8"), ("swa", "kv:fp8"), ("gdn", "memory:bfloat16")],
)
def test_replayed_steps_read_them(arch: str, state: str) -> None:
    model, tokens = kept(arch, state), ids(2)
    found = {}
    for backend in ("torch", "triton"):
        engine = engine_of(model, backend)
        if backend == "triton":
            engine.graphed = GraphedStep(engine.model, engine.store, recorder=Again)
        slots = [engine.store.add() for _ in range(2)]
        engine.extend(slots, tokens[:, :15])
        made = []
        for at in range(15, 22):
            order = [0, 1] if at % 2 else [1, 0]
            fed = tokens[order, at : at + 1]
            made.append(engine.extend_last([slots[b] for b in order], fed).clone())
        found[backend] = torch.stack(made)
    assert engine.graphed is not None and len(engine.graphed._graphs) == 1
    bound = VALUES if "memory" in state else ROWS
    assert error_of(found["triton"], found["torch"]) <= bound


def test_a_convolution_before_a_mixer_leaves_its_rows_to_kernels() -> None:
    spec = ModelSpec(arch="mqa", scale=SCALE, short_conv=3)
    model = keep(spec.build(seed=3).eval(), StateFormat.named("kv:int8"))
    found = [read(engine_of(model, backend), ids(1))[0] for backend in ("torch", "triton")]
    assert error_of(found[1], found[0]) <= ROWS


@pytest.mark.parametrize("arch", ["gqa", "swa"])
def test_synthetic_rows_are_numbers_like_others(arch: str) -> None:
    engine = engine_of(kept(arch, "kv:int8"), "triton")
    slot = engine.store.add()
    engine.store.fill([slot], 40)
    held = torch.cat([v.flatten() for layer in engine.store.snapshot(slot) for v in layer.values()])
    assert torch.equal(held, torch.full_like(held, 0.01))


def test_what_no_kernel_reads_is_refused_in_one_line() -> None:
    for arch, state, said in (
        ("gdn", "memory:int8", "'memory' of GatedDeltaNet in int8"),
        ("gdn", "memory:float16", "in float16"),
        ("gdn", "memory:bfloat16-sr", "in bfloat16, stochastic rounding"),
        ("gqa", "kv:int4", "'kv' of Attention in int4"),
        ("gqa", "kv:int8-g32", "'kv' of Attention in int8 in groups of 32"),
        ("gqa", "kv:bfloat16", "in bfloat16"),
        ("mla", "kv:int8", "'latent' of LatentAttention in int8"),
    ):
        with pytest.raises(NoFormError, match=f"no kernel of backend triton reads .*{said}"):
            engine_of(kept(arch, state), "triton")
    with pytest.raises(NoFormError, match="no kernel of backend flash-attn reads 'kv'"):
        Engine(kept("gqa", "kv:int8"), backend="flash-attn", page_size=256, max_context=256)
