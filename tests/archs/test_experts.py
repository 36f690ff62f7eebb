"""A mixture of experts: its definition, what it costs, and where it is refused."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from archs.backbone import Model
from archs.backends import NoFormError
from archs.cost import Step
from archs.errors import UserError
from archs.experts import Mixture
from archs.layers import RMSNorm, SwiGLU
from archs.registry import ModelSpec
from archs.sizes import Experts, get_scale
from archs.storage import store
from archs.weights import WeightFormat
from infer.engine import Engine
from train.loop import require_trainable

EXPERTS = Experts(count=6, active=2)


def mixture(experts: Experts = EXPERTS, d_model: int = 16, hidden: int = 24) -> Mixture:
    torch.manual_seed(0)
    return Mixture(d_model, hidden, experts).double()


def mix(module: Mixture, x: Tensor) -> Tensor:
    """The mixture's output for x as it is."""
    norm = RMSNorm(x.shape[-1]).double()
    return module.after(norm.before(x, None))


def oracle(module: Mixture, x: Tensor) -> Tensor:
    """Every token alone, through all experts, of which the best are weighted."""
    out = torch.zeros_like(x)
    for at, token in enumerate(x):
        logits = module.router.weight @ token
        best = sorted(range(len(logits)), key=lambda e: -float(logits[e]))[: module.experts.active]
        total = sum(float(logits[e].exp()) for e in best)
        for e in best:
            mlp = module.mlps[e]
            assert isinstance(mlp, SwiGLU)
            gate, up = (mlp.gate_up.weight @ token).chunk(2)
            made = mlp.down.weight @ (gate * gate.sigmoid() * up)
            out[at] += float(logits[e].exp()) / total * made
    return out


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 16), (2, 33, 16)], ids=str)
def test_tokens_go_to_their_experts(shape: tuple[int, ...]) -> None:
    module, x = mixture(), torch.randn(*shape, dtype=torch.float64)
    with torch.no_grad():
        normed = RMSNorm(16).double()(x)
        wanted = oracle(module, normed.flatten(0, 1)).view(shape)
        torch.testing.assert_close(mix(module, x), wanted, rtol=1e-10, atol=1e-10)


def test_all_experts_at_once_are_one_wide_mlp_with_shares() -> None:
    module = mixture(Experts(count=1, active=1))
    alone = module.mlps[0]
    assert isinstance(alone, SwiGLU) and alone.hidden == module.hidden
    x = torch.randn(4, 16, dtype=torch.float64)[None]
    with torch.no_grad():
        dense = alone.after(RMSNorm(16).double().before(x, None))
        torch.testing.assert_close(mix(module, x), dense)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_what_is_read_is_the_mean_over_even_picks(tokens: int) -> None:
    draw = torch.Generator().manual_seed(tokens)
    picks = torch.rand(4000, tokens, 16, generator=draw).topk(3, -1).indices
    touched = torch.zeros(4000, 16).scatter_(1, picks.flatten(1), 1.0).sum(1)
    spread = 4 * float(touched.std()) / 4000**0.5 + 1e-3
    assert abs(float(touched.mean()) - Experts(count=16, active=3).read(tokens)) <= spread


def outline(name: str) -> Model:
    return ModelSpec(arch="gqa", scale=get_scale(name)).outline()


@pytest.mark.parametrize(("batch", "new"), [(1, 1), (3, 1), (2, 9)])
def test_flops_are_counted_and_are_those_of_the_dense_mlp(batch: int, new: int) -> None:
    module, x = mixture().float(), torch.randn(batch, new, 16)
    cost = module.cost(Step(batch, new, 0))
    norm = RMSNorm(16)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        module.after(norm.before(x, None))
    assert counted.get_total_flops() == cost.matrix_flops
    dense = SwiGLU(16, 24).cost(Step(batch, new, 0))
    router = 2 * batch * new * 16 * EXPERTS.count
    assert cost.matrix_flops == dense.matrix_flops + router


def test_bytes_grow_with_the_batch_to_all_experts() -> None:
    one, dense = outline("70m+32x4"), outline("70m")
    routers = sum(b.mlp.router.weight_bytes for b in one.layers if isinstance(b.mlp, Mixture))

    def read(model: Model, batch: int) -> int:
        return model.cost(Step(batch, 1, 0)).weight_bytes

    # One token reads what the dense model reads: experts are whole fractions of its MLP.
    assert abs(read(one, 1) - routers - read(dense, 1)) <= 0.01 * read(dense, 1)
    held = sum(p.nbytes for p in one.parameters())
    assert read(one, 8) < 0.7 * held < read(one, 64)
    embedding = 63 * one.embedding.weight.nbytes // one.vocab_size
    assert read(one, 1000) <= held + 1000 * embedding
    assert read(one, 64) > 0.99 * held - embedding


def test_decode_equals_the_parallel_form_in_few_bits_too() -> None:
    torch.manual_seed(1)
    spec = ModelSpec(arch="gdn:gqa=3:1", scale=get_scale("nano+8x2"))
    tokens = torch.randint(0, 4096, (2, 20))
    for stored in (None, "int8"):
        model = spec.build().eval()
        if stored:
            store(model, WeightFormat.named(stored))
        with torch.no_grad():
            whole = model(tokens)
            engine = Engine(model, max_sequences=2, max_context=32)
            slots = [engine.store.add() for _ in range(2)]
            engine.extend(slots, tokens[:, :13])
            last = [engine.extend_last(slots, tokens[:, t : t + 1]) for t in range(13, 20)]
        # In few bits the rest is bfloat16, whose rounding may send a token to another expert.
        apart = (last[-1].float() - whole[:, -1].float()).abs()
        assert float(apart.mean()) < (2e-6 if stored is None else 0.03)


def test_a_backend_without_a_form_is_refused() -> None:
    module = mixture()
    module.backend = "triton"
    with pytest.raises(NoFormError, match="mixture of experts has no form for backend 'triton'"):
        module._mixed(torch.randn(1, 16, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("8b+", "'' names no experts; write how many"),
        ("8b+64", "'64' names no experts"),
        ("8b+64x", "'64x' names no experts"),
        ("8b+4x8", "each token takes 8 of 4 experts"),
        ("8b+4x0", "each token takes 0 of 4 experts"),
        ("9b+4x2", "Unknown scale '9b'"),
    ],
)
def test_experts_that_cannot_be_are_refused(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_scale(name)


def test_experts_are_not_trained() -> None:
    require_trainable(get_scale("tiny"))
    with pytest.raises(UserError, match="router is not trained here; train 'tiny', and name"):
        require_trainable(get_scale("tiny+8x2"))
